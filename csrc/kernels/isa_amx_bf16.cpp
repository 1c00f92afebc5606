// What tiles of bf16 add to AVX-512 (Sapphire Rapids and later): attention over latent rows, which is bound by arithmetic
// everywhere else. All other kernels are those of AVX-512: tiles add in another order, and what an expert or a linear gives
// for a row may not depend on how many rows it has.
//
// Order: a score is one chain over steps of 32 values, a column of a head's output one chain over steps of 32 rows in a
// block; blocks are added in their order. Weights are rounded to bf16 when they meet the values, their sum is not.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "kernels/isa.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                            \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma,bmi2"))), \
    apply_to = function)
#else
#pragma GCC push_options
// GCC 12's own intrinsics start from an undefined register on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,amx-tile,amx-bf16,fma,bmi2,prefer-vector-width=512")
#endif

namespace k2 {
namespace amx_bf16 {
namespace {

#include "kernels/avx512.inl.h"

using Simd = Lanes;

#include "kernels/exp.inl.h"

constexpr int kSide = 16;             // rows of a tile, and fp32 or pairs of bf16 in one of its rows
constexpr int kStep = 2 * kSide;      // bf16 in a row of a tile
constexpr int kTile = kSide * kSide;  // fp32, or pairs, of a tile
constexpr int kGroups = 2;            // of kSide heads
constexpr int kMostWidth = 1024;
constexpr int kSteps = kAttendRows / kStep;

// Compilers are not told that instructions of tiles read memory: what was stored before lies there from here on.
inline void Stored(const void* what) { __asm__ volatile("" : : "r"(what) : "memory"); }

// Tiles 0 to 3 add up, 4 and 5 are left operands, 6 and 7 right ones. What was configured before, by a library whose kernel
// runs in the same thread, is so again afterwards.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    Config config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) {
      config.bytes[t] = kStep * sizeof(bf16);
      config.rows[t] = kSide;
    }
    Stored(&config);
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette != 0) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  Config before_;
};

// Rows of 16 words to columns.
inline void Transpose(__m512i v[kSide]) {
  __m512i t[kSide];
  for (int i = 0; i < kSide; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < kSide; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xDD);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

const bf16* RowAt(const AttendBlock& block, int row) {
  return block.pages[row / kAttendPage] +
         static_cast<ptrdiff_t>(row % kAttendPage) * (block.latent + block.rope);
}

int HeadsOf(const AttendBlock& block, int group) {
  const int left = block.heads - group * kSide;
  return left < kSide ? left : kSide;
}

// The queries of a group of heads as right operands: step by step, pairs of values by heads.
void TurnQueries(const AttendBlock& block, int group, uint32_t* turned) {
  const int width = block.latent + block.rope, heads = HeadsOf(block, group);
  for (int at = 0; at < width; at += kStep, turned += kTile) {
    __m512i v[kSide];
    for (int h = 0; h < kSide; ++h)
      v[h] = h < heads ? _mm512_loadu_si512(block.q[group * kSide + h] + at) : _mm512_setzero_si512();
    Transpose(v);
    for (int i = 0; i < kSide; ++i) _mm512_store_si512(turned + kSide * i, v[i]);
  }
}

// The last rows of a block, which fill no step, with zeros behind them.
const bf16* FilledUp(const AttendBlock& block, int row, bf16* copy) {
  const int width = block.latent + block.rope, rows = block.rows - row;
  std::memcpy(copy, RowAt(block, row), static_cast<size_t>(rows) * width * sizeof(bf16));
  std::memset(copy + static_cast<ptrdiff_t>(rows) * width, 0,
              static_cast<size_t>(kStep - rows) * width * sizeof(bf16));
  return copy;
}

// scores[group][row][head], of whole steps of rows.
void Scores(const AttendBlock& block, int groups, const uint32_t* queries, float* scores) {
  const int width = block.latent + block.rope, steps = width / kStep;
  const ptrdiff_t stride = static_cast<ptrdiff_t>(width) * sizeof(bf16);
  const uint32_t* second = queries + static_cast<ptrdiff_t>(steps) * kTile;
  bf16 copy[kStep * kMostWidth];
  for (int at = 0; at < block.rows; at += kStep) {
    const bf16* row = at + kStep <= block.rows ? RowAt(block, at) : FilledUp(block, at, copy);
    const bf16* ahead = at + 2 * kStep <= block.rows ? RowAt(block, at + kStep) : row;
    Stored(row);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < steps; ++step) {
      const bf16* x = row + step * kStep;
      for (int i = 0; i < kStep; ++i)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + static_cast<ptrdiff_t>(i) * width + step * kStep),
                     _MM_HINT_T1);
      _tile_loadd(4, x, stride);
      _tile_loadd(5, x + static_cast<ptrdiff_t>(kSide) * width, stride);
      _tile_loadd(6, queries + step * kTile, kSide * sizeof(uint32_t));
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if (groups == 2) {
        _tile_loadd(7, second + step * kTile, kSide * sizeof(uint32_t));
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* out = scores + at * kSide;
    _tile_stored(0, out, kSide * sizeof(float));
    _tile_stored(1, out + kTile, kSide * sizeof(float));
    if (groups == 2) {
      out += kAttendRows * kSide;
      _tile_stored(2, out, kSide * sizeof(float));
      _tile_stored(3, out + kTile, kSide * sizeof(float));
    }
  }
}

// Scores of a group to weights, as left operands: step by step, heads by pairs of rows. Moves peak and total; what earlier
// sums fade by is in `fade`.
void Weigh(const AttendBlock& block, int group, const float* scores, const AttendSums& sums,
           uint32_t* weights, float* fade) {
  const __mmask16 some = static_cast<__mmask16>((1u << HeadsOf(block, group)) - 1);
  const __m512 scale = _mm512_set1_ps(block.scale);
  float* const peaks = sums.peak + group * kSide;
  float* const totals = sums.total + group * kSide;
  const __m512 former = _mm512_maskz_loadu_ps(some, peaks);
  __m512 peak = former;
  for (int r = 0; r < block.rows; ++r)
    peak = _mm512_max_ps(_mm512_mul_ps(_mm512_load_ps(scores + r * kSide), scale), peak);
  const __m512 top = _mm512_sub_ps(_mm512_setzero_ps(), peak);
  __m512 total = _mm512_setzero_ps(), wrong = _mm512_setzero_ps();
  for (int at = 0; at < block.rows; at += kStep, weights += kTile) {
    __m512i pairs[kSide];
    for (int p = 0; p < kSide; ++p) {
      __m512i half[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
      for (int odd = 0; odd < 2; ++odd) {
        const int r = at + 2 * p + odd;
        if (r >= block.rows) break;
        const __m512 s = _mm512_load_ps(scores + r * kSide);
        const __m512 w = Exp(_mm512_fmadd_ps(s, scale, top));
        wrong = _mm512_fmadd_ps(s, _mm512_setzero_ps(), wrong);  // NaN if a score is none: Exp would hide it
        total = _mm512_add_ps(total, w);
        half[odd] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(w));
      }
      pairs[p] = _mm512_or_si512(half[0], _mm512_slli_epi32(half[1], 16));
    }
    Transpose(pairs);
    for (int h = 0; h < kSide; ++h) _mm512_store_si512(weights + h * kSide, pairs[h]);
  }
  const __m512 before = _mm512_maskz_loadu_ps(some, totals);
  const __mmask16 begun = _mm512_cmp_ps_mask(before, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m512 faded = _mm512_maskz_mov_ps(begun, Exp(_mm512_sub_ps(former, peak)));
  _mm512_store_ps(fade, faded);
  _mm512_mask_storeu_ps(peaks, some, peak);
  const __m512 sum = _mm512_add_ps(_mm512_fmadd_ps(before, faded, total), wrong);
  _mm512_mask_storeu_ps(totals, some, sum);
}

// 32 columns of the rows as right operands: of two rows each the values by pairs, in the order that unpacking within
// quarters of a register gives: of every eight columns the first four in `low`, the others in `high`.
void TurnValues(const AttendBlock& block, int column, uint32_t* low, uint32_t* high) {
  const int pairs = (block.rows + kStep - 1) / kStep * kSide;
  for (int p = 0; p < pairs; ++p) {
    const __m512i zero = _mm512_setzero_si512();
    const int r = 2 * p;
    const __m512i a = r < block.rows ? _mm512_loadu_si512(RowAt(block, r) + column) : zero;
    const __m512i b = r + 1 < block.rows ? _mm512_loadu_si512(RowAt(block, r + 1) + column) : zero;
    _mm512_store_si512(low + p * kSide, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(high + p * kSide, _mm512_unpackhi_epi16(a, b));
  }
}

// out[head][column ..] = what it was, faded, and the weighted values of 32 columns.
void Mix(const AttendBlock& block, int groups, int column, const uint32_t* weights, const float* fade,
         float* out) {
  alignas(64) uint32_t low[kSteps * kTile], high[kSteps * kTile];
  alignas(64) float sum[2 * kGroups][kTile];
  TurnValues(block, column, low, high);
  const int steps = (block.rows + kStep - 1) / kStep;
  Stored(low);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(6, low + step * kTile, kSide * sizeof(uint32_t));
    _tile_loadd(7, high + step * kTile, kSide * sizeof(uint32_t));
    _tile_loadd(4, weights + step * kTile, kSide * sizeof(uint32_t));
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (groups == 2) {
      _tile_loadd(5, weights + (kSteps + step) * kTile, kSide * sizeof(uint32_t));
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sum[0], kSide * sizeof(float));
  _tile_stored(1, sum[1], kSide * sizeof(float));
  if (groups == 2) {
    _tile_stored(2, sum[2], kSide * sizeof(float));
    _tile_stored(3, sum[3], kSide * sizeof(float));
  }
  const __m512i first = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int h = 0; h < block.heads; ++h) {
    const float* pair = sum[h / kSide * 2] + h % kSide * kSide;
    const __m512 a = _mm512_load_ps(pair), b = _mm512_load_ps(pair + kTile), f = _mm512_set1_ps(fade[h]);
    float* to = out + static_cast<ptrdiff_t>(h) * block.latent + column;
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), f, _mm512_permutex2var_ps(a, first, b)));
    to += kSide;
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), f, _mm512_permutex2var_ps(a, second, b)));
  }
}

void Attend(const AttendBlock& block, float* scores, const AttendSums& sums) {
  const int width = block.latent + block.rope;
  // Tiles would have columns left over, or more heads or values than there is room for.
  if (width % kStep != 0 || block.latent % kStep != 0 || width > kMostWidth || block.heads > kGroups * kSide)
    return kAvx512Bf16Kernels.attend(block, scores, sums);
  alignas(64) uint32_t queries[kGroups * (kMostWidth / kStep) * kTile];
  alignas(64) uint32_t weights[kGroups * kSteps * kTile];
  alignas(64) float by_row[kGroups * kAttendRows * kSide];
  alignas(64) float fade[kGroups * kSide];
  const int groups = (block.heads + kSide - 1) / kSide;
  const Tiles tiles;
  for (int g = 0; g < groups; ++g)
    TurnQueries(block, g, queries + static_cast<ptrdiff_t>(g) * (width / kStep) * kTile);
  Scores(block, groups, queries, by_row);
  for (int g = 0; g < groups; ++g)
    Weigh(block, g, by_row + g * kAttendRows * kSide, sums, weights + g * kSteps * kTile, fade + g * kSide);
  for (int column = 0; column < block.latent; column += kStep)
    Mix(block, groups, column, weights, fade, sums.out);
}

}  // namespace
}  // namespace amx_bf16

const KernelTable& AmxBf16Kernels() {
  static const KernelTable table = [] {
    KernelTable made = kAvx512Bf16Kernels;
    made.name = "amx_bf16";
    made.attend = amx_bf16::Attend;
    return made;
  }();
  return table;
}

}  // namespace k2

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // __x86_64__
