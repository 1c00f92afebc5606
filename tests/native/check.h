// What the native tests share. A test that fails says what did not hold and ends the process.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "base.h"

namespace k2::test {

#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
inline constexpr bool kThreadSanitizer = true;
#else
inline constexpr bool kThreadSanitizer = false;
#endif
#else
inline constexpr bool kThreadSanitizer = false;
#endif

inline void Check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

// `fn` must throw an Error that says `why`.
template <typename Fn>
void CheckRefused(Fn&& fn, const char* why) {
  try {
    fn();
  } catch (const Error& error) {
    if (std::strstr(error.what(), why) != nullptr) return;
    std::fprintf(stderr, "failed: refused with '%s', not '%s'\n", error.what(), why);
    std::exit(1);
  }
  std::fprintf(stderr, "failed: not refused: '%s'\n", why);
  std::exit(1);
}

// Told before it starts: of a program that hangs, the last line is the test that hung.
template <typename Fn>
void Step(const char* name, Fn&& fn) {
  std::printf("%s\n", name);
  std::fflush(stdout);
  fn();
}

// Rounds of a test, fewer where a sanitizer makes each one slow: the first argument divides them.
class Effort {
 public:
  Effort(int argc, char** argv) : divisor_(argc > 1 ? std::atoi(argv[1]) : 1) {
    Check(divisor_ >= 1, "the first argument is a divisor of rounds");
  }
  int Rounds(int full) const { return full / divisor_ + 1; }

 private:
  int divisor_;
};

}  // namespace k2::test
