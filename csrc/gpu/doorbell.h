// How work captured in a CUDA graph asks the CPU for something and waits for the answer, without a callback.
//
// A step of the model rings once per MoE layer. The words below lie in pinned host memory, which the device
// reads and writes over the bus. This file knows no CUDA, only addresses: any thread can play the device.
//
//   header      written by the host: abort reason, layers, rows and epoch of the open step
//   slot i      one line written by the device (request, input), one by the CPU (reply, output)
//
// One ring of slot i, in this order:
//   1. host    Publish(rows, slots) opens a step and writes its descriptor; only then is the graph launched.
//   2. device  writes its input, then request = kRung with a system-wide release (stream writes have one).
//   3. CPU     acquires request == kRung, reads the input, works, writes the output.
//   4. CPU     request = kIdle, then reply: kIdle -> kAnswered by compare-exchange, with release.
//   5. device  acquires reply >= kAnswered, writes reply = kIdle, then reads the output.
//
// The values are constants, so a captured graph replays unchanged. A slot is not mistaken for its previous
// replay: the device idles the reply before it can ring again (stream order) and the CPU idles the request
// before it replies, so both words are idle at every ring. Epochs never come back: each Publish takes the
// next one, refuses while a step is open, and the CPU answers the slots of the open step only, in the order
// that Publish was told.
//
// Abort. Abort(), or the watchdog once a slot has been rung for timeout_ms without an answer or a sign of
// life, writes the abort word; a slot that rings out of turn, or once too often, ends so as well. From then
// until Reset(), every idle reply is turned into kPoisoned, again and again, so that each wait of this step,
// and of any launched behind it, completes within milliseconds; the device computes garbage and Finish()
// says so. A late answer finds the abort word and is dropped. Reset() demands that the device is idle (the
// caller synchronises first) and the CPU thread is out of its answer; it clears all words.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace k2::gpu {

inline constexpr uint32_t kIdle = 0;
inline constexpr uint32_t kRung = 1;
inline constexpr uint32_t kAnswered = 1;
// Greater than kAnswered, so that one "greater or equal" wait passes both.
inline constexpr uint32_t kPoisoned = 2;

inline constexpr uint32_t kNotAborted = 0;
inline constexpr uint32_t kAbortAsked = 1;
inline constexpr uint32_t kAbortWatchdog = 2;
inline constexpr uint32_t kAbortAnswerThrew = 3;

// "", "asked", "watchdog" or "answer threw".
const char* AbortName(uint32_t reason);

struct alignas(128) DoorbellHeader {
  std::atomic<uint32_t> abort;
  std::atomic<uint32_t> layers;
  std::atomic<uint32_t> rows;
  uint32_t unused;
  std::atomic<uint64_t> epoch;
};

// Two cache lines, one per writer: a line that both sides write would travel over the bus twice as often.
struct alignas(128) DoorbellSlot {
  alignas(64) std::atomic<uint32_t> request;
  std::atomic<uint32_t> input;
  alignas(64) std::atomic<uint32_t> reply;
  std::atomic<uint32_t> output;
};
static_assert(sizeof(DoorbellHeader) == 128 && sizeof(DoorbellSlot) == 128);
static_assert(std::atomic<uint32_t>::is_always_lock_free && std::atomic<uint64_t>::is_always_lock_free);

// Bytes of pinned memory, 128-byte aligned, that `slots` need.
constexpr size_t DoorbellBytes(size_t slots) { return sizeof(DoorbellHeader) + slots * sizeof(DoorbellSlot); }

struct StepOutcome {
  uint64_t epoch;
  uint32_t layers;
  uint32_t answered;      // slots answered before any abort; equals `layers` in a good step
  uint32_t abort_reason;  // kNotAborted in a good step
};

// The CPU's side: one thread that answers, one that watches it. All members may be called from any thread.
class Doorbell {
 public:
  // Called on the answering thread for each ring; returns the output word. What it throws aborts the step.
  using Answer = std::function<uint32_t(uint64_t epoch, uint32_t slot, uint32_t input)>;
  // Thrown by an answer that has a watchdog of its own, and found a worker stuck.
  struct Stuck {};
  // A number that changes while an answer makes progress, read by the watcher: a slow one is not a stuck one.
  using Progress = std::function<uint64_t()>;

  // `memory` holds DoorbellBytes(slots), outlives this object, and is cleared here.
  Doorbell(void* memory, uint32_t slots, double timeout_ms, Answer answer, Progress progress = {});
  // Aborts what is open, then joins both threads; an answer that never returns blocks here.
  ~Doorbell();
  Doorbell(const Doorbell&) = delete;
  Doorbell& operator=(const Doorbell&) = delete;

  // Opens the next step, which rings these slots in this order, each once; returns its epoch. Throws Error
  // while one is open or aborted.
  uint64_t Publish(uint32_t rows, const std::vector<uint32_t>& slots);
  // Closes the step once the device is done with it. Throws Error if slots are unanswered without an abort.
  StepOutcome Finish();
  // Completes all waits as poisoned. The first reason stays.
  void Abort(uint32_t reason = kAbortAsked);
  // Back to a clean state after an abort; the device must be idle. Throws Error while an answer is running.
  void Reset();
  bool aborted() const { return Aborted(); }
  bool open() const;
  // Whether the answering thread is inside a step.
  bool answering() const;

 private:
  void AnswerLoop();
  void AnswerStep(uint64_t epoch);
  bool WaitForRing(const DoorbellSlot& slot) const;
  bool AnyRung() const;
  void WatchLoop();
  void PoisonIdleReplies();
  bool Aborted() const { return header_->abort.load(std::memory_order_acquire) != kNotAborted; }

  DoorbellHeader* const header_;
  DoorbellSlot* const slots_;
  const uint32_t slot_count_;
  const double timeout_ms_;
  const Answer answer_;
  const Progress progress_;

  mutable std::mutex mutex_;  // guards the four below; the words themselves are atomic
  std::condition_variable changed_;
  uint64_t epoch_ = 0;
  bool open_ = false;
  bool stepping_ = false;        // the answering thread is inside AnswerStep
  std::vector<uint32_t> order_;  // slots of the step; not changed before its last answer, or a Reset()

  std::atomic<uint32_t> answered_{0};
  std::atomic<bool> stop_{false};
  std::thread watcher_;
  std::thread answerer_;
};

// The device's side of one ring on an ordinary thread, the reference for what is recorded on a stream.
void RingSlot(void* memory, uint32_t slot, uint32_t input);
// The reply, which is idle again; kIdle: there was none within limit_ms.
uint32_t WaitReply(void* memory, uint32_t slot, double limit_ms);

struct DevicePlay {
  uint32_t answered;
  uint32_t poisoned;
  uint32_t wrong;      // answered, but the output was not `expect(input)`
  uint32_t timed_out;  // 1 if a wait outlasted limit_ms; the play ends there
};

// One step of the device over slots 0, 1, ...: slot i sends input seed + i and expects that plus one.
DevicePlay PlayDevice(void* memory, uint32_t layers, uint32_t seed, double limit_ms);

}  // namespace k2::gpu
