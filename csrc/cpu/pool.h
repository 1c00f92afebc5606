// A pool of pinned threads that work through jobs in the order of their submission.
//
// A job is a few phases; a phase is a number of chunks, taken one by one from a counter by whoever is free,
// so no thread waits long; a phase opens when all chunks of the one before are done. The thread that waits
// for a job works too, as worker 0. What a chunk computes must not depend on who runs it.
//
// Workers form groups, one a NUMA node. A phase in several parts deals part p to group p % groups alone, so that a
// node's weights are read by that node; a phase in one part is anyone's.
//
// Workers spin for a bounded time, then sleep: jobs of one decode step follow each other within tens of
// microseconds, a wake-up costs as much.
//
// Lifetime: a job may be destroyed or reset once Wait() or Retire() returned true: no worker holds it any more
// then (each ring entry counts the workers inside), and none can enter.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base.h"

namespace k2 {

inline constexpr int kMaxNodes = 16;

struct Phase {
  void (*run)(void* context, int chunk, int worker) = nullptr;
  int chunks = 0;  // of each part; chunk c of part p is numbered p * chunks + c
  int parts = 1;   // at most kMaxNodes
};

class Job {
 public:
  static constexpr int kMaxPhases = 4;

  // Phases without chunks are allowed.
  void Reset(void* context, std::initializer_list<Phase> phases);
  bool Done() const { return phase_.load(std::memory_order_acquire) >= count_; }
  // A sign of life from inside a long chunk: a slow one (cold disk, plain C++ kernels) is not a stuck one.
  // A plain store of what this thread did not store before: an atomic increment would wait for all loads in flight.
  void Beat() {
    static thread_local uint64_t beat = 0;
    beat_.store(++beat, std::memory_order_relaxed);
  }
  // Changes with every chunk that is done and every sign of life. From any thread.
  uint64_t Progress() const;
  // What a chunk threw first, or null, once the job was retired; chunks not begun by then did not run.
  std::exception_ptr error() const { return error_; }

 private:
  friend class Pool;
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };
  struct Counters {
    std::array<Counter, kMaxNodes> next;  // by part
    Counter done;
  };
  void Advance(int from);

  void* context_ = nullptr;
  std::array<Phase, kMaxPhases> phases_;
  std::array<Counters, kMaxPhases> counters_;
  int count_ = 0;
  std::atomic<int> phase_{0};
  alignas(64) std::atomic<uint64_t> beat_{0};
  uint64_t sequence_ = 0;
  std::atomic<bool> threw_{false};
  std::exception_ptr error_;
};

class Pool {
 public:
  // `threads` in all, the waiting caller included; the others are pinned to `cpus` (one each, in order). `groups` has
  // each worker's group, 0 and up without gaps; empty: one group.
  Pool(int threads, const std::vector<int>& cpus, const std::vector<int>& groups = {});
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }
  int groups() const { return groups_; }

  // Binds the calling thread to worker 0's core: for the one thread that will do the waiting. Left to float,
  // it tends to be put on the core of a worker that happens to sleep.
  void PinCaller() const;

  // Publishes the job; it must stay alive until Wait() or Retire() returned true for it. Throws if 64 jobs are
  // outstanding.
  void Submit(Job* job);
  // Works until the job is done, and retires it. Returns false if, with nothing left to take, no chunk of it
  // was finished and none gave a sign of life for `patience`: a worker is stuck, and the job must not be
  // touched again before Retire(job).
  bool Wait(Job* job, std::chrono::milliseconds patience);
  // True if the job is done and no worker is inside or can enter any more; never waits.
  bool Retire(const Job* job);

  // Submit and wait, without bound: for jobs that read memory only. Throws what a chunk threw.
  void Run(Job* job);

 private:
  static constexpr uint64_t kRing = 64;
  struct Entry {
    alignas(64) std::atomic<uint64_t> sequence{0};  // 0: the job was retired
    std::atomic<Job*> job{nullptr};
    std::atomic<int> users{0};
  };

  void Loop(int worker);
  // Takes chunks until none is left to take for this worker in the open phase.
  void Work(Job* job, int worker);
  // A chunk for this worker, or -1 if there is none left; `Left` only looks.
  int Take(Job* job, int phase, int worker) const;
  bool Left(const Job* job, int phase, int worker) const;
  void Visit(uint64_t sequence, int worker);
  uint64_t FreeSequence() const;
  void Stop();

  const int threads_;
  const std::vector<int> cpus_;
  const std::vector<int> group_;  // by worker
  int groups_ = 1;
  std::array<Entry, kRing> ring_;
  std::atomic<uint64_t> tail_{0};  // sequences 1..tail_ have been published or passed over
  std::atomic<uint32_t> signal_{0};
  std::atomic<bool> stop_{false};
  std::mutex caller_;  // one thread at a time is worker 0
  std::mutex submit_;
  std::vector<std::thread> workers_;
};

}  // namespace k2
