#include "cpu/probe.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstring>
#include <string_view>

#include "cpu/fault.h"

namespace k2 {
namespace {

using Clock = std::chrono::steady_clock;

enum class Width { kPlain, kAvx2, kAvx512 };

Width WidthOf(const KernelTable& kernels) {
  const std::string_view name = kernels.name;
  if (name.starts_with("avx512") || name.starts_with("amx")) return Width::kAvx512;
  return name == "avx2" ? Width::kAvx2 : Width::kPlain;
}

// ---- reading ----

uint64_t Words(const char* p, size_t bytes) {
  uint64_t sum = 0;
  for (size_t i = 0; i + sizeof(uint64_t) <= bytes; i += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, p + i, sizeof(word));
    sum += word;
  }
  return sum;
}

// From each stream this many lines at a time: a few loads are in flight even where there is one stream.
constexpr int Lines(int streams) { return std::max(1, 4 / streams); }

constexpr size_t StreamBytes(size_t bytes, int streams) {
  const size_t turn = 64 * static_cast<size_t>(Lines(streams));
  return bytes / streams / turn * turn;
}

using Reader = uint64_t (*)(const char* p, size_t bytes, int ahead_bytes);

template <int kStreams>
uint64_t ReadPlain(const char* p, size_t bytes, int) {
  const size_t stream = StreamBytes(bytes, kStreams);
  uint64_t sum[kStreams] = {};
  for (size_t i = 0; i < stream; i += sizeof(uint64_t))
    for (int s = 0; s < kStreams; ++s) sum[s] += Words(p + s * stream + i, sizeof(uint64_t));
  uint64_t all = Words(p + kStreams * stream, bytes - kStreams * stream);
  for (const uint64_t one : sum) all += one;
  return all;
}

#if defined(__x86_64__)
template <int kStreams>
__attribute__((target("avx2"))) uint64_t ReadAvx2(const char* p, size_t bytes, int ahead_bytes) {
  constexpr int kLines = Lines(kStreams);
  const size_t stream = StreamBytes(bytes, kStreams);
  __m256i sum[kStreams][kLines] = {};
  for (size_t i = 0; i < stream; i += 64 * kLines)
    for (int s = 0; s < kStreams; ++s)
      for (int line = 0; line < kLines; ++line) {
        const char* at = p + s * stream + i + 64 * line;
        if (ahead_bytes != 0) _mm_prefetch(at + ahead_bytes, _MM_HINT_T0);
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32));
        sum[s][line] = _mm256_add_epi64(sum[s][line], _mm256_add_epi64(low, high));
      }
  __m256i total = _mm256_setzero_si256();
  for (const auto& one : sum)
    for (const __m256i& line : one) total = _mm256_add_epi64(total, line);
  uint64_t lanes[4];
  std::memcpy(lanes, &total, sizeof(total));
  return lanes[0] + lanes[1] + lanes[2] + lanes[3] + Words(p + kStreams * stream, bytes - kStreams * stream);
}

template <int kStreams>
__attribute__((target("avx512f"))) uint64_t ReadAvx512(const char* p, size_t bytes, int ahead_bytes) {
  constexpr int kLines = Lines(kStreams);
  const size_t stream = StreamBytes(bytes, kStreams);
  __m512i sum[kStreams][kLines] = {};
  for (size_t i = 0; i < stream; i += 64 * kLines)
    for (int s = 0; s < kStreams; ++s)
      for (int line = 0; line < kLines; ++line) {
        const char* at = p + s * stream + i + 64 * line;
        if (ahead_bytes != 0) _mm_prefetch(at + ahead_bytes, _MM_HINT_T0);
        sum[s][line] = _mm512_add_epi64(sum[s][line], _mm512_loadu_si512(at));
      }
  __m512i total = _mm512_setzero_si512();
  for (const auto& one : sum)
    for (const __m512i& line : one) total = _mm512_add_epi64(total, line);
  uint64_t all = Words(p + kStreams * stream, bytes - kStreams * stream);
  uint64_t lanes[8];
  std::memcpy(lanes, &total, sizeof(total));
  for (const uint64_t lane : lanes) all += lane;
  return all;
}
#endif

template <int kStreams>
Reader ReaderOf(Width width) {
#if defined(__x86_64__)
  if (width == Width::kAvx512) return ReadAvx512<kStreams>;
  if (width == Width::kAvx2) return ReadAvx2<kStreams>;
#endif
  (void)width;
  return ReadPlain<kStreams>;
}

Reader PickReader(Width width, int streams) {
  switch (streams) {
    case 1:
      return ReaderOf<1>(width);
    case 2:
      return ReaderOf<2>(width);
    case 4:
      return ReaderOf<4>(width);
    case 8:
      return ReaderOf<8>(width);
    default:
      throw Error("a stripe is read in 1, 2, 4 or 8 streams, not " + std::to_string(streams));
  }
}

struct ReadCall {
  Reader read;
  const char* data;
  size_t bytes;
  const ReadVariant& variant;
  std::atomic<uint64_t> sum{0};
};

void RunRead(void* context, int chunk, int) {
  auto& call = *static_cast<ReadCall*>(context);
  const size_t begin = static_cast<size_t>(chunk) * call.variant.stripe_bytes;
  const size_t bytes = std::min(call.variant.stripe_bytes, call.bytes - begin);
  // The sum is used, so that the reads cannot be dropped.
  call.sum.fetch_add(call.read(call.data + begin, bytes, call.variant.ahead_bytes),
                     std::memory_order_relaxed);
}

// ---- computing ----

constexpr auto kPeakTime = std::chrono::milliseconds(20);
constexpr int64_t kBurstTurns = 2048;  // a few microseconds between two looks at the clock

// `turns` times one instruction on each of some registers, independent of each other.
using Burst = void (*)(int64_t turns, const void* a, const void* b);

struct Peak {
  Burst burst = nullptr;
  int operations = 0;  // a turn
};

void BurstPlain(int64_t turns, const void* a, const void* b) {
  typedef float Four __attribute__((vector_size(16)));  // every 64-bit CPU has them
  Four x, y, sum[12] = {};
  std::memcpy(&x, a, sizeof(x));
  std::memcpy(&y, b, sizeof(y));
  // Each product depends on the sum before it, or it would leave the loop.
  for (; turns > 0; --turns)
    for (Four& one : sum) one = one * x + y;
  for (const Four& one : sum) y += one;
  volatile float used = y[0];
  (void)used;
}

#if defined(__x86_64__)
// In assembly with fixed registers: left to the compiler, sums of a plain loop go through the stack.
#define K2_12(x) x(0) x(1) x(2) x(3) x(4) x(5) x(6) x(7) x(8) x(9) x(10) x(11)
#define K2_16(x) K2_12(x) x(12) x(13) x(14) x(15)
#define K2_ZERO_YMM(n) "vxorps %%ymm" #n ", %%ymm" #n ", %%ymm" #n ";"
#define K2_ZERO_ZMM(n) "vpxord %%zmm" #n ", %%zmm" #n ", %%zmm" #n ";"
#define K2_FMA_YMM(n) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n ";"
#define K2_FMA_ZMM(n) "vfmadd231ps %%zmm16, %%zmm17, %%zmm" #n ";"
#define K2_DOT_BF16(n) "vdpbf16ps %%zmm16, %%zmm17, %%zmm" #n ";"
#define K2_DOT_INT8(n) "vpdpbusd %%zmm16, %%zmm17, %%zmm" #n ";"
#define K2_LOAD_YMM "vmovups (%1), %%ymm14; vmovups (%2), %%ymm15;"
#define K2_LOAD_ZMM "vmovups (%1), %%zmm16; vmovups (%2), %%zmm17;"
#define K2_TURNS(instructions) "1:" instructions "dec %0; jnz 1b; vzeroupper;"
#define K2_LOW_REGISTERS                                                                                     \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
      "xmm13", "xmm14", "xmm15"
#define K2_BURST_ZMM(instruction)                                          \
  asm volatile(K2_16(K2_ZERO_ZMM) K2_LOAD_ZMM K2_TURNS(K2_16(instruction)) \
               : "+r"(turns)                                               \
               : "r"(a), "r"(b)                                            \
               : K2_LOW_REGISTERS, "xmm16", "xmm17", "cc", "memory")

__attribute__((target("avx2,fma"))) void BurstAvx2(int64_t turns, const void* a, const void* b) {
  asm volatile(K2_12(K2_ZERO_YMM) K2_LOAD_YMM K2_TURNS(K2_12(K2_FMA_YMM))
               : "+r"(turns)
               : "r"(a), "r"(b)
               : K2_LOW_REGISTERS, "cc", "memory");
}
__attribute__((target("avx512f"))) void BurstFp32(int64_t turns, const void* a, const void* b) {
  K2_BURST_ZMM(K2_FMA_ZMM);
}
__attribute__((target("avx512f"))) void BurstBf16(int64_t turns, const void* a, const void* b) {
  K2_BURST_ZMM(K2_DOT_BF16);
}
__attribute__((target("avx512f"))) void BurstInt8(int64_t turns, const void* a, const void* b) {
  K2_BURST_ZMM(K2_DOT_INT8);
}
#endif

Peak PickPeak(const KernelTable& kernels, const std::string& kind) {
  const Width width = WidthOf(kernels);
  const bool bf16_kind = kind == "bf16", int8_kind = kind == "int8";
  Require(bf16_kind || int8_kind || kind == "fp32", "a peak is of bf16, int8 or fp32, not of " + kind);
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (width == Width::kAvx512) {
    // A lower set was asked for where its name has no bf16.
    if (bf16_kind) return std::strstr(kernels.name, "bf16") ? Peak{BurstBf16, 16 * 16 * 4} : Peak{};
    if (int8_kind) return __builtin_cpu_supports("avx512vnni") ? Peak{BurstInt8, 16 * 16 * 8} : Peak{};
    return {BurstFp32, 16 * 16 * 2};
  }
  if (width == Width::kAvx2 && kind == "fp32") return {BurstAvx2, 12 * 8 * 2};
#endif
  (void)width;
  return kind == "fp32" ? Peak{BurstPlain, 12 * 4 * 2} : Peak{};
}

struct PeakCall {
  Burst burst;
  Clock::time_point end;
  alignas(64) std::array<uint16_t, 32> a;
  alignas(64) std::array<uint16_t, 32> b;
  alignas(64) std::atomic<int64_t> turns{0};
};

void RunPeak(void* context, int, int) {
  auto& call = *static_cast<PeakCall*>(context);
  // Only bursts that ended in time count: a thread that is taken off its core in the last one delays nobody.
  int64_t turns = 0;
  for (;;) {
    call.burst(kBurstTurns, call.a.data(), call.b.data());
    if (Clock::now() > call.end) break;
    turns += kBurstTurns;
  }
  call.turns.fetch_add(turns, std::memory_order_relaxed);
}

}  // namespace

double ProbeReadSeconds(Machine& machine, const void* data, size_t bytes, const ReadVariant& variant) {
  Require(bytes > 0, "there is nothing to read");
  Require(variant.stripe_bytes >= 4096, "a stripe has at least 4096 bytes");
  Require(variant.ahead_bytes >= 0 && variant.ahead_bytes <= 1 << 20, "prefetch lies in 0..1 MB ahead");
  const size_t stripes = (bytes - 1) / variant.stripe_bytes + 1;
  Require(stripes <= INT_MAX, "there are too many stripes; make them longer");
  const Reader read = PickReader(WidthOf(machine.kernels()), variant.streams);
  ReadCall call{read, static_cast<const char*>(data), bytes, variant};
  Job job;
  job.Reset(&call, {{RunRead, static_cast<int>(stripes)}});
  const Clock::time_point start = Clock::now();
  machine.pool().Run(&job);
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  Require(!FileMaps::Failed(data, bytes),
          "the bytes could not be read: their file shrank or its disk failed");
  return seconds;
}

std::optional<double> ProbePeak(Machine& machine, const std::string& kind) {
  const Peak peak = PickPeak(machine.kernels(), kind);
  if (peak.burst == nullptr) return std::nullopt;
  PeakCall call{};
  call.burst = peak.burst;
  // bf16 numbers of magnitude 0.5 to 1 with both signs, and so are pairs of them as fp32: nothing grows out of
  // range, nothing is zero, which would take less power than work does.
  for (unsigned i = 0; i < call.a.size(); ++i) {
    call.a[i] = static_cast<uint16_t>(0x3f00 | (i * 37 & 0x7f) | (i % 3 == 0 ? 0x8000 : 0));
    call.b[i] = static_cast<uint16_t>(0x3f00 | (i * 53 & 0x7f) | (i % 5 == 0 ? 0x8000 : 0));
  }
  while (call.turns.load() == 0) {  // twice at most, unless the machine is hopelessly busy
    Job job;
    job.Reset(&call, {{RunPeak, machine.pool().threads()}});
    call.end = Clock::now() + kPeakTime;
    machine.pool().Run(&job);
  }
  return static_cast<double>(call.turns.load()) * peak.operations /
         std::chrono::duration<double>(kPeakTime).count();
}

}  // namespace k2
