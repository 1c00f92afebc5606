// A driver that runs stream operations at once on the calling thread, with the layouts of NVIDIA's cuda.h.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>

struct WaitOrWrite {
  uint32_t operation;
  uint64_t address;
  union {
    uint32_t value;
    uint64_t value64;
  };
  unsigned flags;
  uint64_t alias;
};
union BatchParams {
  uint32_t operation;
  WaitOrWrite op;
  uint64_t pad[6];
};
static_assert(sizeof(BatchParams) == 48, "as CUstreamBatchMemOpParams");

static std::map<uintptr_t, uintptr_t> registered;  // pages [begin, end)
static int primary;
static thread_local void* current = nullptr;

extern "C" {
int cuDevicePrimaryCtxRetain(void** context, int device) {
  return *context = &primary, device == 0 ? 0 : 101;
}
int cuCtxSetCurrent(void* context) {
  if (context != nullptr && context != &primary) return 201;
  return current = context, 0;
}
int cuMemHostRegister_v2(void* host, size_t bytes, unsigned flags) {
  if (current == nullptr) return 201;
  if (flags != 1 || bytes == 0) return 1;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(host) / 4096;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(host) + bytes + 4095) / 4096;
  for (const auto& [from, to] : registered)
    if (begin < to && from < end) return 712;
  return registered[begin] = end, 0;
}
int cuMemHostUnregister(void* host) {
  if (current == nullptr) return 201;
  return registered.erase(reinterpret_cast<uintptr_t>(host) / 4096) == 1 ? 0 : 713;
}
int registered_ranges() { return static_cast<int>(registered.size()); }
// As where torch has made a tensor: the thread that begins is in the first device's context.
int cuInit(unsigned flags) { return current = &primary, flags == 0 ? 0 : 1; }
int cuGetErrorName(int code, const char** text) {
  *text = code == 801 ? "CUDA_ERROR_NOT_SUPPORTED" : code == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : nullptr;
  return *text == nullptr ? 1 : 0;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == 801 ? "operation not supported" : "invalid argument";
  return 0;
}
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDriverGetVersion(int* version) { return *version = 12080, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal == 0 ? 0 : 101; }
int cuDeviceGetName(char* name, int length, int) { return snprintf(name, length, "Fake 1"), 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = size_t{24} << 30, 0; }
int cuDeviceGetPCIBusId(char* id, int length, int) { return snprintf(id, length, "0000:0A:00.0"), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int) { return *value = attribute == 75 ? 9 : 0, 0; }
int cuMemHostGetDevicePointer_v2(uint64_t* device, void* host, unsigned flags) {
  return *device = reinterpret_cast<uint64_t>(host), flags == 0 ? 0 : 1;
}
int cuStreamBatchMemOp_v2(void* stream, unsigned count, BatchParams* ops, unsigned flags) {
  if (flags != 0) return 1;
  if (reinterpret_cast<uintptr_t>(stream) == 7) return 801;
  for (unsigned i = 0; i < count; ++i) {
    auto* word = reinterpret_cast<std::atomic<uint32_t>*>(ops[i].op.address);
    if (ops[i].operation == 1 && ops[i].op.flags == 0) {
      while (static_cast<int32_t>(word->load() - ops[i].op.value) < 0) {
      }
    } else if (ops[i].operation == 2) {
      word->store(ops[i].op.value);
    } else {
      return 1;
    }
  }
  return 0;
}
}
