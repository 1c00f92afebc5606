// Attention of one layer for few rows, from the normed rows to what joins the residual stream, in one call.
//
// In decoding, a dozen calls from Python take longer than most of what they do. Here are the same products, in the same
// order and with the same roundings as in k2hybrid/model/mla.py: a row gets the same bits either way.
#pragma once

#include <optional>
#include <vector>

#include "cpu/machine.h"

namespace k2 {

// A layer's weights, which outlive it. Those by head are views of kv_b (DeepSeek-V2, arXiv 2405.04434, section 2.1).
struct LatentWeights {
  std::optional<Weights> q_a;  // none: `q` reads the rows themselves
  Weights q;                   // [heads * (nope + rope), ...]
  Weights kv_a;                // [latent + rope, hidden]
  Weights key_to_latent;       // bf16, by head [nope, latent]
  Weights latent_to_value;     // bf16, by head [value, latent]
  Weights o;                   // [hidden, heads * value]
  const float* q_norm;         // [q_a.rows]; unread without q_a
  const float* latent_norm;    // [latent]
  float eps;                   // of both
  float scale;                 // of the scores
  int rope;
};

// The rows of a pass, the spans' one after the other.
struct LatentBatch {
  const bf16* x;  // [tokens, hidden], `stride` apart
  int tokens;
  ptrdiff_t stride;
  const float* cos;  // [tokens, rope / 2]
  const float* sin;
  const int64_t* slots;  // [tokens]: which of the rows in pages each one's latent becomes
  std::vector<AttendSpan> spans;
};

class LatentStep {
 public:
  // Throws if the weights do not fit each other.
  LatentStep(Machine& machine, const LatentWeights& weights);

  // Stores the latents in `pages`, a layer's rows in bf16, and writes out fp32 [tokens, hidden].
  // Throws if a slot or a table names a row that is not there, or weights can no longer be read.
  void Run(const LatentBatch& batch, uint8_t* pages, int64_t page_count, float* out);

 private:
  Machine& machine_;
  LatentWeights weights_;
  int heads_, nope_, value_, latent_;
};

}  // namespace k2
