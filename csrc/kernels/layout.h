// How the published INT4 experts lie in memory, and how activations are laid out to meet them.
//
// Weights: a row of `in` weights is in/2 bytes of nibbles (byte b holds elements 2b, low nibble, and 2b+1)
// and in/32 bf16 scales; w = (nibble - 8) * scale. Rows start at any multiple of 8 bytes.
//
// Activations ("prepared"): blocks of 128 in the order in which a 512-bit load of nibbles, taken as 32 words
// of 16 bits, gives them up: word w holds elements 4w..4w+3, so shifting by 4k leaves element 4w+k in the low
// bits. Position k*32 + w of a block holds element 4w + k. The last block is padded with zeros.
#pragma once

#include "base.h"

namespace k2 {

inline constexpr int kGroup = 32;   // weights that share one scale
inline constexpr int kBlock = 128;  // weights of one 64-byte load

inline constexpr int PaddedBlocks(int in) { return (in + kBlock - 1) / kBlock; }
inline constexpr int PreparedSize(int in) { return PaddedBlocks(in) * kBlock; }
inline constexpr int PreparedIndex(int i) {
  return (i / kBlock) * kBlock + (i % 4) * (kBlock / 4) + (i % kBlock) / 4;
}

// One INT4 matrix [out, in] where it lies.
struct Int4Matrix {
  const uint8_t* packed = nullptr;
  const bf16* scale = nullptr;
  int out = 0;
  int in = 0;

  const uint8_t* PackedRow(int row) const { return packed + static_cast<ptrdiff_t>(row) * (in / 2); }
  const bf16* ScaleRow(int row) const { return scale + static_cast<ptrdiff_t>(row) * (in / kGroup); }
  int64_t Bytes() const { return static_cast<int64_t>(out) * (in / 2 + in / kGroup * 2); }
};

}  // namespace k2
