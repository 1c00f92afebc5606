// The hand-off of routed experts: submit -> ticket -> collect. The contract:
//
//  1. Slots. A dispatcher owns a few slots; each has buffers at fixed addresses for `max_rows` rows:
//       x bf16 [max_rows, hidden] · ids int32 [max_rows, top_k] · weights fp32 [max_rows, top_k] ·
//       out fp32 [max_rows, hidden].  Nothing is allocated per call.
//  2. Descriptor. The number of valid rows and the layer are data, not shape: Submit publishes {epoch, rows,
//     layer} in the slot. Id -1 is padding and reads nothing.
//  3. Order. The producer fills x, ids and weights of Acquire()'s slot, then submits. Tickets retire in any
//  order,
//     each collected exactly once; a slot is handed out again only after its ticket was collected. The epoch
//     rises by one per use of a slot, so a stale ticket is recognised.
//  4. Stream. Submit and Collect are recordings on a stream: inline on the CPU (the pool starts at once, the
//     thread that collects works too); a stream, captured or not, records copies from and to the same slots between
//     a ring and a wait, and a thread of gpu/handoff.h submits and collects. Slots begin and end with pages, so that
//     a driver can pin them. Neither knows the model.
//  5. Result. out[row] = sum over the row's experts in ascending id of weight * E(x), fp32, each E(x) the
//  same
//     bits whatever else is in the batch.
//  6. Pins. Every expert a ticket reads is pinned from Submit until the ticket retires.
//  7. Status. A row is kOk, kReadError (the bytes of one of its experts could not be read) or kPoisoned. A
//  bad row
//     ends its request, not the step: the other rows are valid.
//  8. Abort. The abort word makes every outstanding and later ticket complete as poisoned, at the next chunk; Resume
//     clears it, nothing being outstanding. The watchdog does the same for one ticket whose other workers made no
//     progress for 0.8 s; a chunk tells of its progress, so a slow one is not a stuck one. The collecting thread's
//     own chunk it cannot interrupt: who watches that thread looks at Progress.
//  9. Report. Each ticket tells bytes read, misses (experts that had to be fetched first), and the
//  nanoseconds from
//     submit to collect and those spent waiting in collect.
// 10. Absent experts. Those that are in memory are computed from Submit on, the others while Collect waits for
//     them: gate and up of an expert as soon as these are there, and down projections ahead of the sum where they
//     are few. One that cannot be read, or does not arrive within half a minute, is a read error of its rows.
// 11. Nodes. Output rows of gate, up and down belong to nodes; a node's rows are computed by its workers. Between the
//     halves all nodes meet once, and read each other's SwiGLU outputs.
// 12. Threads. One thread at a time acquires, submits, collects and resumes; Abort and Progress are anyone's.
#pragma once

#include <memory>
#include <vector>

#include "cpu/machine.h"
#include "experts/store.h"

namespace k2 {

enum class RowStatus : uint8_t { kOk = 0, kReadError = 1, kPoisoned = 2 };

struct TicketReport {
  int64_t bytes = 0;
  int64_t misses = 0;
  int64_t busy_ns = 0;
  int64_t wait_ns = 0;
};

struct SlotBuffers {
  bf16* x;
  int32_t* ids;
  float* weights;
  float* out;
};

class Dispatcher {
 public:
  Dispatcher(ExpertStore& store, Machine& machine, int max_rows, int top_k, int slots);
  ~Dispatcher();
  Dispatcher(const Dispatcher&) = delete;
  Dispatcher& operator=(const Dispatcher&) = delete;

  int slots() const { return static_cast<int>(slots_.size()); }
  int max_rows() const { return max_rows_; }
  int top_k() const { return top_k_; }
  SlotBuffers buffers(int slot) const;

  // A free slot to fill. Throws if all are in flight.
  int Acquire();

  // Starts `rows` rows of the acquired slot; returns its epoch. Throws on a bad id or layer, and the slot is
  // free.
  uint64_t Submit(int slot, int layer, int rows);

  // Waits; fills `status` [rows]. Throws if (slot, epoch) is not outstanding with that many rows.
  TicketReport Collect(int slot, uint64_t epoch, int rows, uint8_t* status);

  void Abort();
  void Resume();

  // Changes as long as the slot's ticket is being computed.
  uint64_t Progress(int slot) const;

 private:
  struct Slot;
  static void RunPrepare(void* context, int chunk, int worker);
  static void RunGateUp(void* context, int chunk, int worker);
  static void RunDown(void* context, int chunk, int worker);
  int nodes() const { return store_.layout().nodes(); }
  void Group(Slot& slot, int layer, int rows);
  // Sets what the next job computes of the absent groups; false: nothing more arrived. `late`: nothing will.
  bool Look(Slot& slot, bool late);
  void Start(Slot& slot, int prepare_chunks);
  // Until something arrives; false: aborted.
  bool Await(Slot& slot);
  // Works until all is computed, or nothing more will be. False: a worker is stuck.
  bool Finish(Slot& slot);
  void Retire(Slot& slot);

  ExpertStore& store_;
  Machine& machine_;
  const int max_rows_;
  const int top_k_;
  int node_threads_ = 1;
  int most_gate_rows_ = 0;  // of a node
  int most_down_rows_ = 0;
  int down_rows_ = 0;  // of a chunk
  std::atomic<bool> abort_{false};
  std::vector<std::unique_ptr<Slot>> slots_;
  std::vector<std::vector<float>> scratch_;  // one per worker
};

}  // namespace k2
