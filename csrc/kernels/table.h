// One entry per instruction set; the best that the CPU and its operating system offer is picked once.
#pragma once

#include <string>
#include <vector>

#include "kernels/layout.h"

namespace k2 {

// A tile of activations is a list of row pointers: the rows an expert got need not be neighbours.
struct KernelTable {
  const char* name;

  // Plain bf16 [in] to prepared order (layout.h).
  void (*prepare)(const bf16* x, int in, bf16* prepared);

  // y[t * ldy + r] = weights.row(row0 + r) . x[t], for `rows` rows and `tokens` prepared activations.
  void (*int4_rows)(const Int4Matrix& weights, int row0, int rows, const bf16* const* x, int tokens, float* y,
                    ptrdiff_t ldy);

  // out[i] = bf16(silu(gate[i]) * up[i]), and out[i] += weight * y[i]: n values, n a multiple of 16.
  void (*swiglu)(const float* gate, const float* up, int n, bf16* out);
  void (*add_scaled)(float weight, const float* y, int n, float* out);

  // out = bf16(x / sqrt(mean of squares + eps) * weight), of any n; and out[i] = 1 / (1 + e^-x[i]), n a multiple of 16.
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, bf16* out);
  void (*sigmoid)(const float* x, int n, float* out);

  // Adjacent pairs turned by angles (rotary embedding), rounded to bf16; and values rounded to bf16.
  void (*rotate)(const float* x, const float* cos, const float* sin, int pairs, bf16* out);
  void (*round)(const float* x, int n, bf16* out);

  // y[t * ldy + r] = w.row(r) . x[t] for bf16 weights of `in` columns, rows `ldw` elements apart.
  void (*dense_rows)(const bf16* w, ptrdiff_t ldw, int in, int rows, const bf16* const* x, int tokens,
                     float* y, ptrdiff_t ldy);

  // The same, times each row's scale, for weights of a byte.
  void (*int8_rows)(const int8_t* w, const float* scale, ptrdiff_t ldw, int in, int rows,
                    const bf16* const* x, int tokens, float* y, ptrdiff_t ldy);
  void (*e4m3_rows)(const E4m3* w, const float* scale, ptrdiff_t ldw, int in, int rows, const bf16* const* x,
                    int tokens, float* y, ptrdiff_t ldy);

  // y[n] = sum_k x[k] * w[k * ldw + n]: the transposed product of absorbed attention.
  void (*dense_columns)(const bf16* w, ptrdiff_t ldw, int in, int columns, const bf16* x, float* y);

  // Adds a block of context to `sums`, which begin with a peak of -inf and zeros; `scores` is room for [heads][kAttendRows].
  void (*attend)(const AttendBlock& block, float* scores, const AttendSums& sums);

  // FP8 rows, `row_bytes` apart, as bf16 [rows][latent + rope].
  void (*decode_rows)(const uint8_t* stored, ptrdiff_t row_bytes, int rows, int latent, int rope, bf16* out);
};

// Entries this CPU can run, best first; the last is always "scalar".
const std::vector<const KernelTable*>& AvailableKernels();

// The best available, or the named one; throws if `name` is unknown or needs more than this CPU has.
const KernelTable& PickKernels(const std::string& name);

}  // namespace k2
