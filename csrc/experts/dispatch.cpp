#include "experts/dispatch.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "cpu/fault.h"

namespace k2 {
namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kWatchdog = std::chrono::milliseconds(800);  // an error is promised within a second
constexpr int kTokenTile = 64;  // rows of one expert whose results fit a worker's scratch
constexpr int kPrepareRows = 8;
// The most rows of a chunk: the longer a stream, the less its beginnings cost.
constexpr int kGateRows = 512;
constexpr int kDownRows = 896;
// Weights that several tiles of tokens pass by stay in a core's L2.
constexpr int kPanelBytes = 448 << 10;
constexpr int kFewTokens = 4;  // one tile of the kernels
// Results of down projections that wait for experts on their way: those of a decode step, not of a prefill.
constexpr int kEarlyResults = kTokenTile;
// A disk that has not brought an expert by then will not.
constexpr auto kReadPatience = std::chrono::seconds(30);

constexpr size_t kLine = 64;
constexpr size_t kPage = 64 << 10;  // the largest base page of a CPU that carries a GPU

// Aligned to cache lines, or to pages that nothing else lies in; zeroed once.
template <typename T, size_t kAlign = kLine>
class Buffer {
 public:
  explicit Buffer(size_t count)
      : data_(
            static_cast<T*>(std::aligned_alloc(kAlign, (count * sizeof(T) + kAlign - 1) / kAlign * kAlign))) {
    if (data_ == nullptr) throw std::bad_alloc();
    std::memset(data_, 0, count * sizeof(T));
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }

 private:
  T* data_;
};

constexpr int kRowStep = 16;  // rows of a chunk come in whole registers; sizes are multiples of 32

// Rows of a chunk, so that each thread gets at least `chunks` of them where there are rows enough: the last chunk is
// what others wait for.
int ChunkRows(int rows, int threads, int chunks, int most) {
  return std::clamp(rows / (chunks * threads) / kRowStep * kRowStep, kRowStep, most);
}

// Rows of weights with `in` columns that are read together for `tokens` tokens.
int PanelRows(int in, int tokens, int rows) {
  return tokens <= kFewTokens ? rows : std::max(kRowStep, kPanelBytes / (in / 2) / kRowStep * kRowStep);
}

// After it was read.
bool Unreadable(const Int4Matrix& matrix) {
  const auto bytes = [](const void* from, const void* to) {
    return static_cast<size_t>(static_cast<const char*>(to) - static_cast<const char*>(from));
  };
  return FileMaps::Failed(matrix.packed, bytes(matrix.packed, matrix.PackedRow(matrix.out))) ||
         FileMaps::Failed(matrix.scale, bytes(matrix.scale, matrix.ScaleRow(matrix.out)));
}

}  // namespace

struct Dispatcher::Slot {
  enum State { kFree, kFilling, kRunning, kStuck };

  Slot(Dispatcher& owner, const ExpertSizes& sizes, int max_rows, int top_k)
      : dispatcher(owner),
        x(static_cast<size_t>(max_rows) * sizes.hidden),
        prepared(static_cast<size_t>(max_rows) * PreparedSize(sizes.hidden)),
        hidden(static_cast<size_t>(max_rows) * top_k * PreparedSize(sizes.inter)),
        ids(static_cast<size_t>(max_rows) * top_k),
        weights(static_cast<size_t>(max_rows) * top_k),
        out(static_cast<size_t>(max_rows) * sizes.hidden),
        taken(static_cast<size_t>(max_rows) * top_k),
        first(sizes.experts + 1),
        assignment(static_cast<size_t>(max_rows) * top_k),
        groups(sizes.experts),
        failed(sizes.experts) {}

  struct Group {
    int expert = 0;
    int begin = 0;  // in `assignment`
    int end = 0;
    bool gated = false;  // its SwiGLU outputs are there, or made by the job under way
    bool early = false;  // so are the results of its down projection, in `early`
    ExpertView view;
  };

  Dispatcher& dispatcher;
  Buffer<bf16, kPage> x;
  Buffer<bf16> prepared;  // x in the kernels' order
  Buffer<bf16> hidden;    // SwiGLU outputs by position in `assignment`, in the kernels' order
  Buffer<int32_t, kPage> ids;
  Buffer<float, kPage> weights;
  Buffer<float, kPage> out;
  std::vector<int32_t> taken;  // ids as Submit found them: a producer that was let go may write new ones
  std::vector<int> first;
  std::vector<int> assignment;  // row * top_k + k, grouped by ascending expert
  std::vector<Group> groups;    // the first `group_count`
  int group_count = 0;
  std::vector<std::atomic<bool>> failed;  // by group
  std::vector<int> absent;                // groups on their way, wholly or in part
  std::vector<float> early;               // [position in `assignment`, hidden], made for the first miss
  // What the job under way computes.
  std::vector<int> gates;  // SwiGLU outputs of these groups
  std::vector<int> downs;  // results of these groups into `early`
  bool last = false;       // all results that are not in `early`, and the weighted sum
  Job job;
  State state = kFree;
  uint64_t epoch = 0;
  int layer = 0;
  int rows = 0;
  int misses = 0;
  int gate_rows = 0;    // of a chunk
  int gate_chunks = 0;  // of a group on one node
  Clock::time_point submitted;
};

Dispatcher::Dispatcher(ExpertStore& store, Machine& machine, int max_rows, int top_k, int slots)
    : store_(store), machine_(machine), max_rows_(max_rows), top_k_(top_k) {
  const ExpertSizes& sizes = store.sizes();
  Require(max_rows >= 1 && max_rows <= 1 << 16, "max_rows must lie in 1..65536");
  Require(top_k >= 1 && top_k <= sizes.experts, "top_k must lie in 1..experts");
  Require(slots >= 1 && slots <= 16, "slots must lie in 1..16");
  const int threads = machine.pool().threads();
  for (int node = 0; node < nodes(); ++node) {
    const RowShards& shards = store.layout().shards();
    most_gate_rows_ = std::max(most_gate_rows_, shards.gate[node + 1] - shards.gate[node]);
    most_down_rows_ = std::max(most_down_rows_, shards.down[node + 1] - shards.down[node]);
  }
  node_threads_ = std::max(1, threads / nodes());
  down_rows_ = ChunkRows(most_down_rows_, node_threads_, 4, kDownRows);
  for (int i = 0; i < slots; ++i) slots_.push_back(std::make_unique<Slot>(*this, sizes, max_rows, top_k));
  scratch_.resize(threads);
  for (auto& scratch : scratch_) scratch.resize(kTokenTile * std::max(2 * kGateRows, kDownRows));
}

Dispatcher::~Dispatcher() {
  Abort();
  for (auto& slot : slots_)
    while (slot->state != Slot::kFree && slot->state != Slot::kFilling) {
      if (machine_.pool().Wait(&slot->job, kWatchdog)) Retire(*slot);
    }
}

SlotBuffers Dispatcher::buffers(int slot) const {
  const Slot& s = *slots_.at(slot);
  return {s.x.get(), s.ids.get(), s.weights.get(), s.out.get()};
}

int Dispatcher::Acquire() {
  for (const auto& slot : slots_)
    if (slot->state == Slot::kStuck && machine_.pool().Retire(&slot->job)) Retire(*slot);
  for (size_t i = 0; i < slots_.size(); ++i) {
    Slot& slot = *slots_[i];
    if (slot.state == Slot::kFree) {
      slot.state = Slot::kFilling;
      return static_cast<int>(i);
    }
  }
  throw Error("all slots of the dispatcher are in flight; collect a ticket first");
}

void Dispatcher::Group(Slot& slot, int layer, int rows) {
  const int experts = store_.sizes().experts;
  const int count = rows * top_k_;
  std::copy_n(slot.ids.get(), count, slot.taken.begin());
  const int32_t* ids = slot.taken.data();
  std::fill(slot.first.begin(), slot.first.end(), 0);
  for (int i = 0; i < count; ++i) {
    Require(ids[i] >= -1 && ids[i] < experts, "expert id " + std::to_string(ids[i]) + " is out of range");
    if (ids[i] >= 0) ++slot.first[ids[i] + 1];
  }
  for (int e = 0; e < experts; ++e) slot.first[e + 1] += slot.first[e];
  slot.group_count = 0;
  for (int e = 0; e < experts; ++e) {
    if (slot.first[e] == slot.first[e + 1]) continue;
    Slot::Group& group = slot.groups[slot.group_count];
    group.expert = e;
    group.begin = slot.first[e];
    group.end = slot.first[e + 1];
    group.gated = group.early = false;
    slot.failed[slot.group_count++].store(false, std::memory_order_relaxed);
  }
  for (int i = 0; i < count; ++i)
    if (ids[i] >= 0) slot.assignment[slot.first[ids[i]]++] = i;
  std::vector<int> chosen;
  std::vector<ExpertView*> views;
  for (int g = 0; g < slot.group_count; ++g) {
    chosen.push_back(slot.groups[g].expert);
    views.push_back(&slot.groups[g].view);
  }
  slot.layer = layer;
  try {
    slot.misses = store_.Pin(layer, chosen.data(), slot.group_count, views.data());
  } catch (...) {
    slot.group_count = 0;
    throw;
  }
  slot.absent.resize(slot.group_count);
  std::iota(slot.absent.begin(), slot.absent.end(), 0);
}

uint64_t Dispatcher::Submit(int index, int layer, int rows) {
  Slot& slot = *slots_.at(index);
  Require(slot.state == Slot::kFilling, "submit needs a slot from Acquire");
  slot.state = Slot::kFree;
  Require(rows >= 0 && rows <= max_rows_,
          "rows must lie in 0.." + std::to_string(max_rows_) + ", not " + std::to_string(rows));
  Group(slot, layer, rows);
  slot.rows = rows;
  slot.submitted = Clock::now();
  try {
    Look(slot, false);
    Start(slot, (rows + kPrepareRows - 1) / kPrepareRows);
  } catch (...) {
    Retire(slot);
    throw;
  }
  slot.state = Slot::kRunning;
  return ++slot.epoch;
}

bool Dispatcher::Look(Slot& slot, bool late) {
  slot.gates.clear();
  slot.downs.clear();
  const size_t before = slot.absent.size();
  const auto settled = [&](int g) {
    Slot::Group& group = slot.groups[g];
    const Arrival arrival = store_.arrival(slot.layer, group.expert);
    if (arrival == Arrival::kLost || (late && arrival != Arrival::kHere)) {
      slot.failed[g].store(true, std::memory_order_relaxed);
      return true;
    }
    if (arrival == Arrival::kOnItsWay) return false;
    if (!group.gated) slot.gates.push_back(g);
    group.gated = true;
    if (arrival == Arrival::kHere) slot.downs.push_back(g);
    return arrival == Arrival::kHere;
  };
  std::erase_if(slot.absent, settled);
  slot.last = slot.absent.empty();
  const bool fit = slot.group_count == 0 || slot.groups[slot.group_count - 1].end <= kEarlyResults;
  if (slot.last || !fit) slot.downs.clear();
  if (!slot.downs.empty()) slot.early.resize(static_cast<size_t>(kEarlyResults) * store_.sizes().hidden);
  for (const int g : slot.downs) slot.groups[g].early = true;
  return slot.absent.size() < before || !slot.gates.empty();
}

void Dispatcher::Start(Slot& slot, int prepare_chunks) {
  const int gates = static_cast<int>(slot.gates.size());
  slot.gate_rows =
      std::min(ChunkRows(std::max(1, gates) * most_gate_rows_, node_threads_, 8, kGateRows), most_gate_rows_);
  slot.gate_chunks = (most_gate_rows_ + slot.gate_rows - 1) / slot.gate_rows;
  const bool down = slot.rows > 0 && (slot.last || !slot.downs.empty());
  slot.job.Reset(&slot, {{RunPrepare, prepare_chunks},
                         {RunGateUp, slot.gate_chunks * gates, nodes()},
                         {RunDown, down ? (most_down_rows_ + down_rows_ - 1) / down_rows_ : 0, nodes()}});
  machine_.pool().Submit(&slot.job);
}

bool Dispatcher::Await(Slot& slot) {
  for (uint32_t seen = store_.arrivals(); !abort_.load(std::memory_order_relaxed);) {
    // A slow disk is not a stuck one.
    if (Look(slot, Clock::now() - std::max(slot.submitted, store_.last_arrival()) > kReadPatience))
      return true;
    seen = store_.WaitArrival(seen);
  }
  return false;
}

bool Dispatcher::Finish(Slot& slot) {
  for (;;) {
    if (!machine_.pool().Wait(&slot.job, kWatchdog)) return false;
    if (slot.last || slot.job.error() != nullptr || !Await(slot)) return true;
    Start(slot, 0);
  }
}

void Dispatcher::RunPrepare(void* context, int chunk, int) {
  Slot& slot = *static_cast<Slot*>(context);
  const int hidden = slot.dispatcher.store_.sizes().hidden;
  const int end = std::min(slot.rows, (chunk + 1) * kPrepareRows);
  for (int row = chunk * kPrepareRows; row < end; ++row)
    slot.dispatcher.machine_.kernels().prepare(
        slot.x.get() + static_cast<ptrdiff_t>(row) * hidden, hidden,
        slot.prepared.get() + static_cast<ptrdiff_t>(row) * PreparedSize(hidden));
}

void Dispatcher::RunGateUp(void* context, int chunk, int worker) {
  Slot& slot = *static_cast<Slot*>(context);
  Dispatcher& self = slot.dispatcher;
  if (self.abort_.load(std::memory_order_relaxed)) return;
  const ExpertSizes& sizes = self.store_.sizes();
  const KernelTable& kernels = self.machine_.kernels();
  const int chunks = slot.gate_chunks * static_cast<int>(slot.gates.size());
  const int node = chunk / chunks;
  const int g = slot.gates[chunk % chunks / slot.gate_chunks];
  const Slot::Group& group = slot.groups[g];
  const Int4Matrix &gate_rows = group.view.gate[node], &up_rows = group.view.up[node];
  const int begin_row = chunk % slot.gate_chunks * slot.gate_rows;
  const int rows = std::min(slot.gate_rows, gate_rows.out - begin_row);
  if (rows <= 0) return;
  const int row = self.store_.layout().shards().gate[node] + begin_row;  // of all nodes' rows
  float* gate = self.scratch_[worker].data();
  float* up = gate + kTokenTile * kGateRows;
  for (int begin = group.begin; begin < group.end; begin += kTokenTile) {
    const int tokens = std::min(kTokenTile, group.end - begin);
    const bf16* x[kTokenTile];
    for (int t = 0; t < tokens; ++t)
      x[t] = slot.prepared.get() +
             static_cast<ptrdiff_t>(slot.assignment[begin + t] / self.top_k_) * PreparedSize(sizes.hidden);
    slot.job.Beat();
    const int panel = PanelRows(sizes.hidden, tokens, rows);
    for (int top = 0; top < rows; top += panel) {
      const int count = std::min(panel, rows - top);
      kernels.int4_rows(gate_rows, begin_row + top, count, x, tokens, gate + top, kGateRows);
      kernels.int4_rows(up_rows, begin_row + top, count, x, tokens, up + top, kGateRows);
    }
    for (int t = 0; t < tokens; ++t) {
      bf16* h = slot.hidden.get() + static_cast<ptrdiff_t>(begin + t) * PreparedSize(sizes.inter);
      bf16 plain[kGateRows];
      kernels.swiglu(gate + t * kGateRows, up + t * kGateRows, rows, plain);
      if (rows % kBlock == 0 && row % kBlock == 0) {
        kernels.prepare(plain, rows, h + row);
      } else {
        for (int r = 0; r < rows; ++r) h[PreparedIndex(row + r)] = plain[r];
      }
    }
  }
  if (Unreadable(gate_rows) || Unreadable(up_rows)) slot.failed[g].store(true, std::memory_order_relaxed);
}

void Dispatcher::RunDown(void* context, int chunk, int worker) {
  Slot& slot = *static_cast<Slot*>(context);
  Dispatcher& self = slot.dispatcher;
  if (self.abort_.load(std::memory_order_relaxed)) return;
  const ExpertSizes& sizes = self.store_.sizes();
  const RowShards& shards = self.store_.layout().shards();
  const int chunks = (self.most_down_rows_ + self.down_rows_ - 1) / self.down_rows_;
  const int node = chunk / chunks;
  const int begin_row = chunk % chunks * self.down_rows_;
  const int row = shards.down[node] + begin_row;  // of all nodes' rows
  const int rows = std::min(self.down_rows_, shards.down[node + 1] - row);
  if (rows <= 0) return;
  const KernelTable& kernels = self.machine_.kernels();
  const auto compute = [&](const Slot::Group& group, int begin, int tokens, float* y, int ldy) {
    const Int4Matrix& down_rows = group.view.down[node];
    const bf16* h[kTokenTile];
    for (int t = 0; t < tokens; ++t)
      h[t] = slot.hidden.get() + static_cast<ptrdiff_t>(begin + t) * PreparedSize(sizes.inter);
    slot.job.Beat();
    const int panel = PanelRows(sizes.inter, tokens, rows);
    for (int top = 0; top < rows; top += panel)
      kernels.int4_rows(down_rows, begin_row + top, std::min(panel, rows - top), h, tokens, y + top, ldy);
  };
  const auto check = [&](int g) {
    if (Unreadable(slot.groups[g].view.down[node])) slot.failed[g].store(true, std::memory_order_relaxed);
  };
  const auto early = [&](int position) {
    return slot.early.data() + static_cast<ptrdiff_t>(position) * sizes.hidden + row;
  };
  for (const int g : slot.downs) {
    const Slot::Group& group = slot.groups[g];
    compute(group, group.begin, group.end - group.begin, early(group.begin), sizes.hidden);
    check(g);
  }
  if (!slot.last) return;
  for (int t = 0; t < slot.rows; ++t)
    std::memset(slot.out.get() + static_cast<ptrdiff_t>(t) * sizes.hidden + row, 0, rows * sizeof(float));
  for (int g = 0; g < slot.group_count; ++g) {
    if (slot.failed[g].load(std::memory_order_relaxed)) continue;
    const Slot::Group& group = slot.groups[g];
    for (int begin = group.begin; begin < group.end; begin += kTokenTile) {
      const int tokens = std::min(kTokenTile, group.end - begin);
      const auto out = [&](int t) {
        return slot.out.get() +
               static_cast<ptrdiff_t>(slot.assignment[begin + t] / self.top_k_) * sizes.hidden + row;
      };
      const float* y = group.early ? early(begin) : self.scratch_[worker].data();
      const int ldy = group.early ? sizes.hidden : kDownRows;
      if (!group.early) {
        for (int t = 0; t < tokens; ++t)
          for (int r = 0; r < rows; r += 16) __builtin_prefetch(out(t) + r, 1);
        compute(group, begin, tokens, self.scratch_[worker].data(), kDownRows);
      }
      for (int t = 0; t < tokens; ++t)
        kernels.add_scaled(slot.weights.get()[slot.assignment[begin + t]],
                           y + static_cast<ptrdiff_t>(t) * ldy, rows, out(t));
    }
    if (!group.early) check(g);
  }
}

void Dispatcher::Retire(Slot& slot) {
  for (int g = 0; g < slot.group_count; ++g) store_.Unpin(slot.layer, slot.groups[g].expert);
  slot.group_count = 0;
  slot.state = Slot::kFree;
}

TicketReport Dispatcher::Collect(int index, uint64_t epoch, int rows, uint8_t* status) {
  Slot& slot = *slots_.at(index);
  Require(slot.state == Slot::kRunning && slot.epoch == epoch && slot.rows == rows,
          "this ticket is not outstanding");
  const Clock::time_point start = Clock::now();
  bool finished;
  try {
    finished = Finish(slot);
  } catch (...) {
    Retire(slot);
    throw;
  }
  const Clock::time_point end = Clock::now();
  const bool poisoned = !finished || abort_.load();
  std::memset(status, static_cast<int>(poisoned ? RowStatus::kPoisoned : RowStatus::kOk), slot.rows);
  TicketReport report;
  report.bytes = store_.expert_bytes() * slot.group_count;
  report.misses = slot.misses;
  report.busy_ns = std::chrono::nanoseconds(end - slot.submitted).count();
  report.wait_ns = std::chrono::nanoseconds(end - start).count();
  if (!poisoned)
    for (int g = 0; g < slot.group_count; ++g)
      if (slot.failed[g].load())
        for (int i = slot.groups[g].begin; i < slot.groups[g].end; ++i)
          status[slot.assignment[i] / top_k_] = static_cast<uint8_t>(RowStatus::kReadError);
  if (finished) {
    Retire(slot);
    if (slot.job.error() != nullptr) std::rethrow_exception(slot.job.error());
  } else {
    slot.state = Slot::kStuck;  // its buffers and pins stay until the stuck worker has left
  }
  return report;
}

void Dispatcher::Abort() { abort_.store(true); }

void Dispatcher::Resume() { abort_.store(false); }

uint64_t Dispatcher::Progress(int slot) const { return slots_.at(slot)->job.Progress(); }

}  // namespace k2
