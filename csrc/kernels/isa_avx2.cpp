// The kernels for AVX2 with FMA (Haswell, Zen 1 and later). A register of 16 lanes is a pair of 256-bit ones; products
// of two bf16 are exact in fp32, so every result has the bits of the plain C++ kernels.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels/isa.h"
#include "kernels/prefetch.h"

// What the compiler leaves out of line passes its registers through memory.
#define K2_ALWAYS_INLINE [[gnu::always_inline]] inline

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif

namespace k2 {
namespace avx2 {
namespace {

struct Simd {
  static constexpr int kInt4Rows = 2, kInt4OneRows = 4;
  static constexpr int kDenseRows = 2, kDenseTokens = 4;
  // 64 columns of 4 heads would be 32 registers of the 16 there are.
  static constexpr int kMixColumns = 1;
  struct F32 {
    __m256 lo, hi;
  };
  // 32 bf16; lane j of a dot product takes elements 2j and 2j + 1.
  struct Bf16 {
    __m256i lo, hi;
  };
  // A block of nibbles as it lies in memory.
  struct Weights {
    __m256i half[2];
  };
  // The even and the odd ones of 32 numbers.
  struct Pair {
    F32 even, odd;
  };

  K2_ALWAYS_INLINE static F32 Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  K2_ALWAYS_INLINE static F32 Splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  K2_ALWAYS_INLINE static __m256i LoadHalf(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  K2_ALWAYS_INLINE static Bf16 Load(const bf16* p) { return {LoadHalf(p), LoadHalf(p + 16)}; }
  K2_ALWAYS_INLINE static Bf16 LoadTail(const bf16* p, int n) {
    alignas(32) bf16 block[32] = {};
    std::memcpy(block, p, static_cast<size_t>(n) * sizeof(bf16));
    return Load(block);
  }
  K2_ALWAYS_INLINE static Pair Load(const int8_t* p) {
    const __m256i lo = Words(p), hi = Words(p + 16);
    return {{EvenNumbers(lo), EvenNumbers(hi)}, {OddNumbers(lo), OddNumbers(hi)}};
  }
  K2_ALWAYS_INLINE static __m256i Words(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  K2_ALWAYS_INLINE static __m256 EvenNumbers(__m256i words) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16));
  }
  K2_ALWAYS_INLINE static __m256 OddNumbers(__m256i words) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16));
  }
  // An e4m3's sign and bits under the exponent of an fp16 are 1/256 of it, whatever its exponent: that of fp16 is
  // biased by 15.
  K2_ALWAYS_INLINE static Pair Load(const E4m3* p) {
    const __m256i lo = Halves(p), hi = Halves(p + 16);
    return {
        {_mm256_cvtph_ps(_mm256_castsi256_si128(lo)), _mm256_cvtph_ps(_mm256_castsi256_si128(hi))},
        {_mm256_cvtph_ps(_mm256_extracti128_si256(lo, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(hi, 1))}};
  }
  // fp16 of 16, the even ones first.
  K2_ALWAYS_INLINE static __m256i Halves(const E4m3* p) {
    const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), apart);
    return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                            _mm256_set1_epi16(static_cast<short>(0xBF80)));
  }
  K2_ALWAYS_INLINE static __m256 WidenHalf(const bf16* p) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
  }
  K2_ALWAYS_INLINE static F32 Widen(const bf16* p) { return {WidenHalf(p), WidenHalf(p + 8)}; }
  K2_ALWAYS_INLINE static F32 LoadF32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  K2_ALWAYS_INLINE static __m128i Bf16Half(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(near, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(kept, kept);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  K2_ALWAYS_INLINE static void StoreBf16(bf16* p, const F32& v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), Bf16Half(v.lo));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), Bf16Half(v.hi));
  }
  K2_ALWAYS_INLINE static void Store(float* p, const F32& v) {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
  }

  // A block of activations in the order of layout.h.
  K2_ALWAYS_INLINE static void PrepareBlock(const bf16* x, bf16* prepared) {
    for (int k = 0; k < 4; ++k)
      for (int w = 0; w < kBlock / 4; ++w) prepared[k * (kBlock / 4) + w] = x[4 * w + k];
  }
  K2_ALWAYS_INLINE static Weights Unpack(const uint8_t* p) { return {{LoadHalf(p), LoadHalf(p + 32)}}; }
  K2_ALWAYS_INLINE static Weights UnpackTail(const uint8_t* p, int bytes) {
    alignas(32) uint8_t block[kBlock / 2] = {};
    std::memcpy(block, p, static_cast<size_t>(bytes));
    return Unpack(block);
  }
  K2_ALWAYS_INLINE static __m256 Even(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
  }
  K2_ALWAYS_INLINE static __m256 Odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  // A block of R rows and T tokens: half of the lanes at a time where there are chains enough, so that the sums of a tile
  // are in registers; a number is unpacked once for all tokens.
  static constexpr bool kAddsBlocks = true;
  template <int R, int T>
  K2_ALWAYS_INLINE static void AddBlock(const Weights (&w)[R], const F32 (&scale)[R], const bf16* const* x,
                                        ptrdiff_t at, F32* sum) {
    if constexpr (T == 1 ? R == 1 : R * T <= 4) {
      AddHalves<R, T, 0, 2>(w, scale, x, at, sum);
    } else {
      AddHalves<R, T, 0, 1>(w, scale, x, at, sum);
      AddHalves<R, T, 1, 1>(w, scale, x, at, sum);
    }
  }
  template <int R, int T, int kFirst, int kCount>
  K2_ALWAYS_INLINE static void AddHalves(const Weights (&w)[R], const F32 (&scale)[R], const bf16* const* x,
                                         ptrdiff_t at, F32* sum) {
    __m256i words[kCount][R][4];
    __m256 dot[kCount][R][T];
#pragma GCC unroll 8
    for (int h = 0; h < kCount; ++h)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        Numbers(w[r].half[kFirst + h], words[h][r]);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) dot[h][r][t] = _mm256_setzero_ps();
      }
#pragma GCC unroll 8
    for (int k = 0; k < 4; ++k)
#pragma GCC unroll 8
      for (int odd = 0; odd < 2; ++odd)
#pragma GCC unroll 8
        for (int h = 0; h < kCount; ++h) {
          __m256 value[R];
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) value[r] = odd ? Odd(words[h][r][k]) : Even(words[h][r][k]);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) {
            const __m256i pairs = LoadHalf(x[t] + at + 16 * (kFirst + h) + kBlock / 4 * k);
            const __m256 v = odd ? Odd(pairs) : Even(pairs);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) dot[h][r][t] = _mm256_fmadd_ps(value[r], v, dot[h][r][t]);
          }
        }
#pragma GCC unroll 8
    for (int h = 0; h < kCount; ++h)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          __m256& total = kFirst + h ? sum[r * T + t].hi : sum[r * T + t].lo;
          total = _mm256_fmadd_ps(dot[h][r][t], kFirst + h ? scale[r].hi : scale[r].lo, total);
        }
  }
  // A block of weights, or of prepared activations, as fp32: what kernels/unpacked.inl.h keeps.
  K2_ALWAYS_INLINE static void ToFloats(const Weights& w, float* out) {
#pragma GCC unroll 8
    for (int h = 0; h < 2; ++h) {
      __m256i words[4];
      Numbers(w.half[h], words);
#pragma GCC unroll 8
      for (int k = 0; k < 4; ++k) {
        _mm256_store_ps(out + 32 * k + 8 * h, Even(words[k]));
        _mm256_store_ps(out + 32 * k + 16 + 8 * h, Odd(words[k]));
      }
    }
  }
  K2_ALWAYS_INLINE static void ToFloats(const bf16* x, float* out) {
#pragma GCC unroll 8
    for (int at = 0; at < kBlock; at += 16) {
      const __m256i pairs = LoadHalf(x + at);
      const int to = at / 32 * 32 + at % 32 / 2;
      _mm256_store_ps(out + to, Even(pairs));
      _mm256_store_ps(out + to + 16, Odd(pairs));
    }
  }
  // One block of R rows and T tokens, x[t * kStride], added to sum[r * kSums + t].
  template <int R, int T, int kStride, int kSums>
  K2_ALWAYS_INLINE static void AddFloats(const float* const (&w)[R], const float* x, const F32 (&scale)[R],
                                         F32* sum) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m256 dot[R][T];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) dot[r][t] = _mm256_setzero_ps();
#pragma GCC unroll 8
      for (int at = 8 * h; at < kBlock; at += 16) {
        __m256 value[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) value[r] = _mm256_load_ps(w[r] + at);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          __m256 v = _mm256_load_ps(x + t * kStride + at);
          asm("" : "+x"(v));  // one load for all rows: as an operand of each product it would be R
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) dot[r][t] = _mm256_fmadd_ps(value[r], v, dot[r][t]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          __m256& total = h ? sum[r * kSums + t].hi : sum[r * kSums + t].lo;
          total = _mm256_fmadd_ps(dot[r][t], h ? scale[r].hi : scale[r].lo, total);
        }
    }
  }
  // nibble - 8 in bf16, byte by byte through a table: of 64 nibbles those of position k in numbers[k], as a bf16 pair
  // in each of 8 lanes.
  K2_ALWAYS_INLINE static void Numbers(__m256i nibbles, __m256i (&numbers)[4]) {
    const __m256i apart =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    const __m256i high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-63, -64, -64, -64, -64, -64, -64, -65, 0, 63, 64, 64, 64, 64, 64, 64));
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -32, -64, -96, -128, 64, 0, -128, 0, -128, 0, 64, -128, -96, -64, -32));
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i bytes = _mm256_shuffle_epi8(nibbles, apart);
    const __m256i first = _mm256_and_si256(bytes, mask);
    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
    const __m256i first_low = _mm256_shuffle_epi8(low, first), first_high = _mm256_shuffle_epi8(high, first);
    const __m256i second_low = _mm256_shuffle_epi8(low, second),
                  second_high = _mm256_shuffle_epi8(high, second);
    numbers[0] = _mm256_unpacklo_epi8(first_low, first_high);
    numbers[1] = _mm256_unpacklo_epi8(second_low, second_high);
    numbers[2] = _mm256_unpackhi_epi8(first_low, first_high);
    numbers[3] = _mm256_unpackhi_epi8(second_low, second_high);
  }
  K2_ALWAYS_INLINE static F32 Dot(F32 sum, const Bf16& w, const Bf16& x) {
    sum.lo = _mm256_fmadd_ps(Even(w.lo), Even(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(Even(w.hi), Even(x.hi), sum.hi);
    sum.lo = _mm256_fmadd_ps(Odd(w.lo), Odd(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(Odd(w.hi), Odd(x.hi), sum.hi);
    return sum;
  }
  K2_ALWAYS_INLINE static F32 Dot(F32 sum, const Pair& w, const Bf16& x) {
    sum.lo = _mm256_fmadd_ps(w.even.lo, Even(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(w.even.hi, Even(x.hi), sum.hi);
    sum.lo = _mm256_fmadd_ps(w.odd.lo, Odd(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(w.odd.hi, Odd(x.hi), sum.hi);
    return sum;
  }
  K2_ALWAYS_INLINE static F32 Scales(const bf16* p) { return ScalesTail(p, 4); }
  K2_ALWAYS_INLINE static F32 ScalesTail(const bf16* p, int groups) {
    alignas(8) bf16 four[4] = {};
    std::memcpy(four, p, static_cast<size_t>(groups) * sizeof(bf16));
    const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(four));
    const __m256 values =
        _mm256_castsi256_ps(_mm256_castsi128_si256(_mm_slli_epi32(_mm_cvtepu16_epi32(words), 16)));
    return {_mm256_permutevar8x32_ps(values, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
            _mm256_permutevar8x32_ps(values, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
  }
  K2_ALWAYS_INLINE static F32 Fma(const F32& a, const F32& b, const F32& sum) {
    return {_mm256_fmadd_ps(a.lo, b.lo, sum.lo), _mm256_fmadd_ps(a.hi, b.hi, sum.hi)};
  }
  K2_ALWAYS_INLINE static F32 Add(const F32& a, const F32& b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
  }
  K2_ALWAYS_INLINE static F32 Mul(const F32& a, const F32& b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
  }
  K2_ALWAYS_INLINE static F32 Div(const F32& a, const F32& b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
  }
  K2_ALWAYS_INLINE static F32 Min(const F32& a, const F32& b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
  }
  K2_ALWAYS_INLINE static F32 Max(const F32& a, const F32& b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
  }
  K2_ALWAYS_INLINE static F32 Round(const F32& v) {
    return {_mm256_round_ps(v.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(v.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  K2_ALWAYS_INLINE static __m256 Exp2Half(__m256 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  K2_ALWAYS_INLINE static F32 Exp2(const F32& n) { return {Exp2Half(n.lo), Exp2Half(n.hi)}; }
  template <int N>
  static inline void Sums(const F32* v, float* out) {
    for (int i = 0; i < N; ++i) out[i] = Sum(v[i]);
  }
  K2_ALWAYS_INLINE static float Sum(const F32& v) {
    const __m256 eight = _mm256_add_ps(v.lo, v.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  template <bool kOnce>
  K2_ALWAYS_INLINE static void Prefetch(const void* p) {
    FetchAhead<kOnce>(p);
  }
};

#include "kernels/tiles.inl.h"
//
#include "kernels/matmul.inl.h"
//
#include "kernels/unpacked.inl.h"
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
}  // namespace avx2

const KernelTable kAvx2Kernels = {
    "avx2",         avx2::Prepare,  avx2::FewOrManyRows, avx2::SwiGlu, avx2::AddScaled,
    avx2::RmsNorm,  avx2::Sigmoid,  avx2::Rotate,        avx2::Round,  avx2::DenseRows,
    avx2::Int8Rows, avx2::E4m3Rows, avx2::DenseColumns,  avx2::Attend, avx2::DecodeRows};

}  // namespace k2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
