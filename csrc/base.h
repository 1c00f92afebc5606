// Named errors and checks shared by every room of the extension. Mirrors k2hybrid/errors.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace k2 {

// A bf16 value as its bits: the upper half of the fp32 with the same value.
using bf16 = uint16_t;

// Arguments were wrong: shape, range, state. Becomes k2hybrid.errors.NativeError.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

inline void Require(bool holds, const std::string& message) {
  if (!holds) throw Error(message);
}

inline float ToFloat(bf16 value) {
  union {
    uint32_t bits;
    float number;
  } cast{static_cast<uint32_t>(value) << 16};
  return cast.number;
}

// Round to nearest even, as the hardware's conversion does; NaN stays NaN.
inline bf16 ToBf16(float value) {
  union {
    float number;
    uint32_t bits;
  } cast{value};
  if ((cast.bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((cast.bits >> 16) | 0x40u);
  return static_cast<bf16>((cast.bits + 0x7fffu + ((cast.bits >> 16) & 1u)) >> 16);
}

}  // namespace k2
