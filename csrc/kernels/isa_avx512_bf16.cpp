// The kernels for AVX-512 with BF16 (Zen 4, Zen 5, Cooper Lake, Sapphire Rapids and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels/isa.h"

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
// GCC 12's own intrinsics start from an undefined register on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,bmi2,prefer-vector-width=512")
#endif

namespace k2 {
namespace avx512_bf16 {
namespace {

struct Simd {
  // Two dot products start a cycle and take six: at least twelve chains. Weights of INT4 rows fill eight registers.
  static constexpr int kInt4Rows = 2, kChains = 4;
  static constexpr int kDenseRows = 2, kDenseTokens = 8;
  using F32 = __m512;
  using Bf16 = __m512bh;
  struct Weights {
    Bf16 part[4];
  };

  static inline F32 Zero() { return _mm512_setzero_ps(); }
  static inline F32 Splat(float v) { return _mm512_set1_ps(v); }
  static inline Bf16 Load(const bf16* p) { return (Bf16)_mm512_loadu_si512(p); }
  static inline Bf16 LoadTail(const bf16* p, int n) {
    return (Bf16)_mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffffu, static_cast<unsigned>(n)), p);
  }
  static inline F32 Widen(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static inline F32 LoadF32(const float* p) { return _mm512_loadu_ps(p); }
  static inline void Store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
  // In integers: the conversion instruction would flush subnormals.
  static inline void StoreBf16(bf16* p, F32 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }

  // bf16 of nibble - 8 for 0..15, twice: the permute reads five index bits, and the fifth (the next nibble's
  // lowest) then does not matter, so no mask is needed.
  static inline __m512i Table() {
    const __m256i once =
        _mm256_setr_epi16(static_cast<short>(0xC100), static_cast<short>(0xC0E0), static_cast<short>(0xC0C0),
                          static_cast<short>(0xC0A0), static_cast<short>(0xC080), static_cast<short>(0xC040),
                          static_cast<short>(0xC000), static_cast<short>(0xBF80), 0x0000, 0x3F80, 0x4000,
                          0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0);
    return _mm512_broadcast_i64x4(once);
  }
  // A block of activations in the order of layout.h: of each register every fourth word.
  static inline void PrepareBlock(const bf16* x, bf16* prepared) {
    __m512i v[4];
    for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_si512(x + 32 * i);
    for (int k = 0; k < 4; ++k) {
      const __m512i low = _mm512_permutex2var_epi16(v[0], Fourths(k), v[1]);
      const __m512i high = _mm512_permutex2var_epi16(v[2], Fourths(k), v[3]);
      _mm512_storeu_si512(prepared + 32 * k, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
    }
  }
  // Words k, k + 4, … of two registers, in the lower half.
  static inline __m512i Fourths(int k) {
    const __m256i first = _mm256_setr_epi16(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    return _mm512_castsi256_si512(_mm256_add_epi16(first, _mm256_set1_epi16(static_cast<short>(k))));
  }
  static inline Weights Split(__m512i v) {
    const __m512i table = Table();
    Weights out;
    out.part[0] = (Bf16)_mm512_permutexvar_epi16(v, table);
    out.part[1] = (Bf16)_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), table);
    out.part[2] = (Bf16)_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), table);
    out.part[3] = (Bf16)_mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), table);
    return out;
  }
  static inline Weights Unpack(const uint8_t* p) { return Split(_mm512_loadu_si512(p)); }
  static inline Weights UnpackTail(const uint8_t* p, int bytes) {
    return Split(_mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, static_cast<unsigned>(bytes)), p));
  }
  // Four bf16 scales to the upper halves of four lanes each.
  static inline F32 Spread(long long four) {
    const __m512i index = _mm512_set_epi32(0x30000, 0x30000, 0x30000, 0x30000, 0x20000, 0x20000, 0x20000,
                                           0x20000, 0x10000, 0x10000, 0x10000, 0x10000, 0, 0, 0, 0);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, index, _mm512_set1_epi64(four)));
  }
  static inline F32 Scales(const bf16* p) {
    long long four;
    std::memcpy(&four, p, sizeof(four));
    return Spread(four);
  }
  static inline F32 ScalesTail(const bf16* p, int groups) {
    long long four = 0;
    std::memcpy(&four, p, static_cast<size_t>(groups) * sizeof(bf16));
    return Spread(four);
  }
  static inline F32 Dot(F32 sum, Bf16 a, Bf16 b) { return _mm512_dpbf16_ps(sum, a, b); }
  static inline F32 Fma(F32 a, F32 b, F32 sum) { return _mm512_fmadd_ps(a, b, sum); }
  static inline F32 Add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static inline F32 Mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static inline F32 Div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  static inline F32 Min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  static inline F32 Max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static inline F32 Round(F32 v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT); }
  static inline F32 Exp2(F32 n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }
  static inline float Sum(F32 v) { return _mm512_reduce_add_ps(v); }
  // The tree of `Sum` for eight at once: lanes 8, 4, 2 and 1 apart are added, pairs of vectors sharing each step.
  static inline void SumEight(const F32* v, float* out) {
    F32 four[4], two[2];
    for (int i = 0; i < 4; ++i)
      four[i] = Add(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                    _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xEE));
    for (int i = 0; i < 2; ++i)
      two[i] = Add(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                   _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xDD));
    const F32 one = Add(_mm512_shuffle_ps(two[0], two[1], 0x44), _mm512_shuffle_ps(two[0], two[1], 0xEE));
    const F32 all = Add(_mm512_shuffle_ps(one, one, 0x88), _mm512_shuffle_ps(one, one, 0xDD));
    // Lane 4i holds the sum of v[i], lane 4i + 1 that of v[i + 4].
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all)));
  }
  template <int N>
  static inline void Sums(const F32* v, float* out) {
    int i = 0;
    for (; i + 8 <= N; i += 8) SumEight(v + i, out + i);
    for (; i < N; ++i) out[i] = Sum(v[i]);
  }
  // What is read once need not displace what is not.
  template <bool kOnce>
  static inline void Prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), kOnce ? _MM_HINT_NTA : _MM_HINT_T0);
  }
};

#include "kernels/tiles.inl.h"
//
#include "kernels/matmul.inl.h"
//
#include "kernels/dense.inl.h"
//
#include "kernels/ffn.inl.h"

}  // namespace
}  // namespace avx512_bf16

const KernelTable kAvx512Bf16Kernels = {
    "avx512_bf16",          avx512_bf16::Prepare,   avx512_bf16::Int4Rows,     avx512_bf16::SwiGlu,
    avx512_bf16::AddScaled, avx512_bf16::DenseRows, avx512_bf16::DenseColumns, nullptr};

}  // namespace k2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
