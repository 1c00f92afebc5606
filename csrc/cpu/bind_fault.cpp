// What Python sees of the guard of mapped files: plain functions, made objects by k2hybrid/native/files.py.
#include "cpu/bind_fault.h"

#include <chrono>

#include "cpu/fault.h"

namespace py = pybind11;

namespace k2 {
namespace {

const void* Pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

}  // namespace

void bind_fault(py::module_& m) {
  // Asking a file's size may wait for a network.
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def(
      "register_file",
      [](uintptr_t address, size_t bytes, int fd) { return FileMaps::Register(Pointer(address), bytes, fd); },
      py::arg("address"), py::arg("bytes"), py::arg("fd"), Unlocked());
  m.def("unregister_file", &FileMaps::Unregister, py::arg("id"), Unlocked());
  m.def("restore_file", &FileMaps::Restore, py::arg("id"), py::arg("fd"), Unlocked());
  // Its seconds, without those of waiting for the interpreter.
  m.def(
      "look_at_files",
      [] {
        const auto start = std::chrono::steady_clock::now();
        FileMaps::Look();
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      },
      Unlocked());
  m.def(
      "file_failed",
      [](uintptr_t address, size_t bytes) { return FileMaps::Failed(Pointer(address), bytes); },
      py::arg("address"), py::arg("bytes"));
  m.def("file_changes", &FileMaps::changes);
  m.def("rewritten_files", [] {
    py::dict times;
    for (const FileMaps::Rewrite& one : FileMaps::Rewrites()) times[py::int_(one.begin)] = one.times;
    return times;
  });
  m.def("failed_ranges", [] {
    py::list pairs;
    for (const FileMaps::Range& range : FileMaps::Ranges())
      pairs.append(py::make_tuple(range.begin, range.end));
    return pairs;
  });
}

}  // namespace k2
