// Names only: the hand-off of a stream, for k2hybrid/native/handoff.py.
#include "gpu/bind_handoff.h"

#include <pybind11/stl.h>

#include "gpu/handoff.h"

namespace py = pybind11;

namespace k2 {

void bind_handoff(py::module_& m) {
  using gpu::Handoff;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<Handoff>(m, "Handoff")
      .def(
          py::init([](ExpertStore& store, Machine& machine, int max_rows, int top_k,
                      const std::vector<int>& layers, const py::object&, uintptr_t words, double timeout_ms) {
            return std::make_unique<Handoff>(store, machine, max_rows, top_k, layers,
                                             reinterpret_cast<void*>(words), timeout_ms);
          }),
          py::arg("store"), py::arg("machine"), py::arg("max_rows"), py::arg("top_k"), py::arg("layers"),
          py::arg("owner"), py::arg("words"), py::arg("timeout_ms"), py::keep_alive<1, 2>(),
          py::keep_alive<1, 3>(), py::keep_alive<1, 7>())
      .def("buffers",
           [](const Handoff& self, int) {
             const SlotBuffers b = self.buffers();
             return py::make_tuple(reinterpret_cast<uintptr_t>(b.x), reinterpret_cast<uintptr_t>(b.ids),
                                   reinterpret_cast<uintptr_t>(b.weights),
                                   reinterpret_cast<uintptr_t>(b.out));
           })
      .def("begin", &Handoff::Begin, Unlocked())
      .def("end",
           [](Handoff& self) {
             gpu::HandoffStep step;
             {
               py::gil_scoped_release unlocked;
               step = self.End();
             }
             py::dict found;
             found["epoch"] = step.outcome.epoch;
             found["layers"] = step.outcome.layers;
             found["answered"] = step.outcome.answered;
             found["aborted"] = gpu::AbortName(step.outcome.abort_reason);
             found["error"] = step.error;
             found["next_layer"] = step.next_layer;
             found["lost_rows"] = step.lost;
             found["bytes_read"] = step.total.bytes;
             found["misses"] = step.total.misses;
             found["busy_ns"] = step.total.busy_ns;
             found["wait_ns"] = step.total.wait_ns;
             return found;
           })
      .def("abort", &Handoff::Abort, Unlocked())
      .def("aborted", &Handoff::aborted, Unlocked())
      .def("reset", &Handoff::Reset, Unlocked())
      .def("close", &Handoff::Close, Unlocked())
      .def("stall_at", &Handoff::StallAt);
}

}  // namespace k2
