// Names only: what Python sees of the extension. Pointers arrive as integers, checked by k2hybrid/native/.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "cpu/bind_fault.h"
#include "cpu/bind_steps.h"
#include "cpu/machine.h"
#include "cpu/probe.h"
#include "cpu/rows.h"
#include "experts/bind_store.h"
#include "experts/dispatch.h"
#include "gpu/bind_doorbell.h"
#include "gpu/bind_handoff.h"
#include "kernels/mask.h"

namespace py = pybind11;

namespace {

template <typename T>
T* Pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void BindMachine(py::module_& m) {
  py::class_<k2::Machine>(m, "Machine")
      .def(py::init<int, const std::string&, const std::vector<int>&, const std::vector<int>&>(),
           py::arg("threads"), py::arg("isa"), py::arg("cpus"), py::arg("groups"))
      .def_property_readonly("isa", [](const k2::Machine& self) { return self.kernels().name; })
      .def_property_readonly("threads", [](k2::Machine& self) { return self.pool().threads(); })
      .def_property_readonly("groups", [](k2::Machine& self) { return self.pool().groups(); })
      .def_property_readonly("attend_ns", &k2::Machine::attend_ns)
      .def("pin_caller", [](k2::Machine& self) { self.pool().PinCaller(); })
      .def(
          "linear",
          [](k2::Machine& self, uintptr_t x, int tokens, ptrdiff_t x_token, ptrdiff_t x_head, uintptr_t w,
             int heads, int rows, int columns, ptrdiff_t w_head, ptrdiff_t w_row, uintptr_t y) {
            self.Linear({Pointer<k2::bf16>(x), tokens, x_token, x_head},
                        {Pointer<k2::bf16>(w), rows, columns, w_row, heads, w_head}, Pointer<float>(y));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "linear8",
          [](k2::Machine& self, uintptr_t x, int tokens, ptrdiff_t x_token, bool e4m3, uintptr_t w,
             uintptr_t scale, int rows, int columns, ptrdiff_t w_row, uintptr_t y) {
            const auto kind = e4m3 ? k2::WeightKind::kE4m3 : k2::WeightKind::kInt8;
            self.Linear({Pointer<k2::bf16>(x), tokens, x_token},
                        {Pointer<void>(w), rows, columns, w_row, 1, 0, kind, Pointer<float>(scale)},
                        Pointer<float>(y));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "linear_transposed",
          [](k2::Machine& self, uintptr_t x, int tokens, ptrdiff_t x_token, ptrdiff_t x_head, uintptr_t w,
             int heads, int rows, int columns, ptrdiff_t w_head, ptrdiff_t w_row, uintptr_t y) {
            self.LinearTransposed({Pointer<k2::bf16>(x), tokens, x_token, x_head},
                                  {Pointer<k2::bf16>(w), rows, columns, w_row, heads, w_head},
                                  Pointer<float>(y));
          },
          py::call_guard<py::gil_scoped_release>())
      .def("attend",
           [](k2::Machine& self, uintptr_t rows, int64_t pages, ptrdiff_t row_bytes, int latent, int rope,
              bool fp8, const std::vector<std::tuple<uintptr_t, int, int>>& spans, uintptr_t q, int heads,
              float scale, uintptr_t out) {
             std::vector<k2::AttendSpan> given;
             for (const auto& [table, start, count] : spans)
               given.push_back({Pointer<int64_t>(table), start, count});
             py::gil_scoped_release release;
             self.Attend({Pointer<uint8_t>(rows), pages, row_bytes, latent, rope, fp8}, given,
                         Pointer<k2::bf16>(q), heads, scale, Pointer<float>(out));
           })
      .def(
          "rms_norm",
          [](k2::Machine& self, uintptr_t x, int rows, ptrdiff_t stride, uintptr_t weight, float eps, int n,
             uintptr_t out) {
            k2::RmsNormRows(self, Pointer<float>(x), rows, stride, Pointer<float>(weight), eps, n,
                            Pointer<k2::bf16>(out));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "swiglu",
          [](k2::Machine& self, uintptr_t gate, uintptr_t up, int rows, int n, uintptr_t out) {
            k2::SwiGluRows(self, Pointer<float>(gate), Pointer<float>(up), rows, n, Pointer<k2::bf16>(out));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "choose",
          [](k2::Machine& self, uintptr_t logits, uintptr_t bias, int rows, int experts, int top_k,
             bool normalize, float scale, uintptr_t ids, uintptr_t weights) {
            k2::ChooseRows(self, Pointer<float>(logits), Pointer<float>(bias),
                           {experts, top_k, normalize, scale}, rows, Pointer<int32_t>(ids),
                           Pointer<float>(weights));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "prepare_attention",
          [](k2::Machine& self, uintptr_t q, uintptr_t kv, int rows, int heads, int nope, int rope,
             int latent, uintptr_t norm, float eps, uintptr_t cos, uintptr_t sin, uintptr_t q_nope,
             uintptr_t q_rope, uintptr_t latents) {
            k2::PrepareAttention(self,
                                 {heads, nope, rope, latent, eps, Pointer<float>(norm), Pointer<float>(cos),
                                  Pointer<float>(sin)},
                                 Pointer<float>(q), Pointer<float>(kv), rows, Pointer<k2::bf16>(q_nope),
                                 Pointer<k2::bf16>(q_rope), Pointer<k2::bf16>(latents));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "probe_read_seconds",
          [](k2::Machine& self, uintptr_t data, size_t bytes, size_t stripe_bytes, int ahead_bytes,
             int streams) {
            return k2::ProbeReadSeconds(self, Pointer<void>(data), bytes,
                                        {stripe_bytes, ahead_bytes, streams});
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "probe_peak", [](k2::Machine& self, const std::string& kind) { return k2::ProbePeak(self, kind); },
          py::call_guard<py::gil_scoped_release>());
}

void BindExperts(py::module_& m) {
  py::class_<k2::Dispatcher>(m, "Dispatcher")
      .def(py::init<k2::ExpertStore&, k2::Machine&, int, int, int>(), py::arg("store"), py::arg("machine"),
           py::arg("max_rows"), py::arg("top_k"), py::arg("slots"), py::keep_alive<1, 2>(),
           py::keep_alive<1, 3>())
      .def_property_readonly("slots", &k2::Dispatcher::slots)
      .def("buffers",
           [](const k2::Dispatcher& self, int slot) {
             const k2::SlotBuffers b = self.buffers(slot);
             return py::make_tuple(reinterpret_cast<uintptr_t>(b.x), reinterpret_cast<uintptr_t>(b.ids),
                                   reinterpret_cast<uintptr_t>(b.weights),
                                   reinterpret_cast<uintptr_t>(b.out));
           })
      .def("acquire", &k2::Dispatcher::Acquire)
      .def("submit", &k2::Dispatcher::Submit, py::call_guard<py::gil_scoped_release>())
      .def("collect",
           [](k2::Dispatcher& self, int slot, uint64_t epoch, int rows) {
             std::string status(static_cast<size_t>(rows), '\0');
             k2::TicketReport report;
             {
               py::gil_scoped_release release;
               report = self.Collect(slot, epoch, rows, reinterpret_cast<uint8_t*>(status.data()));
             }
             return py::make_tuple(py::bytes(status), report.bytes, report.misses, report.busy_ns,
                                   report.wait_ns);
           })
      .def("abort", &k2::Dispatcher::Abort);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels, pool, expert store and hand-off of k2hybrid; use k2hybrid.native.";
  py::register_exception<k2::Error>(m, "Error");
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const k2::KernelTable* table : k2::AvailableKernels()) names.emplace_back(table->name);
    return names;
  });
  m.def("mask_logits",
        [](uintptr_t logits, int64_t count, int64_t plain, const std::optional<py::bytes>& allowed, bool all,
           const std::vector<int64_t>& specials) {
          const uint8_t* bits = nullptr;
          if (allowed.has_value()) {
            const std::string_view view = *allowed;
            k2::Require(static_cast<int64_t>(view.size()) * 8 >= plain, "mask: fewer bits than plain tokens");
            bits = reinterpret_cast<const uint8_t*>(view.data());
          }
          k2::MaskLogits(Pointer<float>(logits), count, plain, bits, all, specials);
        });
  BindMachine(m);
  k2::bind_store(m);
  BindExperts(m);
  k2::bind_doorbell(m);
  k2::bind_handoff(m);
  k2::bind_fault(m);
  k2::bind_steps(m);
}
