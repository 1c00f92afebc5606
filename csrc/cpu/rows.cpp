#include "cpu/rows.h"

#include <algorithm>
#include <string>
#include <vector>

namespace k2 {
namespace {

constexpr int64_t kAlone = 1 << 16;  // values that the caller does without waking the pool
constexpr int kLanes = 16;

// each(row) for all rows.
template <typename Each>
void ForRows(Machine& machine, int rows, int64_t values_per_row, const Each& each) {
  if (rows * values_per_row <= kAlone) {
    for (int row = 0; row < rows; ++row) each(row);
    return;
  }
  struct Call {
    const Each& each;
    int rows, per_chunk;
  };
  const int per_chunk =
      static_cast<int>(std::max<int64_t>(1, kAlone / 4 / std::max<int64_t>(1, values_per_row)));
  Call call{each, rows, per_chunk};
  Job job;
  job.Reset(&call, {{[](void* context, int chunk, int) {
                       const Call& call = *static_cast<Call*>(context);
                       const int end = std::min(call.rows, (chunk + 1) * call.per_chunk);
                       for (int row = chunk * call.per_chunk; row < end; ++row) call.each(row);
                     },
                     (rows + per_chunk - 1) / per_chunk}});
  machine.pool().Run(&job);
}

// The kernel over whole registers; what is left goes through one filled up with zeros.
void SwiGluRow(const KernelTable& kernels, const float* gate, const float* up, int n, bf16* out) {
  const int whole = n / kLanes * kLanes, left = n - whole;
  if (whole) kernels.swiglu(gate, up, whole, out);
  if (!left) return;
  float last_gate[kLanes] = {}, last_up[kLanes] = {};
  bf16 last[kLanes];
  std::copy_n(gate + whole, left, last_gate);
  std::copy_n(up + whole, left, last_up);
  kernels.swiglu(last_gate, last_up, kLanes, last);
  std::copy_n(last, left, out + whole);
}

void ChooseRow(const KernelTable& kernels, const float* logits, const float* bias, const Choice& choice,
               float* scratch, int32_t* ids, float* weights) {
  const int experts = choice.experts, padded = (experts + kLanes - 1) / kLanes * kLanes;
  float* scores = scratch;
  float* biased = scratch + padded;
  std::copy_n(logits, experts, biased);
  std::fill(biased + experts, biased + padded, 0.0f);
  kernels.sigmoid(biased, padded, scores);
  for (int e = 0; e < experts; ++e) biased[e] = scores[e] + bias[e];
  // Insertion into the best so far: an expert moves ahead of those that are strictly less, so equals stay in order.
  int best[kMostChosen];
  int count = 0;
  for (int e = 0; e < experts; ++e) {
    if (count == choice.top_k && !(biased[e] > biased[best[count - 1]])) continue;
    int at = count < choice.top_k ? count++ : count - 1;
    for (; at > 0 && biased[e] > biased[best[at - 1]]; --at) best[at] = best[at - 1];
    best[at] = e;
  }
  // A logit that is no number has a score like any other (Exp clamps it): what was lost must not look like a choice.
  float sum = 0.0f;
  for (int e = 0; e < experts; ++e) sum += logits[e] != logits[e] ? logits[e] : 0.0f;
  for (int i = 0; i < count; ++i) {
    ids[i] = best[i];
    weights[i] = scores[best[i]];
    sum += weights[i];
  }
  for (int i = 0; i < count; ++i)
    weights[i] = (choice.normalize || sum != sum ? weights[i] / (sum + 1e-20f) : weights[i]) * choice.scale;
}

}  // namespace

void RmsNormRows(Machine& machine, const float* x, int rows, ptrdiff_t stride, const float* weight, float eps,
                 int n, bf16* out) {
  ForRows(machine, rows, n, [&](int t) {
    machine.kernels().rms_norm(x + t * stride, weight, eps, n, out + static_cast<ptrdiff_t>(t) * n);
  });
}

void SwiGluRows(Machine& machine, const float* gate, const float* up, int rows, int n, bf16* out) {
  ForRows(machine, rows, n, [&](int t) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(t) * n;
    SwiGluRow(machine.kernels(), gate + at, up + at, n, out + at);
  });
}

void ChooseRows(Machine& machine, const float* logits, const float* bias, const Choice& choice, int rows,
                int32_t* ids, float* weights) {
  Require(choice.top_k > 0 && choice.top_k <= std::min(choice.experts, kMostChosen),
          "a row chooses at least one of the experts, and at most " + std::to_string(kMostChosen));
  const int padded = (choice.experts + kLanes - 1) / kLanes * kLanes;
  ForRows(machine, rows, choice.experts, [&](int t) {
    thread_local std::vector<float> scratch;
    scratch.resize(std::max(scratch.size(), static_cast<size_t>(2 * padded)));
    const ptrdiff_t at = static_cast<ptrdiff_t>(t) * choice.top_k;
    ChooseRow(machine.kernels(), logits + static_cast<ptrdiff_t>(t) * choice.experts, bias, choice,
              scratch.data(), ids + at, weights + at);
  });
}

void PrepareAttention(Machine& machine, const AttentionRows& sizes, const float* q, const float* kv, int rows,
                      bf16* q_nope, bf16* q_rope, bf16* latents) {
  const int nope = sizes.nope, rope = sizes.rope, heads = sizes.heads, latent = sizes.latent;
  const KernelTable& kernels = machine.kernels();
  ForRows(machine, rows, static_cast<int64_t>(heads) * (nope + rope), [&](int t) {
    const float* cos = sizes.cos + static_cast<ptrdiff_t>(t) * (rope / 2);
    const float* sin = sizes.sin + static_cast<ptrdiff_t>(t) * (rope / 2);
    for (int h = 0; h < heads; ++h) {
      const ptrdiff_t head = static_cast<ptrdiff_t>(t) * heads + h;
      const float* from = q + head * (nope + rope);
      kernels.round(from, nope, q_nope + head * nope);
      kernels.rotate(from + nope, cos, sin, rope / 2, q_rope + head * rope);
    }
    const float* from = kv + static_cast<ptrdiff_t>(t) * (latent + rope);
    bf16* to = latents + static_cast<ptrdiff_t>(t) * (latent + rope);
    kernels.rms_norm(from, sizes.norm, sizes.eps, latent, to);
    kernels.rotate(from + latent, cos, sin, rope / 2, to + latent);
  });
}

}  // namespace k2
