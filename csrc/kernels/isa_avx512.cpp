// The kernels for AVX-512 without BF16 (Skylake-X, Cascade Lake, Ice Lake). Products of two bf16 are exact in fp32, so
// every result has the bits of the plain C++ kernels.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels/isa.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
// GCC 12's own intrinsics start from an undefined register on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma,bmi2,prefer-vector-width=512")
#endif

namespace k2 {
namespace avx512 {
namespace {

struct Simd {
  // A row's weights are eight registers: two rows, their sums for four tokens and a chain each fill the 32.
  static constexpr int kInt4Rows = 2, kChains = 1;
  static constexpr int kDenseRows = 4, kDenseTokens = 4;
  using F32 = __m512;
  using Bf16 = __m512i;  // 32 bf16; lane j of a dot product takes elements 2j and 2j + 1
  struct Pair {
    F32 even, odd;
  };
  struct Weights {
    Pair part[4];
  };

  static inline F32 Zero() { return _mm512_setzero_ps(); }
  static inline F32 Splat(float v) { return _mm512_set1_ps(v); }
  static inline Bf16 Load(const bf16* p) { return _mm512_loadu_si512(p); }
  static inline Bf16 LoadTail(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffffu, static_cast<unsigned>(n)), p);
  }
  static inline F32 Widen(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return Even(_mm512_cvtepu16_epi32(half));
  }
  static inline F32 LoadF32(const float* p) { return _mm512_loadu_ps(p); }
  static inline void Store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
  static inline void StoreBf16(bf16* p, F32 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }

  // nibble - 8 as fp32, from a table in one register: the permute reads the low four bits of a lane, whatever lies
  // above them, so no mask is needed: 15 operations a block. The mantissas of the AVX2 kernels would take 17 (mask and
  // exponent in one, a subtraction) on the same two ports, and twelve registers of constants that a tile needs.
  static inline F32 Value(__m512i words) {
    const F32 table = _mm512_setr_ps(-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f, 0.0f, 1.0f, 2.0f,
                                     3.0f, 4.0f, 5.0f, 6.0f, 7.0f);
    return _mm512_permutexvar_ps(words, table);
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
    Weights out;
    out.part[0] = {Value(v), Value(_mm512_srli_epi32(v, 16))};
    out.part[1] = {Value(_mm512_srli_epi32(v, 4)), Value(_mm512_srli_epi32(v, 20))};
    out.part[2] = {Value(_mm512_srli_epi32(v, 8)), Value(_mm512_srli_epi32(v, 24))};
    out.part[3] = {Value(_mm512_srli_epi32(v, 12)), Value(_mm512_srli_epi32(v, 28))};
    return out;
  }
  static inline Weights Unpack(const uint8_t* p) { return Split(_mm512_loadu_si512(p)); }
  static inline Weights UnpackTail(const uint8_t* p, int bytes) {
    return Split(_mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, static_cast<unsigned>(bytes)), p));
  }
  // Four bf16 scales to the upper halves of four lanes each, by a byte shuffle: before Ice Lake the 16-bit permute is
  // two operations.
  static inline F32 Spread(long long four) {
    const __m512i index =
        _mm512_set_epi64(0x0706808007068080, 0x0706808007068080, 0x0504808005048080, 0x0504808005048080,
                         0x0302808003028080, 0x0302808003028080, 0x0100808001008080, 0x0100808001008080);
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64(four), index));
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

  static inline F32 Even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static inline F32 Odd(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static inline F32 Dot(F32 sum, const Pair& w, Bf16 x) {
    return Fma(w.odd, Odd(x), Fma(w.even, Even(x), sum));
  }
  static inline F32 Dot(F32 sum, Bf16 w, Bf16 x) { return Dot(sum, Pair{Even(w), Odd(w)}, x); }
  static inline F32 Fma(F32 a, F32 b, F32 sum) { return _mm512_fmadd_ps(a, b, sum); }
  static inline F32 Add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static inline F32 Mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static inline F32 Div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  static inline F32 Min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  static inline F32 Max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static inline F32 Round(F32 v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline F32 Exp2(F32 n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }

  // Lanes 8, 4, 2 and 1 apart are added, in this order.
  static inline float Sum(F32 v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // The tree of `Sum` for eight at once, pairs of vectors sharing each step.
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
}  // namespace avx512

const KernelTable kAvx512Kernels = {
    "avx512",          avx512::Prepare,   avx512::Int4Rows,     avx512::SwiGlu,
    avx512::AddScaled, avx512::DenseRows, avx512::DenseColumns, nullptr};

}  // namespace k2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
