// Brings experts into free slots behind the scenes, while the store serves from the map.
//
// Each node has threads of its own, bound to it: they make its pages and read its rows, the next expert while the last
// one is on its way. What the page cache holds is copied, the rest is read past it, and one more thread
// lets the cache forget what is filled. While tickets are at work the threads step back, but never stop for good.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "experts/store.h"

namespace k2 {

struct FillProgress {
  int64_t experts = 0;  // to be filled in all
  int64_t done = 0;     // filled, or found filled; those for which no slot was free count too
  int64_t failed = 0;
  bool running = false;
};

class Filler {
 public:
  // `order` is (layer, expert); `cpus` those of each node (empty: not bound), `threads` for each node.
  Filler(ExpertStore& store, std::vector<std::pair<int, int>> order, std::vector<std::vector<int>> cpus,
         int threads);
  ~Filler();  // stops at the next expert
  Filler(const Filler&) = delete;
  Filler& operator=(const Filler&) = delete;

  void Stop();
  FillProgress progress() const;

 private:
  struct Work {
    std::atomic<int> slot{-2};  // -2: nobody began yet; -1: nothing to do
    std::atomic<int> nodes_left{0};
    std::atomic<bool> failed{false};
  };
  struct Coming {  // what one thread has on its way
    Filler* filler = nullptr;
    int item = -1;
    Fetch fetch;
    bool done = true;
  };

  void Loop(int node);
  void StepBack();
  // Begins item `i` on `node`: pages, what is cached, and the reads of the rest.
  void Begin(int i, int node, Coming* read);
  void Finished(int i, bool whole);
  // Drops the page cache's copies, on a thread of its own: it takes the kernel as long as copying them took.
  void Forget();

  ExpertStore& store_;
  const std::vector<std::pair<int, int>> order_;
  const std::vector<std::vector<int>> cpus_;
  std::vector<Work> work_;
  std::vector<std::atomic<int>> next_;  // by node
  std::atomic<int> running_{0};
  std::atomic<int64_t> done_{0}, failed_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  int left_ = 0;             // threads that may still bring experts
  std::vector<int> filled_;  // items that the page cache may forget
  std::vector<std::thread> threads_;
};

}  // namespace k2
