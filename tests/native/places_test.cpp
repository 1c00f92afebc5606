// Experts in slots, with threads: streamed ones that leave and come back, slots that fill behind a running ticket,
// moves, copies, reads that fail, an end with reads under way. The bytes lie in a file at odd places; a mapped store tells what
// the results must be.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "experts/dispatch.h"
#include "experts/filler.h"

namespace {

using k2::bf16;
using k2::RowStatus;
using k2::test::Check;
using k2::test::CheckRefused;
using k2::test::Step;

constexpr k2::ExpertSizes kSizes = {3, 8, 160, 96};
constexpr int kTopK = 3;
constexpr int kMaxRows = 25;  // more results than wait for experts on their way

struct Ticket {
  int layer;
  int rows;
  std::vector<int32_t> ids;
  std::vector<float> weights;
  std::vector<bf16> x;
  std::vector<float> want;
};

// A file of experts, mapped; segments start at multiples of 8 bytes.
class Checkpoint {
 public:
  explicit Checkpoint(std::mt19937& random) {
    char name[] = "/var/tmp/k2hybrid-places-XXXXXX";
    descriptor_ = mkstemp(name);
    Check(descriptor_ >= 0, "a file for experts");
    path_ = name;
    std::vector<uint8_t> content(24);
    const int total = kSizes.layers * kSizes.experts;
    spans_.resize(total);
    for (k2::ExpertSpans& spans : spans_)
      for (int m = 0; m < 3; ++m) {
        const size_t weights = static_cast<size_t>(kSizes.hidden) * kSizes.inter;
        spans.packed[m] = {0, content.size()};
        for (size_t i = 0; i < weights / 2; ++i) content.push_back(static_cast<uint8_t>(random()));
        spans.scale[m] = {0, content.size()};
        for (size_t i = 0; i < weights / k2::kGroup; ++i) {
          const bf16 scale = k2::ToBf16(0.01f + static_cast<float>(random() % 100) / 2000.0f);
          content.push_back(static_cast<uint8_t>(scale & 255));
          content.push_back(static_cast<uint8_t>(scale >> 8));
        }
        content.resize((content.size() + 7) / 8 * 8 + 8 * (random() % 5));
      }
    bytes_ = content.size();
    Check(write(descriptor_, content.data(), bytes_) == static_cast<ssize_t>(bytes_),
          "the experts are written");
    fsync(descriptor_);
    map_ = static_cast<uint8_t*>(mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, descriptor_, 0));
    Check(map_ != MAP_FAILED, "a map of it");
  }
  ~Checkpoint() {
    munmap(map_, bytes_);
    close(descriptor_);
    unlink(path_.c_str());
  }

  void Give(k2::ExpertStore& store, bool located) const {
    if (located) store.AddSource(path_);
    for (int i = 0; i < kSizes.layers * kSizes.experts; ++i) {
      k2::ExpertBytes bytes;
      for (int m = 0; m < 3; ++m) {
        bytes.packed[m] = map_ + spans_[i].packed[m].offset;
        bytes.scale[m] = reinterpret_cast<const bf16*>(map_ + spans_[i].scale[m].offset);
      }
      store.Put(i / kSizes.experts, i % kSizes.experts, bytes);
      if (located) store.Locate(i / kSizes.experts, i % kSizes.experts, spans_[i]);
    }
  }

  // What a copy of an expert must be.
  std::vector<uint8_t> Bytes(int index) const {
    std::vector<uint8_t> bytes;
    const size_t weights = static_cast<size_t>(kSizes.hidden) * kSizes.inter;
    const auto add = [&](const k2::ExpertSpans::Span& span, size_t count) {
      bytes.insert(bytes.end(), map_ + span.offset, map_ + span.offset + count);
    };
    for (const auto& span : spans_[index].packed) add(span, weights / 2);
    for (const auto& span : spans_[index].scale) add(span, weights / k2::kGroup * sizeof(bf16));
    return bytes;
  }

 private:
  std::string path_;
  int descriptor_ = -1;
  size_t bytes_ = 0;
  uint8_t* map_ = nullptr;
  std::vector<k2::ExpertSpans> spans_;
};

k2::RowShards Shards(int nodes) {
  k2::RowShards shards;
  for (int node = 0; node < nodes; ++node) {
    shards.gate.push_back(kSizes.inter / 16 * node / nodes * 16);
    shards.down.push_back(kSizes.hidden / 16 * node / nodes * 16);
  }
  shards.gate.push_back(kSizes.inter);
  shards.down.push_back(kSizes.hidden);
  return shards;
}

// Rows whose result is as it must be, or lost; how many were lost.
int Run(k2::Dispatcher& dispatcher, Ticket& ticket, bool learn) {
  const int slot = dispatcher.Acquire();
  const k2::SlotBuffers buffers = dispatcher.buffers(slot);
  std::copy(ticket.x.begin(), ticket.x.end(), buffers.x);
  std::copy(ticket.ids.begin(), ticket.ids.end(), buffers.ids);
  std::copy(ticket.weights.begin(), ticket.weights.end(), buffers.weights);
  const uint64_t epoch = dispatcher.Submit(slot, ticket.layer, ticket.rows);
  std::vector<uint8_t> status(static_cast<size_t>(ticket.rows));
  dispatcher.Collect(slot, epoch, ticket.rows, status.data());
  const size_t values = static_cast<size_t>(ticket.rows) * kSizes.hidden;
  if (learn) ticket.want.assign(buffers.out, buffers.out + values);
  int lost = 0;
  for (int row = 0; row < ticket.rows; ++row) {
    if (status[row] != static_cast<uint8_t>(RowStatus::kOk)) {
      ++lost;
      continue;
    }
    const size_t at = static_cast<size_t>(row) * kSizes.hidden;
    Check(std::memcmp(buffers.out + at, ticket.want.data() + at, kSizes.hidden * sizeof(float)) == 0,
          "a row is the same bits wherever its experts lie");
  }
  return lost;
}

std::vector<Ticket> Tickets(const Checkpoint& checkpoint, int count, std::mt19937& random) {
  std::vector<Ticket> tickets;
  for (int i = 0; i < count; ++i) {
    const int rows = 1 + static_cast<int>(random() % (random() % 4 == 0 ? kMaxRows : 4));
    Ticket ticket{i % kSizes.layers, rows, {}, {}, {}, {}};
    for (int k = 0; k < ticket.rows * kTopK; ++k) {
      ticket.ids.push_back(static_cast<int32_t>(random() % (kSizes.experts + 1)) - 1);
      ticket.weights.push_back(static_cast<float>(random() % 100) / 100.0f);
    }
    for (int k = 0; k < ticket.rows * kSizes.hidden; ++k)
      ticket.x.push_back(k2::ToBf16(static_cast<float>(random() % 4001) / 1000.0f - 2.0f));
    tickets.push_back(std::move(ticket));
  }
  k2::ExpertStore store(kSizes);
  checkpoint.Give(store, false);
  k2::Machine machine(2, "", {});
  k2::Dispatcher dispatcher(store, machine, kMaxRows, kTopK, 1);
  for (Ticket& ticket : tickets) Check(Run(dispatcher, ticket, true) == 0, "nothing mapped is lost");
  return tickets;
}

std::vector<int> Groups(int nodes) {
  std::vector<int> groups;
  for (int node = 0; node < nodes; ++node) groups.push_back(node);
  groups.push_back(0);
  return groups;
}

std::vector<std::pair<int, int>> All() {
  std::vector<std::pair<int, int>> all;
  for (int layer = 0; layer < kSizes.layers; ++layer)
    for (int expert = 0; expert < kSizes.experts; ++expert) all.emplace_back(layer, expert);
  return all;
}

struct Place {
  Place(const Checkpoint& checkpoint, int nodes, int slots, bool streamed, const char* reader)
      : store(kSizes, Shards(nodes)), machine(nodes + 1, "", {}, Groups(nodes)) {
    checkpoint.Give(store, true);
    store.OpenSlots({slots, std::vector<int>(static_cast<size_t>(nodes), -1), "", ""}, {reader, 4, 4096},
                    streamed, slots % 2 == 0 ? 0.0 : 7.0);
    dispatcher = std::make_unique<k2::Dispatcher>(store, machine, kMaxRows, kTopK, 2);
  }
  k2::ExpertStore store;
  k2::Machine machine;
  std::unique_ptr<k2::Dispatcher> dispatcher;
};

// A thread that copies and borrows one expert after the other while others serve and move them.
class Copier {
 public:
  Copier(const Checkpoint& checkpoint, k2::ExpertStore& store)
      : thread_([&checkpoint, &store, this] {
          std::vector<uint8_t> to(static_cast<size_t>(store.expert_bytes()));
          do {
            for (const auto& [layer, expert] : All())
              wrong_ = wrong_ || !store.Copy(layer, expert, to.data()) ||
                       to != checkpoint.Bytes(layer * kSizes.experts + expert) ||
                       !Borrow(store, layer, expert, to);
          } while (!stop_.load());
        }) {}
  ~Copier() {
    stop_.store(true);
    thread_.join();
    Check(!wrong_, "a copy and a loan have the bytes of the file");
  }

 private:
  static bool Borrow(k2::ExpertStore& store, int layer, int expert, const std::vector<uint8_t>& wanted) {
    k2::Loan loan;
    if (!store.Lend(layer, expert, &loan)) return true;
    std::vector<uint8_t> found;
    for (const k2::MemorySpan& part : loan.parts) {
      const auto* begin = static_cast<const uint8_t*>(part.begin);
      found.insert(found.end(), begin, begin + part.bytes);
    }
    store.GiveBack(layer, expert);
    return found == wanted;
  }

  std::atomic<bool> stop_{false};
  bool wrong_ = false;
  std::thread thread_;
};

void TestStreamed(const Checkpoint& checkpoint, std::vector<Ticket>& tickets, int nodes, const char* reader) {
  for (int slots : {kSizes.experts, 2 * kSizes.experts + 1}) {
    Place place(checkpoint, nodes, slots, true, reader);
    k2::Filler filler(place.store, All(), std::vector<std::vector<int>>(static_cast<size_t>(nodes)), 2);
    const Copier copier(checkpoint, place.store);
    for (Ticket& ticket : tickets)
      Check(Run(*place.dispatcher, ticket, false) == 0, "nothing streamed is lost");
    Check(place.store.stats().misses > 0, "experts leave");
    CheckRefused([&] { place.store.OpenSlots({1, {-1}, "", ""}, {}, true, 0); }, "has its slots already");
  }
}

void TestFaults(const Checkpoint& checkpoint, std::vector<Ticket>& tickets, int nodes, const char* reader) {
  Place place(checkpoint, nodes, kSizes.experts + 3, true, reader);
  place.store.reader().faults.fail_every.store(11);
  place.store.reader().faults.short_every.store(3);
  int lost = 0;
  for (Ticket& ticket : tickets) lost += Run(*place.dispatcher, ticket, false);
  Check(lost > 0, "a read that fails loses rows");
  place.store.reader().faults.fail_every.store(0);
  for (Ticket& ticket : tickets) Check(Run(*place.dispatcher, ticket, false) == 0, "and only those");
}

void TestResident(const Checkpoint& checkpoint, std::vector<Ticket>& tickets, int nodes, const char* reader) {
  Place place(checkpoint, nodes, kSizes.layers * kSizes.experts, false, reader);
  for (int round = 0; round < 3; ++round) {
    k2::Filler filler(place.store, All(), std::vector<std::vector<int>>(static_cast<size_t>(nodes)),
                      1 + round % 2);
    std::atomic<bool> stop{false};
    std::thread mover([&] {
      std::mt19937 random(round);
      while (!stop.load()) {
        place.store.Release(static_cast<int>(random() % kSizes.layers),
                            static_cast<int>(random() % kSizes.experts));
        place.store.stats();
        std::this_thread::yield();
      }
    });
    const Copier copier(checkpoint, place.store);
    for (Ticket& ticket : tickets)
      Check(Run(*place.dispatcher, ticket, false) == 0, "nothing is lost meanwhile");
    stop.store(true);
    mover.join();
    if (round == 1) filler.Stop();
  }
  place.store.CloseSlots();
  for (Ticket& ticket : tickets) Check(Run(*place.dispatcher, ticket, false) == 0, "mapped again");
}

// Gate and up of an expert are told of before its down rows, and are whole then.
void TestHalves(const Checkpoint& checkpoint, int nodes, const char* reader) {
  k2::ExpertStore mapped(kSizes), store(kSizes, Shards(nodes));
  checkpoint.Give(mapped, false);
  checkpoint.Give(store, true);
  store.OpenSlots({kSizes.experts, std::vector<int>(static_cast<size_t>(nodes), -1), "", ""},
                  {reader, 1, 4096}, true, 0);
  const auto same = [&](const k2::Int4Matrix& part, const k2::Int4Matrix& whole, int first,
                        const char* what) {
    for (int row = 0; row < part.out; ++row)
      Check(std::memcmp(part.PackedRow(row), whole.PackedRow(first + row), part.in / 2) == 0 &&
                std::memcmp(part.ScaleRow(row), whole.ScaleRow(first + row), part.in / k2::kGroup * 2) == 0,
            what);
  };
  int halves = 0;
  for (int i = 0; i < 2 * kSizes.layers * kSizes.experts; ++i) {
    const int layer = i / kSizes.experts % kSizes.layers, expert = i % kSizes.experts;
    k2::ExpertView view, want;
    k2::ExpertView *views[] = {&view}, *wanted[] = {&want};
    Check(store.Pin(layer, &expert, 1, views) == 1, "each is asked for after all others");
    mapped.Pin(layer, &expert, 1, wanted);
    const k2::RowShards& shards = store.layout().shards();
    k2::Arrival last = k2::Arrival::kOnItsWay;
    while (last != k2::Arrival::kHere) {
      const k2::Arrival now = store.arrival(layer, expert);
      Check(now >= last && now != k2::Arrival::kLost, "what has arrived stays");
      last = now;
      if (now == k2::Arrival::kOnItsWay) continue;
      halves += now == k2::Arrival::kGateUp;
      for (int node = 0; node < nodes; ++node) {
        same(view.gate[node], want.gate[0], shards.gate[node], "gate is whole");
        same(view.up[node], want.up[0], shards.gate[node], "up is whole");
        if (now == k2::Arrival::kHere)
          same(view.down[node], want.down[0], shards.down[node], "down is whole");
      }
    }
    store.Unpin(layer, expert);
    mapped.Unpin(layer, expert);
  }
  std::printf("%d halves seen\n", halves);
}

void TestEnd(const Checkpoint& checkpoint, std::vector<Ticket>& tickets, int nodes, const char* reader) {
  for (int round = 0; round < 10; ++round) {
    Place place(checkpoint, nodes, kSizes.layers * kSizes.experts, round % 2 == 0, reader);
    k2::Filler filler(place.store, All(), std::vector<std::vector<int>>(static_cast<size_t>(nodes)), 2);
    if (round % 3 == 0) Run(*place.dispatcher, tickets[static_cast<size_t>(round)], false);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const k2::test::Effort effort(argc, argv);
  std::mt19937 random(5);
  const Checkpoint checkpoint(random);
  std::vector<Ticket> tickets = Tickets(checkpoint, effort.Rounds(120), random);
  const bool uring = k2::OpenUring({}) != nullptr;
  for (const char* reader : {"threads", "uring"})
    for (int nodes : {1, 3}) {
      if (!uring && std::strcmp(reader, "uring") == 0) continue;
      std::printf("%s, %d nodes\n", reader, nodes);
      Step("streamed", [&] { TestStreamed(checkpoint, tickets, nodes, reader); });
      Step("halves", [&] { TestHalves(checkpoint, nodes, reader); });
      Step("faults", [&] { TestFaults(checkpoint, tickets, nodes, reader); });
      Step("resident", [&] { TestResident(checkpoint, tickets, nodes, reader); });
      Step("end", [&] { TestEnd(checkpoint, tickets, nodes, reader); });
    }
  std::puts("all held");
}
