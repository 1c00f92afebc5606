#include "cpu/arena.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "base.h"

namespace k2 {
namespace {

constexpr size_t kHugePage = 2 << 20;
constexpr int kBind = 2;  // MPOL_BIND
// <linux/mman.h> of older headers lacks it; Linux 5.14 and later know it.
constexpr int kPopulateWrite = 23;
constexpr long kHugetlbfs = 0x958458f6;
constexpr long kTmpfs = 0x01021994;

size_t Up(size_t bytes, size_t page) { return (bytes + page - 1) / page * page; }

// Reserved huge pages of 2 MB that are free, of one node or in all.
size_t FreeHugePages(int node) {
  char path[128];
  if (node < 0) {
    snprintf(path, sizeof(path), "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
  } else {
    snprintf(path, sizeof(path), "/sys/devices/system/node/node%d/hugepages/hugepages-2048kB/free_hugepages",
             node);
  }
  unsigned long count = 0;
  if (FILE* file = fopen(path, "r")) {
    if (fscanf(file, "%lu", &count) != 1) count = 0;
    fclose(file);
  }
  return count;
}

bool TransparentHugePages() {
  char mode[64] = {};
  if (FILE* file = fopen("/sys/kernel/mm/transparent_hugepage/enabled", "r")) {
    const size_t read = fread(mode, 1, sizeof(mode) - 1, file);
    mode[read] = 0;
    fclose(file);
  }
  return mode[0] != 0 && strstr(mode, "[never]") == nullptr;
}

bool Bind(void* data, size_t bytes, int node) {
  unsigned long mask[16] = {};
  constexpr int kBits = sizeof(mask[0]) * 8;
  if (node < 0 || node >= 16 * kBits) return false;
  mask[node / kBits] |= 1ul << (node % kBits);
  return syscall(SYS_mbind, data, bytes, kBind, mask, 16 * kBits + 1, 0) == 0;
}

}  // namespace

Arena::Arena(size_t bytes, const ArenaOptions& options) : bytes_(Up(bytes, kHugePage)) {
  Require(bytes > 0, "an arena needs at least a byte");
  if (options.file.empty()) {
    MapAnonymous(options.node);
  } else {
    MapFile(options.file);
  }
  // Refused in some containers: the pages then come from wherever the thread that touches them runs.
  bound_ = Bind(data_, bytes_, options.node);
}

Arena::~Arena() {
  if (data_ != nullptr) munmap(data_, bytes_);
  if (descriptor_ >= 0) close(descriptor_);
}

void Arena::MapAnonymous(int node) {
  constexpr int kProtection = PROT_READ | PROT_WRITE;
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS;
  void* at = MAP_FAILED;
  if (FreeHugePages(node) * kHugePage >= bytes_)
    at = mmap(nullptr, bytes_, kProtection, kFlags | MAP_HUGETLB, -1, 0);
  if (at != MAP_FAILED) {
    data_ = static_cast<uint8_t*>(at);
    pages_ = "explicit huge";
    return;
  }
  on_touch_ = true;
  // Transparent huge pages start at multiples of their size: reserve one more, and give the ends back.
  at = mmap(nullptr, bytes_ + kHugePage, kProtection, kFlags | MAP_NORESERVE, -1, 0);
  Require(at != MAP_FAILED,
          std::to_string(bytes_ >> 20) + " MiB for experts cannot be reserved: " + strerror(errno));
  auto* start = static_cast<uint8_t*>(at);
  data_ = reinterpret_cast<uint8_t*>(Up(reinterpret_cast<uintptr_t>(start), kHugePage));
  if (data_ != start) munmap(start, static_cast<size_t>(data_ - start));
  const size_t tail = static_cast<size_t>(start + kHugePage - data_);
  if (tail != 0) munmap(data_ + bytes_, tail);
  if (madvise(data_, bytes_, MADV_HUGEPAGE) == 0 && TransparentHugePages()) pages_ = "transparent huge";
}

void Arena::MapFile(const std::string& path) {
  descriptor_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
  Require(descriptor_ >= 0, path + " cannot be opened: " + strerror(errno));
  const auto require = [&](bool holds, const std::string& why) {
    if (holds) return;
    close(descriptor_);
    throw Error(path + why);
  };
  struct stat info{};
  struct statfs system{};
  require(fstat(descriptor_, &info) == 0 && fstatfs(descriptor_, &system) == 0, " cannot be examined");
  // Whoever else could write to it, or has another name for it, could change weights under us.
  require(
      S_ISREG(info.st_mode) && info.st_uid == geteuid() && info.st_nlink == 1 && (info.st_mode & 022) == 0,
      " is not a plain file of this user's alone; delete it, or give another folder");
  const bool huge = static_cast<long>(system.f_type) == kHugetlbfs;
  // On a disk it would be written back, marks perhaps before what they are for.
  require(huge || static_cast<long>(system.f_type) == kTmpfs,
          " would lie on a disk; give a folder in shared memory (/dev/shm) or on hugetlbfs");
  require(flock(descriptor_, LOCK_EX | LOCK_NB) == 0,
          " is in use by another process; stop it, or give another folder");
  found_ = static_cast<size_t>(info.st_size) == bytes_;
  // What has another size was made for something else. Pages are made as they are needed, huge ones as well.
  void* at = MAP_FAILED;
  if (found_ || (ftruncate(descriptor_, 0) == 0 && ftruncate(descriptor_, static_cast<off_t>(bytes_)) == 0))
    at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, descriptor_, 0);
  require(at != MAP_FAILED, " cannot hold " + std::to_string(bytes_ >> 20) + " MiB: " + strerror(errno));
  data_ = static_cast<uint8_t*>(at);
  if (!huge) madvise(data_, bytes_, MADV_HUGEPAGE);
  pages_ = huge ? "explicit huge" : "shared memory";
}

bool Arena::Ensure(size_t offset, size_t bytes) {
  if (descriptor_ >= 0) {
    // Also where the file has room only on paper: a store there would be a SIGBUS.
    const size_t from = offset / kHugePage * kHugePage;
    const size_t to = std::min(bytes_, Up(offset + bytes, kHugePage));
    if (fallocate(descriptor_, 0, static_cast<off_t>(from), static_cast<off_t>(to - from)) != 0) return false;
  }
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t from = offset / page * page;
  if (madvise(data_ + from, Up(offset + bytes, page) - from, kPopulateWrite) == 0) return true;
  // An older kernel: touch them. Memory was reserved for explicit pages, and the others come or the process is told so
  // by the kernel's own means.
  if (errno != EINVAL) return false;
  for (size_t at = from; at < offset + bytes; at += page) {
    auto* byte = reinterpret_cast<volatile uint8_t*>(data_ + at);
    *byte = *byte;
  }
  return true;
}

void Arena::Forget(size_t offset, size_t bytes) {
  const size_t from = Up(offset, kHugePage), to = (offset + bytes) / kHugePage * kHugePage;
  if (from >= to) return;
  madvise(data_ + from, to - from, descriptor_ >= 0 ? MADV_REMOVE : MADV_DONTNEED);
}

}  // namespace k2
