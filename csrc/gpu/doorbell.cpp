#include "gpu/doorbell.h"

#include <algorithm>
#include <chrono>
#include <new>
#include <string>
#include <utility>

#include "base.h"

namespace k2::gpu {
namespace {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::duration<double, std::milli>;

double MillisecondsSince(Clock::time_point start) { return Milliseconds(Clock::now() - start).count(); }

// A ring usually comes within a layer's time on the device, some hundred microseconds; beyond that a core is
// worth more than the wake-up.
constexpr int kSpinsBeforeYield = 4096;
constexpr int kYieldsBeforeNap = 2000;
constexpr auto kNap = std::chrono::microseconds(50);
constexpr auto kSweepPause = std::chrono::milliseconds(1);

class Backoff {
 public:
  void Pause() {
    if (spins_ < kSpinsBeforeYield) {
      ++spins_;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    } else if (yields_ < kYieldsBeforeNap) {
      ++yields_;
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(kNap);
    }
  }

 private:
  int spins_ = 0;
  int yields_ = 0;
};

DoorbellSlot* SlotsAt(void* memory) {
  return reinterpret_cast<DoorbellSlot*>(static_cast<char*>(memory) + sizeof(DoorbellHeader));
}

}  // namespace

const char* AbortName(uint32_t reason) {
  switch (reason) {
    case kNotAborted:
      return "";
    case kAbortAsked:
      return "asked";
    case kAbortWatchdog:
      return "watchdog";
    default:
      return "answer threw";
  }
}

Doorbell::Doorbell(void* memory, uint32_t slots, double timeout_ms, Answer answer, Progress progress)
    : header_(static_cast<DoorbellHeader*>(memory)),
      slots_(SlotsAt(memory)),
      slot_count_(slots),
      timeout_ms_(timeout_ms),
      answer_(std::move(answer)),
      progress_(std::move(progress)) {
  Require(memory != nullptr && reinterpret_cast<uintptr_t>(memory) % alignof(DoorbellSlot) == 0,
          "doorbell: the memory must be aligned to 128 bytes");
  Require(slots > 0, "doorbell: at least one slot is needed");
  Require(timeout_ms > 0, "doorbell: timeout_ms must be positive");
  new (memory) DoorbellHeader{};
  for (uint32_t i = 0; i < slots; ++i) new (slots_ + i) DoorbellSlot{};
  watcher_ = std::thread([this] { WatchLoop(); });
  answerer_ = std::thread([this] { AnswerLoop(); });
}

Doorbell::~Doorbell() {
  {
    std::lock_guard lock(mutex_);
    if (open_) header_->abort.store(kAbortAsked, std::memory_order_release);
    stop_.store(true, std::memory_order_release);
  }
  changed_.notify_all();
  answerer_.join();
  watcher_.join();
}

uint64_t Doorbell::Publish(uint32_t rows, const std::vector<uint32_t>& slots) {
  std::lock_guard lock(mutex_);
  Require(!Aborted(), "doorbell: aborted; Reset() before the next step");
  Require(!open_, "doorbell: the step before is open; Finish() it first");
  Require(
      !slots.empty() && slots.size() <= slot_count_,
      "doorbell: " + std::to_string(slots.size()) + " layers for " + std::to_string(slot_count_) + " slots");
  std::vector<bool> listed(slot_count_, false);
  for (const uint32_t slot : slots) {
    Require(slot < slot_count_ && !listed[slot],
            "doorbell: slot " + std::to_string(slot) + " is out of range or listed twice");
    listed[slot] = true;
  }
  order_ = slots;
  answered_.store(0, std::memory_order_relaxed);
  header_->rows.store(rows, std::memory_order_relaxed);
  header_->layers.store(static_cast<uint32_t>(slots.size()), std::memory_order_relaxed);
  header_->epoch.store(++epoch_, std::memory_order_release);
  open_ = true;
  changed_.notify_all();
  return epoch_;
}

StepOutcome Doorbell::Finish() {
  std::lock_guard lock(mutex_);
  Require(open_, "doorbell: no step is open");
  const uint32_t layers = header_->layers.load(std::memory_order_relaxed);
  const uint32_t answered = answered_.load(std::memory_order_acquire);
  const uint32_t reason = header_->abort.load(std::memory_order_acquire);
  Require(answered == layers || reason != kNotAborted,
          "doorbell: " + std::to_string(layers - answered) +
              " slots were not rung yet; synchronise the stream first");
  open_ = false;
  // An abort that was asked for after the last answer came too late. One that the watchdog found did not: it
  // is a ring too many. While the thread is inside, its last answer may be one that it is about to take back.
  const bool late = reason == kAbortAsked && answered == layers && !stepping_;
  const bool good = reason == kNotAborted || late;
  return {epoch_, layers, answered, good ? kNotAborted : reason};
}

void Doorbell::Abort(uint32_t reason) {
  Require(reason != kNotAborted, "doorbell: an abort needs a reason");
  std::lock_guard lock(mutex_);  // neither a watcher about to sleep nor a Reset() may miss it
  uint32_t none = kNotAborted;
  header_->abort.compare_exchange_strong(none, reason, std::memory_order_acq_rel);
  PoisonIdleReplies();
  changed_.notify_all();
}

void Doorbell::Reset() {
  std::lock_guard lock(mutex_);
  Require(!stepping_, "doorbell: the CPU is still inside an answer; it must return before a reset");
  for (uint32_t i = 0; i < slot_count_; ++i) {
    slots_[i].request.store(kIdle, std::memory_order_relaxed);
    slots_[i].reply.store(kIdle, std::memory_order_relaxed);
  }
  open_ = false;
  header_->abort.store(kNotAborted, std::memory_order_release);
}

bool Doorbell::open() const {
  std::lock_guard lock(mutex_);
  return open_;
}

bool Doorbell::answering() const {
  std::lock_guard lock(mutex_);
  return stepping_;
}

void Doorbell::AnswerLoop() {
  uint64_t done = 0;
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stop_.load(std::memory_order_relaxed) || (open_ && epoch_ != done); });
    if (stop_.load(std::memory_order_relaxed)) return;
    done = epoch_;
    stepping_ = true;
    lock.unlock();
    AnswerStep(done);
    lock.lock();
    stepping_ = false;
  }
}

void Doorbell::AnswerStep(uint64_t epoch) {
  const size_t layers = order_.size();
  for (size_t i = 0; i < layers; ++i) {
    const uint32_t number = order_[i];
    DoorbellSlot& slot = slots_[number];
    if (!WaitForRing(slot)) return;
    uint32_t output = 0;
    try {
      output = answer_(epoch, number, slot.input.load(std::memory_order_relaxed));
    } catch (const Stuck&) {
      Abort(kAbortWatchdog);
    } catch (...) {
      Abort(kAbortAnswerThrew);  // whatever it was, the device must not wait for it
    }
    if (Aborted()) return;
    slot.output.store(output, std::memory_order_relaxed);
    slot.request.store(kIdle, std::memory_order_relaxed);
    // Counted before the reply: whoever has seen the device finish must also see the count.
    answered_.fetch_add(1, std::memory_order_release);
    uint32_t idle = kIdle;
    if (!slot.reply.compare_exchange_strong(idle, kAnswered, std::memory_order_release)) {
      answered_.fetch_sub(1, std::memory_order_release);  // poisoned in between
      return;
    }
  }
}

bool Doorbell::WaitForRing(const DoorbellSlot& slot) const {
  Backoff backoff;
  while (slot.request.load(std::memory_order_acquire) != kRung) {
    if (Aborted() || stop_.load(std::memory_order_acquire)) return false;
    backoff.Pause();
  }
  return !Aborted();
}

bool Doorbell::AnyRung() const {
  for (uint32_t i = 0; i < slot_count_; ++i)
    if (slots_[i].request.load(std::memory_order_acquire) == kRung) return true;
  return false;
}

void Doorbell::PoisonIdleReplies() {
  for (uint32_t i = 0; i < slot_count_; ++i) {
    uint32_t idle = kIdle;
    slots_[i].reply.compare_exchange_strong(idle, kPoisoned, std::memory_order_acq_rel);
  }
}

void Doorbell::WatchLoop() {
  const auto look_again = Milliseconds(std::clamp(timeout_ms_ / 8, 0.5, 20.0));
  double waited_ms = 0;
  auto looked = Clock::now();
  uint64_t seen_epoch = 0;
  uint32_t seen_answered = 0;
  uint64_t seen_progress = 0;
  std::unique_lock lock(mutex_);
  while (!stop_.load(std::memory_order_relaxed)) {
    if (Aborted()) {
      PoisonIdleReplies();  // under the lock: a Reset() cannot be undone by a sweep that began before it
      changed_.wait_for(lock, kSweepPause);
      continue;
    }
    if (!open_) {
      changed_.wait(lock, [&] { return stop_.load(std::memory_order_relaxed) || open_ || Aborted(); });
      continue;
    }
    // Until it rings, the device takes its time. A ring that nobody expects would wait for good.
    const uint32_t answered = answered_.load(std::memory_order_acquire);
    const uint64_t progress = progress_ ? progress_() : 0;
    if (!AnyRung() || seen_epoch != epoch_ || seen_answered != answered || seen_progress != progress) {
      seen_epoch = epoch_;
      seen_answered = answered;
      seen_progress = progress;
      waited_ms = 0;
    } else {
      // Time in which this thread did not run either does not count: the machine was suspended, or overloaded.
      waited_ms += std::min(MillisecondsSince(looked), 2 * look_again.count());
    }
    looked = Clock::now();
    if (waited_ms > timeout_ms_) {
      header_->abort.store(kAbortWatchdog, std::memory_order_release);
      continue;
    }
    changed_.wait_for(lock, look_again);
  }
  // A device that still waits when the doorbell is torn down is let go as well.
  if (Aborted()) PoisonIdleReplies();
}

void RingSlot(void* memory, uint32_t number, uint32_t input) {
  DoorbellSlot& slot = SlotsAt(memory)[number];
  slot.input.store(input, std::memory_order_relaxed);
  slot.request.store(kRung, std::memory_order_release);
}

uint32_t WaitReply(void* memory, uint32_t number, double limit_ms) {
  DoorbellSlot& slot = SlotsAt(memory)[number];
  Backoff backoff;
  const auto start = Clock::now();
  uint32_t reply = kIdle;
  while ((reply = slot.reply.load(std::memory_order_acquire)) == kIdle) {
    if (MillisecondsSince(start) > limit_ms) return kIdle;
    backoff.Pause();
  }
  slot.reply.store(kIdle, std::memory_order_relaxed);
  return reply;
}

DevicePlay PlayDevice(void* memory, uint32_t layers, uint32_t seed, double limit_ms) {
  DevicePlay play{};
  for (uint32_t i = 0; i < layers; ++i) {
    RingSlot(memory, i, seed + i);
    const uint32_t reply = WaitReply(memory, i, limit_ms);
    if (reply == kIdle) {
      play.timed_out = 1;
      return play;
    }
    if (reply != kAnswered) {
      ++play.poisoned;
    } else {
      ++play.answered;
      if (SlotsAt(memory)[i].output.load(std::memory_order_relaxed) != seed + i + 1) ++play.wrong;
    }
  }
  return play;
}

}  // namespace k2::gpu
