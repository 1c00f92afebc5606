// The kernels for AVX-512 with BF16 (Zen 4, Zen 5, Cooper Lake, Sapphire Rapids and later).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels/isa.h"
#include "kernels/prefetch.h"

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

#include "kernels/avx512.inl.h"

struct Simd : Lanes {
  // Two dot products start a cycle and take six: at least twelve chains. Weights of INT4 rows fill eight registers.
  static constexpr int kInt4Rows = 2, kInt4OneRows = 1, kChains = 4;
  static constexpr int kDenseRows = 2, kDenseTokens = 8;
  static constexpr int kMixColumns = 4;
  using Bf16 = __m512bh;
  struct Weights {
    Bf16 part[4];
  };

  static inline Bf16 Load(const bf16* p) { return (Bf16)_mm512_loadu_si512(p); }
  static inline Bf16 Load(const int8_t* p) { return (Bf16)FromInt8(p); }
  static inline Bf16 Load(const E4m3* p) { return (Bf16)FromE4m3(p); }
  static inline Bf16 LoadTail(const bf16* p, int n) {
    return (Bf16)_mm512_maskz_loadu_epi16(_bzhi_u32(0xffffffffu, static_cast<unsigned>(n)), p);
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
}  // namespace avx512_bf16

const KernelTable kAvx512Bf16Kernels = {"avx512_bf16",
                                        avx512_bf16::Prepare,
                                        avx512_bf16::Int4Rows,
                                        avx512_bf16::SwiGlu,
                                        avx512_bf16::AddScaled,
                                        avx512_bf16::RmsNorm,
                                        avx512_bf16::Sigmoid,
                                        avx512_bf16::Rotate,
                                        avx512_bf16::Round,
                                        avx512_bf16::DenseRows,
                                        avx512_bf16::Int8Rows,
                                        avx512_bf16::E4m3Rows,
                                        avx512_bf16::DenseColumns,
                                        avx512_bf16::Attend,
                                        avx512_bf16::DecodeRows};

}  // namespace k2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
