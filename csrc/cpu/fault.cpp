#include "cpu/fault.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "base.h"
#include "cpu/marks.h"

namespace k2 {

std::atomic<int> FileMaps::failing_{0};
std::atomic<uint64_t> FileMaps::changes_{0};

namespace {

constexpr int kBusy = -1;

size_t page_bytes = 4096;  // set before the handler is
struct sigaction previous;
std::mutex table;  // of whoever changes it; the handler never takes it

size_t Up(size_t bytes) { return (bytes + page_bytes - 1) / page_bytes * page_bytes; }

// The bare system call: handlers may make it, which POSIX does not say of mmap. And sanitizers would take mmap's for
// a write to what other threads are reading.
bool MapOver(uintptr_t address, size_t bytes, long flags, long fd) {
  return syscall(SYS_mmap, address, bytes, long{PROT_READ}, MAP_FIXED | flags, fd, 0L) != -1;
}

}  // namespace

// One map. `users` counts handlers inside; who changes the map waits until there are none and makes it kBusy. A
// handler that meets kBusy returns: the read is tried again, and so waits.
class FileMap {
 public:
  std::atomic<uintptr_t> begin{0};  // 0: free
  std::atomic<size_t> bytes{0};
  std::atomic<int> fd{0};
  std::atomic<int> users{0};
  // Of whoever holds the table.
  int uses = 0;  // of this place: makes ids differ
  uint64_t rewrites = 0;
  timespec written = {};

  bool Enter() {
    int inside = users.load();
    do {
      if (inside == kBusy) return false;
    } while (!users.compare_exchange_weak(inside, inside + 1));
    return true;
  }
  void Leave() { users.fetch_sub(1); }
  void Close() {
    int none = 0;
    while (!users.compare_exchange_weak(none, kBusy)) {
      none = 0;
      std::this_thread::yield();
    }
  }
  void Open() { users.store(0); }

  bool Covers(uintptr_t address) const {
    const uintptr_t from = begin.load();
    return from != 0 && address - from < Up(bytes.load());
  }

  // Inside, at a fault. Marks first, then zeros: nobody finds zeros that are not marked.
  bool Fail(uintptr_t address) {
    const size_t at = (address - begin.load()) / page_bytes * page_bytes;
    struct stat info;
    // A file that cannot be asked any more may still have its other pages in memory.
    const bool beyond = fstat(fd.load(), &info) == 0 && at >= static_cast<uint64_t>(info.st_size);
    const Lost gone = beyond ? MarkFrom(static_cast<uint64_t>(info.st_size)) : MarkPage(at / page_bytes);
    return Zero(gone.begin, gone.end);
  }

  bool Zero(size_t from, size_t to) {
    return MapOver(begin.load() + from, to - from, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  }

  void Look() {
    struct stat info;
    if (fstat(fd.load(), &info) != 0) return;
    const timespec before = std::exchange(written, info.st_mtim);
    if (static_cast<uint64_t>(info.st_size) < bytes.load()) {
      MarkFrom(static_cast<uint64_t>(info.st_size));
    } else if (before.tv_sec != written.tv_sec || before.tv_nsec != written.tv_nsec) {
      ++rewrites;
      FileMaps::changes_.fetch_add(1);
    }
  }

  bool Overlaps(uint64_t from, uint64_t to) const { return marks.Overlap(from, to, page_bytes); }

  void AddRanges(std::vector<FileMaps::Range>& ranges) const {
    for (const Lost& lost : marks.List(bytes.load(), page_bytes))
      ranges.push_back({begin.load() + lost.begin, begin.load() + lost.end});
  }

  // Closed: no handler is inside.
  void ClearMarks() {
    marks.Clear();
    if (!counts.exchange(false)) return;
    FileMaps::failing_.fetch_sub(1);
    FileMaps::changes_.fetch_add(1);
  }

  // All from byte `end` on; gives what of it lies in whole pages.
  Lost MarkFrom(uint64_t end) {
    const Counted counted(*this);
    if (marks.AddFrom(end)) FileMaps::changes_.fetch_add(1);
    return {Up(end), Up(bytes.load())};
  }

 private:
  // In `failing_` from before a mark is written: nobody finds a mark that does not count yet.
  class Counted {
   public:
    explicit Counted(FileMap& map) : map_(map) { FileMaps::failing_.fetch_add(1); }
    ~Counted() {
      if (map_.counts.exchange(true)) FileMaps::failing_.fetch_sub(1);
    }

   private:
    FileMap& map_;
  };

  Lost MarkPage(uint64_t page) {
    const Counted counted(*this);
    Lost added;
    if (marks.AddPage(page, page_bytes, added)) FileMaps::changes_.fetch_add(1);
    return added;
  }

  Marks marks;
  std::atomic<bool> counts{false};
};

namespace {

FileMap maps[FileMaps::kMaps];
std::atomic<int> places{0};  // of `maps` that were ever used

// Whether the fault was in a map of ours, and may be tried again.
bool Caught(uintptr_t address) {
  const int count = places.load();
  for (int i = 0; i < count; ++i) {
    FileMap& map = maps[i];
    if (!map.Covers(address)) continue;
    if (!map.Enter()) return true;
    const bool caught = map.Covers(address) && map.Fail(address);
    map.Leave();
    if (caught) return true;
  }
  return false;
}

// A read that found no bytes; not, for example, a signal that somebody sent, which has no address.
bool IsFault(const siginfo_t* info) {
  switch (info->si_code) {
    case BUS_ADRERR:
    case BUS_OBJERR:
#ifdef BUS_MCEERR_AR
    case BUS_MCEERR_AR:  // memory failed that held a page of the file
    case BUS_MCEERR_AO:
#endif
      return true;
    default:
      return false;
  }
}

void OnFault(int signal, siginfo_t* info, void* context) {
  const int error = errno;
  const bool caught = IsFault(info) && Caught(reinterpret_cast<uintptr_t>(info->si_addr));
  errno = error;
  if (caught) return;
  if ((previous.sa_flags & SA_SIGINFO) != 0 && previous.sa_sigaction != nullptr) {
    previous.sa_sigaction(signal, info, context);
    return;
  }
  if (previous.sa_handler == SIG_IGN && !IsFault(info)) return;
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
    return;
  }
  // Not ours and nobody's: die of it as without us, at the faulting instruction, or of the signal sent.
  sigaction(signal, &previous, nullptr);
  if (!IsFault(info)) raise(signal);
}

FileMap& At(int id) {
  FileMap& map = maps[id & (FileMaps::kMaps - 1)];
  Require(id >= 0 && map.begin.load() != 0 && map.uses == id / FileMaps::kMaps,
          "no map of a file is registered as " + std::to_string(id));
  return map;
}

int Duplicated(int fd) {
  const int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (own < 0) throw Error(std::string("a file's descriptor cannot be kept: ") + std::strerror(errno));
  return own;
}

}  // namespace

void FileMaps::Install() {
  static std::once_flag once;
  std::call_once(once, [] {
    page_bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    sigaction(SIGBUS, nullptr, &previous);
    struct sigaction action = {};
    action.sa_sigaction = OnFault;
    // SA_NODEFER: the handler before us may leave by a jump. And it may count on a stack of its own.
    action.sa_flags = SA_SIGINFO | SA_NODEFER | (previous.sa_flags & SA_ONSTACK);
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, nullptr);
  });
}

int FileMaps::Register(const void* begin, size_t bytes, int fd) {
  Install();
  const auto from = reinterpret_cast<uintptr_t>(begin);
  Require(from != 0 && from % page_bytes == 0 && bytes > 0, "a map starts at a page and holds something");
  Require(Up(bytes) / page_bytes < UINT32_MAX, "a map is too large to be watched");
  const std::lock_guard<std::mutex> lock(table);
  int place = -1;
  const int count = places.load();
  for (int i = 0; i < count; ++i) {
    const uintptr_t other = maps[i].begin.load();
    if (other == 0) {
      if (place < 0) place = i;
    } else {
      Require(other >= from + Up(bytes) || from >= other + Up(maps[i].bytes.load()),
              "a map of a file is registered over another one");
    }
  }
  if (place < 0) place = count;
  Require(place < kMaps,
          "more than " + std::to_string(kMaps) + " maps of files are open; close a checkpoint");
  FileMap& map = maps[place];
  struct stat info;
  Require(fstat(fd, &info) == 0, "a map needs the descriptor of its file");
  map.fd.store(Duplicated(fd));
  map.bytes.store(bytes);
  map.rewrites = 0;
  map.written = info.st_mtim;
  map.uses = (map.uses + 1) % (INT32_MAX / kMaps);
  map.begin.store(from);
  places.store(std::max(count, place + 1));
  return map.uses * kMaps + place;
}

void FileMaps::Unregister(int id) {
  const std::lock_guard<std::mutex> lock(table);
  FileMap& map = At(id);
  map.Close();
  map.begin.store(0);
  map.ClearMarks();
  close(map.fd.exchange(0));
  map.Open();
}

bool FileMaps::Search(const void* begin, size_t bytes) {
  const auto from = reinterpret_cast<uintptr_t>(begin);
  const int count = places.load();
  for (int i = 0; i < count; ++i) {
    const FileMap& map = maps[i];
    const uintptr_t start = map.begin.load();
    if (start == 0 || from >= start + map.bytes.load() || start >= from + bytes) continue;
    if (map.Overlaps(from <= start ? 0 : from - start,
                     std::min<uint64_t>(from + bytes - start, map.bytes.load())))
      return true;
  }
  return false;
}

void FileMaps::Look() {
  const std::lock_guard<std::mutex> lock(table);
  const int count = places.load();
  for (int i = 0; i < count; ++i)
    if (maps[i].begin.load() != 0) maps[i].Look();
}

bool FileMaps::Restore(int id, int fd) {
  const std::lock_guard<std::mutex> lock(table);
  FileMap& map = At(id);
  struct stat info;
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) || static_cast<uint64_t>(info.st_size) != map.bytes)
    return false;
  const int own = Duplicated(fd);
  map.Close();
  if (!MapOver(map.begin.load(), map.bytes.load(), MAP_SHARED, own)) {
    const int error = errno;
    close(own);
    // The old map may be gone by now.
    map.MarkFrom(0);
    const bool zeros = map.Zero(0, Up(map.bytes.load()));
    map.Open();
    throw Error(std::string("a file cannot be mapped again: ") + std::strerror(error) +
                (zeros ? "" : "; its addresses are lost"));
  }
  close(map.fd.exchange(own));
  map.written = info.st_mtim;
  map.ClearMarks();
  map.Open();
  map.Look();  // it may have shrunk again meanwhile
  return true;
}

std::vector<FileMaps::Range> FileMaps::Ranges() {
  const std::lock_guard<std::mutex> lock(table);
  std::vector<Range> ranges;
  const int count = places.load();
  for (int i = 0; i < count; ++i)
    if (maps[i].begin.load() != 0) maps[i].AddRanges(ranges);
  return ranges;
}

std::vector<FileMaps::Rewrite> FileMaps::Rewrites() {
  const std::lock_guard<std::mutex> lock(table);
  std::vector<Rewrite> rewrites;
  const int count = places.load();
  for (int i = 0; i < count; ++i)
    if (maps[i].begin.load() != 0 && maps[i].rewrites != 0)
      rewrites.push_back({maps[i].begin.load(), maps[i].rewrites});
  return rewrites;
}

}  // namespace k2
