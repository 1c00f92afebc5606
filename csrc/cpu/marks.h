// Which bytes of a mapped file were lost: added to by handlers of signals, so without locks or allocation.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace k2 {

// Offsets [begin, end).
struct Lost {
  uint64_t begin;
  uint64_t end;
};

// All zeros when empty, as a table of them is before anything runs. Bytes are marked from some byte on, which
// may only move down, or by pages, in a few intervals that may only grow. Any thread may add and ask at any time.
class Marks {
 public:
  static constexpr int kIntervals = 16;  // the last one takes in all that are more

  // From byte `end` on. Whether that is new.
  bool AddFrom(uint64_t end) {
    uint64_t old = beyond_.load();
    while (~end > old && !beyond_.compare_exchange_weak(old, ~end)) {
    }
    return ~end > old;
  }

  // One page; gives it with what an interval takes in on the way to it. Whether that is new.
  bool AddPage(uint64_t page, size_t page_bytes, Lost& added) {
    const auto give = [&](uint64_t first, uint64_t last) { added = {first * page_bytes, last * page_bytes}; };
    give(page, page + 1);
    if (Overlap(added.begin, added.end, page_bytes)) return false;
    for (int i = 0; i < kIntervals; ++i) {
      uint64_t old = intervals_[i].load();
      for (;;) {
        const uint64_t first = First(old), last = Last(old);
        if (old != 0 && page >= first && page < last) return false;  // by another thread
        const bool touches = old == 0 || page == last || page + 1 == first;
        if (!touches && i + 1 < kIntervals) break;
        const uint64_t wanted =
            old == 0 ? Pack(page, page + 1) : Pack(std::min(first, page), std::max(last, page + 1));
        if (!intervals_[i].compare_exchange_weak(old, wanted)) continue;
        if (old != 0) page < first ? give(page, first) : give(last, page + 1);
        return true;
      }
    }
    return false;  // not reached: the last interval takes any page
  }

  bool Overlap(uint64_t begin, uint64_t end, size_t page_bytes) const {
    if (end > ~beyond_.load()) return true;
    for (const auto& interval : intervals_) {
      const uint64_t pages = interval.load();
      if (pages == 0) break;
      if (begin < Last(pages) * page_bytes && First(pages) * page_bytes < end) return true;
    }
    return false;
  }

  // Ascending, of a file of `bytes`; they may overlap.
  std::vector<Lost> List(uint64_t bytes, size_t page_bytes) const {
    std::vector<Lost> list;
    for (const auto& interval : intervals_)
      if (const uint64_t pages = interval.load(); pages != 0)
        list.push_back({First(pages) * page_bytes, std::min(bytes, Last(pages) * page_bytes)});
    if (const uint64_t end = ~beyond_.load(); end < bytes) list.push_back({end, bytes});
    std::sort(list.begin(), list.end(), [](const Lost& a, const Lost& b) { return a.begin < b.begin; });
    return list;
  }

  // While nobody adds.
  void Clear() {
    beyond_.store(0);
    for (auto& interval : intervals_) interval.store(0);
  }

 private:
  // Pages [first, last) in one word, so that they change together.
  static uint64_t Pack(uint64_t first, uint64_t last) { return first << 32 | last; }
  static uint64_t First(uint64_t pages) { return pages >> 32; }
  static uint64_t Last(uint64_t pages) { return pages & UINT32_MAX; }

  std::atomic<uint64_t> beyond_{0};  // the complement of the byte from which on all is lost
  std::atomic<uint64_t> intervals_[kIntervals] = {};
};

}  // namespace k2
