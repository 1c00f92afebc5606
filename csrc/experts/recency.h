// Which expert leaves when another needs its slot: the one with the lowest score.
//
// The clock ticks once a ticket. Least recently used: the score is the time of the last use. With a half life, each use
// counts 1 and halves its weight every so many ticks (LRFU: D. Lee et al., 2001); scores are kept as
// log2(value) + time / half_life, which needs no update while time passes. An expert that left keeps its score: it comes
// back as what it was, not as a newcomer (docs/traces.md says what that is worth).
#pragma once

#include <cmath>
#include <limits>

namespace k2 {

class Recency {
 public:
  // `half_life` in ticks; 0: the last use alone.
  explicit Recency(double half_life = 0) : rate_(half_life > 0 ? 1 / half_life : 0) {}

  static constexpr double kNever = -std::numeric_limits<double>::infinity();

  // The score after a use at `now`; `before` is that of the last one, or kNever.
  double Used(double before, double now) const {
    if (rate_ == 0) return now;
    return now * rate_ + std::log2(1 + std::exp2(before - now * rate_));
  }

 private:
  double rate_;
};

}  // namespace k2
