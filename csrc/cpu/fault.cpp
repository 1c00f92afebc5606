#include "cpu/fault.h"

#include <signal.h>

#include <mutex>

namespace k2 {

thread_local sigjmp_buf* volatile FaultGuard::target = nullptr;

namespace {

struct sigaction previous;

void OnFault(int signal, siginfo_t* info, void* context) {
  if (FaultGuard::target != nullptr) siglongjmp(*FaultGuard::target, 1);
  if ((previous.sa_flags & SA_SIGINFO) != 0 && previous.sa_sigaction != nullptr) {
    previous.sa_sigaction(signal, info, context);
    return;
  }
  if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
    return;
  }
  // Not ours and nobody's: die of it as without us, at the faulting instruction.
  sigaction(signal, &previous, nullptr);
}

}  // namespace

void FaultGuard::Install() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = OnFault;
    // SA_NODEFER: the signal stays unblocked through the jump, so that the next fault is caught too.
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
  });
}

}  // namespace k2
