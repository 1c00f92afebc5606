// What a layer does to rows between its products, on the CPU: norms, SwiGLU, the choice of experts, rotation.
//
// A row's bits depend on that row alone. Few rows are done by the caller, many by the pool.
#pragma once

#include "cpu/machine.h"

namespace k2 {

// out[t, :] = bf16(x[t, :] / rms(x[t, :]) * weight); rows of x lie `stride` apart.
void RmsNormRows(Machine& machine, const float* x, int rows, ptrdiff_t stride, const float* weight, float eps,
                 int n, bf16* out);

// out[t, :] = bf16(silu(gate[t, :]) * up[t, :]), contiguous.
void SwiGluRows(Machine& machine, const float* gate, const float* up, int rows, int n, bf16* out);

// DeepSeek-V3's choice without groups (arXiv 2412.19437, section 2.1.2): the `top_k` experts with the greatest
// sigmoid(logit) + bias, best first, equal ones by number; their weights are the sigmoids, divided by their sum if
// `normalize`, times `scale`. Of a row with a logit that is no number, the weights are none either.
inline constexpr int kMostChosen = 64;
struct Choice {
  int experts;
  int top_k;
  bool normalize;
  float scale;
};
void ChooseRows(Machine& machine, const float* logits, const float* bias, const Choice& choice, int rows,
                int32_t* ids, float* weights);

// What attention's products gave, made ready for the attention itself: adjacent pairs of the rotary parts turned by
// cos and sin [rows, rope / 2], the latent normed, all rounded to bf16.
struct AttentionRows {
  int heads;
  int nope;
  int rope;
  int latent;
  float eps;
  const float* norm;  // [latent]
  const float* cos;
  const float* sin;
};
// q [rows, heads, nope + rope], kv [rows, latent + rope] -> q_nope [rows, heads, nope], q_rope [rows, heads, rope],
// latents [rows, latent + rope], contiguous.
void PrepareAttention(Machine& machine, const AttentionRows& sizes, const float* q, const float* kv, int rows,
                      bf16* q_nope, bf16* q_rope, bf16* latents);

}  // namespace k2
