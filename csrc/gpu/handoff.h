// From a stream to the routed experts: a thread that answers the doorbell with a dispatcher of its own.
//
// A step is {epoch, rows, layers in the order in which they ring}. On a ring the answering thread submits the
// dispatcher's slot for that layer with the step's rows, works in its pool, and collects; the stream copies
// into the slot before it rings and out of it after its wait. One slot is enough: a stream has one hand-off
// in flight. Neither Python nor CUDA is involved.
//
// A layer has the same words in every step, so what was captured for some layers may be replayed in any step
// that lists them. Rows beyond the step's are not looked at, and their output is left as it was.
//
// One error. A ring without an answer whose pool shows no progress for timeout_ms, and a ticket whose workers
// show none for 0.8 s (dispatch.h, 8), end the step for the same reason: "watchdog". Every wait then
// completes as poisoned until Reset(), which demands that the worker came back.
//
// Threads. Begin, End and Reset belong to the thread that drives the stream; Abort and Close may be called by
// any. The dispatcher belongs to the answering thread, and to Reset() while that one is idle. It sleeps while
// no step is open, and naps when the next ring is more than a few milliseconds away.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "experts/dispatch.h"
#include "gpu/doorbell.h"

namespace k2::gpu {

struct HandoffStep {
  StepOutcome outcome{};
  std::string error;      // of an answer that threw, else empty
  int next_layer = -1;    // the first without an answer
  std::vector<int> lost;  // rows of which an expert could not be read, ascending
  TicketReport total;     // of all answers
};

class Handoff {
 public:
  // `layers` may ring; slot i of `words`, which holds DoorbellBytes(layers) and outlives this object, is
  // layers[i]'s.
  Handoff(ExpertStore& store, Machine& machine, int max_rows, int top_k, std::vector<int> layers, void* words,
          double timeout_ms);
  ~Handoff();
  Handoff(const Handoff&) = delete;
  Handoff& operator=(const Handoff&) = delete;

  // What a stream copies from and to; at the same addresses, also after Close().
  SlotBuffers buffers() const { return dispatcher_.buffers(kSlot); }

  // Opens a step and returns its epoch. Throws Error while one is open or aborted.
  uint64_t Begin(const std::vector<int>& layers, int rows);
  // Closes it, the stream being idle. Throws Error if layers did not ring and nothing was aborted.
  HandoffStep End();
  void Abort();
  bool aborted() const;
  // Back to a clean state, the stream being idle; an open step is aborted. Throws Error while a worker is
  // stuck.
  void Reset();
  // Ends the threads, what is open as aborted; waits for a worker that is stuck.
  void Close();

  // For tests: the answering thread stands still at this layer without a sign of life; -1: it goes on.
  void StallAt(int layer) { stall_at_.store(layer); }

 private:
  static constexpr int kSlot = 0;
  uint32_t Answer(uint32_t slot);
  void Collected(const TicketReport& report);
  Doorbell& Opened() const;

  Machine& machine_;
  Dispatcher dispatcher_;
  const int max_rows_;
  const std::vector<int> layers_;
  std::atomic<int> stall_at_{-1};

  // Of the answering thread, and of Reset() while that one is idle.
  bool pinned_ = false;
  bool acquired_ = false;  // the slot may be submitted
  std::vector<uint8_t> status_;

  // Of the step; written before it is published, and under the mutex while it is open.
  int rows_ = 0;
  std::vector<int> step_layers_;
  std::mutex step_;
  std::vector<bool> lost_;
  TicketReport total_;
  std::string error_;

  mutable std::mutex life_;             // never taken by the answering thread: Close() waits for that one
  std::unique_ptr<Doorbell> doorbell_;  // last: its threads use all the above
};

}  // namespace k2::gpu
