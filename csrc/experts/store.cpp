#include "experts/store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "cpu/fault.h"

namespace k2 {
namespace {

// Gaps between the layers of a step, and between steps, are shorter.
constexpr auto kMoment = std::chrono::milliseconds(20);
constexpr auto kNap = std::chrono::milliseconds(20);
constexpr auto kPatience = std::chrono::seconds(30);  // with a disk that brings nothing

RowShards Whole(const ExpertSizes& sizes, const RowShards& shards) {
  return shards.gate.empty() ? RowShards{{0, sizes.inter}, {0, sizes.hidden}} : shards;
}

const ExpertSizes& Checked(const ExpertSizes& sizes) {
  Require(sizes.layers >= 1 && sizes.experts >= 1 && sizes.hidden >= kGroup && sizes.inter >= kGroup,
          "expert sizes must be positive");
  Require(sizes.hidden % kGroup == 0 && sizes.inter % kGroup == 0,
          "expert sizes must be multiples of 32, the group that shares a scale");
  return sizes;
}

int64_t NowNs() { return std::chrono::nanoseconds(ExpertStore::Clock::now().time_since_epoch()).count(); }

}  // namespace

ExpertStore::ExpertStore(const ExpertSizes& sizes, const RowShards& shards)
    : sizes_(Checked(sizes)), layout_(sizes, Whole(sizes, shards)) {
  entries_ = std::make_unique<Entry[]>(static_cast<size_t>(sizes.layers) * sizes.experts);
}

ExpertStore::~ExpertStore() {
  reader_.reset();  // waits for reads into the slots
}

int ExpertStore::Index(int layer, int expert) const {
  Require(layer >= 0 && layer < sizes_.layers, "layer " + std::to_string(layer) + " is out of range");
  Require(expert >= 0 && expert < sizes_.experts, "expert " + std::to_string(expert) + " is out of range");
  return layer * sizes_.experts + expert;
}

int64_t ExpertStore::expert_bytes() const {
  const int64_t weights = 3ll * sizes_.hidden * sizes_.inter;
  return weights / 2 + weights / kGroup * static_cast<int64_t>(sizeof(bf16));
}

int ExpertStore::AddSource(const std::string& path) {
  sources_.push_back(std::make_unique<Source>(path));
  return static_cast<int>(sources_.size()) - 1;
}

void ExpertStore::Put(int layer, int expert, const ExpertBytes& bytes) {
  Entry& entry = At(layer, expert);
  const std::lock_guard lock(mutex_);
  Require(entry.pins.load() == 0 && entry.slot < 0, "an expert that a ticket reads cannot be moved");
  for (int i = 0; i < 3; ++i)
    Require(bytes.packed[i] != nullptr && bytes.scale[i] != nullptr, "expert bytes must not be null");
  entry.bytes = bytes;
  entry.spans = {};
}

void ExpertStore::Locate(int layer, int expert, const ExpertSpans& spans) {
  Entry& entry = At(layer, expert);
  for (int i = 0; i < 3; ++i)
    for (const ExpertSpans::Span& span : {spans.packed[i], spans.scale[i]})
      Require(span.source >= 0 && span.source < static_cast<int>(sources_.size()),
              "an expert's file is unknown");
  const std::lock_guard lock(mutex_);
  Require(memory_ == nullptr, "the store has its slots already");
  entry.spans = spans;
}

bool ExpertStore::HasSpans() const {
  const int total = sizes_.layers * sizes_.experts;
  for (int i = 0; i < total; ++i)
    if (entries_[i].bytes.packed[0] != nullptr && !entries_[i].spans.known()) return false;
  return true;
}

void ExpertStore::OpenSlots(const SlotMemory::Options& memory, const ReaderOptions& reader, bool streamed,
                            double half_life) {
  Require(memory_ == nullptr, "the store has its slots already");
  Require(HasSpans(), "the experts' places in their files are unknown");
  Require(!streamed || memory.folder.empty(), "streamed experts do not outlive the process");
  auto made = std::make_unique<SlotMemory>(layout_, memory);
  reader_ = Reader::Open(reader);
  memory_ = std::move(made);
  streamed_ = streamed;
  recency_ = Recency(half_life);
  slots_ = std::vector<Slot>(static_cast<size_t>(memory.count));
  for (Slot& slot : slots_) {
    slot.store = this;
    slot.gate_up.context = slot.down.context = &slot;
    slot.gate_up.done = [](void* context, bool whole) {
      auto* own = static_cast<Slot*>(context);
      own->store->Arrived(*own, true, whole);
    };
    slot.down.done = [](void* context, bool whole) {
      auto* own = static_cast<Slot*>(context);
      own->store->Arrived(*own, false, whole);
    };
  }
  if (!memory_->lasting()) return;
  const int total = sizes_.layers * sizes_.experts;
  Require(memory.count == total, "slots that last are one for each expert");
  for (int i = 0; i < total; ++i)
    if (memory_->marked(i)) {
      slots_[i].entry = i;
      entries_[i].slot = i;
      entries_[i].state.store(kIn);
      ++stats_.filled;
    }
}

const SlotMemory& ExpertStore::memory() const {
  Require(memory_ != nullptr, "the store has no slots");
  return *memory_;
}

Reader& ExpertStore::reader() {
  Require(reader_ != nullptr, "the store has no slots");
  return *reader_;
}

void ExpertStore::CloseSlots() {
  if (memory_ == nullptr) return;
  Require(tickets_pins_.load() == 0, "experts that a ticket reads cannot be moved");
  std::unique_ptr<Reader> reader;
  {
    const std::lock_guard lock(mutex_);
    reader.swap(reader_);
  }
  reader.reset();  // waits for reads into the slots, which tell of their end; those not begun end as lost
  std::unique_lock lock(mutex_);
  arrived_.wait(lock, [&] { return copies_ == 0; });
  for (const Slot& slot : slots_)
    if (slot.entry >= 0) {
      entries_[slot.entry].slot = -1;
      entries_[slot.entry].state.store(kOut);
      entries_[slot.entry].score = Recency::kNever;
    }
  slots_.clear();
  memory_.reset();
  streamed_ = false;
  stats_ = {};
}

void ExpertStore::View(const Entry& entry, ExpertView* view) const {
  if (entry.slot < 0 || (!streamed_ && entry.state.load(std::memory_order_acquire) != kIn)) {
    layout_.ViewWhole(entry.bytes, view);
    return;
  }
  uint8_t* base[kMaxNodes];
  for (int node = 0; node < layout_.nodes(); ++node) base[node] = memory_->at(entry.slot, node);
  layout_.ViewSlot(entry.spans, base, view);
}

int ExpertStore::Pin(int layer, const int* experts, int count, ExpertView* const* views) {
  std::unique_lock lock(mutex_);
  last_ticket_ns_.store(NowNs(), std::memory_order_relaxed);
  for (int i = 0; i < count; ++i)
    Require(At(layer, experts[i]).bytes.packed[0] != nullptr,
            "layer " + std::to_string(layer) + " has no expert " + std::to_string(experts[i]) + " loaded");
  // Those that are here first: they must not make room for the others.
  for (int i = 0; i < count; ++i) At(layer, experts[i]).pins.fetch_add(1);
  std::vector<int> missing, victims;
  for (const auto begun = Clock::now();;) {
    missing.clear();
    for (int i = 0; i < count; ++i)
      if (streamed_ && At(layer, experts[i]).slot < 0) missing.push_back(Index(layer, experts[i]));
    const bool more = Victims(missing.size(), &victims);
    if (victims.size() == missing.size()) break;
    // Slots on their way to somebody else may leave once they are here.
    if (more && Clock::now() - std::max(begun, last_arrival()) > kPatience) break;  // the rest counts as lost
    if (!more) {
      for (int i = 0; i < count; ++i) At(layer, experts[i]).pins.fetch_sub(1);
      throw Error("all slots for experts are in use; give --expert-ram more");
    }
    arrived_.wait_for(lock, kNap);
  }
  ++now_;
  for (size_t i = 0; i < victims.size(); ++i) BeginFetch(victims[i], missing[i]);
  for (int i = 0; i < count; ++i) {
    Entry& entry = At(layer, experts[i]);
    if (streamed_) entry.score = recency_.Used(entry.score, now_);
    View(entry, views[i]);
  }
  tickets_pins_.fetch_add(count);
  stats_.misses += static_cast<int64_t>(missing.size());
  stats_.hits += count - static_cast<int64_t>(missing.size());
  return static_cast<int>(missing.size());
}

bool ExpertStore::Victims(size_t count, std::vector<int>* victims) const {
  victims->clear();
  if (count == 0) return false;
  bool filling = false;
  std::vector<std::pair<double, int>> found;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const int index = slots_[i].entry;
    if (index < 0) {
      found.emplace_back(Recency::kNever, static_cast<int>(i));
      continue;
    }
    const Entry& entry = entries_[index];
    if (entry.pins.load() != 0) continue;
    if (entry.copies != 0) {
      filling = true;  // it may leave as soon
      continue;
    }
    if (entry.state.load() == kIn) found.emplace_back(entry.score, static_cast<int>(i));
    filling = filling || OnItsWay(entry.state.load());
  }
  const size_t taken = std::min(count, found.size());
  std::partial_sort(found.begin(), found.begin() + static_cast<ptrdiff_t>(taken), found.end());
  for (size_t i = 0; i < taken; ++i) victims->push_back(found[i].second);
  return filling;
}

void ExpertStore::BeginFetch(int index, int to) {
  Slot& slot = slots_[index];
  if (slot.entry >= 0) Free(entries_[slot.entry]);
  Entry& entry = entries_[to];
  slot.entry = to;
  entry.slot = index;
  entry.state.store(kFilling, std::memory_order_release);
  slot.parts = 2;
  slot.whole = true;
  std::vector<Read> gate_up, down;
  for (int node = 0; node < layout_.nodes(); ++node) {
    uint8_t* base = memory_->at(index, node);
    layout_.AddReads(entry.spans, entry.bytes, sources_, node, base, {0, 1}, &gate_up);
    layout_.AddReads(entry.spans, entry.bytes, sources_, node, base, {2}, &down);
  }
  reader_->Submit(&slot.gate_up, gate_up, Urgency::kDemand);
  reader_->Submit(&slot.down, down, Urgency::kDemand);
}

void ExpertStore::Free(Entry& entry) {
  slots_[entry.slot].entry = -1;
  if (entry.state.load() == kIn) --stats_.filled;
  entry.slot = -1;
  entry.state.store(kOut, std::memory_order_release);
}

void ExpertStore::Arrived(Slot& slot, bool gate_up, bool whole) {
  {
    const std::lock_guard lock(mutex_);
    Entry& entry = entries_[slot.entry];
    slot.whole = slot.whole && whole;
    if (--slot.parts == 0) {
      Settle(entry, slot.whole);
    } else if (gate_up && whole) {
      entry.state.store(kGateUp, std::memory_order_release);
      Tell();
    }
  }
  arrived_.notify_all();
}

void ExpertStore::Tell() {
  last_arrival_ns_.store(NowNs(), std::memory_order_relaxed);
  arrivals_.fetch_add(1, std::memory_order_release);
}

void ExpertStore::Settle(Entry& entry, bool whole) {
  if (whole) {
    ++stats_.filled;
    memory_->Mark(entry.slot, true);
  } else {
    ++stats_.lost;
  }
  entry.state.store(whole ? kIn : kLost, std::memory_order_release);
  if (!whole && entry.pins.load() == 0) Free(entry);
  Tell();
}

void ExpertStore::Unpin(int layer, int expert) {
  Entry& entry = At(layer, expert);
  tickets_pins_.fetch_sub(1);
  last_ticket_ns_.store(NowNs(), std::memory_order_relaxed);
  if (entry.pins.fetch_sub(1) != 1) return;
  // While it is on its way `Arrived` may be telling of its loss right now: the lock decides who frees the slot.
  if (const uint8_t state = entry.state.load(); state == kIn || state == kOut) return;
  const std::lock_guard lock(mutex_);  // what was lost is asked for again by the next ticket
  if (entry.pins.load() == 0 && entry.state.load() == kLost) Free(entry);
}

int ExpertStore::pins(int layer, int expert) const { return At(layer, expert).pins.load(); }

Arrival ExpertStore::arrival(int layer, int expert) const {
  const uint8_t state = At(layer, expert).state.load(std::memory_order_acquire);
  if (!streamed_ || state == kIn) return Arrival::kHere;
  if (state == kGateUp) return Arrival::kGateUp;
  return state == kFilling ? Arrival::kOnItsWay : Arrival::kLost;  // out: late reads hold the slots
}

uint32_t ExpertStore::WaitArrival(uint32_t seen) {
  std::unique_lock lock(mutex_);
  arrived_.wait_for(lock, kNap, [&] { return arrivals() != seen; });
  return arrivals();
}

bool ExpertStore::busy() const {
  return tickets_pins_.load() > 0 || NowNs() - last_ticket_ns_.load(std::memory_order_relaxed) <
                                         std::chrono::nanoseconds(kMoment).count();
}

bool ExpertStore::in_slot(int layer, int expert) const {
  return At(layer, expert).state.load(std::memory_order_acquire) == kIn;
}

int ExpertStore::BeginFill(int layer, int expert) {
  const int index = Index(layer, expert);
  Entry& entry = entries_[index];
  const std::lock_guard lock(mutex_);
  Require(memory_ != nullptr, "the store has no slots");
  Require(entry.bytes.packed[0] != nullptr,
          "layer " + std::to_string(layer) + " has no expert " + std::to_string(expert) + " loaded");
  if (entry.slot >= 0) return -1;
  int slot = -1;
  if (memory_->lasting()) {
    slot = index;
  } else {
    const auto free = std::find_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.entry < 0; });
    if (free == slots_.end()) return -1;
    slot = static_cast<int>(free - slots_.begin());
  }
  slots_[slot].entry = index;
  entry.slot = slot;
  entry.state.store(kFilling, std::memory_order_release);
  return slot;
}

void ExpertStore::EndFill(int layer, int expert, bool whole) {
  Entry& entry = At(layer, expert);
  {
    const std::lock_guard lock(mutex_);
    Require(entry.state.load() == kFilling, "the expert is not being filled");
    Settle(entry, whole);
  }
  arrived_.notify_all();
}

std::vector<Read> ExpertStore::Reads(int layer, int expert, int slot, int node) const {
  const Entry& entry = At(layer, expert);
  std::vector<Read> reads;
  layout_.AddReads(entry.spans, entry.bytes, sources_, node, memory_->at(slot, node), {0, 1, 2}, &reads);
  return reads;
}

bool ExpertStore::Release(int layer, int expert) {
  Entry& entry = At(layer, expert);
  const std::lock_guard lock(mutex_);
  if (streamed_ || entry.pins.load() != 0 || entry.copies != 0 || entry.state.load() != kIn) return false;
  const int slot = entry.slot;
  memory_->Mark(slot, false);
  Free(entry);
  if (!slots_[slot].lent)
    for (int node = 0; node < layout_.nodes(); ++node) memory_->Forget(slot, node);
  return true;
}

std::vector<MemorySpan> ExpertStore::Parts(const ExpertView& view) const {
  std::vector<MemorySpan> parts;
  const auto add = [&](const void* from, const void* end) {
    parts.push_back(
        {from, static_cast<size_t>(static_cast<const char*>(end) - static_cast<const char*>(from))});
  };
  const std::array<Int4Matrix, kMaxNodes>* const matrices[] = {&view.gate, &view.up, &view.down};
  for (const auto* matrix : matrices)
    for (int node = 0; node < layout_.nodes(); ++node)
      add((*matrix)[node].packed, (*matrix)[node].PackedRow((*matrix)[node].out));
  for (const auto* matrix : matrices)
    for (int node = 0; node < layout_.nodes(); ++node)
      add((*matrix)[node].scale, (*matrix)[node].ScaleRow((*matrix)[node].out));
  return parts;
}

bool ExpertStore::Lend(int layer, int expert, Loan* loan) {
  Entry& entry = At(layer, expert);
  ExpertView view;
  {
    const std::lock_guard lock(mutex_);
    if (entry.state.load() != kIn) return false;
    View(entry, &view);
    ++entry.copies;
    ++copies_;
    slots_[entry.slot].lent = true;
  }
  loan->parts = Parts(view);
  loan->memory.clear();
  for (int node = 0; node < layout_.nodes(); ++node)
    loan->memory.push_back({memory_->at(entry.slot, node), layout_.slot_bytes(node)});
  return true;
}

void ExpertStore::GiveBack(int layer, int expert) {
  Entry& entry = At(layer, expert);
  {
    const std::lock_guard lock(mutex_);
    Require(entry.copies > 0, "an expert is given back that nobody borrowed");
    --entry.copies;
    --copies_;
  }
  arrived_.notify_all();
}

bool ExpertStore::Copy(int layer, int expert, uint8_t* to) {
  Entry& entry = At(layer, expert);
  ExpertView view;
  bool in_slot = false;
  {
    const std::lock_guard lock(mutex_);
    Require(entry.bytes.packed[0] != nullptr,
            "layer " + std::to_string(layer) + " has no expert " + std::to_string(expert) + " loaded");
    in_slot = entry.state.load() == kIn;
    if (in_slot) {
      View(entry, &view);
      ++entry.copies;
      ++copies_;
    } else {
      layout_.ViewWhole(entry.bytes, &view);
    }
  }
  const std::vector<MemorySpan> parts = Parts(view);
  for (const auto& [from, bytes] : parts) {
    std::memcpy(to, from, bytes);
    to += bytes;
  }
  bool whole = true;
  if (in_slot) {
    GiveBack(layer, expert);
  } else {
    FileMaps::Look();  // after reading: what became shorter within a page gave zeros without a signal
    for (const auto& [from, bytes] : parts) whole = whole && !FileMaps::Failed(from, bytes);
  }
  return whole;
}

void ExpertStore::Stretches(const Entry& entry, std::vector<Stretch>* to) const {
  const auto weights = static_cast<uint64_t>(sizes_.hidden) * static_cast<uint64_t>(sizes_.inter);
  for (int m = 0; m < 3; ++m) {
    const auto add = [&](const void* mapped, const ExpertSpans::Span& span, uint64_t bytes) {
      to->push_back({span.source, span.offset, span.offset + bytes,
                     reinterpret_cast<uintptr_t>(mapped) - static_cast<uintptr_t>(span.offset)});
    };
    add(entry.bytes.packed[m], entry.spans.packed[m], weights / 2);
    add(entry.bytes.scale[m], entry.spans.scale[m], weights / kGroup * sizeof(bf16));
  }
}

void ExpertStore::Drop(const std::vector<Stretch>& stretches) const {
  for (const Stretch& stretch : stretches) {
    const uint64_t from = BlockCeil(stretch.begin), to = BlockFloor(stretch.end);
    if (from >= to) continue;
    // Pages that are mapped here would stay: they are let go of first. A ticket that reads them mapped meanwhile
    // only brings them back.
    if ((stretch.map + from) % kBlock4k == 0)
      madvise(reinterpret_cast<void*>(stretch.map + from), to - from, MADV_DONTNEED);
    posix_fadvise(sources_[stretch.source]->file()->cached, static_cast<off_t>(from),
                  static_cast<off_t>(to - from), POSIX_FADV_DONTNEED);
  }
}

void ExpertStore::DropCached(int layer, int expert) const {
  std::vector<Stretch> stretches;
  Stretches(At(layer, expert), &stretches);
  Drop(stretches);
}

void ExpertStore::DropCached() const {
  std::vector<Stretch> stretches;
  {
    const std::lock_guard lock(mutex_);
    for (const Slot& slot : slots_)
      if (slot.entry >= 0 && entries_[slot.entry].state.load() == kIn)
        Stretches(entries_[slot.entry], &stretches);
  }
  std::sort(stretches.begin(), stretches.end(), [](const Stretch& a, const Stretch& b) {
    return std::tie(a.source, a.begin) < std::tie(b.source, b.begin);
  });
  // The cache holds pages in folios, which it drops whole: neighbours have to go together.
  std::vector<Stretch> joined;
  for (const Stretch& stretch : stretches) {
    if (!joined.empty() && joined.back().source == stretch.source &&
        joined.back().end + kBlock4k >= stretch.begin) {
      joined.back().end = std::max(joined.back().end, stretch.end);
    } else {
      joined.push_back(stretch);
    }
  }
  Drop(joined);
}

StoreStats ExpertStore::stats() const {
  const std::lock_guard lock(mutex_);
  StoreStats stats = stats_;
  stats.slots = static_cast<int64_t>(slots_.size());
  stats.bytes_read = reader_ == nullptr ? 0 : static_cast<int64_t>(reader_->bytes_read());
  return stats;
}

}  // namespace k2
