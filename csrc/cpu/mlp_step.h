// down(silu(gate x) * up x) of few rows, a dense layer's or the shared expert's, in one call: as latent_step.h, and for the
// same reason.
#pragma once

#include "cpu/machine.h"

namespace k2 {

struct MlpWeights {
  Weights gate;  // [inner, hidden]
  Weights up;    // the same
  Weights down;  // [hidden, inner]
};

class MlpStep {
 public:
  // Throws if the weights, which outlive it, do not fit each other.
  MlpStep(Machine& machine, const MlpWeights& weights);

  // out fp32 [x.tokens, hidden]. Throws if weights can no longer be read.
  void Run(const Activations& x, float* out);

 private:
  Machine& machine_;
  MlpWeights weights_;
};

}  // namespace k2
