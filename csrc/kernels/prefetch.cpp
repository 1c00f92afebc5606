#include "kernels/prefetch.h"

namespace k2 {
namespace {

bool PastCaches() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

}  // namespace

const bool kPastCaches = PastCaches();

}  // namespace k2
