// The kernels in plain C++: every CPU, and the slow witness of the others. Same lanes, same order.
#include <cmath>
#include <cstring>

#include "kernels/isa.h"
#include "kernels/prefetch.h"

namespace k2 {
namespace scalar {
namespace {

struct Simd {
  static constexpr int kInt4Rows = 2, kInt4OneRows = 1, kChains = 1;
  static constexpr int kDenseRows = 2, kDenseTokens = 4;
  static constexpr int kMixColumns = 4;
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
  static Bf16 Load(const int8_t* p) {
    Bf16 out;
    for (int i = 0; i < 2 * kLanes; ++i) out.lane[i] = ToBf16(static_cast<float>(p[i]));
    return out;
  }
  static Bf16 Load(const E4m3* p) {
    Bf16 out;
    for (int i = 0; i < 2 * kLanes; ++i) out.lane[i] = FromE4m3(p[i]);
    return out;
  }
  static F32 Widen(const bf16* p) {
    F32 out;
    for (int j = 0; j < kLanes; ++j) out.lane[j] = ToFloat(p[j]);
    return out;
  }
  static F32 LoadF32(const float* p) {
    F32 out;
    std::memcpy(out.lane, p, sizeof(out.lane));
    return out;
  }
  static void StoreBf16(bf16* p, const F32& v) {
    for (int j = 0; j < kLanes; ++j) p[j] = ToBf16(v.lane[j]);
  }
  static void Store(float* p, const F32& v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
  // A block of activations in the order of layout.h.
  static inline void PrepareBlock(const bf16* x, bf16* prepared) {
    for (int k = 0; k < 4; ++k)
      for (int w = 0; w < kBlock / 4; ++w) prepared[k * (kBlock / 4) + w] = x[4 * w + k];
  }
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
  template <typename Function>
  static F32 Each(const F32& a, const F32& b, Function&& function) {
    F32 out;
    for (int j = 0; j < kLanes; ++j) out.lane[j] = function(a.lane[j], b.lane[j]);
    return out;
  }
  static F32 Mul(const F32& a, const F32& b) {
    return Each(a, b, [](float u, float v) { return u * v; });
  }
  static F32 Div(const F32& a, const F32& b) {
    return Each(a, b, [](float u, float v) { return u / v; });
  }
  // The second where they cannot be compared, as the instructions do.
  static F32 Min(const F32& a, const F32& b) {
    return Each(a, b, [](float u, float v) { return u < v ? u : v; });
  }
  static F32 Max(const F32& a, const F32& b) {
    return Each(a, b, [](float u, float v) { return u > v ? u : v; });
  }
  static F32 Round(const F32& v) {
    return Each(v, v, [](float u, float) { return std::nearbyint(u); });
  }
  static F32 Exp2(const F32& n) {
    return Each(n, n, [](float u, float) { return std::ldexp(1.0f, static_cast<int>(u)); });
  }
  template <int N>
  static void Sums(const F32* v, float* out) {
    for (int i = 0; i < N; ++i) out[i] = Sum(v[i]);
  }
  static float Sum(F32 v) {
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) v.lane[j] += v.lane[j + half];
    return v.lane[0];
  }
  template <bool kOnce>
  static void Prefetch(const void*) {}
};

#include "kernels/tiles.inl.h"
//
#include "kernels/matmul.inl.h"
//
#include "kernels/dense.inl.h"
//
#include "kernels/exp.inl.h"
//
#include "kernels/ffn.inl.h"
//
#include "kernels/rows.inl.h"
//
#include "kernels/attend.inl.h"

}  // namespace
}  // namespace scalar

const KernelTable kScalarKernels = {
    "scalar",         scalar::Prepare,  scalar::Int4Rows,     scalar::SwiGlu, scalar::AddScaled,
    scalar::RmsNorm,  scalar::Sigmoid,  scalar::Rotate,       scalar::Round,  scalar::DenseRows,
    scalar::Int8Rows, scalar::E4m3Rows, scalar::DenseColumns, scalar::Attend, scalar::DecodeRows};

}  // namespace k2
