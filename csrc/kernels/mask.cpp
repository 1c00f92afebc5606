#include "kernels/mask.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

namespace k2 {
namespace {

constexpr uint32_t kMinusInf = 0xff800000u;

// For each four bits: all ones where the entry stays.
constexpr std::array<std::array<uint32_t, 4>, 16> MakeLanes() {
  std::array<std::array<uint32_t, 4>, 16> lanes{};
  for (unsigned nibble = 0; nibble < 16; ++nibble)
    for (unsigned lane = 0; lane < 4; ++lane) lanes[nibble][lane] = (nibble >> lane & 1u) ? 0xffffffffu : 0u;
  return lanes;
}

constexpr auto kLanes = MakeLanes();

// Without a branch: which tokens are allowed is not to be predicted. Four lanes fit every vector unit.
inline void MaskFour(float* logits, unsigned nibble) {
  uint32_t bits[4];
  std::memcpy(bits, logits, sizeof bits);
  for (int lane = 0; lane < 4; ++lane)
    bits[lane] = (bits[lane] & kLanes[nibble][lane]) | (kMinusInf & ~kLanes[nibble][lane]);
  std::memcpy(logits, bits, sizeof bits);
}

void MaskPlain(float* logits, const uint8_t* allowed, int64_t count) {
  const int64_t whole = count / 64 * 64;
  for (int64_t i = 0; i < whole; i += 64) {
    uint64_t bits;
    std::memcpy(&bits, allowed + i / 8, sizeof bits);
    // Mostly a grammar allows nearly all tokens (in a string) or nearly none (between strings).
    if (bits == ~uint64_t{0}) continue;
    if (bits == 0) {
      std::fill_n(logits + i, 64, -std::numeric_limits<float>::infinity());
      continue;
    }
    for (int nibble = 0; nibble < 16; ++nibble) MaskFour(logits + i + 4 * nibble, bits >> (4 * nibble) & 15u);
  }
  for (int64_t i = whole; i < count; ++i)
    if (!(allowed[i / 8] >> (i % 8) & 1)) logits[i] = -std::numeric_limits<float>::infinity();
}

}  // namespace

void MaskLogits(float* logits, int64_t count, int64_t plain, const uint8_t* allowed, bool all,
                const std::vector<int64_t>& specials) {
  Require(plain >= 0 && plain <= count, "mask: more plain tokens than logits");
  std::vector<float> kept;
  kept.reserve(specials.size());
  for (const int64_t token : specials) {
    Require(token >= plain && token < count, "mask: token " + std::to_string(token) + " is no special");
    kept.push_back(logits[token]);
  }
  if (allowed != nullptr)
    MaskPlain(logits, allowed, plain);
  else if (!all)
    std::fill_n(logits, plain, -std::numeric_limits<float>::infinity());
  std::fill(logits + plain, logits + count, -std::numeric_limits<float>::infinity());
  for (size_t i = 0; i < specials.size(); ++i) logits[specials[i]] = kept[i];
}

}  // namespace k2
