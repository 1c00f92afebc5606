// Files that shrink, fail and come back under their maps: what readers see, what is marked, who gets the signal.
#include "cpu/fault.h"

#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/marks.h"

namespace {

using k2::FileMaps;
using k2::test::Check;
using k2::test::CheckRefused;
using k2::test::Step;

const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

// Never zero, and no two pages alike.
uint8_t Byte(size_t at) { return static_cast<uint8_t>(1 + (at * 7 + at / kPage) % 255); }

class TempFile {
 public:
  explicit TempFile(size_t bytes) : file_(std::tmpfile()) {
    Check(file_ != nullptr, "a file");
    Write(bytes);
  }
  ~TempFile() { std::fclose(file_); }
  int fd() const { return fileno(file_); }
  void Write(size_t bytes) {
    std::vector<uint8_t> content(bytes);
    for (size_t i = 0; i < bytes; ++i) content[i] = Byte(i);
    Check(pwrite(fd(), content.data(), bytes, 0) == static_cast<ssize_t>(bytes), "the file is written");
  }
  void Shrink(size_t bytes) { Check(ftruncate(fd(), static_cast<off_t>(bytes)) == 0, "the file shrinks"); }

 private:
  std::FILE* file_;
};

// A map of `file` that is registered, with `known` as its file.
class Map {
 public:
  Map(const TempFile& file, size_t bytes, const TempFile& known) : bytes_(bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.fd(), 0);
    Check(at != MAP_FAILED, "a map");
    data_ = static_cast<const volatile uint8_t*>(at);
    id_ = FileMaps::Register(at, bytes, known.fd());
  }
  Map(const TempFile& file, size_t bytes) : Map(file, bytes, file) {}
  ~Map() {
    FileMaps::Unregister(id_);
    munmap(const_cast<uint8_t*>(data_), bytes_);
  }
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;

  int id() const { return id_; }
  uint8_t operator[](size_t at) const { return data_[at]; }
  bool Failed(size_t begin, size_t bytes) const {
    return FileMaps::Failed(const_cast<uint8_t*>(data_) + begin, bytes);
  }
  // As offsets.
  std::vector<k2::Lost> Lost() const {
    const auto from = reinterpret_cast<uintptr_t>(data_);
    std::vector<k2::Lost> own;
    for (const FileMaps::Range& range : FileMaps::Ranges())
      if (range.begin >= from && range.begin < from + bytes_)
        own.push_back({range.begin - from, range.end - from});
    return own;
  }

 private:
  const volatile uint8_t* data_;
  size_t bytes_;
  int id_;
};

bool Is(const std::vector<k2::Lost>& lost, uint64_t begin, uint64_t end) {
  return lost.size() == 1 && lost[0].begin == begin && lost[0].end == end;
}

// ---- the handler that was there before ----

sigjmp_buf elsewhere;
std::atomic<int> foreign{0};

void OnForeign(int, siginfo_t* info, void*) {
  foreign.fetch_add(1);
  if (info->si_code > 0) siglongjmp(elsewhere, 1);  // a fault, which would come again
}

// The mask is not saved: after the jump the next fault must arrive all the same.
bool Faults(const volatile uint8_t* at) {
  if (sigsetjmp(elsewhere, 0) != 0) return true;
  (void)*at;
  return false;
}

void TestForeignSignals() {
  TempFile ours(3 * kPage), others(3 * kPage);
  const Map map(ours, 3 * kPage);
  void* const raw = mmap(nullptr, 3 * kPage, PROT_READ, MAP_SHARED, others.fd(), 0);
  Check(raw != MAP_FAILED, "a map that is not registered");
  const auto* const data = static_cast<const volatile uint8_t*>(raw);
  others.Shrink(kPage);
  for (int i = 1; i <= 3; ++i) {
    Check(Faults(data + kPage + i) && foreign.load() == i, "a fault elsewhere reaches the handler before");
    Check(!Faults(data), "what is left can be read");
  }
  // A signal that is sent has a sender where a fault has an address.
  ours.Shrink(0);
  sigval value;
  value.sival_ptr = raw;
  Check(sigqueue(getpid(), SIGBUS, value) == 0 && foreign.load() == 4, "a signal that is sent does as well");
  Check(raise(SIGBUS) == 0 && foreign.load() == 5, "and one from within");
  Check(!map.Failed(0, 3 * kPage), "nothing of ours was touched");
  Check(map[0] == 0 && foreign.load() == 5 && map.Failed(0, 1), "a fault of ours is ours");
  munmap(raw, 3 * kPage);
}

// ---- one file ----

void TestShrunk() {
  const size_t bytes = 5 * kPage + 100, end = 2 * kPage + 123;
  TempFile file(bytes), whole(bytes);
  const Map map(file, bytes), beside(whole, bytes);
  const uint64_t before = FileMaps::changes();
  Check(!map.Failed(0, bytes) && map.Lost().empty(), "a whole file has not failed");
  file.Shrink(end);
  Check(map[0] == Byte(0) && map[end - 1] == Byte(end - 1), "what is left is read as ever");
  Check(FileMaps::changes() == before, "nobody has noticed yet");
  Check(map[4 * kPage] == 0 && map[3 * kPage] == 0 && map[5 * kPage + 99] == 0,
        "what is lost is read as zeros");
  Check(Is(map.Lost(), end, bytes), "from the last byte on, and all at once");
  Check(FileMaps::changes() != before, "a change is told");
  Check(!map.Failed(0, end) && map.Failed(end - 1, 2) && map.Failed(end, 1), "to the byte");
  Check(map.Failed(bytes - 1, 1) && map.Failed(0, bytes) && !map.Failed(end, 0) && !map.Failed(bytes, 10),
        "at either end");
  Check(map[end - 1] == Byte(end - 1) && map[end] == 0, "the page of the end is still the file's");
  Check(!beside.Failed(0, bytes), "other files are not concerned");
  file.Shrink(kPage);
  FileMaps::Look();
  Check(Is(map.Lost(), kPage, bytes), "it may shrink on");
  file.Write(bytes);
  FileMaps::Look();
  Check(Is(map.Lost(), kPage, bytes) && map[4 * kPage] == 0, "growing alone brings nothing back");
}

void TestLook() {
  const size_t bytes = 3 * kPage;
  TempFile file(bytes);
  const Map map(file, bytes);
  for (const size_t end : {bytes - 1, bytes - 500, 2 * kPage + 1}) {
    file.Shrink(end);
    Check(map[end] == 0 && map[end - 1] == Byte(end - 1), "the rest of a page is zeros without a signal");
    FileMaps::Look();
    Check(Is(map.Lost(), end, bytes), "a look finds it, to the byte");
    const uint64_t changes = FileMaps::changes();
    FileMaps::Look();
    Check(FileMaps::changes() == changes, "what is known is no news");
  }
}

// Written to between two looks, and as long as ever: nothing is lost, and yet it is told.
void TestRewritten() {
  TempFile file(2 * kPage), other(kPage);
  const Map map(file, 2 * kPage), beside(other, kPage);
  const auto times = [&]() -> uint64_t {
    FileMaps::Look();
    const std::vector<FileMaps::Rewrite> rewrites = FileMaps::Rewrites();
    Check(rewrites.size() <= 1, "other files are not concerned");
    return rewrites.empty() ? 0 : rewrites[0].times;
  };
  const auto at = [&](time_t seconds) {
    const timespec stamps[2] = {{seconds, 0}, {seconds, 5}};
    Check(futimens(file.fd(), stamps) == 0, "the file's time changes");
  };
  Check(times() == 0, "nothing yet");
  for (uint64_t round = 1; round < 4; ++round) {
    const uint64_t changes = FileMaps::changes();
    file.Shrink(1);
    file.Write(2 * kPage);
    at(static_cast<time_t>(round));  // clocks of files are coarse
    Check(times() == round && times() == round && FileMaps::changes() != changes, "each time once");
  }
  Check(!map.Failed(0, 2 * kPage), "nothing is lost");
  file.Shrink(kPage);
  at(9);
  Check(times() == 3 && map.Failed(kPage, 1), "what is shorter is lost");
  file.Write(2 * kPage);
  at(10);
  Check(FileMaps::Restore(map.id(), file.fd()) && times() == 3, "what is mapped again is as it is to be");
}

void TestRestore() {
  const size_t bytes = 4 * kPage + 7;
  TempFile file(bytes), other(bytes);
  const Map map(file, bytes);
  for (int round = 0; round < 3; ++round) {
    file.Shrink(round * kPage + 1);
    Check(map[4 * kPage] == 0 && map.Failed(bytes - 1, 1), "it is lost");
    Check(!FileMaps::Restore(map.id(), file.fd()) && map.Failed(bytes - 1, 1), "too short to come back");
    file.Write(bytes + 1);
    Check(!FileMaps::Restore(map.id(), file.fd()), "too long");
    int ends[2];
    Check(pipe(ends) == 0 && !FileMaps::Restore(map.id(), ends[0]), "no file at all");
    close(ends[0]);
    close(ends[1]);
    file.Shrink(bytes);
    Check(FileMaps::Restore(map.id(), round == 1 ? other.fd() : file.fd()), "whole again, or another one is");
    Check(!map.Failed(0, bytes) && map.Lost().empty(), "nothing is marked then");
    for (size_t i = 0; i < bytes; ++i) Check(map[i] == Byte(i), "and all can be read");
    if (round == 1) {
      file.Shrink(0);
      FileMaps::Look();
      Check(!map.Failed(0, bytes) && map[bytes - 1] == Byte(bytes - 1), "the old file is of no account");
      other.Shrink(3 * kPage);
      Check(map[bytes - 1] == 0 && Is(map.Lost(), 3 * kPage, bytes), "the new one is");
    }
  }
}

// A disk that fails has no end of file to show: here the faults lie within what is known as the file.
void TestFailingPages() {
  const size_t pages = 400;
  TempFile file(1), known(pages * kPage);
  const Map map(file, pages * kPage, known);
  std::mt19937 random(3);
  std::vector<bool> touched(pages);
  for (int i = 0; i < 60; ++i) {
    const size_t page = 1 + random() % (pages - 1);
    Check(map[page * kPage + random() % kPage] == 0, "a page that fails is zeros");
    touched[page] = true;
    const std::vector<k2::Lost> lost = map.Lost();
    Check(lost.size() <= k2::Marks::kIntervals, "the list is bounded");
    size_t marked = 0;
    for (const k2::Lost& one : lost) marked += (one.end - one.begin) / kPage;
    for (size_t p = 0; p < pages; ++p)
      Check(!touched[p] || map.Failed(p * kPage, kPage), "all of them are marked");
    if (i < k2::Marks::kIntervals)
      Check(marked == static_cast<size_t>(std::count(touched.begin(), touched.end(), true)),
            "and no others, as long as the list has room");
  }
  Check(FileMaps::Restore(map.id(), known.fd()) && map[99 * kPage] == Byte(99 * kPage) && map.Lost().empty(),
        "pages come back too");
}

void TestMarks(int rounds) {
  std::mt19937 random(5);
  for (int round = 0; round < rounds; ++round) {
    k2::Marks marks;
    const unsigned pages = 1 + random() % 200;
    std::vector<bool> want(pages);
    for (int i = 0; i < 100; ++i) {
      const unsigned page = random() % pages;
      k2::Lost added;
      const bool known = want[page];
      Check(marks.AddPage(page, 10, added) == !known, "a page is news once");
      Check(added.begin % 10 == 0 && added.begin <= page * 10 && page * 10 + 10 <= added.end, "it is added");
      for (uint64_t p = added.begin / 10; p < added.end / 10; ++p) want[p] = true;
      for (unsigned p = 0; p < pages; ++p)
        Check(marks.Overlap(p * 10, p * 10 + 10, 10) == want[p], "what was given is what is marked");
    }
    const uint64_t end = random() % (pages * 10);
    Check(marks.AddFrom(end) && !marks.AddFrom(end) && !marks.AddFrom(end + 1), "an end is news once");
    for (uint64_t at = 0; at < pages * 10; ++at)
      Check(marks.Overlap(at, at + 1, 10) == (at >= end || want[at / 10]), "pages and end");
    marks.Clear();
    Check(marks.List(pages * 10, 10).empty() && !marks.Overlap(0, pages * 10, 10), "cleared");
  }
}

// ---- the table ----

void TestTable() {
  TempFile file(2 * kPage);
  const auto* const page =
      static_cast<const char*>(mmap(nullptr, 2 * kPage, PROT_READ, MAP_SHARED, file.fd(), 0));
  CheckRefused([&] { FileMaps::Register(page + 1, kPage, file.fd()); }, "starts at a page");
  CheckRefused([&] { FileMaps::Register(page, 0, file.fd()); }, "holds something");
  CheckRefused([&] { FileMaps::Register(page, kPage, -1); }, "needs the descriptor of its file");
  const int first = FileMaps::Register(page, kPage + 1, file.fd());
  CheckRefused([&] { FileMaps::Register(page + kPage, kPage, file.fd()); }, "over another one");
  for (int wrong : {-1, first + 1, first + FileMaps::kMaps, INT32_MAX}) {
    CheckRefused([&] { FileMaps::Unregister(wrong); }, "no map of a file is registered");
    CheckRefused([&] { FileMaps::Restore(wrong, file.fd()); }, "no map of a file is registered");
  }
  FileMaps::Unregister(first);
  CheckRefused([&] { FileMaps::Unregister(first); }, "no map of a file is registered");
  const int second = FileMaps::Register(page + kPage, kPage, file.fd());
  Check(second != first, "the same place has another id");
  CheckRefused([&] { FileMaps::Restore(first, file.fd()); }, "no map of a file is registered");
  file.Shrink(0);
  FileMaps::Look();
  Check(FileMaps::Failed(page + kPage, kPage), "it is lost");
  FileMaps::Unregister(second);
  Check(!FileMaps::Failed(page, 2 * kPage) && FileMaps::Ranges().empty(), "what is gone has not failed");
  munmap(const_cast<char*>(page), 2 * kPage);
}

// As many as the table holds. All are of one file, and descriptors are few: a map may share one.
void TestFullTable() {
  TempFile file(kPage);
  std::vector<void*> pages;
  std::vector<int> ids;
  const auto add = [&] {
    void* at = mmap(nullptr, kPage, PROT_READ, MAP_SHARED, file.fd(), 0);
    Check(at != MAP_FAILED, "a map");
    pages.push_back(at);
    ids.push_back(FileMaps::Register(at, kPage, file.fd()));
  };
  const int many = std::min<int>(FileMaps::kMaps, static_cast<int>(sysconf(_SC_OPEN_MAX)) - 64);
  for (int i = 0; i < many; ++i) add();
  if (many == FileMaps::kMaps) CheckRefused(add, "close a checkpoint");
  file.Shrink(0);
  for (void* at : {pages.front(), pages[many / 2], pages[many - 1]})
    Check(*static_cast<const volatile uint8_t*>(at) == 0 && FileMaps::Failed(at, 1), "each is guarded");
  for (int id : ids) FileMaps::Unregister(id);
  for (void* at : pages) munmap(at, kPage);
}

// ---- threads ----

// Readers never know what happens: whoever reads a zero and asks is told.
void TestThreads(int rounds) {
  constexpr int kReaders = 4;
  const size_t pages = 64, bytes = pages * kPage;
  TempFile file(bytes), failing(1), known(bytes);
  std::mt19937 random(11);
  for (int round = 0; round < rounds; ++round) {
    const Map map(file, bytes), bad(failing, bytes, known);
    std::atomic<int> ready{0};
    std::atomic<bool> fell{false};
    std::vector<std::thread> readers;
    for (int r = 0; r < kReaders; ++r)
      readers.emplace_back([&, seed = random()] {
        std::mt19937 own(seed);
        ready.fetch_add(1);
        for (int i = 0; i < 400; ++i) {
          const Map& one = own() % 2 == 0 ? map : bad;
          const size_t at = (1 + own() % (pages - 1)) * kPage;  // whole pages: the rest is for Look
          const uint8_t got = one[at];
          if (got == Byte(at)) continue;
          Check(got == 0 && one.Failed(at, 1), "zeros are told of");
          fell.store(true);
        }
      });
    // Other maps come and go, and sizes are looked at, meanwhile.
    std::thread other([&] {
      TempFile small(kPage);
      for (int i = 0; i < 50; ++i) {
        const Map guest(small, kPage);
        if (i % 8 == 0) small.Shrink(0);
        Check((guest[0] == 0) == (i % 8 == 0), "a guest reads");
        FileMaps::Look();
        Check(guest.Failed(0, 1) == (i % 8 == 0), "a guest is told");
        if (i % 8 == 0) small.Write(kPage);
      }
    });
    while (ready.load() < kReaders) std::this_thread::yield();
    for (size_t end = pages / 2; end > 0; end /= 2) {
      file.Shrink(end * kPage);
      std::this_thread::yield();
    }
    for (std::thread& reader : readers) reader.join();
    other.join();
    Check(fell.load(), "there was something to tell");
    file.Write(bytes);
    Check(FileMaps::Restore(map.id(), file.fd()) && !map.Failed(0, bytes), "it comes back");
    for (size_t p = 0; p < pages; ++p) Check(map[p * kPage] == Byte(p * kPage), "as it was");
  }
  Check(FileMaps::Ranges().empty(), "nothing is left");
}

// All threads fault in the same moment on the same page.
void TestAtOnce(int rounds) {
  constexpr int kReaders = 4;
  TempFile file(8 * kPage);
  const Map map(file, 8 * kPage);
  for (int round = 0; round < rounds; ++round) {
    file.Shrink(kPage + 1);
    std::atomic<int> waiting{kReaders};
    std::vector<std::thread> readers;
    for (int r = 0; r < kReaders; ++r)
      readers.emplace_back([&] {
        waiting.fetch_sub(1);
        while (waiting.load() > 0) std::this_thread::yield();
        Check(map[5 * kPage] == 0 && map.Failed(5 * kPage, 1), "each is told");
      });
    for (std::thread& reader : readers) reader.join();
    file.Write(8 * kPage);
    Check(FileMaps::Restore(map.id(), file.fd()), "it comes back");
  }
}

// Readers that nobody stopped go on while their file is mapped again: they wait, and read what is there.
void TestRestoreUnderReaders(int rounds) {
  TempFile file(16 * kPage);
  const Map map(file, 16 * kPage);
  std::atomic<bool> stop{false};
  std::vector<std::thread> readers;
  for (int r = 0; r < 3; ++r)
    readers.emplace_back([&, r] {
      for (size_t i = r; !stop.load(); ++i) {
        const size_t at = i % 16 * kPage;
        const uint8_t got = map[at];
        Check(got == 0 || got == Byte(at), "a reader sees the file or zeros");
      }
    });
  for (int round = 0; round < rounds; ++round) {
    file.Shrink(0);
    std::this_thread::yield();
    file.Write(16 * kPage);
    Check(FileMaps::Restore(map.id(), file.fd()), "it comes back");
  }
  stop.store(true);
  for (std::thread& reader : readers) reader.join();
}

}  // namespace

int main(int argc, char** argv) {
  const k2::test::Effort effort(argc, argv);
  struct sigaction action = {};
  action.sa_sigaction = OnForeign;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &action, nullptr);
  FileMaps::Install();
  FileMaps::Install();  // once is enough
  // The thread sanitizer blocks all signals in a handler that was left by a jump.
  if (!k2::test::kThreadSanitizer) Step("foreign signals", TestForeignSignals);
  Step("a file that shrank", TestShrunk);
  Step("a look", TestLook);
  Step("a file that is written to", TestRewritten);
  Step("a file that is whole again", TestRestore);
  Step("pages that fail", TestFailingPages);
  Step("marks", [&] { TestMarks(effort.Rounds(100)); });
  Step("the table", TestTable);
  Step("many maps", TestFullTable);
  Step("threads", [&] { TestThreads(effort.Rounds(60)); });
  Step("at once", [&] { TestAtOnce(effort.Rounds(200)); });
  Step("restored under readers", [&] { TestRestoreUnderReaders(effort.Rounds(100)); });
  std::puts("all held");
}
