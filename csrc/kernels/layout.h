// How the published INT4 experts lie in memory, and how activations are laid out to meet them.
//
// Weights: a row of `in` weights is in/2 bytes of nibbles (byte b holds elements 2b, low nibble, and 2b+1)
// and in/32 bf16 scales; w = (nibble - 8) * scale. Rows start at any multiple of 8 bytes.
//
// Weights of a byte: int8, or e4m3 as its bits (one of sign, four of exponent biased by 7, three of mantissa; no
// infinity). An int8 is a bf16 exactly; an e4m3 is loaded as 1/256 of itself, which is a bf16 exactly and a shift and a
// few bits away, since the exponents of bf16 have no carry there (0x38 | …). Its two NaN (0x7F, 0xFF) never occur: who
// makes the weights refuses what is not finite and saturates.
//
// Activations ("prepared"): blocks of 128 in the order in which a 512-bit load of nibbles, taken as 32 words
// of 16 bits, gives them up: word w holds elements 4w..4w+3, so shifting by 4k leaves element 4w+k in the low
// bits. Position k*32 + w of a block holds element 4w + k. The last block is padded with zeros.
#pragma once

#include <bit>

#include "base.h"

namespace k2 {

inline constexpr int kGroup = 32;   // weights that share one scale
inline constexpr int kBlock = 128;  // weights of one 64-byte load

inline constexpr int PaddedBlocks(int in) { return (in + kBlock - 1) / kBlock; }
inline constexpr int PreparedSize(int in) { return PaddedBlocks(in) * kBlock; }
inline constexpr int PreparedIndex(int i) {
  return (i / kBlock) * kBlock + (i % 4) * (kBlock / 4) + (i % kBlock) / 4;
}

inline constexpr int kAttendPage = 64;   // context rows that adjoin
inline constexpr int kAttendRows = 256;  // of a block of attention
inline constexpr int kScaleGroup = 128;  // values of an FP8 latent that share a scale

// What some heads of one query attend to: a block of the context, `latent` + `rope` values a row.
struct AttendBlock {
  const bf16* const* q;  // of each head, as wide as a row
  int heads;
  const bf16* const* pages;  // kAttendPage rows each
  int rows;                  // at most kAttendRows
  int latent;                // a multiple of 16
  int rope;
  float scale;  // of the scores, above 0
};

// The softmax of each head so far: the greatest score, the sum of the weights, and of weighted latents [head][latent].
struct AttendSums {
  float* peak;
  float* total;
  float* out;
};

enum class E4m3 : uint8_t {};

inline constexpr float kE4m3Unit = 256.0f;
// Of the magnitudes 0..7, whose exponent is zero: k * 2^-9, as 1/256 of themselves, in bf16.
inline constexpr bf16 kE4m3Small[8] = {0x0000, 0x3700, 0x3780, 0x37C0, 0x3800, 0x3820, 0x3840, 0x3860};

inline constexpr bf16 FromE4m3(E4m3 value) {
  const unsigned bits = static_cast<unsigned>(value), size = bits & 0x7F;
  return static_cast<bf16>((bits & 0x80) << 8 | (size < 8 ? kE4m3Small[size] : 0x3800 | size << 4));
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
