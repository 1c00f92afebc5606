// Turns a SIGBUS on a mapped weight (the file shrank, the disk failed) into a return value.
//
// Guard::Run(fn) calls fn and returns false if it touched a page that could not be read. `fn` must own
// nothing that needs a destructor: it is left by a jump. Nothing else in the process loses its own SIGBUS
// handler: a fault outside a guard is handed to whoever was installed before.
#pragma once

#include <csetjmp>

namespace k2 {

class FaultGuard {
 public:
  // Installs the handler once per process.
  static void Install();

  template <typename Fn>
  static bool Run(Fn&& fn) {
    sigjmp_buf here;
    const struct Restore {
      sigjmp_buf* const outer = target;
      ~Restore() { target = outer; }  // also where fn throws
    } restore;
    target = &here;
    // The mask is not saved (a system call); the handler is installed so that it need not be.
    if (sigsetjmp(here, 0) != 0) return false;
    fn();
    return true;
  }

  static thread_local sigjmp_buf* volatile target;
};

}  // namespace k2
