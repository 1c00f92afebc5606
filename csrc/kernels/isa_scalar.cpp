// The kernels in plain C++: every CPU, and the slow witness of the others. Same lanes, same order.
#include <cstring>

#include "kernels/isa.h"

namespace k2 {
namespace scalar {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
  struct F32 {
    float lane[kLanes];
  };
  struct Bf16 {
    bf16 lane[2 * kLanes];
  };
  struct Weights {
    Bf16 part[4];
  };

  static F32 Zero() { return F32{}; }
  static F32 Splat(float v) {
    F32 out;
    for (float& lane : out.lane) lane = v;
    return out;
  }
  static Bf16 Load(const bf16* p) {
    Bf16 out;
    std::memcpy(out.lane, p, sizeof(out.lane));
    return out;
  }
  static Bf16 LoadTail(const bf16* p, int n) {
    Bf16 out{};
    std::memcpy(out.lane, p, static_cast<size_t>(n) * sizeof(bf16));
    return out;
  }
  static F32 Widen(const bf16* p) {
    F32 out;
    for (int j = 0; j < kLanes; ++j) out.lane[j] = ToFloat(p[j]);
    return out;
  }
  static void Store(float* p, const F32& v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
  static Weights Unpack(const uint8_t* p) { return UnpackTail(p, kBlock / 2); }
  static Weights UnpackTail(const uint8_t* p, int bytes) {
    uint8_t block[kBlock / 2] = {};
    std::memcpy(block, p, static_cast<size_t>(bytes));
    Weights out;
    for (int w = 0; w < 2 * kLanes; ++w)
      for (int k = 0; k < 4; ++k) {
        const int nibble = (block[2 * w + k / 2] >> (4 * (k % 2))) & 15;
        out.part[k].lane[w] = ToBf16(static_cast<float>(nibble - 8));
      }
    return out;
  }
  static F32 Scales(const bf16* p) { return ScalesTail(p, 4); }
  static F32 ScalesTail(const bf16* p, int groups) {
    F32 out;
    for (int j = 0; j < kLanes; ++j) out.lane[j] = j / 4 < groups ? ToFloat(p[j / 4]) : 0.0f;
    return out;
  }
  static F32 Dot(F32 sum, const Bf16& a, const Bf16& b) {
    for (int j = 0; j < kLanes; ++j) {
      sum.lane[j] += ToFloat(a.lane[2 * j]) * ToFloat(b.lane[2 * j]);
      sum.lane[j] += ToFloat(a.lane[2 * j + 1]) * ToFloat(b.lane[2 * j + 1]);
    }
    return sum;
  }
  static F32 Fma(const F32& a, const F32& b, F32 sum) {
    for (int j = 0; j < kLanes; ++j) sum.lane[j] = __builtin_fmaf(a.lane[j], b.lane[j], sum.lane[j]);
    return sum;
  }
  static F32 Add(F32 a, const F32& b) {
    for (int j = 0; j < kLanes; ++j) a.lane[j] += b.lane[j];
    return a;
  }
  static float Sum(F32 v) {
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) v.lane[j] += v.lane[j + half];
    return v.lane[0];
  }
  static void Prefetch(const void*) {}
};

uint64_t ReadBytes(const void* data, size_t bytes, int) {
  const auto* words = static_cast<const uint64_t*>(data);
  uint64_t sum = 0;
  for (size_t i = 0; i < bytes / sizeof(uint64_t); ++i) sum += words[i];
  return sum;
}

#include "kernels/matmul.inl.h"
//
#include "kernels/dense.inl.h"

}  // namespace
}  // namespace scalar

const KernelTable kScalarKernels = {"scalar",          scalar::Prepare,      scalar::Int4Rows,
                                    scalar::DenseRows, scalar::DenseColumns, scalar::ReadBytes};

}  // namespace k2
