#include "io/reader.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>

#include "base.h"

namespace k2 {

OpenFile::~OpenFile() {
  ::close(cached);
  if (direct >= 0) ::close(direct);
}

std::shared_ptr<OpenFile> Source::Open(const std::string& path) {
  const int cached = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (cached < 0) return nullptr;
  return std::make_shared<OpenFile>(cached, ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT));
}

Source::Source(const std::string& path) : path_(path), file_(Open(path)) {
  Require(file_ != nullptr, path + " cannot be opened for reading: " + strerror(errno));
}

std::shared_ptr<OpenFile> Source::file() const {
  const std::lock_guard lock(mutex_);
  return file_;
}

void Source::Reopen(const OpenFile* failed) {
  const std::lock_guard lock(mutex_);
  if (file_.get() != failed) return;
  if (auto opened = Open(path_)) file_ = std::move(opened);
}

std::unique_ptr<Reader> Reader::Open(const ReaderOptions& options) {
  Require(options.depth >= 1 && options.depth <= 256, "reads in flight must lie in 1..256");
  Require(options.piece_bytes >= kBlock4k && options.piece_bytes % kBlock4k == 0,
          "a piece must be a multiple of 4096 bytes");
  Require(options.kind.empty() || options.kind == "uring" || options.kind == "threads",
          "a reader is uring or threads, not " + options.kind);
  std::unique_ptr<Reader> reader;
  if (options.kind != "threads") reader = OpenUring(options);
  Require(reader != nullptr || options.kind != "uring",
          "this kernel or its container refuses io_uring; use the threads instead");
  return reader != nullptr ? std::move(reader) : OpenThreads(options);
}

void Reader::Submit(Fetch* fetch, const std::vector<Read>& reads, Urgency urgency) {
  int pieces = 0;
  for (const Read& read : reads) {
    Require(read.offset % kBlock4k == 0 && read.bytes % kBlock4k == 0 && read.bytes > 0 &&
                reinterpret_cast<uintptr_t>(read.into) % kBlock4k == 0 && read.needed <= read.bytes,
            "a direct read must be made of whole blocks");
    pieces += static_cast<int>((read.bytes + options_.piece_bytes - 1) / options_.piece_bytes);
  }
  fetch->failed.store(false, std::memory_order_relaxed);
  fetch->left.store(pieces, std::memory_order_release);
  if (pieces == 0) {
    fetch->done(fetch->context, true);
    return;
  }
  bool stopped;
  {
    const std::lock_guard lock(mutex_);
    std::deque<Piece>& queue = urgency == Urgency::kDemand ? demand_ : background_;
    for (const Read& read : reads)
      for (uint64_t at = 0; at < read.bytes; at += options_.piece_bytes) {
        const uint64_t bytes = std::min(options_.piece_bytes, read.bytes - at);
        const uint64_t needed = read.needed <= at ? 0 : std::min(bytes, read.needed - at);
        queue.push_back({fetch,
                         {read.source, read.offset + at, bytes, needed, read.into + at, nullptr},
                         urgency,
                         nullptr});
      }
    stopped = stop_;
  }
  if (stopped) FailQueue();
  Wake();
}

bool Reader::Next(Piece* piece) {
  // Background leaves room, so that demand finds the disk's queue short.
  const int background_depth = std::max(1, options_.depth / 2);
  if (in_flight_ >= options_.depth) return false;
  if (!demand_.empty()) {
    *piece = demand_.front();
    demand_.pop_front();
  } else if (!background_.empty() && background_in_flight_ < background_depth) {
    *piece = background_.front();
    background_.pop_front();
    ++background_in_flight_;
  } else {
    return false;
  }
  piece->file = piece->read.source->file();
  ++in_flight_;
  return true;
}

bool Reader::Again(Piece* piece, ssize_t result) {
  Read& read = piece->read;
  const uint64_t number = count_.fetch_add(1, std::memory_order_relaxed) + 1;
  const int fail = faults.fail_every.load(std::memory_order_relaxed);
  const int cut = faults.short_every.load(std::memory_order_relaxed);
  if (fail > 0 && number % static_cast<uint64_t>(fail) == 0) result = -EIO;
  if (cut > 0 && number % static_cast<uint64_t>(cut) == 0 && result > static_cast<ssize_t>(kBlock4k))
    result = result / 2 + 1;
  if (result == -EINTR || result == -EAGAIN) return true;
  if ((result == -EINVAL || result == -EOPNOTSUPP) && piece->began_direct) {
    piece->file->refused.store(true, std::memory_order_relaxed);
    return true;
  }
  if (result < 0) {
    Finish(*piece, false);
    return false;
  }
  const uint64_t got = static_cast<uint64_t>(result);
  bytes_read_.fetch_add(got, std::memory_order_relaxed);
  if (!piece->began_direct)
    posix_fadvise(piece->file->cached, static_cast<off_t>(read.offset), static_cast<off_t>(read.bytes),
                  POSIX_FADV_DONTNEED);
  if (got >= read.needed) {
    Finish(*piece, true);
    return false;
  }
  if (got == 0) {  // the file ends before what is needed
    Finish(*piece, false);
    return false;
  }
  // It goes on where it ended: a direct read at the last whole block, and where there is none, as at the end of a file
  // that shrank, through the page cache.
  const uint64_t kept = piece->began_direct ? BlockFloor(got) : got;
  if (kept == 0) piece->direct = false;
  read.offset += kept;
  read.bytes -= kept;
  read.needed -= kept;
  read.into += kept;
  return true;
}

void Reader::Finish(const Piece& piece, bool whole) {
  Fetch* fetch = piece.fetch;
  if (!whole) {
    fetch->failed.store(true, std::memory_order_relaxed);
    piece.read.source->Reopen(piece.file.get());
  }
  if (fetch->left.fetch_sub(1, std::memory_order_acq_rel) == 1)
    fetch->done(fetch->context, !fetch->failed.load(std::memory_order_relaxed));
}

void Reader::FailQueue() {
  std::deque<Piece> left;
  {
    const std::lock_guard lock(mutex_);
    left.swap(demand_);
    left.insert(left.end(), background_.begin(), background_.end());
    background_.clear();
  }
  for (const Piece& piece : left) Finish(piece, false);
}

}  // namespace k2
