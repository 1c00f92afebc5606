// Where the bytes of every routed expert lie, and how they get there.
//
//   mapped    read in place from the checkpoint's file
//   resident  in a slot of memory that is bound to the nodes; filled in the background, read mapped until then
//   streamed  in one of a bounded number of slots; a ticket that needs an absent expert makes it come
//
// A ticket pins the experts it reads. Only an unpinned expert moves or leaves.
//
//   Put ─► mapped ◄─Release── in a slot ◄── filling or fetching ◄─ Pin (streamed), Filler, Load
//                               ╰─ evicted: the lowest score among the unpinned
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "experts/recency.h"
#include "experts/slots.h"

namespace k2 {

// An expert is read in two parts, gate and up before down.
enum class Arrival : uint8_t { kOnItsWay, kGateUp, kHere, kLost };

struct StoreStats {
  int64_t slots = 0;
  int64_t filled = 0;  // slots that hold an expert
  int64_t hits = 0;    // experts that tickets found in memory, and those they waited for
  int64_t misses = 0;
  int64_t lost = 0;  // reads of an expert that failed
  int64_t bytes_read = 0;
};

// An expert's bytes in its slot: in the order of its file's, and the memory of the slot on each node.
struct Loan {
  std::vector<MemorySpan> parts;
  std::vector<MemorySpan> memory;
};

class ExpertStore {
 public:
  using Clock = std::chrono::steady_clock;

  // Without shards: one node.
  explicit ExpertStore(const ExpertSizes& sizes, const RowShards& shards = {});
  ~ExpertStore();
  ExpertStore(const ExpertStore&) = delete;
  ExpertStore& operator=(const ExpertStore&) = delete;

  const ExpertSizes& sizes() const { return sizes_; }
  const SlotLayout& layout() const { return layout_; }
  int64_t expert_bytes() const;

  // A file of which experts are read; returns its index. Throws if it cannot be opened.
  int AddSource(const std::string& path);

  // The bytes must stay where they are for as long as the store lives. Throws if the expert is pinned or in a slot.
  void Put(int layer, int expert, const ExpertBytes& bytes);
  // Where in their files they lie: the bytes are then a map of these files, and pages of it may be given back to the
  // system at any time. Throws if an index is none of AddSource's.
  void Locate(int layer, int expert, const ExpertSpans& spans);

  // Memory for experts; once, when all were put. `streamed`: tickets fetch what they miss, and nothing is read
  // mapped. Throws if the memory or the reader cannot be had, or an expert's spans are unknown.
  void OpenSlots(const SlotMemory::Options& memory, const ReaderOptions& reader, bool streamed,
                 double half_life);
  // Gives the slots back: every expert is mapped again. The filler must have stopped. Throws if an expert is pinned.
  void CloseSlots();
  bool has_slots() const { return memory_ != nullptr; }
  // Throw if there are none.
  const SlotMemory& memory() const;
  Reader& reader();

  // ---- tickets: one thread at a time ----

  // Pins `count` experts, ascending and each once, and tells where each one's rows lie. Returns how many had to be
  // fetched: their bytes are on their way (`arrival`). Throws, with nothing pinned, if one was never put or all slots
  // are pinned.
  int Pin(int layer, const int* experts, int count, ExpertView* const* views);
  void Unpin(int layer, int expert);
  int pins(int layer, int expert) const;
  Arrival arrival(int layer, int expert) const;
  // Waits until an expert arrives after `seen`, but not for long; returns what to pass next time.
  uint32_t WaitArrival(uint32_t seen);
  uint32_t arrivals() const { return arrivals_.load(std::memory_order_acquire); }
  // When bytes of an expert last came, or failed to.
  Clock::time_point last_arrival() const {
    return Clock::time_point(std::chrono::nanoseconds(last_arrival_ns_.load(std::memory_order_relaxed)));
  }
  // Whether a ticket was at work within the last moment: others step back.
  bool busy() const;

  // ---- moves: any thread ----

  bool in_slot(int layer, int expert) const;
  // Brings an expert into a free slot: Begin, then End when its bytes are there. Begin returns the slot, or -1 if it is
  // in a slot already or none is free.
  int BeginFill(int layer, int expert);
  void EndFill(int layer, int expert, bool whole);
  // What fills `node`'s part of it.
  std::vector<Read> Reads(int layer, int expert, int slot, int node) const;
  bool Ensure(int slot, int node) { return memory_->Ensure(slot, node); }
  // One copy in all: lets the page cache forget one expert, as far as pages that it shares with neighbours allow, or
  // all that are in slots.
  void DropCached(int layer, int expert) const;
  void DropCached() const;
  // Back to the map, its slot free again. False if it is pinned or being copied, in no slot, or streamed.
  bool Release(int layer, int expert);
  // The bytes of an expert as its file has them to `to` [expert_bytes()]: packed rows of gate, up and down, then their
  // scales. From its slot, where it stays meanwhile, else through the map. False if they could not be read.
  bool Copy(int layer, int expert, uint8_t* to);
  // The same bytes where they lie in the expert's slot, which stays as it is until GiveBack: as many of them. False, and
  // nothing to give back, if it is in none. The slot's memory is kept until CloseSlots: whoever borrows may lock it.
  bool Lend(int layer, int expert, Loan* loan);
  void GiveBack(int layer, int expert);

  StoreStats stats() const;

 private:
  enum State : uint8_t { kOut, kFilling, kGateUp, kIn, kLost };
  struct Entry {
    ExpertBytes bytes;
    ExpertSpans spans;
    std::atomic<int> pins{0};
    std::atomic<uint8_t> state{kOut};
    int copies = 0;  // under way from its slot, and loans of it
    int slot = -1;
    double score = Recency::kNever;
  };
  struct Slot {
    ExpertStore* store;
    int entry = -1;  // -1: free
    Fetch gate_up, down;
    int parts = 0;      // on their way
    bool whole = true;  // so far
    bool lent = false;  // once, or now
  };

  static bool OnItsWay(uint8_t state) { return state == kFilling || state == kGateUp; }
  int Index(int layer, int expert) const;
  Entry& At(int layer, int expert) const { return entries_[Index(layer, expert)]; }
  void View(const Entry& entry, ExpertView* view) const;
  std::vector<MemorySpan> Parts(const ExpertView& view) const;
  // The slots that `count` experts may take, worst first, as far as there are; whether others will be.
  bool Victims(size_t count, std::vector<int>* victims) const;
  void BeginFetch(int slot, int entry);
  void Arrived(Slot& slot, bool gate_up, bool whole);
  // What was on its way is here, or lost; the caller holds mutex_ and wakes those who wait.
  void Settle(Entry& entry, bool whole);
  void Tell();
  void Free(Entry& entry);
  // Part of a file; `map` is the address of the file's first byte.
  struct Stretch {
    int source;
    uint64_t begin;
    uint64_t end;
    uintptr_t map;
  };
  void Stretches(const Entry& entry, std::vector<Stretch>* to) const;
  void Drop(const std::vector<Stretch>& stretches) const;
  bool HasSpans() const;

  const ExpertSizes sizes_;
  const SlotLayout layout_;
  std::unique_ptr<Entry[]> entries_;
  std::vector<std::unique_ptr<Source>> sources_;
  std::unique_ptr<SlotMemory> memory_;
  std::vector<Slot> slots_;
  Recency recency_;
  bool streamed_ = false;
  double now_ = 0;

  mutable std::mutex mutex_;         // entries' slots, states, scores and copies
  std::condition_variable arrived_;  // or copied
  int copies_ = 0;                   // of all entries
  std::atomic<uint32_t> arrivals_{0};
  std::atomic<int> tickets_pins_{0};
  std::atomic<int64_t> last_ticket_ns_{0};
  std::atomic<int64_t> last_arrival_ns_{0};
  StoreStats stats_;
  std::unique_ptr<Reader> reader_;  // last: what it reads into goes after it
};

}  // namespace k2
