// How weights are fetched ahead of use.
#pragma once

namespace k2 {

// Where what is read once goes. AMD: past the caches, so that it displaces nothing. Intel: into L2, since a fetch to L1
// holds one of the core's few fill buffers until memory answers, which makes half of what it can read.
extern const bool kPastCaches;

// kOnce: the line is not read again soon.
template <bool kOnce>
inline void FetchAhead(const void* p) {
  if (!kOnce)
    __builtin_prefetch(p, 0, 3);
  else if (kPastCaches)
    __builtin_prefetch(p, 0, 0);
  else
    __builtin_prefetch(p, 0, 2);
}

}  // namespace k2
