// The hand-off of experts and the linears, with threads: tickets in flight, padding, errors, an abort from
// elsewhere, an end with tickets outstanding, a file that shrank. Operands lie in blocks of just their size.
#include "experts/dispatch.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/fault.h"

namespace {

using k2::bf16;
using k2::RowStatus;
using k2::test::Check;
using k2::test::CheckRefused;
using k2::test::Step;

constexpr k2::ExpertSizes kSizes = {2, 5, 160, 96};  // tails of 32 and 96 weights
constexpr int kTopK = 2;
constexpr int kMaxRows = 150;  // more than the 64 rows of an expert that are computed at once
constexpr int kMissing = 4;    // the expert that layer 1 lacks

template <typename T>
std::unique_ptr<T[]> Exact(const std::vector<T>& values) {
  auto block = std::make_unique<T[]>(values.size());
  std::copy(values.begin(), values.end(), block.get());
  return block;
}

bf16 RandomValue(std::mt19937& random) {
  return k2::ToBf16(static_cast<float>(random() % 4001) / 1000.0f - 2.0f);
}

struct Matrix {
  Matrix(int out, int in, std::mt19937& random) : out(out), in(in) {
    std::vector<uint8_t> nibbles(static_cast<size_t>(out) * in / 2);
    for (uint8_t& byte : nibbles) byte = static_cast<uint8_t>(random());
    std::vector<bf16> scales(static_cast<size_t>(out) * in / k2::kGroup);
    for (bf16& value : scales) value = k2::ToBf16(0.01f + static_cast<float>(random() % 100) / 2000.0f);
    packed = Exact(nibbles);
    scale = Exact(scales);
  }
  size_t PackedBytes() const { return static_cast<size_t>(out) * in / 2; }
  double At(int row, int column) const {
    const size_t at = static_cast<size_t>(row) * in + column;
    return ((packed[at / 2] >> (4 * (at % 2)) & 15) - 8) *
           static_cast<double>(k2::ToFloat(scale[at / k2::kGroup]));
  }

  int out;
  int in;
  std::unique_ptr<uint8_t[]> packed;
  std::unique_ptr<bf16[]> scale;
};

// A token, the experts it goes to and what they weigh.
struct Row {
  std::vector<bf16> x;
  int32_t ids[kTopK];
  float weights[kTopK];
};

struct Model {
  Model() : store(kSizes) {
    std::mt19937 random(7);
    for (int layer = 0; layer < kSizes.layers; ++layer)
      for (int expert = 0; expert < kSizes.experts; ++expert) {
        matrices.emplace_back(kSizes.inter, kSizes.hidden, random);
        matrices.emplace_back(kSizes.inter, kSizes.hidden, random);
        matrices.emplace_back(kSizes.hidden, kSizes.inter, random);
        if (layer != 1 || expert != kMissing) Put(layer, expert);
      }
    // Pairs of experts, one expert of two, none.
    constexpr int32_t kIds[][kTopK] = {{0, 1}, {4, 2}, {-1, 3}, {2, 2}, {3, -1}, {-1, -1}, {1, 4}, {0, 3}};
    for (const auto& ids : kIds) {
      Row row;
      for (int i = 0; i < kSizes.hidden; ++i) row.x.push_back(RandomValue(random));
      for (int k = 0; k < kTopK; ++k) {
        row.ids[k] = ids[k];
        row.weights[k] = 0.1f + static_cast<float>(random() % 100) / 100.0f;
      }
      rows.push_back(std::move(row));
    }
  }

  const Matrix& Part(int layer, int expert, int part) const {
    return matrices[(static_cast<size_t>(layer) * kSizes.experts + expert) * 3 + part];
  }
  void Put(int layer, int expert) {
    k2::ExpertBytes bytes;
    for (int i = 0; i < 3; ++i) {
      bytes.packed[i] = Part(layer, expert, i).packed.get();
      bytes.scale[i] = Part(layer, expert, i).scale.get();
    }
    store.Put(layer, expert, bytes);
  }
  bool Unpinned() const {
    for (int layer = 0; layer < kSizes.layers; ++layer)
      for (int expert = 0; expert < kSizes.experts; ++expert)
        if (store.pins(layer, expert) != 0) return false;
    return true;
  }

  std::vector<Matrix> matrices;
  std::vector<Row> rows;
  k2::ExpertStore store;
};

using Bits = std::vector<float>;  // a row's output

struct Ticket {
  int slot;
  uint64_t epoch;
  std::vector<int> rows;  // of the model
};

void Fill(const k2::Dispatcher& dispatcher, int slot, int at, const Row& row) {
  const k2::SlotBuffers buffers = dispatcher.buffers(slot);
  std::copy(row.x.begin(), row.x.end(), buffers.x + static_cast<size_t>(at) * kSizes.hidden);
  std::copy_n(row.ids, kTopK, buffers.ids + at * kTopK);
  std::copy_n(row.weights, kTopK, buffers.weights + at * kTopK);
}

Ticket Submit(k2::Dispatcher& dispatcher, const Model& model, std::vector<int> rows, int layer = 0) {
  const int slot = dispatcher.Acquire();
  for (size_t i = 0; i < rows.size(); ++i) Fill(dispatcher, slot, static_cast<int>(i), model.rows[rows[i]]);
  const uint64_t epoch = dispatcher.Submit(slot, layer, static_cast<int>(rows.size()));
  return {slot, epoch, std::move(rows)};
}

std::vector<uint8_t> Collect(k2::Dispatcher& dispatcher, const Ticket& ticket) {
  const int rows = static_cast<int>(ticket.rows.size());
  auto status = std::make_unique<uint8_t[]>(rows);
  const k2::TicketReport report = dispatcher.Collect(ticket.slot, ticket.epoch, rows, status.get());
  Check(report.busy_ns >= report.wait_ns && report.wait_ns >= 0 && report.bytes >= 0,
        "a ticket reports its time");
  return {status.get(), status.get() + rows};
}

Bits Output(const k2::Dispatcher& dispatcher, int slot, int at) {
  const float* out = dispatcher.buffers(slot).out + static_cast<size_t>(at) * kSizes.hidden;
  return {out, out + kSizes.hidden};
}

bool SameBits(const Bits& a, const Bits& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool All(const std::vector<uint8_t>& status, RowStatus wanted) {
  for (uint8_t s : status)
    if (s != static_cast<uint8_t>(wanted)) return false;
  return true;
}

void CheckOk(k2::Dispatcher& dispatcher, const Ticket& ticket, const std::vector<Bits>& alone) {
  Check(All(Collect(dispatcher, ticket), RowStatus::kOk), "every row is fine");
  for (size_t i = 0; i < ticket.rows.size(); ++i)
    Check(SameBits(Output(dispatcher, ticket.slot, static_cast<int>(i)), alone[ticket.rows[i]]),
          "a row has the same bits in any company, on any number of threads");
}

// Each row of the model by itself on one thread: the witness of all else here.
std::vector<Bits> Alone(Model& model, const std::string& isa) {
  k2::Machine machine(1, isa, {});
  k2::Dispatcher dispatcher(model.store, machine, 1, kTopK, 1);
  std::vector<Bits> alone;
  for (size_t i = 0; i < model.rows.size(); ++i) {
    const Ticket ticket = Submit(dispatcher, model, {static_cast<int>(i)});
    Check(All(Collect(dispatcher, ticket), RowStatus::kOk), "a row alone is fine");
    alone.push_back(Output(dispatcher, ticket.slot, 0));
  }
  return alone;
}

// Against float64; 3e-3 is the bound of docs/numerics.md.
void TestValues(const Model& model, const std::vector<Bits>& alone) {
  double error = 0, norm = 0;
  for (size_t r = 0; r < model.rows.size(); ++r) {
    const Row& row = model.rows[r];
    std::vector<double> want(kSizes.hidden);
    for (int k = 0; k < kTopK; ++k) {
      if (row.ids[k] < 0) continue;
      std::vector<double> hidden(kSizes.inter);
      for (int i = 0; i < kSizes.inter; ++i) {
        double gate = 0, up = 0;
        for (int j = 0; j < kSizes.hidden; ++j) {
          gate += model.Part(0, row.ids[k], 0).At(i, j) * k2::ToFloat(row.x[j]);
          up += model.Part(0, row.ids[k], 1).At(i, j) * k2::ToFloat(row.x[j]);
        }
        hidden[i] = gate / (1 + std::exp(-gate)) * up;
      }
      for (int i = 0; i < kSizes.hidden; ++i)
        for (int j = 0; j < kSizes.inter; ++j)
          want[i] += row.weights[k] * model.Part(0, row.ids[k], 2).At(i, j) * hidden[j];
    }
    for (int i = 0; i < kSizes.hidden; ++i) {
      error += (alone[r][i] - want[i]) * (alone[r][i] - want[i]);
      norm += want[i] * want[i];
    }
  }
  Check(std::sqrt(error / norm) < 3e-3, "experts obey their bound");
}

void TestManyTickets(Model& model, const std::vector<Bits>& alone, k2::Machine& machine, int rounds) {
  std::mt19937 random(3);
  constexpr int kSlots = 3;
  k2::Dispatcher dispatcher(model.store, machine, 8, kTopK, kSlots);
  std::vector<Ticket> flying;
  for (int round = 0; round < rounds; ++round) {
    while (flying.size() < kSlots) {
      std::vector<int> rows(random() % 9);  // none, too
      for (int& row : rows) row = static_cast<int>(random() % model.rows.size());
      flying.push_back(Submit(dispatcher, model, rows));
    }
    CheckRefused([&] { dispatcher.Acquire(); }, "all slots of the dispatcher are in flight");
    for (size_t left = random() % 3; flying.size() > left;) {
      const size_t next = random() % flying.size();  // in any order
      CheckOk(dispatcher, flying[next], alone);
      flying.erase(flying.begin() + static_cast<ptrdiff_t>(next));
    }
  }
  for (const Ticket& ticket : flying) CheckOk(dispatcher, ticket, alone);
  Check(model.Unpinned(), "what was collected is not pinned");
}

void TestManyRows(Model& model, const std::vector<Bits>& alone, k2::Machine& machine) {
  k2::Dispatcher dispatcher(model.store, machine, kMaxRows, kTopK, 1);
  for (int count : {64, 65, kMaxRows}) {
    CheckOk(dispatcher, Submit(dispatcher, model, std::vector<int>(count, 0)), alone);
    std::vector<int> mixed(count);
    for (int i = 0; i < count; ++i) mixed[i] = i * 5 % static_cast<int>(model.rows.size());
    CheckOk(dispatcher, Submit(dispatcher, model, mixed), alone);
  }
}

void TestErrors(Model& model, const std::vector<Bits>& alone, k2::Machine& machine) {
  CheckRefused([] { k2::ExpertStore({1, 1, 48, 32}); }, "multiples of 32");
  CheckRefused([] { k2::ExpertStore({0, 1, 32, 32}); }, "must be positive");
  CheckRefused([&] { k2::Dispatcher(model.store, machine, 0, kTopK, 1); }, "max_rows must lie in");
  CheckRefused([&] { k2::Dispatcher(model.store, machine, 1, 6, 1); }, "top_k must lie in");
  CheckRefused([&] { k2::Dispatcher(model.store, machine, 1, 1, 17); }, "slots must lie in");
  CheckRefused([&] { model.store.Put(0, 5, {}); }, "expert 5 is out of range");

  k2::Dispatcher dispatcher(model.store, machine, 4, kTopK, 2);
  CheckRefused([&] { dispatcher.Submit(0, 0, 1); }, "submit needs a slot from Acquire");
  for (int32_t wrong : {5, -2, 1 << 30}) {
    const int slot = dispatcher.Acquire();
    Fill(dispatcher, slot, 0, model.rows[0]);
    Fill(dispatcher, slot, 1, model.rows[1]);
    dispatcher.buffers(slot).ids[kTopK + 1] = wrong;
    CheckRefused([&] { dispatcher.Submit(slot, 0, 2); }, "is out of range");
  }
  for (int layer : {-1, 2, 1 << 30})
    CheckRefused([&] { Submit(dispatcher, model, {0, 1}, layer); }, "is out of range");
  CheckRefused([&] { Submit(dispatcher, model, {0, 1}, 1); }, "layer 1 has no expert 4 loaded");
  for (int rows : {5, -1, 1 << 30}) {
    const int slot = dispatcher.Acquire();
    CheckRefused([&] { dispatcher.Submit(slot, 0, rows); }, "rows must lie in 0..4");
  }
  Check(model.Unpinned(), "what was refused is not pinned");

  const Ticket ticket = Submit(dispatcher, model, {0, 1});
  Check(model.store.pins(0, 0) == 1 && model.store.pins(0, 4) == 1, "what a ticket reads is pinned");
  CheckRefused([&] { model.Put(0, 0); }, "cannot be moved");
  uint8_t status[4];
  CheckRefused([&] { dispatcher.Collect(ticket.slot, ticket.epoch + 1, 2, status); }, "is not outstanding");
  CheckRefused([&] { dispatcher.Collect(ticket.slot, ticket.epoch, 3, status); }, "is not outstanding");
  CheckRefused([&] { dispatcher.Collect(1 - ticket.slot, ticket.epoch, 2, status); }, "is not outstanding");
  CheckOk(dispatcher, ticket, alone);
  CheckRefused([&] { dispatcher.Collect(ticket.slot, ticket.epoch, 2, status); }, "is not outstanding");
  CheckOk(dispatcher, Submit(dispatcher, model, {5, 0, 6}), alone);
  model.Put(0, 0);
}

// The ring of the pool may be full of others' jobs: the ticket is refused, and nothing of it stays.
void TestFullPool(Model& model, const std::vector<Bits>& alone, k2::Machine& machine) {
  k2::Dispatcher dispatcher(model.store, machine, 4, kTopK, 1);
  std::vector<k2::Job> jobs(64);
  for (k2::Job& job : jobs) {
    job.Reset(nullptr, {{[](void*, int, int) {}, 1}});
    machine.pool().Submit(&job);
  }
  CheckRefused([&] { Submit(dispatcher, model, {0}); }, "64 jobs are outstanding");
  Check(model.Unpinned(), "what was refused is not pinned");
  for (k2::Job& job : jobs)
    Check(machine.pool().Wait(&job, std::chrono::milliseconds(60000)), "each completes");
  CheckOk(dispatcher, Submit(dispatcher, model, {0}), alone);
}

void TestAbort(Model& model, k2::Machine& machine, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    k2::Dispatcher dispatcher(model.store, machine, 8, kTopK, 2);
    std::atomic<bool> begun{false};
    std::thread other([&] {
      while (!begun.load()) std::this_thread::yield();
      std::this_thread::sleep_for(std::chrono::microseconds(round % 16 * 20));
      dispatcher.Abort();
    });
    bool poisoned = false;
    for (int i = 0; !poisoned; ++i) {
      const Ticket a = Submit(dispatcher, model, {0, 1, 2, 3});
      const Ticket b = Submit(dispatcher, model, {6, 7});
      begun.store(true);
      const std::vector<uint8_t> first = Collect(dispatcher, a);
      const std::vector<uint8_t> second = Collect(dispatcher, b);
      Check(All(first, RowStatus::kOk) || All(second, RowStatus::kPoisoned), "an abort lasts");
      poisoned = All(second, RowStatus::kPoisoned);
      Check(poisoned || All(second, RowStatus::kOk), "a ticket is poisoned as a whole");
    }
    other.join();
    Check(All(Collect(dispatcher, Submit(dispatcher, model, {0})), RowStatus::kPoisoned),
          "later tickets too");
    Check(model.Unpinned(), "what was aborted is not pinned");
  }
}

void TestEndOutstanding(Model& model, const std::vector<Bits>& alone, k2::Machine& machine, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    {
      k2::Dispatcher dispatcher(model.store, machine, 8, kTopK, 4);
      Submit(dispatcher, model, {0, 1, 2, 3, 4, 5, 6, 7});
      const Ticket second = Submit(dispatcher, model, {6});
      Submit(dispatcher, model, {});
      dispatcher.Acquire();  // filled, never submitted
      if (round % 2 == 0) CheckOk(dispatcher, second, alone);
    }
    Check(model.Unpinned(), "a dispatcher that ended pins nothing");
  }
}

// Other threads' linears share the pool with the tickets.
void TestWithLinears(Model& model, const std::vector<Bits>& alone, k2::Machine& machine, int rounds) {
  std::thread other([&] {
    std::mt19937 random(1);
    constexpr int kTokens = 3, kRows = 33, kColumns = 100;
    std::vector<bf16> x(kTokens * kColumns), w(kRows * kColumns);
    for (bf16& value : x) value = RandomValue(random);
    for (bf16& value : w) value = RandomValue(random);
    std::vector<float> first(kTokens * kRows), y(kTokens * kRows);
    machine.Linear({x.data(), kTokens, kColumns}, {w.data(), kRows, kColumns, kColumns}, first.data());
    for (int i = 0; i < rounds; ++i) {
      machine.Linear({x.data(), kTokens, kColumns}, {w.data(), kRows, kColumns, kColumns}, y.data());
      Check(SameBits(y, first), "a linear has the same bits beside tickets");
    }
  });
  TestManyTickets(model, alone, machine, rounds);
  other.join();
}

// Heads, strides and tiles of the linears against float64: the bounds of docs/numerics.md.
void TestLinears(k2::Machine& machine) {
  std::mt19937 random(2);
  for (int tokens : {0, 1, 3, 64, 65})
    for (int rows : {1, 2, 17, 130})
      for (int heads : {1, 3}) {
        const int columns = 70, row_stride = columns + 3, x_stride = heads * columns + 5;
        const ptrdiff_t head_stride = static_cast<ptrdiff_t>(rows) * row_stride;
        std::vector<bf16> ws(static_cast<size_t>(heads * head_stride - 3));
        std::vector<bf16> xs(tokens == 0 ? 0 : static_cast<size_t>(tokens) * x_stride - 5);
        for (bf16& value : ws) value = RandomValue(random);
        for (bf16& value : xs) value = RandomValue(random);
        const auto w = Exact(ws), x = Exact(xs);
        const auto y = std::make_unique<float[]>(static_cast<size_t>(tokens) * heads * rows);
        const k2::Weights weights{w.get(), rows, columns, row_stride, heads, head_stride};
        machine.Linear({x.get(), tokens, x_stride, columns}, weights, y.get());
        for (int t = 0; t < tokens; ++t)
          for (int h = 0; h < heads; ++h)
            for (int r = 0; r < rows; ++r) {
              double want = 0, magnitude = 0;
              for (int i = 0; i < columns; ++i) {
                const double term = static_cast<double>(k2::ToFloat(
                                        w[h * head_stride + static_cast<ptrdiff_t>(r) * row_stride + i])) *
                                    k2::ToFloat(x[static_cast<ptrdiff_t>(t) * x_stride + h * columns + i]);
                want += term;
                magnitude += std::abs(term);
              }
              const double got = y[(static_cast<ptrdiff_t>(t) * heads + h) * rows + r];
              Check(std::abs(got - want) <= (2 * 3 + 4) * 1.01 * 0x1p-24 * magnitude,
                    "a linear obeys its bound");
            }

        // Transposed: x has a value per row of the weights.
        std::vector<bf16> vs(static_cast<size_t>(tokens) * heads * rows);
        for (bf16& value : vs) value = RandomValue(random);
        const auto v = Exact(vs);
        const auto z = std::make_unique<float[]>(static_cast<size_t>(tokens) * heads * columns);
        machine.LinearTransposed({v.get(), tokens, static_cast<ptrdiff_t>(heads) * rows, rows}, weights,
                                 z.get());
        for (int t = 0; t < tokens; ++t)
          for (int h = 0; h < heads; ++h)
            for (int c = 0; c < columns; ++c) {
              double want = 0, magnitude = 0;
              for (int r = 0; r < rows; ++r) {
                const double term = static_cast<double>(k2::ToFloat(
                                        w[h * head_stride + static_cast<ptrdiff_t>(r) * row_stride + c])) *
                                    k2::ToFloat(v[(static_cast<ptrdiff_t>(t) * heads + h) * rows + r]);
                want += term;
                magnitude += std::abs(term);
              }
              const double got = z[(static_cast<ptrdiff_t>(t) * heads + h) * columns + c];
              Check(std::abs(got - want) <= rows * 1.01 * 0x1p-24 * magnitude, "a transposed linear too");
            }
      }
}

// The bytes of an expert lie in a file that loses them: its rows say so, the others are fine.
void TestReadError(Model& model, const std::vector<Bits>& alone, k2::Machine& machine) {
  constexpr int kLost = 2;
  const Matrix& gate = model.Part(0, kLost, 0);
  std::FILE* file = std::tmpfile();
  Check(file != nullptr &&
            std::fwrite(gate.packed.get(), 1, gate.PackedBytes(), file) == gate.PackedBytes() &&
            std::fflush(file) == 0,
        "a file for an expert");
  void* map = mmap(nullptr, gate.PackedBytes(), PROT_READ, MAP_SHARED, fileno(file), 0);
  Check(map != MAP_FAILED, "a map of it");
  const int id = k2::FileMaps::Register(map, gate.PackedBytes(), fileno(file));
  k2::ExpertBytes bytes;
  for (int i = 0; i < 3; ++i) {
    bytes.packed[i] = model.Part(0, kLost, i).packed.get();
    bytes.scale[i] = model.Part(0, kLost, i).scale.get();
  }
  bytes.packed[0] = static_cast<const uint8_t*>(map);
  model.store.Put(0, kLost, bytes);

  k2::Dispatcher dispatcher(model.store, machine, 8, kTopK, 2);
  const std::vector<int> all = {0, 1, 2, 3, 4, 5, 6, 7};
  CheckOk(dispatcher, Submit(dispatcher, model, all), alone);
  Check(ftruncate(fileno(file), 0) == 0, "the file shrinks");
  for (int round = 0; round < 5; ++round) {
    const Ticket ticket = Submit(dispatcher, model, all);
    const std::vector<uint8_t> status = Collect(dispatcher, ticket);
    for (int i : all) {
      const Row& row = model.rows[i];
      const bool lost = row.ids[0] == kLost || row.ids[1] == kLost;
      Check(status[i] == static_cast<uint8_t>(lost ? RowStatus::kReadError : RowStatus::kOk),
            "rows whose expert is lost say so, no others");
      Check(lost || SameBits(Output(dispatcher, ticket.slot, i), alone[i]), "the others are fine");
    }
  }
  const auto x = std::make_unique<bf16[]>(32);
  float y[4];
  CheckRefused([&] { machine.Linear({x.get(), 1, 32}, {static_cast<const bf16*>(map), 4, 32, 32}, y); },
               "weights could not be read");
  Check(std::fseek(file, 0, SEEK_SET) == 0 &&
            std::fwrite(gate.packed.get(), 1, gate.PackedBytes(), file) == gate.PackedBytes() &&
            std::fflush(file) == 0 && k2::FileMaps::Restore(id, fileno(file)),
        "the file is whole again");
  CheckOk(dispatcher, Submit(dispatcher, model, all), alone);
  k2::FileMaps::Unregister(id);
  model.Put(0, kLost);
  CheckOk(dispatcher, Submit(dispatcher, model, all), alone);
  munmap(map, gate.PackedBytes());
  std::fclose(file);
}

}  // namespace

int main(int argc, char** argv) {
  const k2::test::Effort effort(argc, argv);
  for (const k2::KernelTable* table : k2::AvailableKernels()) {
    std::puts(table->name);
    Model model;
    std::vector<Bits> alone;
    Step("rows alone", [&] { alone = Alone(model, table->name); });
    Step("values", [&] { TestValues(model, alone); });
    for (int threads : {1, 2, 3}) {
      std::printf("%d threads\n", threads);
      k2::Machine machine(threads, table->name, {});
      Step("many tickets", [&] { TestManyTickets(model, alone, machine, effort.Rounds(200)); });
      Step("many rows", [&] { TestManyRows(model, alone, machine); });
      Step("errors", [&] { TestErrors(model, alone, machine); });
      Step("full pool", [&] { TestFullPool(model, alone, machine); });
      Step("abort", [&] { TestAbort(model, machine, effort.Rounds(40)); });
      Step("end with tickets outstanding",
           [&] { TestEndOutstanding(model, alone, machine, effort.Rounds(80)); });
      Step("beside linears", [&] { TestWithLinears(model, alone, machine, effort.Rounds(60)); });
      Step("linears", [&] { TestLinears(machine); });
      Step("a file that shrank", [&] { TestReadError(model, alone, machine); });
    }
  }
  std::puts("all held");
}
