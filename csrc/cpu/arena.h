// Memory for experts: large pages where the machine has them, bound to a NUMA node where it lets us.
//
// Pages are reserved first and made as they are needed (`Ensure`), by the thread that calls: a start costs nothing.
// An arena in a file on hugetlbfs or in shared memory outlives the process; whoever opens it again finds its content.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace k2 {

struct ArenaOptions {
  int node = -1;     // NUMA node to bind to; -1: none
  std::string file;  // empty: anonymous
};

class Arena {
 public:
  // Throws Error if the memory cannot be reserved, or the file cannot be made or belongs to a running process.
  Arena(size_t bytes, const ArenaOptions& options);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  const char* pages() const {
    return pages_;
  }  // "explicit huge", "transparent huge", "4 KB", "shared memory"
  bool bound() const { return bound_; }
  bool found() const { return found_; }  // the file was there already, with this size

  // Whether pages come by themselves when they are touched: others have to be asked for first.
  bool on_touch() const { return on_touch_; }
  // Makes the pages of [offset, offset + bytes); false if there is no memory left for them.
  bool Ensure(size_t offset, size_t bytes);
  // Gives the pages of [offset, offset + bytes) back where whole pages lie in it.
  void Forget(size_t offset, size_t bytes);

 private:
  void MapFile(const std::string& path);
  void MapAnonymous(int node);

  size_t bytes_;
  uint8_t* data_ = nullptr;
  const char* pages_ = "4 KB";
  bool bound_ = false;
  bool found_ = false;
  bool on_touch_ = false;
  int descriptor_ = -1;
};

}  // namespace k2
