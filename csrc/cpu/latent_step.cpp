#include "cpu/latent_step.h"

#include <cstring>

#include "cpu/rows.h"
#include "kernels/layout.h"

namespace k2 {
namespace {

// Rows between two products. Of the thread that runs the model, which does one layer after the other.
struct Room {
  std::vector<float> sums, keys;
  std::vector<bf16> normed, nope, turned, latents, queries;

  template <typename T>
  static T* Of(std::vector<T>& values, size_t count) {
    if (values.size() < count) values.resize(count);
    return values.data();
  }
};
thread_local Room room;

}  // namespace

LatentStep::LatentStep(Machine& machine, const LatentWeights& weights)
    : machine_(machine),
      weights_(weights),
      heads_(weights.key_to_latent.heads),
      nope_(weights.key_to_latent.rows),
      value_(weights.latent_to_value.rows),
      latent_(weights.key_to_latent.columns) {
  const LatentWeights& w = weights_;
  const bool by_head = w.latent_to_value.heads == heads_ && w.latent_to_value.columns == latent_;
  const int from = w.q_a ? w.q_a->rows : w.kv_a.columns;
  Require(by_head && w.q.rows == heads_ * (nope_ + w.rope) && w.q.columns == from &&
              w.kv_a.rows == latent_ + w.rope && (!w.q_a || w.q_a->columns == w.kv_a.columns) &&
              w.o.columns == heads_ * value_,
          "the weights of an attention layer do not fit each other");
  Require(latent_ > 0 && latent_ % 16 == 0, "a latent is a multiple of 16 values");
  Require(w.rope >= 0 && w.rope % 2 == 0, "a rotary part is made of pairs");
}

void LatentStep::Run(const LatentBatch& batch, uint8_t* pages, int64_t page_count, float* out) {
  const LatentWeights& w = weights_;
  const KernelTable& kernels = machine_.kernels();
  const size_t tokens = static_cast<size_t>(batch.tokens), by_head = tokens * heads_;
  const int width = latent_ + w.rope;
  for (size_t t = 0; t < tokens; ++t)
    Require(batch.slots[t] >= 0 && batch.slots[t] < page_count * kAttendPage,
            "a latent has no row to lie in");

  const Activations x{batch.x, batch.tokens, batch.stride};
  Activations queried = x;
  if (w.q_a) {
    const int rank = w.q_a->rows;
    float* lower = Room::Of(room.sums, tokens * rank);
    bf16* normed = Room::Of(room.normed, tokens * rank);
    machine_.Linear(x, *w.q_a, lower);
    RmsNormRows(machine_, lower, batch.tokens, rank, w.q_norm, w.eps, rank, normed);
    queried = {normed, batch.tokens, rank};
  }
  float* q = Room::Of(room.sums, by_head * (nope_ + w.rope));
  machine_.Linear(queried, w.q, q);
  float* kv = Room::Of(room.keys, tokens * width);
  machine_.Linear(x, w.kv_a, kv);

  bf16* nope = Room::Of(room.nope, by_head * nope_);
  bf16* turned = Room::Of(room.turned, by_head * w.rope);
  bf16* latents = Room::Of(room.latents, tokens * width);
  PrepareAttention(machine_, {heads_, nope_, w.rope, latent_, w.eps, w.latent_norm, batch.cos, batch.sin}, q,
                   kv, batch.tokens, nope, turned, latents);
  const size_t row_bytes = width * sizeof(bf16);
  for (size_t t = 0; t < tokens; ++t)
    std::memcpy(pages + batch.slots[t] * row_bytes, latents + t * width, row_bytes);

  float* sums = Room::Of(room.sums, by_head * latent_);
  machine_.LinearTransposed({nope, batch.tokens, static_cast<ptrdiff_t>(heads_) * nope_, nope_},
                            w.key_to_latent, sums);
  bf16* queries = Room::Of(room.queries, by_head * width);
  for (size_t i = 0; i < by_head; ++i) {
    kernels.round(sums + i * latent_, latent_, queries + i * width);
    std::memcpy(queries + i * width + latent_, turned + i * w.rope, w.rope * sizeof(bf16));
  }
  machine_.Attend({pages, page_count, static_cast<ptrdiff_t>(row_bytes), latent_, w.rope, false}, batch.spans,
                  queries, heads_, w.scale, sums);
  bf16* mixed = queries;  // they are done with
  kernels.round(sums, static_cast<int>(by_head * latent_), mixed);
  float* values = Room::Of(room.sums, by_head * value_);
  machine_.Linear({mixed, batch.tokens, static_cast<ptrdiff_t>(heads_) * latent_, latent_}, w.latent_to_value,
                  values);
  bf16* rounded = Room::Of(room.nope, by_head * value_);
  kernels.round(values, static_cast<int>(by_head * value_), rounded);
  machine_.Linear({rounded, batch.tokens, static_cast<ptrdiff_t>(heads_) * value_}, w.o, out);
}

}  // namespace k2
