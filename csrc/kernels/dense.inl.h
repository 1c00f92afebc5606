// bf16 rows times bf16 activations. Included once per instruction set, inside its namespace, after `Simd`.
//
// Order, the same for every tile shape: two accumulators of 16 lanes take the blocks of 32 columns in turn
// (one alone would be bound by the latency of the dot product), are added at the end, and summed as a tree.

template <int R, int T>
static inline void DenseTile(const bf16* w, ptrdiff_t ldw, int in, const bf16* const* x, float* y,
                             ptrdiff_t ldy) {
  typename Simd::F32 even[R][T];
  typename Simd::F32 odd[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) even[r][t] = odd[r][t] = Simd::Zero();
  int i = 0;
  for (; i + 64 <= in; i += 64) {
    typename Simd::Bf16 a[R];
    typename Simd::Bf16 b[R];
    for (int r = 0; r < R; ++r) {
      Simd::Prefetch(w + r * ldw + i + kPrefetchBytes / 4);
      Simd::Prefetch(w + r * ldw + i + kPrefetchBytes / 4 + 32);
      a[r] = Simd::Load(w + r * ldw + i);
      b[r] = Simd::Load(w + r * ldw + i + 32);
    }
    for (int t = 0; t < T; ++t) {
      const typename Simd::Bf16 u = Simd::Load(x[t] + i);
      const typename Simd::Bf16 v = Simd::Load(x[t] + i + 32);
      for (int r = 0; r < R; ++r) {
        even[r][t] = Simd::Dot(even[r][t], a[r], u);
        odd[r][t] = Simd::Dot(odd[r][t], b[r], v);
      }
    }
  }
  for (bool first = true; i < in; i += 32, first = false) {
    const int n = in - i < 32 ? in - i : 32;
    for (int t = 0; t < T; ++t) {
      const typename Simd::Bf16 v = Simd::LoadTail(x[t] + i, n);
      for (int r = 0; r < R; ++r) {
        typename Simd::F32& sum = first ? even[r][t] : odd[r][t];
        sum = Simd::Dot(sum, Simd::LoadTail(w + r * ldw + i, n), v);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) y[t * ldy + r] = Simd::Sum(Simd::Add(even[r][t], odd[r][t]));
}

template <int R>
static inline void DenseTokens(const bf16* w, ptrdiff_t ldw, int in, const bf16* const* x, int tokens,
                               float* y, ptrdiff_t ldy) {
  int t = 0;
  for (; t + 4 <= tokens; t += 4) DenseTile<R, 4>(w, ldw, in, x + t, y + t * ldy, ldy);
  switch (tokens - t) {
    case 3:
      return DenseTile<R, 3>(w, ldw, in, x + t, y + t * ldy, ldy);
    case 2:
      return DenseTile<R, 2>(w, ldw, in, x + t, y + t * ldy, ldy);
    case 1:
      return DenseTile<R, 1>(w, ldw, in, x + t, y + t * ldy, ldy);
    default:
      return;
  }
}

static void DenseRows(const bf16* w, ptrdiff_t ldw, int in, int rows, const bf16* const* x, int tokens,
                      float* y, ptrdiff_t ldy) {
  int r = 0;
  if (tokens > 1)
    for (; r + 2 <= rows; r += 2) DenseTokens<2>(w + r * ldw, ldw, in, x, tokens, y + r, ldy);
  for (; r < rows; ++r) DenseTokens<1>(w + r * ldw, ldw, in, x, tokens, y + r, ldy);
}

// Ascending k into one accumulator per column; 128 columns at a time stay in registers.
static void DenseColumns(const bf16* w, ptrdiff_t ldw, int in, int columns, const bf16* x, float* y) {
  constexpr int kLanes = 16;
  constexpr int kWide = 8;
  int n = 0;
  for (; n + kWide * kLanes <= columns; n += kWide * kLanes) {
    typename Simd::F32 sum[kWide];
    for (int j = 0; j < kWide; ++j) sum[j] = Simd::Zero();
    for (int k = 0; k < in; ++k) {
      const typename Simd::F32 v = Simd::Splat(ToFloat(x[k]));
      for (int j = 0; j < kWide; ++j)
        sum[j] = Simd::Fma(v, Simd::Widen(w + k * ldw + n + j * kLanes), sum[j]);
    }
    for (int j = 0; j < kWide; ++j) Simd::Store(y + n + j * kLanes, sum[j]);
  }
  for (; n < columns; ++n) {
    float sum = 0.0f;
    for (int k = 0; k < in; ++k) sum = __builtin_fmaf(ToFloat(x[k]), ToFloat(w[k * ldw + n]), sum);
    y[n] = sum;
  }
}
