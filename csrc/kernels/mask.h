// Logits of forbidden tokens become −inf.
#pragma once

#include <cstdint>

namespace k2 {

// `allowed` has one bit per entry, the lowest bit of a byte first; `count` entries are looked at.
void MaskLogits(float* logits, const uint8_t* allowed, int64_t count);

}  // namespace k2
