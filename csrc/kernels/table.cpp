#include "kernels/table.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/isa.h"

namespace k2 {
namespace {

// CPUID says what the core has; XCR0 says which registers the operating system saves.
bool HasAvx512() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

bool HasAvx512Bf16() {
#if defined(__x86_64__)
  return HasAvx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Tiles belong to a process once it asked the system for them.
bool HasAmxBf16() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;  // in XCR0
  constexpr long kRequestPermission = 0x1023, kTileDataFeature = 18;
  unsigned a, b, c, d;
  if (!HasAvx512Bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low & kTileConfig) == 0 || (low & kTileData) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileDataFeature) == 0;
#else
  return false;
#endif
}

bool HasAvx2() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
#else
  return false;
#endif
}

}  // namespace

const std::vector<const KernelTable*>& AvailableKernels() {
  static const std::vector<const KernelTable*> tables = [] {
    std::vector<const KernelTable*> found;
#if defined(__x86_64__)
    if (HasAmxBf16()) found.push_back(&AmxBf16Kernels());
    if (HasAvx512Bf16()) found.push_back(&kAvx512Bf16Kernels);
    if (HasAvx512()) found.push_back(&kAvx512Kernels);
    if (HasAvx2()) found.push_back(&kAvx2Kernels);
#endif
    found.push_back(&kScalarKernels);
    return found;
  }();
  return tables;
}

const KernelTable& PickKernels(const std::string& name) {
  const auto& tables = AvailableKernels();
  if (name.empty()) return *tables.front();
  std::string known;
  for (const KernelTable* table : tables) {
    if (name == table->name) return *table;
    known += std::string(known.empty() ? "" : ", ") + table->name;
  }
  throw Error("instruction set '" + name + "' is unknown or more than this CPU offers; it offers: " + known);
}

}  // namespace k2
