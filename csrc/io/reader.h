// Asynchronous reads of a checkpoint's own files, past the page cache.
//
//   Source (a file) ──Read{source, offset, bytes}──► Reader (io_uring, or threads) ──► Fetch::done, on its thread
//
// Direct reads start, end and land at multiples of kBlock. A read is cut into pieces, so that several are in flight;
// demand goes before background, and never waits for more than the pieces that background has in flight. A short read
// goes on where it ended; one that the file system refuses to do directly is done through the page cache, which is
// told to forget it.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace k2 {

inline constexpr uint64_t kBlock4k = 4096;
inline constexpr uint64_t BlockFloor(uint64_t at) { return at / kBlock4k * kBlock4k; }
inline constexpr uint64_t BlockCeil(uint64_t at) { return BlockFloor(at + kBlock4k - 1); }

// An open file. Whoever reads holds it, so that it is not closed meanwhile.
struct OpenFile {
  OpenFile(int cached, int direct) : cached(cached), direct(direct) {}
  ~OpenFile();
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  const int cached;                  // reads through the page cache
  const int direct;                  // reads past it; -1 where the file system has no direct reads
  std::atomic<bool> refused{false};  // it has, but not for this file
  bool is_direct() const { return direct >= 0 && !refused.load(std::memory_order_relaxed); }
};

// A file that is read, opened again by its path after a read failed: whoever repairs it may replace it.
class Source {
 public:
  // Throws Error if the file cannot be opened.
  explicit Source(const std::string& path);

  std::shared_ptr<OpenFile> file() const;
  // `failed` is what failed; where another one is open already, that one may be better.
  void Reopen(const OpenFile* failed);

 private:
  static std::shared_ptr<OpenFile> Open(const std::string& path);

  const std::string path_;
  mutable std::mutex mutex_;
  std::shared_ptr<OpenFile> file_;
};

// Reads that are complete together: `done(context, whole)` is called once, on the reader's thread.
struct Fetch {
  std::atomic<int> left{0};  // pieces; set by Reader::Submit
  std::atomic<bool> failed{false};
  void (*done)(void* context, bool whole) = nullptr;
  void* context = nullptr;
};

// `bytes` from `offset` on to `into`; all multiples of kBlock4k. The file may end inside the last block, but not before
// `needed` bytes.
struct Read {
  Source* source;
  uint64_t offset;
  uint64_t bytes;
  uint64_t needed;
  uint8_t* into;
  const void* mapped = nullptr;  // the same bytes in a map of the file, if there is one
};

struct ReaderOptions {
  std::string kind;  // "uring", "threads", or "": the first of them that works here
  int depth = 16;    // pieces in flight
  uint64_t piece_bytes = 2 << 20;
};

// What tests ask for: every n-th piece fails, or ends early. 0: never.
struct ReadFaults {
  std::atomic<int> fail_every{0};
  std::atomic<int> short_every{0};
};

enum class Urgency { kDemand, kBackground };

class Reader {
 public:
  // Throws Error for an unknown kind, or one that is refused here.
  static std::unique_ptr<Reader> Open(const ReaderOptions& options);
  virtual ~Reader() = default;  // waits for what is in flight; the queue is completed as failed
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  virtual const char* kind() const = 0;
  // `fetch` must stay until its `done` was called.
  void Submit(Fetch* fetch, const std::vector<Read>& reads, Urgency urgency);
  ReadFaults faults;
  uint64_t bytes_read() const { return bytes_read_.load(std::memory_order_relaxed); }

 protected:
  struct Piece {
    Fetch* fetch;
    Read read;
    Urgency urgency;
    std::shared_ptr<OpenFile> file;  // set by Next
    bool direct = true;
    bool began_direct = false;  // how the read under way was asked for: `refused` may be set meanwhile
    int Descriptor() {          // of the read that begins now
      began_direct = direct && file->is_direct();
      return began_direct ? file->direct : file->cached;
    }
  };
  explicit Reader(const ReaderOptions& options) : options_(options) {}

  // The next piece to begin, if any may begin now; the caller holds mutex_.
  bool Next(Piece* piece);
  // A piece's read ended with `result` (bytes, or -errno). True if it is to be read again as it now stands.
  bool Again(Piece* piece, ssize_t result);
  void FailQueue();
  virtual void Wake() = 0;

  const ReaderOptions options_;
  std::mutex mutex_;
  std::deque<Piece> demand_, background_;
  int in_flight_ = 0;
  int background_in_flight_ = 0;
  bool stop_ = false;

 private:
  void Finish(const Piece& piece, bool whole);

  std::atomic<uint64_t> count_{0};
  std::atomic<uint64_t> bytes_read_{0};
};

// Null where the kernel has no io_uring, or forbids it.
std::unique_ptr<Reader> OpenUring(const ReaderOptions& options);
std::unique_ptr<Reader> OpenThreads(const ReaderOptions& options);

}  // namespace k2
