// Logits of forbidden tokens become −inf.
#pragma once

#include <cstdint>
#include <vector>

#include "base.h"

namespace k2 {

// Of the first `plain` of `count` entries those stay whose bit in `allowed` is set (the lowest bit of a byte first);
// without `allowed`, `all` or none. Of the others those of `specials` stay, which must lie there.
void MaskLogits(float* logits, int64_t count, int64_t plain, const uint8_t* allowed, bool all,
                const std::vector<int64_t>& specials);

}  // namespace k2
