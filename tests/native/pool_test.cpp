// The pool from start to stop, and under load: order of phases, jobs from several threads, a stuck chunk.
#include "cpu/pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <memory>
#include <thread>
#include <vector>

#include "check.h"

// Threads that the system still grants: a negative number is no limit.
static std::atomic<int> granted{-1};

// The sanitizers' own, where they are linked statically: the name below hides it from dlsym.
extern "C" __attribute__((weak)) int __interceptor_pthread_create(pthread_t*, const pthread_attr_t*,
                                                                  void* (*)(void*), void*);

// Stands before the C library's, so that the test decides which thread is refused.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                              void* argument) noexcept {
  if (granted.load() == 0) return EAGAIN;
  if (granted.load() > 0) granted.fetch_sub(1);
  if (__interceptor_pthread_create != nullptr)
    return __interceptor_pthread_create(thread, attributes, start, argument);
  static const auto next = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  return next(thread, attributes, start, argument);
}

namespace {

using k2::test::Check;
using k2::test::CheckRefused;
using k2::test::Step;
using std::chrono::microseconds;
using std::chrono::milliseconds;

// Each phase adds its weight once per chunk; a chunk of phase p must see phase p - 1 complete.
struct Counting {
  int chunks[3];
  std::atomic<int> done[3] = {0, 0, 0};
  std::atomic<int> early{0};
};

template <int P>
void Count(void* context, int, int) {
  auto& c = *static_cast<Counting*>(context);
  if (P > 0 && c.done[P - 1].load() != c.chunks[P - 1]) c.early.fetch_add(1);
  c.done[P].fetch_add(1);
}

void RunOne(k2::Pool& pool, int seed) {
  Counting c{{seed % 7, seed % 5, 1 + seed % 3}};
  k2::Job job;
  job.Reset(&c, {{Count<0>, c.chunks[0]}, {Count<1>, c.chunks[1]}, {Count<2>, c.chunks[2]}});
  pool.Run(&job);
  for (int p = 0; p < 3; ++p) Check(c.done[p].load() == c.chunks[p], "every chunk runs exactly once");
  Check(c.early.load() == 0, "a phase opens only when the one before is done");
}

void TestCounts() {
  for (int threads : {0, -1, -1024, 1025, 1 << 30})
    CheckRefused([&] { k2::Pool pool(threads, {}); }, "threads must lie in 1..1024");
  for (int threads : {1, 2, 17}) {
    k2::Pool pool(threads, {});
    Check(pool.threads() == threads, "the pool has the threads asked for");
    RunOne(pool, 5);
  }
}

void TestRefusedThreads() {
  for (int grant : {0, 1, 3}) {
    granted.store(grant);
    CheckRefused([] { k2::Pool pool(5, {}); }, "ask for fewer threads");
    Check(granted.load() == 0, "those before the refused one were started, and stopped");
  }
  granted.store(0);
  {
    k2::Pool alone(1, {});
    RunOne(alone, 11);  // one thread is the caller's own
  }
  granted.store(-1);
  k2::Pool pool(5, {});
  RunOne(pool, 11);
}

void TestPins() {
  // Places to run that do not exist, or are fewer than threads: workers float, and work.
  for (const std::vector<int>& cpus :
       {std::vector<int>{0}, {-1, -1, -1}, {0, 100000, 1 << 30}, {0, 0, 0, 0}}) {
    k2::Pool pool(3, cpus);
    for (int i = 0; i < 20; ++i) RunOne(pool, i);
  }
  std::thread caller([] {
    k2::Pool pool(2, {0, 0});
    pool.PinCaller();
    RunOne(pool, 11);
  });
  caller.join();
}

// The end comes at any moment of a worker's life: while it starts, spins, goes to sleep or leaves a job.
void TestStopAnyMoment(int rounds) {
  for (int i = 0; i < rounds; ++i) {
    k2::Pool pool(2 + i % 3, {});
    for (int job = 0; job < i % 4; ++job) RunOne(pool, i + job);
    if (i % 16 == 0) std::this_thread::sleep_for(microseconds(i % 512));  // workers spin for 200
  }
}

void TestStopAsleep() {
  for (int threads : {2, 5}) {
    k2::Pool pool(threads, {});
    RunOne(pool, 11);
    std::this_thread::sleep_for(milliseconds(20));
  }
}

// What nobody waited for is either done or was not begun; the pool does not touch it afterwards.
void TestStopOutstanding(int rounds) {
  constexpr int kJobs = 8;
  for (int threads : {1, 2, 3})
    for (int round = 0; round < rounds; ++round) {
      std::vector<Counting> counting(kJobs);
      auto jobs = std::make_unique<std::array<k2::Job, kJobs>>();
      {
        k2::Pool pool(threads, {});
        for (int i = 0; i < kJobs; ++i) {
          counting[i].chunks[0] = 3;
          counting[i].chunks[1] = 1 + i;
          counting[i].chunks[2] = i % 3;
          (*jobs)[i].Reset(&counting[i], {{Count<0>, 3}, {Count<1>, 1 + i}, {Count<2>, i % 3}});
          pool.Submit(&(*jobs)[i]);
        }
        if (round % 2 == 0) std::this_thread::sleep_for(microseconds(round % 64));
      }
      for (int i = 0; i < kJobs; ++i) {
        const bool done = (*jobs)[i].Done();
        Check(threads > 1 || !done, "without workers nothing runs that nobody waits for");
        for (int p = 0; p < 3; ++p)
          Check(counting[i].done[p].load() == (done ? counting[i].chunks[p] : 0),
                "a job that the end overtook is whole or untouched");
        Check(counting[i].early.load() == 0, "and its phases kept their order");
      }
    }
}

// The end waits for a chunk that runs; those behind it in the same job still run.
void TestStopInsideChunk() {
  std::atomic<bool> inside{false};
  std::atomic<int> ran{0};
  struct Context {
    std::atomic<bool>& inside;
    std::atomic<int>& ran;
  } context{inside, ran};
  k2::Job job;
  job.Reset(&context, {{[](void* at, int, int) {
                          auto& c = *static_cast<Context*>(at);
                          c.inside.store(true);
                          std::this_thread::sleep_for(milliseconds(30));
                          c.ran.fetch_add(1);
                        },
                        3}});
  {
    k2::Pool pool(2, {});
    pool.Submit(&job);
    while (!inside.load()) std::this_thread::yield();
  }
  Check(job.Done() && ran.load() == 3, "the end waits for a job that was begun");
}

struct Throwing {
  std::atomic<int> ran{0};
  std::atomic<bool> thrown{false};
  int at = 0;
  bool by_worker = false;  // else by the thread that waits
};

void Throw(void* context, int chunk, int worker) {
  auto& c = *static_cast<Throwing*>(context);
  c.ran.fetch_add(1);
  if ((worker != 0) != c.by_worker) {
    while (!c.thrown.load()) std::this_thread::yield();
  } else if (chunk >= c.at) {
    c.thrown.store(true);
    throw k2::Error("chunk " + std::to_string(chunk));
  }
}

// What a chunk throws reaches the caller, whoever ran it; the job is over, and the pool goes on.
void TestThrowingChunks(int rounds) {
  for (int threads : {1, 2, 3}) {
    k2::Pool pool(threads, {});
    for (int round = 0; round < rounds; ++round) {
      Throwing c;
      c.at = round % 7;
      c.by_worker = threads > 1 && round % 2 == 1;
      k2::Job job;
      job.Reset(&c, {{Throw, 40}, {Throw, 40}});
      CheckRefused([&] { pool.Run(&job); }, "chunk ");
      Check(job.Done() && pool.Retire(&job), "a job that threw is over");
      Check(threads > 1 || c.ran.load() == c.at + 1, "no chunk begins behind it");
      job.Reset(&c, {{Throw, 8}});
      pool.Submit(&job);
      Check(pool.Wait(&job, milliseconds(60000)), "waiting does not throw");
      k2::Job good;
      Counting counting{{3, 2, 1}};
      good.Reset(&counting, {{Count<0>, 3}, {Count<1>, 2}, {Count<2>, 1}});
      pool.Run(&good);
      Check(good.error() == nullptr && counting.done[2].load() == 1, "the next job is none the worse");
    }
  }
}

// A job may go as soon as it was waited for, or retired: no worker looks at it any more.
void TestJobsComeAndGo(int rounds) {
  k2::Pool pool(3, {});
  for (int i = 0; i < rounds; ++i) {
    Counting c{{1 + i % 3, i % 2, 2}};
    auto job = std::make_unique<k2::Job>();
    job->Reset(&c, {{Count<0>, c.chunks[0]}, {Count<1>, c.chunks[1]}, {Count<2>, 2}});
    pool.Submit(job.get());
    if (i % 2 == 0) {
      Check(pool.Wait(job.get(), milliseconds(60000)), "it completes");
    } else {
      while (!pool.Retire(job.get())) std::this_thread::yield();
    }
    Check(c.done[2].load() == 2, "it ran");
  }
}

// Plain memory passes from one phase to the next and to the caller: nothing but the pool orders it.
struct Plain {
  static constexpr int kChunks = 12;
  int round = 0;
  int first[kChunks] = {};
  int second[kChunks] = {};
};

void WriteFirst(void* context, int chunk, int) {
  auto& p = *static_cast<Plain*>(context);
  p.first[chunk] = p.round + chunk;
}

void WriteSecond(void* context, int chunk, int) {
  auto& p = *static_cast<Plain*>(context);
  p.second[chunk] = p.first[Plain::kChunks - 1 - chunk] - p.round;
}

void TestPlainMemory(int rounds) {
  for (int threads : {2, 3}) {
    k2::Pool pool(threads, {});
    Plain plain;
    k2::Job job;
    for (plain.round = 0; plain.round < rounds; ++plain.round) {
      job.Reset(&plain, {{WriteFirst, Plain::kChunks}, {WriteSecond, Plain::kChunks}});
      pool.Run(&job);
      for (int i = 0; i < Plain::kChunks; ++i) {
        Check(plain.second[i] == Plain::kChunks - 1 - i, "what a phase wrote is read by the next");
        plain.first[i] = plain.second[i] = -1;
      }
    }
  }
}

void TestEmptyJobs() {
  k2::Pool pool(3, {});
  for (int i = 0; i < 200; ++i) {
    k2::Job none;
    none.Reset(nullptr, {});
    pool.Run(&none);
    k2::Job empty;
    empty.Reset(nullptr, {{Count<0>, 0}, {Count<1>, 0}});
    Check(empty.Done(), "phases without chunks are done");
    pool.Run(&empty);
    Counting c{{0, 0, 4}};
    k2::Job last;
    last.Reset(&c, {{Count<0>, 0}, {Count<1>, 0}, {Count<2>, 4}});
    pool.Run(&last);
    Check(c.done[2].load() == 4, "empty phases are passed over");
  }
  k2::Job job;
  constexpr k2::Phase kPhase{Count<0>, 1};
  CheckRefused([&] { job.Reset(nullptr, {kPhase, kPhase, kPhase, kPhase, kPhase}); }, "at most 4 phases");
}

void TestManyJobs(int threads, int rounds) {
  k2::Pool pool(threads, {});
  for (int i = 0; i < rounds; ++i) RunOne(pool, i);
}

void TestSeveralCallers(int rounds) {
  k2::Pool pool(3, {});
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t)
    callers.emplace_back([&pool, t, rounds] {
      for (int i = 0; i < rounds; ++i) RunOne(pool, i + t);
    });
  for (auto& caller : callers) caller.join();
}

void TestTicketsInFlight(int rounds) {
  k2::Pool pool(2, {});
  for (int round = 0; round < rounds; ++round) {
    Counting first{{3, 2, 2}};
    Counting second{{1, 4, 1}};
    k2::Job a;
    k2::Job b;
    a.Reset(&first, {{Count<0>, 3}, {Count<1>, 2}, {Count<2>, 2}});
    b.Reset(&second, {{Count<0>, 1}, {Count<1>, 4}, {Count<2>, 1}});
    pool.Submit(&a);
    pool.Submit(&b);
    RunOne(pool, round);
    Check(pool.Wait(&b, milliseconds(10000)), "the second ticket completes first if collected first");
    Check(pool.Wait(&a, milliseconds(10000)), "the first completes too");
    Check(first.done[2].load() == 2 && second.done[2].load() == 1, "both ran");
  }
}

void TestStuckChunk() {
  static std::atomic<bool> release{false};
  static std::atomic<int> ran{0};
  k2::Pool pool(2, {});
  k2::Job job;
  job.Reset(nullptr, {{[](void*, int, int worker) {
                         // Only the pool's own thread gets stuck; the caller goes on.
                         while (worker != 0 && !release.load()) std::this_thread::yield();
                         if (worker == 0) std::this_thread::sleep_for(milliseconds(5));
                         ran.fetch_add(1);
                       },
                       40}});
  pool.Submit(&job);
  Check(!pool.Wait(&job, milliseconds(100)), "a job without progress is given up");
  Check(!pool.Retire(&job), "its worker is still inside");
  for (int i = 0; i < 200; ++i) RunOne(pool, i);  // thrice around the ring: the stuck one is passed over
  release.store(true);
  Check(pool.Wait(&job, milliseconds(10000)), "it completes once the worker comes back");
  Check(ran.load() == 40 && pool.Retire(&job), "nothing was lost");
  RunOne(pool, 11);
}

// Not collected while the ring goes around: neither lost nor overwritten.
void TestOldTicket(int rounds) {
  k2::Pool pool(3, {});
  for (int round = 0; round < rounds; ++round) {
    Counting old{{5, 3, 2}};
    k2::Job ticket;
    ticket.Reset(&old, {{Count<0>, 5}, {Count<1>, 3}, {Count<2>, 2}});
    pool.Submit(&ticket);
    for (int i = 0; i < 150; ++i) RunOne(pool, i);
    Check(pool.Wait(&ticket, milliseconds(10000)), "an old ticket completes");
    Check(old.done[2].load() == 2 && old.early.load() == 0, "its chunks ran once and in order");
  }
}

void TestFullRing() {
  k2::Pool pool(1, {});
  Counting counting{{1, 0, 0}};
  std::vector<k2::Job> jobs(65);
  for (k2::Job& job : jobs) job.Reset(&counting, {{Count<0>, 1}});
  for (int i = 0; i < 64; ++i) pool.Submit(&jobs[i]);
  CheckRefused([&] { pool.Submit(&jobs[64]); }, "64 jobs are outstanding");
  for (int i = 0; i < 64; ++i) Check(pool.Wait(&jobs[i], milliseconds(10000)), "each completes");
  Check(counting.done[0].load() == 64, "the 64 ran");
}

// Chunks longer than the patience are fine as long as they tell that they live.
void TestSlowChunk() {
  k2::Pool pool(2, {});
  static k2::Job job;
  job.Reset(nullptr, {{[](void*, int, int worker) {
                         for (int i = 0; i < (worker == 0 ? 1 : 30); ++i) {
                           std::this_thread::sleep_for(milliseconds(20));
                           job.Beat();
                         }
                       },
                       2}});
  pool.Submit(&job);
  Check(pool.Wait(&job, milliseconds(300)), "a slow chunk that shows progress is waited for");
}

void TestSleepAndWake() {
  k2::Pool pool(3, {0, 1, 0});
  for (int i = 0; i < 50; ++i) {
    std::this_thread::sleep_for(milliseconds(2));  // longer than the workers spin
    RunOne(pool, i);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const k2::test::Effort effort(argc, argv);
  Step("thread counts", TestCounts);
  Step("refused threads", TestRefusedThreads);
  Step("pins", TestPins);
  Step("stop at any moment", [&] { TestStopAnyMoment(effort.Rounds(4000)); });
  Step("stop while workers sleep", TestStopAsleep);
  Step("stop with jobs outstanding", [&] { TestStopOutstanding(effort.Rounds(500)); });
  Step("stop inside a chunk", TestStopInsideChunk);
  for (int threads : {1, 2, 3, 5}) Step("many jobs", [&] { TestManyJobs(threads, effort.Rounds(20000)); });
  Step("jobs come and go", [&] { TestJobsComeAndGo(effort.Rounds(5000)); });
  Step("plain memory", [&] { TestPlainMemory(effort.Rounds(5000)); });
  Step("empty jobs", TestEmptyJobs);
  Step("throwing chunks", [&] { TestThrowingChunks(effort.Rounds(300)); });
  Step("several callers", [&] { TestSeveralCallers(effort.Rounds(3000)); });
  Step("tickets in flight", [&] { TestTicketsInFlight(effort.Rounds(2000)); });
  Step("stuck chunk", TestStuckChunk);
  Step("old ticket", [&] { TestOldTicket(effort.Rounds(50)); });
  Step("full ring", TestFullRing);
  Step("slow chunk", TestSlowChunk);
  Step("sleep and wake", TestSleepAndWake);
  std::puts("all held");
}
