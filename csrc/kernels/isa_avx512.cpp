// The kernels for AVX-512 without BF16 (Skylake-X, Cascade Lake, Ice Lake). Products of two bf16 are exact in fp32, so
// every result has the bits of the plain C++ kernels.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels/isa.h"
#include "kernels/prefetch.h"

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

#include "kernels/avx512.inl.h"

struct Simd : Lanes {
  // A row's weights are eight registers: two rows, their sums for four tokens and a chain each fill the 32.
  static constexpr int kInt4Rows = 2, kInt4OneRows = 1, kChains = 1;
  static constexpr int kDenseRows = 4, kDenseTokens = 4;
  static constexpr int kMixColumns = 4;
  using Bf16 = __m512i;  // 32 bf16; lane j of a dot product takes elements 2j and 2j + 1
  struct Pair {
    F32 even, odd;
  };
  struct Weights {
    Pair part[4];
  };

  static inline Bf16 Load(const bf16* p) { return _mm512_loadu_si512(p); }
  static inline Pair Load(const int8_t* p) {
    const __m512i word = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(word, 16), 16);
    return {_mm512_cvtepi32_ps(even), _mm512_cvtepi32_ps(_mm512_srai_epi32(word, 16))};
  }
  static inline Pair Load(const E4m3* p) {
    const __m512i word = FromE4m3(p);
    return {Even(word), Odd(word)};
  }
  static inline Bf16 LoadTail(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffffu, static_cast<unsigned>(n)), p);
  }
  // nibble - 8 as fp32, from a table in one register: the permute reads the low four bits of a lane, whatever lies
  // above them, so no mask is needed: 15 operations a block. A trick with mantissas would take 17 (mask and
  // exponent in one, a subtraction) on the same two ports, and twelve registers of constants that a tile needs.
  static inline F32 Value(__m512i words) {
    const F32 table = _mm512_setr_ps(-8.0f, -7.0f, -6.0f, -5.0f, -4.0f, -3.0f, -2.0f, -1.0f, 0.0f, 1.0f, 2.0f,
                                     3.0f, 4.0f, 5.0f, 6.0f, 7.0f);
    return _mm512_permutexvar_ps(words, table);
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
}  // namespace avx512

const KernelTable kAvx512Kernels = {
    "avx512",         avx512::Prepare,  avx512::Int4Rows,     avx512::SwiGlu, avx512::AddScaled,
    avx512::RmsNorm,  avx512::Sigmoid,  avx512::Rotate,       avx512::Round,  avx512::DenseRows,
    avx512::Int8Rows, avx512::E4m3Rows, avx512::DenseColumns, avx512::Attend, avx512::DecodeRows};

}  // namespace k2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
