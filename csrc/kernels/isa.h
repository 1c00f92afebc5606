// The stamped tables; only table.cpp reads this.
#pragma once

#include "kernels/table.h"

namespace k2 {

// How what is read once is fetched ahead of use. AMD: past the caches, so that it displaces nothing. Intel: into L2, since
// a fetch to L1 holds one of some sixteen buffers until memory answers, which makes half of what a core can read.
extern const bool kPastCaches;

// kOnce: the line is not read again soon.
template <bool kOnce>
inline void FetchAhead(const void* p) {
  if (!kOnce)
    __builtin_prefetch(p, 0, 3);
  else if (kPastCaches)
    __builtin_prefetch(p, 0, 0);
  else
    __builtin_prefetch(p, 0, 2);
}

extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx2Kernels;
#endif

}  // namespace k2
