// What Python sees of the doorbell: enough to check and time the protocol, with an answer that stays in C++.
#include "gpu/bind_doorbell.h"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <utility>

#include "gpu/doorbell.h"

namespace py = pybind11;

namespace k2 {
namespace gpu {
namespace {

// A doorbell that answers input + 1 after `work_us` of busy work, and can be made to stall or to throw.
class EchoDoorbell {
 public:
  EchoDoorbell(py::object owner, uintptr_t memory, uint32_t slots, double timeout_ms, double work_us)
      : owner_(std::move(owner)),
        work_us_(work_us),
        doorbell_(reinterpret_cast<void*>(memory), slots, timeout_ms,
                  [this](uint64_t, uint32_t slot, uint32_t input) { return Echo(slot, input); }) {}
  ~EchoDoorbell() {
    doorbell_.Abort();
    stall_at_.store(kNever);
  }

  Doorbell& doorbell() { return doorbell_; }
  void StallAt(int64_t slot) { stall_at_.store(slot < 0 ? kNever : slot); }
  void ThrowAt(int64_t slot) { throw_at_.store(slot < 0 ? kNever : slot); }

 private:
  static constexpr int64_t kNever = -1;

  uint32_t Echo(uint32_t slot, uint32_t input) {
    while (stall_at_.load() == slot) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    if (throw_at_.load() == slot) throw std::runtime_error("asked to throw");
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double, std::micro>(work_us_);
    while (work_us_ > 0 && std::chrono::steady_clock::now() < end) {
    }
    return input + 1;
  }

  const py::object owner_;  // of the memory; first, so that it goes last
  const double work_us_;
  std::atomic<int64_t> stall_at_{kNever};
  std::atomic<int64_t> throw_at_{kNever};
  Doorbell doorbell_;  // last: its threads use the members above
};

py::dict ToDict(const StepOutcome& outcome) {
  using namespace py::literals;
  return py::dict("epoch"_a = outcome.epoch, "layers"_a = outcome.layers, "answered"_a = outcome.answered,
                  "aborted"_a = AbortName(outcome.abort_reason));
}

py::dict ToDict(const DevicePlay& play) {
  using namespace py::literals;
  return py::dict("answered"_a = play.answered, "poisoned"_a = play.poisoned, "wrong"_a = play.wrong,
                  "timed_out"_a = play.timed_out != 0);
}

}  // namespace
}  // namespace gpu

void bind_doorbell(py::module_& m) {
  using namespace gpu;
  m.def("doorbell_bytes", [](uint32_t slots) { return DoorbellBytes(slots); }, py::arg("slots"));
  m.def(
      "doorbell_layout",
      [] {
        using namespace py::literals;
        return py::dict("header_bytes"_a = sizeof(DoorbellHeader), "slot_bytes"_a = sizeof(DoorbellSlot),
                        "request"_a = offsetof(DoorbellSlot, request),
                        "input"_a = offsetof(DoorbellSlot, input), "reply"_a = offsetof(DoorbellSlot, reply),
                        "output"_a = offsetof(DoorbellSlot, output), "idle"_a = kIdle, "rung"_a = kRung,
                        "answered"_a = kAnswered, "poisoned"_a = kPoisoned);
      },
      "Byte offsets and values of the protocol, so that the device's side cannot drift from the CPU's.");
  m.def(
      "ring_slot",
      [](uintptr_t memory, uint32_t slot, uint32_t input) {
        RingSlot(reinterpret_cast<void*>(memory), slot, input);
      },
      py::arg("memory"), py::arg("slot"), py::arg("input"));
  m.def(
      "wait_reply",
      [](uintptr_t memory, uint32_t slot, double limit_ms) {
        return WaitReply(reinterpret_cast<void*>(memory), slot, limit_ms);
      },
      py::arg("memory"), py::arg("slot"), py::arg("limit_ms"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "play_device",
      [](uintptr_t memory, uint32_t layers, uint32_t seed, double limit_ms) {
        DevicePlay play;
        {
          py::gil_scoped_release unlocked;
          play = PlayDevice(reinterpret_cast<void*>(memory), layers, seed, limit_ms);
        }
        return ToDict(play);
      },
      py::arg("memory"), py::arg("layers"), py::arg("seed"), py::arg("limit_ms"));

  py::class_<EchoDoorbell>(m, "EchoDoorbell")
      .def(py::init<py::object, uintptr_t, uint32_t, double, double>(), py::arg("owner"), py::arg("memory"),
           py::arg("slots"), py::arg("timeout_ms"), py::arg("work_us") = 0.0)
      .def(
          "publish",
          [](EchoDoorbell& self, uint32_t rows, uint32_t layers) {
            std::vector<uint32_t> slots(layers);
            std::iota(slots.begin(), slots.end(), 0u);
            return self.doorbell().Publish(rows, slots);
          },
          py::arg("rows"), py::arg("layers"), py::call_guard<py::gil_scoped_release>())
      .def("finish", [](EchoDoorbell& self) { return ToDict(self.doorbell().Finish()); })
      .def(
          "abort", [](EchoDoorbell& self) { self.doorbell().Abort(); },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "reset", [](EchoDoorbell& self) { self.doorbell().Reset(); },
          py::call_guard<py::gil_scoped_release>())
      .def("stall_at", &EchoDoorbell::StallAt, py::arg("slot"), "Stop answering at this slot; -1 goes on.")
      .def("throw_at", &EchoDoorbell::ThrowAt, py::arg("slot"), "Fail at this slot; -1 never.");
}

}  // namespace k2
