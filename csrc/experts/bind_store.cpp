// Names only: the expert store and what fills it, for k2hybrid/native/store.py.
#include "experts/bind_store.h"

#include <pybind11/stl.h>

#include "experts/filler.h"
#include "experts/store.h"

namespace py = pybind11;

namespace k2 {
namespace {

using Addresses = std::array<uintptr_t, 3>;
using Places =
    std::array<std::pair<int, uint64_t>, 6>;  // (source, offset): packed of gate, up, down; their scales

void Put(ExpertStore& self, int layer, int expert, const Addresses& packed, const Addresses& scale) {
  ExpertBytes bytes;
  for (int i = 0; i < 3; ++i) {
    bytes.packed[i] = reinterpret_cast<const uint8_t*>(packed[i]);
    bytes.scale[i] = reinterpret_cast<const bf16*>(scale[i]);
  }
  self.Put(layer, expert, bytes);
}

void Locate(ExpertStore& self, int layer, int expert, const Places& places) {
  ExpertSpans spans;
  for (int i = 0; i < 3; ++i) {
    spans.packed[i] = {places[i].first, places[i].second};
    spans.scale[i] = {places[i + 3].first, places[i + 3].second};
  }
  self.Locate(layer, expert, spans);
}

py::dict Stats(const ExpertStore& self) {
  const StoreStats stats = self.stats();
  py::dict found;
  found["slots"] = stats.slots;
  found["filled"] = stats.filled;
  found["hits"] = stats.hits;
  found["misses"] = stats.misses;
  found["lost"] = stats.lost;
  found["bytes_read"] = stats.bytes_read;
  return found;
}

py::list Arenas(const ExpertStore& self) {
  py::list found;
  for (int node = 0; node < self.layout().nodes(); ++node) {
    const Arena& arena = self.memory().arena(node);
    found.append(py::make_tuple(arena.bytes(), arena.pages(), arena.bound()));
  }
  return found;
}

std::vector<std::pair<uintptr_t, size_t>> PlacesOf(const std::vector<MemorySpan>& spans) {
  std::vector<std::pair<uintptr_t, size_t>> found;
  for (const MemorySpan& span : spans)
    found.emplace_back(reinterpret_cast<uintptr_t>(span.begin), span.bytes);
  return found;
}

py::object Lend(ExpertStore& self, int layer, int expert) {
  Loan loan;
  bool lent = false;
  {
    const py::gil_scoped_release release;
    lent = self.Lend(layer, expert, &loan);
  }
  if (!lent) return py::none();
  return py::make_tuple(PlacesOf(loan.parts), PlacesOf(loan.memory));
}

}  // namespace

void bind_store(py::module_& m) {
  py::class_<ExpertStore>(m, "ExpertStore")
      .def(py::init([](int layers, int experts, int hidden, int inter, const std::vector<int>& gate,
                       const std::vector<int>& down) {
             return std::make_unique<ExpertStore>(ExpertSizes{layers, experts, hidden, inter},
                                                  RowShards{gate, down});
           }),
           py::arg("layers"), py::arg("experts"), py::arg("hidden"), py::arg("inter"), py::arg("gate_bounds"),
           py::arg("down_bounds"))
      .def_property_readonly("expert_bytes", &ExpertStore::expert_bytes)
      .def_property_readonly("nodes", [](const ExpertStore& self) { return self.layout().nodes(); })
      .def_property_readonly("slot_bytes",
                             [](const ExpertStore& self) {
                               std::vector<size_t> bytes;
                               for (int node = 0; node < self.layout().nodes(); ++node)
                                 bytes.push_back(self.layout().slot_bytes(node));
                               return bytes;
                             })
      .def("add_source", &ExpertStore::AddSource)
      .def("put", &Put)
      .def("locate", &Locate)
      .def(
          "open_slots",
          [](ExpertStore& self, int count, const std::vector<int>& node_ids, const std::string& folder,
             const std::string& digest, const std::string& reader, int depth, uint64_t piece_bytes,
             bool streamed, double half_life) {
            self.OpenSlots({count, node_ids, folder, digest}, {reader, depth, piece_bytes}, streamed,
                           half_life);
          },
          py::arg("count"), py::arg("node_ids"), py::arg("folder"), py::arg("digest"), py::arg("reader"),
          py::arg("depth"), py::arg("piece_bytes"), py::arg("streamed"), py::arg("half_life"))
      .def(
          "copy",
          [](ExpertStore& self, int layer, int expert, uintptr_t to) {
            return self.Copy(layer, expert, reinterpret_cast<uint8_t*>(to));
          },
          py::arg("layer"), py::arg("expert"), py::arg("to"), py::call_guard<py::gil_scoped_release>())
      .def("lend", &Lend, py::arg("layer"), py::arg("expert"))
      .def("give_back", &ExpertStore::GiveBack, py::arg("layer"), py::arg("expert"),
           py::call_guard<py::gil_scoped_release>())
      .def("close_slots", &ExpertStore::CloseSlots, py::call_guard<py::gil_scoped_release>())
      .def("pins", &ExpertStore::pins)
      .def("in_slot", &ExpertStore::in_slot)
      .def("release", &ExpertStore::Release)
      .def("stats", &Stats)
      .def("arenas", &Arenas)
      .def_property_readonly("reader", [](ExpertStore& self) { return self.reader().kind(); })
      .def("inject_read_faults", [](ExpertStore& self, int fail_every, int short_every) {
        self.reader().faults.fail_every.store(fail_every);
        self.reader().faults.short_every.store(short_every);
      });

  py::class_<Filler>(m, "Filler")
      .def(py::init<ExpertStore&, std::vector<std::pair<int, int>>, std::vector<std::vector<int>>, int>(),
           py::arg("store"), py::arg("order"), py::arg("cpus"), py::arg("threads"), py::keep_alive<1, 2>())
      .def("stop", &Filler::Stop, py::call_guard<py::gil_scoped_release>())
      .def("progress", [](const Filler& self) {
        const FillProgress progress = self.progress();
        return py::make_tuple(progress.experts, progress.done, progress.failed, progress.running);
      });
}

}  // namespace k2
