#include "cpu/bind_steps.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/latent_step.h"
#include "cpu/mlp_step.h"

namespace py = pybind11;

namespace k2 {
namespace {

template <typename T>
T* Pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Kind, address, address of the scales, heads, rows, columns, and elements between two heads and two rows.
using GivenWeights = std::tuple<std::string, uintptr_t, uintptr_t, int, int, int, ptrdiff_t, ptrdiff_t>;

Weights Of(const GivenWeights& given) {
  const auto& [kind, data, scale, heads, rows, columns, head_stride, row_stride] = given;
  const WeightKind known = kind == "int8"  ? WeightKind::kInt8
                           : kind == "fp8" ? WeightKind::kE4m3
                                           : WeightKind::kBf16;
  return {Pointer<void>(data), rows, columns, row_stride, heads, head_stride, known, Pointer<float>(scale)};
}

}  // namespace

void bind_steps(py::module_& m) {
  py::class_<LatentStep>(m, "LatentStep")
      .def(py::init([](Machine& machine, const std::optional<GivenWeights>& q_a, const GivenWeights& q,
                       const GivenWeights& kv_a, const GivenWeights& key_to_latent,
                       const GivenWeights& latent_to_value, const GivenWeights& o, uintptr_t q_norm,
                       uintptr_t latent_norm, float eps, float scale, int rope) {
             LatentWeights weights{std::nullopt,
                                   Of(q),
                                   Of(kv_a),
                                   Of(key_to_latent),
                                   Of(latent_to_value),
                                   Of(o),
                                   Pointer<float>(q_norm),
                                   Pointer<float>(latent_norm),
                                   eps,
                                   scale,
                                   rope};
             if (q_a) weights.q_a = Of(*q_a);
             return std::make_unique<LatentStep>(machine, weights);
           }),
           py::keep_alive<1, 2>())
      .def("run", [](LatentStep& self, uintptr_t x, int tokens, ptrdiff_t stride, uintptr_t cos,
                     uintptr_t sin, uintptr_t slots,
                     const std::vector<std::tuple<uintptr_t, int, int>>& spans, uintptr_t pages,
                     int64_t page_count, uintptr_t out) {
        LatentBatch batch{Pointer<bf16>(x),        tokens, stride, Pointer<float>(cos), Pointer<float>(sin),
                          Pointer<int64_t>(slots), {}};
        for (const auto& [table, start, count] : spans)
          batch.spans.push_back({Pointer<int64_t>(table), start, count});
        py::gil_scoped_release release;
        self.Run(batch, Pointer<uint8_t>(pages), page_count, Pointer<float>(out));
      });
  py::class_<MlpStep>(m, "MlpStep")
      .def(py::init([](Machine& machine, const GivenWeights& gate, const GivenWeights& up,
                       const GivenWeights& down) {
             return std::make_unique<MlpStep>(machine, MlpWeights{Of(gate), Of(up), Of(down)});
           }),
           py::keep_alive<1, 2>())
      .def(
          "run",
          [](MlpStep& self, uintptr_t x, int tokens, ptrdiff_t stride, uintptr_t out) {
            self.Run({Pointer<bf16>(x), tokens, stride}, Pointer<float>(out));
          },
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace k2
