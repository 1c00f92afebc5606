// What this machine can do at most: the limits that every figure of the kernels is held against.
#pragma once

#include <optional>
#include <string>

#include "cpu/machine.h"

namespace k2 {

struct ReadVariant {
  size_t stripe_bytes;  // what a thread takes at a time
  int ahead_bytes;      // of software prefetch; 0: left to the hardware
  int streams;          // 1, 2, 4 or 8 equal parts of the stripe, read in turn
};

// Seconds to read `bytes` once with all threads, in the widest registers of the picked instruction set.
// Throws if the variant makes no sense or the bytes lie in a map that can no longer be read.
double ProbeReadSeconds(Machine& machine, const void* data, size_t bytes, const ReadVariant& variant);

// Operations per second (a multiply-add is two) of all threads together, from registers only, over 20 ms:
// "bf16" (AVX512-BF16 dot products), "int8" (AVX512-VNNI dot products) or "fp32" (multiply-adds). None if the
// picked instruction set or the CPU lacks the instruction.
std::optional<double> ProbePeak(Machine& machine, const std::string& kind);

}  // namespace k2
