#include "cpu/mlp_step.h"

#include <vector>

#include "cpu/rows.h"

namespace k2 {

MlpStep::MlpStep(Machine& machine, const MlpWeights& weights) : machine_(machine), weights_(weights) {
  const auto& [gate, up, down] = weights_;
  Require(gate.rows == up.rows && gate.columns == up.columns && down.columns == gate.rows &&
              down.rows == gate.columns,
          "the weights of an MLP do not fit each other");
}

void MlpStep::Run(const Activations& x, float* out) {
  thread_local std::vector<float> gate, up;
  thread_local std::vector<bf16> inner;
  const int n = weights_.gate.rows;
  const size_t count = static_cast<size_t>(x.tokens) * n;
  if (inner.size() < count) {
    gate.resize(count);
    up.resize(count);
    inner.resize(count);
  }
  machine_.Linear(x, weights_.gate, gate.data());
  machine_.Linear(x, weights_.up, up.data());
  SwiGluRows(machine_, gate.data(), up.data(), x.tokens, n, inner.data());
  machine_.Linear({inner.data(), x.tokens, n}, weights_.down, out);
}

}  // namespace k2
