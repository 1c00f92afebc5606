// The stamped tables; only table.cpp reads this.
#pragma once

#include "kernels/table.h"

namespace k2 {

extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
const KernelTable& AmxBf16Kernels();
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx2Kernels;
#endif

}  // namespace k2
