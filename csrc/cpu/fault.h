// Mapped files that shrink or fail while somebody reads them.
//
// Reading a page whose bytes are gone raises SIGBUS in whoever reads: a kernel of ours, torch, numba, numpy.
// In registered maps the handler puts zero pages there and marks the bytes as failed, and the reader goes on
// with zeros. Whoever cares asks Failed() afterwards about what it read:
//
//   Register ──► read ──SIGBUS──► marked, then zeros ──► Failed() is true ──Restore──► read again
//                  ├──the file shrank within a page: zeros without a signal──Look──► marked
//                  └──it was written to, but is as long as ever: what was read?──Look──► Rewrites
//
//  1. Past the end of the file all is marked at once: from the file's last byte on, to the byte. A page within
//     the file (a disk that failed) is marked alone. Marks are never too small: who reads zeros in place of a
//     file's bytes and asks afterwards is told, but for what Look has yet to find.
//  2. Faults elsewhere go to the handler that was there before, and so does a SIGBUS that somebody sent.
//  3. The handler takes no lock and allocates nothing; any number of threads may fault at once.
//  4. Register, Unregister, Look, Restore and Ranges may be called by any thread, but hold a lock: not by a
//     signal's handler. Restore is for times when nobody reads: what was read before is asked about before.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace k2 {

class FileMaps {
 public:
  static constexpr int kMaps = 1 << 14;  // at once: K2 has 62 shards, the index allows 4096

  struct Range {
    uintptr_t begin;
    uintptr_t end;
  };

  // Installs the handler, once per process; Register does so too.
  static void Install();

  // From now on faults in [begin, begin + bytes), a read-only map of the start of `fd`'s file, are caught.
  // `begin` is a multiple of the page size; `fd` is duplicated. Throws if the range overlaps another one, or
  // something has run out. The map must not be unmapped before Unregister.
  static int Register(const void* begin, size_t bytes, int fd);
  static void Unregister(int id);

  // Whether a byte of the range may have been read as zero in place of what the file holds.
  static bool Failed(const void* begin, size_t bytes) {
    // What was read must have been read before the marks are: a fence, since a load alone orders what follows.
    std::atomic_thread_fence(std::memory_order_acquire);
    return failing_.load(std::memory_order_relaxed) != 0 && Search(begin, bytes);
  }

  // Marks what files lost that have become shorter, and counts what was written to; one fstat a map.
  static void Look();

  // Maps `fd`'s file, opened anew, over map `id` and clears its marks. False, and nothing changes, unless the
  // file is regular and has just the bytes of the map. Throws if the id is unknown or it cannot be mapped.
  static bool Restore(int id, int fd);

  // What is marked, as addresses, ascending within a map.
  static std::vector<Range> Ranges();

  // Maps, by their address, whose files were found changed at the same size, and how often: what was read in
  // between may have been anything.
  struct Rewrite {
    uintptr_t begin;
    uint64_t times;
  };
  static std::vector<Rewrite> Rewrites();

  // Changes whenever Ranges or Rewrites do.
  static uint64_t changes() { return changes_.load(); }

 private:
  static bool Search(const void* begin, size_t bytes);

  static std::atomic<int> failing_;  // maps with marks, at least
  static std::atomic<uint64_t> changes_;

  friend class FileMap;
};

}  // namespace k2
