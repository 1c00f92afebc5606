// The kernels for AVX2 with FMA (Haswell, Zen 1 and later). A register of 16 lanes is a pair of 256-bit ones; products
// of two bf16 are exact in fp32, so every result has the bits of the plain C++ kernels.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels/isa.h"

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
  static constexpr int kInt4Rows = 2, kChains = 1;
  static constexpr int kDenseRows = 2, kDenseTokens = 4;
  struct F32 {
    __m256 lo, hi;
  };
  // 32 bf16; lane j of a dot product takes elements 2j and 2j + 1.
  struct Bf16 {
    __m256i lo, hi;
  };
  // Nibbles of one position within each 16-bit word, where they lie: the even words' in `low`, the odd words' in `high`.
  struct Nibbles {
    __m256i low[2], high[2];
    int position;
  };
  struct Weights {
    Nibbles part[4];
  };
  // The even and the odd ones of 32 numbers.
  struct Pair {
    F32 even, odd;
  };

  static inline F32 Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static inline F32 Splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static inline __m256i LoadHalf(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static inline Bf16 Load(const bf16* p) { return {LoadHalf(p), LoadHalf(p + 16)}; }
  static inline Bf16 LoadTail(const bf16* p, int n) {
    alignas(32) bf16 block[32] = {};
    std::memcpy(block, p, static_cast<size_t>(n) * sizeof(bf16));
    return Load(block);
  }
  static inline Pair Load(const int8_t* p) {
    const __m256i lo = Words(p), hi = Words(p + 16);
    return {{EvenNumbers(lo), EvenNumbers(hi)}, {OddNumbers(lo), OddNumbers(hi)}};
  }
  static inline __m256i Words(const int8_t* p) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline __m256 EvenNumbers(__m256i words) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16));
  }
  static inline __m256 OddNumbers(__m256i words) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16)); }
  // An e4m3's sign and bits under the exponent of an fp16 are 1/256 of it, whatever its exponent: that of fp16 is
  // biased by 15.
  static inline Pair Load(const E4m3* p) {
    const __m256i lo = Halves(p), hi = Halves(p + 16);
    return {
        {_mm256_cvtph_ps(_mm256_castsi256_si128(lo)), _mm256_cvtph_ps(_mm256_castsi256_si128(hi))},
        {_mm256_cvtph_ps(_mm256_extracti128_si256(lo, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(hi, 1))}};
  }
  // fp16 of 16, the even ones first.
  static inline __m256i Halves(const E4m3* p) {
    const __m128i apart = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m128i bytes = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), apart);
    return _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                            _mm256_set1_epi16(static_cast<short>(0xBF80)));
  }
  static inline __m256 WidenHalf(const bf16* p) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
  }
  static inline F32 Widen(const bf16* p) { return {WidenHalf(p), WidenHalf(p + 8)}; }
  static inline F32 LoadF32(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static inline __m128i Bf16Half(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(near, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(kept, kept);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
  }
  static inline void StoreBf16(bf16* p, const F32& v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), Bf16Half(v.lo));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), Bf16Half(v.hi));
  }
  static inline void Store(float* p, const F32& v) {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
  }

  // A block of activations in the order of layout.h.
  static inline void PrepareBlock(const bf16* x, bf16* prepared) {
    for (int k = 0; k < 4; ++k)
      for (int w = 0; w < kBlock / 4; ++w) prepared[k * (kBlock / 4) + w] = x[4 * w + k];
  }
  static inline Weights Split(__m256i lo, __m256i hi) {
    const __m256i high_lo = _mm256_srli_epi32(lo, 16);
    const __m256i high_hi = _mm256_srli_epi32(hi, 16);
    Weights out;
    for (int k = 0; k < 4; ++k) out.part[k] = {{lo, hi}, {high_lo, high_hi}, k};
    return out;
  }
  static inline Weights Unpack(const uint8_t* p) { return Split(LoadHalf(p), LoadHalf(p + 32)); }
  static inline Weights UnpackTail(const uint8_t* p, int bytes) {
    alignas(32) uint8_t block[kBlock / 2] = {};
    std::memcpy(block, p, static_cast<size_t>(bytes));
    return Unpack(block);
  }
  // nibble - 8 as fp32 without a shift: at bits 4k..4k+3 of a mantissa whose bit 4k counts 1, the nibble adds itself to
  // 2^(23-4k); taking that and 8 away is exact.
  static inline __m256 Value(__m256i words, int k) {
    const __m256i mask = _mm256_set1_epi32(15 << (4 * k));
    const __m256i base = _mm256_set1_epi32((150 - 4 * k) << 23);
    const __m256 offset = _mm256_set1_ps(static_cast<float>(1 << (23 - 4 * k)) + 8.0f);
    return _mm256_sub_ps(_mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(words, mask), base)), offset);
  }
  static inline __m256 Even(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static inline __m256 Odd(__m256i pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static inline F32 Dot(F32 sum, const Nibbles& w, const Bf16& x) {
    sum.lo = _mm256_fmadd_ps(Value(w.low[0], w.position), Even(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(Value(w.low[1], w.position), Even(x.hi), sum.hi);
    sum.lo = _mm256_fmadd_ps(Value(w.high[0], w.position), Odd(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(Value(w.high[1], w.position), Odd(x.hi), sum.hi);
    return sum;
  }
  static inline F32 Dot(F32 sum, const Bf16& w, const Bf16& x) {
    sum.lo = _mm256_fmadd_ps(Even(w.lo), Even(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(Even(w.hi), Even(x.hi), sum.hi);
    sum.lo = _mm256_fmadd_ps(Odd(w.lo), Odd(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(Odd(w.hi), Odd(x.hi), sum.hi);
    return sum;
  }
  static inline F32 Dot(F32 sum, const Pair& w, const Bf16& x) {
    sum.lo = _mm256_fmadd_ps(w.even.lo, Even(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(w.even.hi, Even(x.hi), sum.hi);
    sum.lo = _mm256_fmadd_ps(w.odd.lo, Odd(x.lo), sum.lo);
    sum.hi = _mm256_fmadd_ps(w.odd.hi, Odd(x.hi), sum.hi);
    return sum;
  }
  static inline F32 Scales(const bf16* p) { return ScalesTail(p, 4); }
  static inline F32 ScalesTail(const bf16* p, int groups) {
    alignas(8) bf16 four[4] = {};
    std::memcpy(four, p, static_cast<size_t>(groups) * sizeof(bf16));
    const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(four));
    const __m256 values =
        _mm256_castsi256_ps(_mm256_castsi128_si256(_mm_slli_epi32(_mm_cvtepu16_epi32(words), 16)));
    return {_mm256_permutevar8x32_ps(values, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)),
            _mm256_permutevar8x32_ps(values, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3))};
  }
  static inline F32 Fma(const F32& a, const F32& b, const F32& sum) {
    return {_mm256_fmadd_ps(a.lo, b.lo, sum.lo), _mm256_fmadd_ps(a.hi, b.hi, sum.hi)};
  }
  static inline F32 Add(const F32& a, const F32& b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
  }
  static inline F32 Mul(const F32& a, const F32& b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
  }
  static inline F32 Div(const F32& a, const F32& b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
  }
  static inline F32 Min(const F32& a, const F32& b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
  }
  static inline F32 Max(const F32& a, const F32& b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
  }
  static inline F32 Round(const F32& v) {
    return {_mm256_round_ps(v.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(v.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static inline __m256 Exp2Half(__m256 n) {
    const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
  }
  static inline F32 Exp2(const F32& n) { return {Exp2Half(n.lo), Exp2Half(n.hi)}; }
  template <int N>
  static inline void Sums(const F32* v, float* out) {
    for (int i = 0; i < N; ++i) out[i] = Sum(v[i]);
  }
  static inline float Sum(const F32& v) {
    const __m256 eight = _mm256_add_ps(v.lo, v.hi);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
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
//
#include "kernels/rows.inl.h"
//
#include "kernels/attend.inl.h"

}  // namespace
}  // namespace avx2

const KernelTable kAvx2Kernels = {
    "avx2",         avx2::Prepare,  avx2::Int4Rows,     avx2::SwiGlu, avx2::AddScaled,
    avx2::RmsNorm,  avx2::Sigmoid,  avx2::Rotate,       avx2::Round,  avx2::DenseRows,
    avx2::Int8Rows, avx2::E4m3Rows, avx2::DenseColumns, avx2::Attend, avx2::DecodeRows,
    nullptr};

}  // namespace k2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
