// Reads by threads that block: for kernels and containers without io_uring.
#include <errno.h>
#include <pthread.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

#include "base.h"
#include "io/reader.h"

namespace k2 {
namespace {

class ThreadReader final : public Reader {
 public:
  explicit ThreadReader(const ReaderOptions& options) : Reader(options) {
    try {
      for (int i = 0; i < options.depth; ++i) threads_.emplace_back([this] { Loop(); });
    } catch (const std::system_error&) {
      if (!threads_.empty()) return;  // fewer read as well
      throw Error("the system refuses threads that read; let this process have more");
    }
  }

  ~ThreadReader() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    FailQueue();
  }

  const char* kind() const override { return "threads"; }

 private:
  void Wake() override { work_.notify_all(); }

  void Loop() {
    std::unique_lock lock(mutex_);
    for (;;) {
      Piece piece;
      bool found = false;
      work_.wait(lock, [&] { return stop_ || (found = Next(&piece)); });
      if (!found) return;
      lock.unlock();
      ssize_t result;
      do {
        result = ::pread(piece.Descriptor(), piece.read.into, piece.read.bytes,
                         static_cast<off_t>(piece.read.offset));
      } while (Again(&piece, result < 0 ? -errno : result));
      lock.lock();
      --in_flight_;
      if (piece.urgency == Urgency::kBackground) --background_in_flight_;
      work_.notify_one();
    }
  }

  std::condition_variable work_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Reader> OpenThreads(const ReaderOptions& options) {
  return std::make_unique<ThreadReader>(options);
}

}  // namespace k2
