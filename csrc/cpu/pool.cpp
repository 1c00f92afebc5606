#include "cpu/pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <string>
#include <system_error>

namespace k2 {
namespace {

using Clock = std::chrono::steady_clock;

// About the longest gap between two jobs of one decode step.
constexpr auto kSpin = std::chrono::microseconds(200);

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

void Pin(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  // Refused where a container forbids it; the thread then floats, which costs speed, not correctness.
  pthread_setaffinity_np(thread, sizeof(set), &set);
}

// Waits for others politely: the thread waited for may be due to run on this very core.
class Patience {
 public:
  void Wait() {
    Pause();
    if (++turns_ % 1024 == 0) std::this_thread::yield();
  }

 private:
  unsigned turns_ = 0;
};

}  // namespace

void Job::Reset(void* context, std::initializer_list<Phase> phases) {
  Require(phases.size() <= kMaxPhases, "a job has at most 4 phases");
  context_ = context;
  count_ = static_cast<int>(phases.size());
  int i = 0;
  for (const Phase& phase : phases) {
    Require(phase.parts >= 1 && phase.parts <= kMaxNodes, "a phase has 1 to 16 parts");
    phases_[i] = phase;
    for (int part = 0; part < phase.parts; ++part)
      counters_[i].next[part].value.store(0, std::memory_order_relaxed);
    counters_[i].done.value.store(0, std::memory_order_relaxed);
    ++i;
  }
  threw_.store(false, std::memory_order_relaxed);
  error_ = nullptr;
  int first = 0;
  while (first < count_ && phases_[first].chunks == 0) ++first;
  phase_.store(first, std::memory_order_release);
}

uint64_t Job::Progress() const {
  uint64_t progress = beat_.load(std::memory_order_relaxed);
  for (const auto& counter : counters_)
    progress += static_cast<uint64_t>(counter.done.value.load(std::memory_order_relaxed));
  return progress;
}

void Job::Advance(int from) {
  int next = from + 1;
  while (next < count_ && phases_[next].chunks == 0) ++next;
  phase_.store(next, std::memory_order_release);
}

Pool::Pool(int threads, const std::vector<int>& cpus, const std::vector<int>& groups)
    : threads_(threads),
      cpus_(cpus),
      group_(groups.empty() ? std::vector<int>(std::max(1, threads)) : groups) {
  Require(threads >= 1 && threads <= 1024, "threads must lie in 1..1024");
  Require(group_.size() == static_cast<size_t>(threads), "every worker needs a group");
  groups_ = 1 + *std::max_element(group_.begin(), group_.end());
  for (int group = 0; group < groups_; ++group)
    Require(std::count(group_.begin(), group_.end(), group) > 0,
            "group " + std::to_string(group) + " has no worker");
  workers_.reserve(threads);
  for (int worker = 1; worker < threads; ++worker) {
    try {
      workers_.emplace_back([this, worker] { Loop(worker); });
    } catch (const std::system_error&) {
      Stop();
      throw Error("the system refused thread " + std::to_string(worker) + " of " + std::to_string(threads) +
                  "; ask for fewer threads");
    }
    if (static_cast<size_t>(worker) < cpus.size()) Pin(workers_.back().native_handle(), cpus[worker]);
  }
}

Pool::~Pool() { Stop(); }

void Pool::Stop() {
  stop_.store(true, std::memory_order_release);
  signal_.fetch_add(1, std::memory_order_release);
  signal_.notify_all();
  for (std::thread& thread : workers_) thread.join();
}

void Pool::PinCaller() const {
  if (!cpus_.empty()) Pin(pthread_self(), cpus_.front());
}

uint64_t Pool::FreeSequence() const {
  // Entries of outstanding jobs are passed over, however long ago they were submitted: one that is stuck
  // neither blocks the ring nor loses its place. Who comes to a retired entry too late leaves at once.
  Patience patience;
  for (;;) {
    bool all_taken = true;
    const uint64_t next = tail_.load(std::memory_order_relaxed) + 1;
    for (uint64_t sequence = next; sequence < next + kRing; ++sequence) {
      const Entry& entry = ring_[sequence % kRing];
      if (entry.sequence.load(std::memory_order_seq_cst) != 0) continue;
      if (entry.users.load(std::memory_order_seq_cst) == 0) return sequence;
      all_taken = false;
    }
    Require(!all_taken, "64 jobs are outstanding in the pool; wait for one first");
    patience.Wait();
  }
}

void Pool::Submit(Job* job) {
  const std::lock_guard lock(submit_);
  const uint64_t sequence = FreeSequence();
  Entry& entry = ring_[sequence % kRing];
  job->sequence_ = sequence;
  entry.job.store(job, std::memory_order_relaxed);
  entry.sequence.store(sequence, std::memory_order_seq_cst);
  tail_.store(sequence, std::memory_order_release);
  signal_.fetch_add(1, std::memory_order_release);
  signal_.notify_all();
}

bool Pool::Retire(const Job* job) {
  if (!job->Done()) return false;
  Entry& entry = ring_[job->sequence_ % kRing];
  uint64_t found = job->sequence_;
  // First no late worker may start on it, then those inside must have left.
  if (entry.sequence.compare_exchange_strong(found, 0, std::memory_order_seq_cst)) found = 0;
  // Another job took the entry: only once this one's workers had left.
  return found != 0 || entry.users.load(std::memory_order_seq_cst) == 0;
}

bool Pool::Wait(Job* job, std::chrono::milliseconds patience) {
  const std::lock_guard lock(caller_);
  // Jobs before this one come first: they were submitted first, and the workers are busy with them.
  uint64_t seen = ~0ull;
  Clock::time_point changed = Clock::now();
  Patience waiting;
  while (!job->Done()) {
    Work(job, 0);
    const uint64_t progress = job->Progress();
    const Clock::time_point now = Clock::now();
    if (progress != seen) {
      seen = progress;
      changed = now;
    } else if (now - changed > patience) {
      return false;
    }
    waiting.Wait();
  }
  while (!Retire(job)) waiting.Wait();
  return true;
}

void Pool::Run(Job* job) {
  Submit(job);
  while (!Wait(job, std::chrono::hours(1))) {
  }
  if (job->error_ != nullptr) std::rethrow_exception(job->error_);
}

bool Pool::Left(const Job* job, int p, int worker) const {
  const Phase& phase = job->phases_[p];
  const int step = phase.parts == 1 ? 1 : groups_;
  for (int part = phase.parts == 1 ? 0 : group_[worker]; part < phase.parts; part += step)
    if (job->counters_[p].next[part].value.load(std::memory_order_relaxed) < phase.chunks) return true;
  return false;
}

int Pool::Take(Job* job, int p, int worker) const {
  const Phase& phase = job->phases_[p];
  const int step = phase.parts == 1 ? 1 : groups_;
  for (int part = phase.parts == 1 ? 0 : group_[worker]; part < phase.parts; part += step) {
    std::atomic<int>& next = job->counters_[p].next[part].value;
    if (next.load(std::memory_order_relaxed) >= phase.chunks) continue;
    const int chunk = next.fetch_add(1, std::memory_order_relaxed);
    if (chunk < phase.chunks) return part * phase.chunks + chunk;
  }
  return -1;
}

void Pool::Work(Job* job, int worker) {
  for (;;) {
    const int p = job->phase_.load(std::memory_order_acquire);
    if (p >= job->count_) return;
    const Phase& phase = job->phases_[p];
    const int chunk = Take(job, p, worker);
    if (chunk < 0) return;
    // A chunk that throws is done as well: left open, it would hold up the job and those inside it for good.
    if (!job->threw_.load(std::memory_order_relaxed)) {
      try {
        phase.run(job->context_, chunk, worker);
      } catch (...) {
        if (!job->threw_.exchange(true)) job->error_ = std::current_exception();
      }
    }
    if (job->counters_[p].done.value.fetch_add(1, std::memory_order_acq_rel) + 1 ==
        phase.chunks * phase.parts)
      job->Advance(p);
  }
}

void Pool::Visit(uint64_t sequence, int worker) {
  Entry& entry = ring_[sequence % kRing];
  entry.users.fetch_add(1, std::memory_order_seq_cst);
  if (entry.sequence.load(std::memory_order_seq_cst) == sequence) {
    Job* job = entry.job.load(std::memory_order_relaxed);
    Patience waiting;
    while (!job->Done()) {
      Work(job, worker);
      if (job->Done() || entry.sequence.load(std::memory_order_relaxed) != sequence) break;
      // The last phase has no more to take: the next job may have.
      const int p = job->phase_.load(std::memory_order_acquire);
      if (p == job->count_ - 1 && !Left(job, p, worker)) break;
      waiting.Wait();
    }
  }
  entry.users.fetch_sub(1, std::memory_order_release);
}

void Pool::Loop(int worker) {
  uint64_t visited = 0;
  for (;;) {
    // Read before the words that it announces, so that a change behind this look ends the wait below.
    const uint32_t signal = signal_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_acquire)) return;
    const uint64_t tail = tail_.load(std::memory_order_acquire);
    if (visited < tail) {
      if (tail - visited > kRing) visited = tail - kRing;
      Visit(++visited, worker);
      continue;
    }
    const Clock::time_point start = Clock::now();
    bool slept = false;
    while (signal_.load(std::memory_order_acquire) == signal && !slept) {
      for (int i = 0; i < 64; ++i) Pause();
      if (Clock::now() - start > kSpin) {
        signal_.wait(signal, std::memory_order_acquire);
        slept = true;
      }
    }
  }
}

}  // namespace k2
