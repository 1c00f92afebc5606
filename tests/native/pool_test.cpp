// The pool under load: order of phases, jobs from several threads, a stuck chunk. Exits 1 with a line if one
// fails.
#include "cpu/pool.h"

#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

using std::chrono::milliseconds;

void Check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

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

void TestManyJobs(int threads) {
  k2::Pool pool(threads, {});
  for (int i = 0; i < 20000; ++i) RunOne(pool, i);
}

void TestSeveralCallers() {
  k2::Pool pool(3, {});
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t)
    callers.emplace_back([&pool, t] {
      for (int i = 0; i < 3000; ++i) RunOne(pool, i + t);
    });
  for (auto& caller : callers) caller.join();
}

void TestTicketsInFlight() {
  k2::Pool pool(2, {});
  for (int round = 0; round < 2000; ++round) {
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
void TestOldTicket() {
  k2::Pool pool(3, {});
  for (int round = 0; round < 50; ++round) {
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
  bool refused = false;
  try {
    pool.Submit(&jobs[64]);
  } catch (const k2::Error&) {
    refused = true;
  }
  Check(refused, "a 65th outstanding job is refused");
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

int main() {
  for (int threads : {1, 2, 3, 5}) TestManyJobs(threads);
  TestSeveralCallers();
  TestTicketsInFlight();
  TestStuckChunk();
  TestOldTicket();
  TestFullRing();
  TestSlowChunk();
  TestSleepAndWake();
  std::puts("pool: all held");
}
