#include "gpu/handoff.h"

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

namespace k2::gpu {

Handoff::Handoff(ExpertStore& store, Machine& machine, int max_rows, int top_k, std::vector<int> layers,
                 void* words, double timeout_ms)
    : machine_(machine),
      dispatcher_(store, machine, max_rows, top_k, 1),
      max_rows_(max_rows),
      layers_(std::move(layers)),
      status_(max_rows),
      lost_(max_rows) {
  for (const int layer : layers_)
    Require(layer >= 0 && layer < store.sizes().layers,
            "hand-off: layer " + std::to_string(layer) + " is out of range");
  doorbell_ = std::make_unique<Doorbell>(
      words, static_cast<uint32_t>(layers_.size()), timeout_ms,
      [this](uint64_t, uint32_t slot, uint32_t) { return Answer(slot); },
      [this] { return dispatcher_.Progress(kSlot); });
}

Handoff::~Handoff() { Close(); }

Doorbell& Handoff::Opened() const {
  Require(doorbell_ != nullptr, "hand-off: closed");
  return *doorbell_;
}

uint64_t Handoff::Begin(const std::vector<int>& layers, int rows) {
  const std::lock_guard life(life_);
  Doorbell& doorbell = Opened();
  // Before anything of the step is written: an aborted one may still be answered.
  Require(!doorbell.aborted(), "hand-off: aborted; Reset() before the next step");
  Require(!doorbell.open(), "hand-off: the step before is open");
  Require(rows >= 1 && rows <= max_rows_,
          "hand-off: rows must lie in 1.." + std::to_string(max_rows_) + ", not " + std::to_string(rows));
  std::vector<uint32_t> slots;
  for (const int layer : layers) {
    const auto found = std::find(layers_.begin(), layers_.end(), layer);
    Require(found != layers_.end(), "hand-off: layer " + std::to_string(layer) + " has no routed experts");
    slots.push_back(static_cast<uint32_t>(found - layers_.begin()));
  }
  {
    const std::lock_guard lock(step_);
    rows_ = rows;
    step_layers_ = layers;
    std::fill(lost_.begin(), lost_.end(), false);
    total_ = {};
    error_.clear();
  }
  return doorbell.Publish(static_cast<uint32_t>(rows), slots);
}

HandoffStep Handoff::End() {
  const std::lock_guard life(life_);
  HandoffStep step{Opened().Finish(), {}, -1, {}, {}};
  const std::lock_guard lock(step_);
  if (step.outcome.answered < step.outcome.layers) step.next_layer = step_layers_[step.outcome.answered];
  step.error = error_;
  step.total = total_;
  for (int row = 0; row < rows_; ++row)
    if (lost_[row]) step.lost.push_back(row);
  return step;
}

void Handoff::Abort() {
  const std::lock_guard life(life_);
  if (doorbell_ == nullptr) return;
  doorbell_->Abort();  // first: its reason stays, whatever the dispatcher's tickets then say
  dispatcher_.Abort();
}

bool Handoff::aborted() const {
  const std::lock_guard life(life_);
  return Opened().aborted();
}

void Handoff::Reset() {
  const std::lock_guard life(life_);
  Doorbell& doorbell = Opened();
  doorbell.Abort();  // from here on no answer begins
  Require(!doorbell.answering(), "hand-off: the thread that answers has not come back yet");
  if (!acquired_) {
    try {
      dispatcher_.Acquire();
    } catch (const Error&) {
      throw Error("hand-off: a worker of the pool is still stuck in its chunk");
    }
    acquired_ = true;
  }
  dispatcher_.Resume();
  doorbell.Reset();
}

void Handoff::Close() {
  stall_at_.store(-1);
  const std::lock_guard life(life_);
  if (doorbell_ == nullptr) return;
  doorbell_->Abort();
  dispatcher_.Abort();
  doorbell_.reset();
}

uint32_t Handoff::Answer(uint32_t slot) {
  const int layer = layers_[slot];
  if (!pinned_) machine_.pool().PinCaller();  // it is the pool's worker 0
  pinned_ = true;
  while (stall_at_.load() == layer) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  try {
    if (!acquired_) dispatcher_.Acquire();
    acquired_ = false;
    const uint64_t epoch = dispatcher_.Submit(kSlot, layer, rows_);
    Collected(dispatcher_.Collect(kSlot, epoch, rows_, status_.data()));
  } catch (const std::exception& problem) {
    const std::lock_guard lock(step_);
    error_ = "layer " + std::to_string(layer) + ": " + problem.what();
    throw;
  }
  return 0;
}

void Handoff::Collected(const TicketReport& report) {
  // A ticket is poisoned as a whole. Where an abort was asked for, that is the reason that stays.
  if (status_[0] == static_cast<uint8_t>(RowStatus::kPoisoned)) throw Doorbell::Stuck();
  const std::lock_guard lock(step_);
  total_.bytes += report.bytes;
  total_.misses += report.misses;
  total_.busy_ns += report.busy_ns;
  total_.wait_ns += report.wait_ns;
  for (int row = 0; row < rows_; ++row)
    if (status_[row] != static_cast<uint8_t>(RowStatus::kOk)) lost_[row] = true;
}

}  // namespace k2::gpu
