// Reads through io_uring, by its system calls. Whoever asks for a read hands it to the kernel himself: a thread of its
// own would first have to get a core, which the computation of what is there already may hold for milliseconds. One
// thread takes what is complete; an eventfd tells it to look around.
#include "io/reader.h"

#if __has_include(<linux/io_uring.h>)
#include <errno.h>
#include <linux/io_uring.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <system_error>

namespace k2 {
namespace {

// Not in every libc's headers; the numbers are the same on all architectures.
constexpr long kSetup = 425, kEnter = 426;
constexpr unsigned kPatienceUs = 1000;

class Rings {
 public:
  // False if the kernel refuses.
  bool Open(unsigned entries) {
    io_uring_params params{};
    descriptor_ = static_cast<int>(::syscall(kSetup, entries, &params));
    if (descriptor_ < 0) return false;
    size_t bytes = params.sq_off.array + params.sq_entries * sizeof(unsigned);
    bytes = std::max(bytes, params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe));
    if ((params.features & IORING_FEAT_SINGLE_MMAP) == 0) return false;  // before Linux 5.4
    ring_ = Map(bytes, IORING_OFF_SQ_RING, &ring_bytes_);
    entries_ = static_cast<io_uring_sqe*>(
        Map(params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES, &entries_bytes_));
    if (ring_ == nullptr || entries_ == nullptr) return false;
    auto* base = static_cast<uint8_t*>(ring_);
    const auto word = [&](unsigned offset) { return reinterpret_cast<unsigned*>(base + offset); };
    sq_tail_ = word(params.sq_off.tail);
    sq_mask_ = *word(params.sq_off.ring_mask);
    sq_array_ = word(params.sq_off.array);
    cq_head_ = word(params.cq_off.head);
    cq_tail_ = word(params.cq_off.tail);
    cq_mask_ = *word(params.cq_off.ring_mask);
    completions_ = reinterpret_cast<io_uring_cqe*>(base + params.cq_off.cqes);
    return true;
  }

  ~Rings() {
    if (ring_ != nullptr) ::munmap(ring_, ring_bytes_);
    if (entries_ != nullptr) ::munmap(entries_, entries_bytes_);
    if (descriptor_ >= 0) ::close(descriptor_);
  }

  // The caller never has more in flight than the ring has entries.
  void Add(int file, void* into, unsigned bytes, uint64_t offset, uint64_t tag) {
    const unsigned tail = *sq_tail_;
    io_uring_sqe& entry = entries_[tail & sq_mask_];
    std::memset(&entry, 0, sizeof(entry));
    entry.opcode = IORING_OP_READ;
    entry.fd = file;
    entry.addr = reinterpret_cast<uint64_t>(into);
    entry.len = bytes;
    entry.off = offset;
    entry.user_data = tag;
    sq_array_[tail & sq_mask_] = tail & sq_mask_;
    __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
    ++added_;
  }

  // Hands over what was added. False: not all of it, as memory is short; the kernel will take it later.
  bool Submit() {
    while (added_ > 0) {
      const long taken = ::syscall(kEnter, descriptor_, added_, 0u, 0u, nullptr, 0);
      if (taken < 0 && errno == EINTR) continue;
      if (taken <= 0) return false;
      added_ -= static_cast<unsigned>(taken);
    }
    return true;
  }

  // Until something is complete.
  void Wait() {
    const long entered = ::syscall(kEnter, descriptor_, 0u, 1u, IORING_ENTER_GETEVENTS, nullptr, 0);
    if (entered < 0 && errno != EINTR) ::usleep(kPatienceUs);
  }

  template <typename Fn>
  void Completions(Fn&& fn) {
    unsigned head = *cq_head_;
    while (head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) {
      const io_uring_cqe completion = completions_[head & cq_mask_];
      __atomic_store_n(cq_head_, ++head, __ATOMIC_RELEASE);
      fn(completion.user_data, completion.res);
    }
  }

 private:
  void* Map(size_t bytes, off_t what, size_t* mapped) {
    void* at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, descriptor_, what);
    *mapped = bytes;
    return at == MAP_FAILED ? nullptr : at;
  }

  int descriptor_ = -1;
  void* ring_ = nullptr;
  size_t ring_bytes_ = 0;
  io_uring_sqe* entries_ = nullptr;
  size_t entries_bytes_ = 0;
  unsigned* sq_tail_ = nullptr;
  unsigned* sq_array_ = nullptr;
  unsigned sq_mask_ = 0;
  unsigned* cq_head_ = nullptr;
  unsigned* cq_tail_ = nullptr;
  unsigned cq_mask_ = 0;
  io_uring_cqe* completions_ = nullptr;
  unsigned added_ = 0;
};

class UringReader final : public Reader {
 public:
  explicit UringReader(const ReaderOptions& options) : Reader(options), pieces_(options.depth) {}

  bool Start() {
    bell_ = ::eventfd(0, EFD_CLOEXEC);
    if (bell_ < 0 || !rings_.Open(static_cast<unsigned>(options_.depth) + 1)) return false;
    if (!Answers()) return false;
    for (int i = options_.depth; i-- > 0;) free_.push_back(i);
    try {
      thread_ = std::thread([this] { Loop(); });
    } catch (const std::system_error&) {
      return false;
    }
    return true;
  }

  ~UringReader() override {
    if (thread_.joinable()) {
      {
        const std::lock_guard lock(mutex_);
        stop_ = true;
      }
      Wake();
      thread_.join();
    }
    FailQueue();
    if (bell_ >= 0) ::close(bell_);
  }

  const char* kind() const override { return "uring"; }

 private:
  static constexpr uint64_t kBell = ~0ull;

  void Wake() override {
    {
      const std::lock_guard lock(mutex_);
      if (!stop_ && BeginAll()) return;
    }
    RingBell();
  }

  void RingBell() {
    const uint64_t one = 1;
    // It can only fail by being full, and then it rings already.
    [[maybe_unused]] const ssize_t written = ::write(bell_, &one, sizeof(one));
  }

  // Rings alone prove little: Linux 5.4 and 5.5 open them, but know no plain read.
  bool Answers() {
    RingBell();
    rings_.Add(bell_, &rings_count_, sizeof(rings_count_), 0, kBell);
    int result = 0;
    for (int i = 0; i < 100 && result == 0; ++i) {
      if (!rings_.Submit()) ::usleep(kPatienceUs);
      rings_.Wait();
      rings_.Completions([&](uint64_t, int found) { result = found; });
    }
    return result == static_cast<int>(sizeof(rings_count_));
  }

  void Begin(int index) {
    const Read& read = pieces_[index].read;
    rings_.Add(pieces_[index].Descriptor(), read.into, static_cast<unsigned>(read.bytes), read.offset,
               static_cast<uint64_t>(index));
  }

  // Begins what may begin now; the caller holds mutex_. False: the kernel has not taken all of it.
  bool BeginAll() {
    Piece piece;
    while (Next(&piece)) {
      const int index = free_.back();
      free_.pop_back();
      pieces_[index] = piece;
      Begin(index);
    }
    return rings_.Submit();
  }

  void Loop() {
    bool listening = false;
    for (;;) {
      bool taken = true;
      {
        const std::lock_guard lock(mutex_);
        if (stop_ && in_flight_ == 0) return;
        if (!listening) rings_.Add(bell_, &rings_count_, sizeof(rings_count_), 0, kBell);
        listening = true;
        taken = stop_ ? rings_.Submit() : BeginAll();
      }
      if (taken)
        rings_.Wait();
      else
        ::usleep(kPatienceUs);
      rings_.Completions([&](uint64_t tag, int result) {
        if (tag == kBell) {
          listening = false;
          return;
        }
        const int index = static_cast<int>(tag);
        Piece piece;
        {
          const std::lock_guard lock(mutex_);
          piece = pieces_[index];
        }
        const bool again = Again(&piece, result);  // without the lock: it may tell whoever waits
        const std::lock_guard lock(mutex_);
        pieces_[index] = piece;
        if (again) {
          Begin(index);
          return;
        }
        --in_flight_;
        if (pieces_[index].urgency == Urgency::kBackground) --background_in_flight_;
        pieces_[index].file.reset();
        free_.push_back(index);
      });
    }
  }

  Rings rings_;
  int bell_ = -1;
  uint64_t rings_count_ = 0;
  std::vector<Piece> pieces_;
  std::vector<int> free_;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Reader> OpenUring(const ReaderOptions& options) {
  auto reader = std::make_unique<UringReader>(options);
  return reader->Start() ? std::move(reader) : nullptr;
}

}  // namespace k2

#else

namespace k2 {
std::unique_ptr<Reader> OpenUring(const ReaderOptions&) { return nullptr; }
}  // namespace k2

#endif
