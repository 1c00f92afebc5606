// bf16 rows times bf16 activations. Included once per instruction set, inside its namespace, after `Simd` and tiles.
//
// Order, the same for every tile shape: blocks of 32 columns in ascending order into one accumulator of 16 lanes
// per row and token, which is summed as a tree at the end. The chain of one row and token takes six cycles a cache
// line, a third of what memory needs for it; with several tokens the chains of a tile hide each other's latency.

inline constexpr int kDenseBlock = 32;

struct DensePanel {
  static constexpr int kTokens = Simd::kDenseTokens;
  static constexpr int kRows = Simd::kDenseRows;
  static constexpr int kStepBytes = kDenseBlock * 2;
  static constexpr int kPartBytes = 16 << 10;  // its weights are four times as wide

  const bf16* w;
  ptrdiff_t ldw;
  int in;

  int steps() const { return (in + kDenseBlock - 1) / kDenseBlock; }

  template <int R, int T, bool kOnce>
  inline void Tile(int row, int begin, int end, const bf16* const* x, typename Simd::F32* total) const {
    const bf16* at[R];
    typename Simd::F32 sum[R * T];
    for (int r = 0; r < R; ++r) at[r] = w + (row + r) * ldw;
    for (int i = 0; i < R * T; ++i) sum[i] = total[i];
    const int full = in / kDenseBlock;
    // A tile that takes a part of its rows is followed by the same part of the next ones.
    const ptrdiff_t ahead = end - begin < steps() ? R * ldw : kPrefetchBytes / 4;
    for (int b = begin; b < end && b < full; ++b) {
      typename Simd::Bf16 rows[R];
      for (int r = 0; r < R; ++r) {
        Simd::template Prefetch<kOnce>(at[r] + b * kDenseBlock + ahead);
        rows[r] = Simd::Load(at[r] + b * kDenseBlock);
      }
      for (int t = 0; t < T; ++t) {
        const typename Simd::Bf16 v = Simd::Load(x[t] + b * kDenseBlock);
        for (int r = 0; r < R; ++r) sum[r * T + t] = Simd::Dot(sum[r * T + t], rows[r], v);
      }
    }
    if (end > full)
      for (int t = 0; t < T; ++t) {
        const int n = in % kDenseBlock;
        const typename Simd::Bf16 v = Simd::LoadTail(x[t] + full * kDenseBlock, n);
        for (int r = 0; r < R; ++r)
          sum[r * T + t] = Simd::Dot(sum[r * T + t], Simd::LoadTail(at[r] + full * kDenseBlock, n), v);
      }
    for (int i = 0; i < R * T; ++i) total[i] = sum[i];
  }
};

static void DenseRows(const bf16* w, ptrdiff_t ldw, int in, int rows, const bf16* const* x, int tokens,
                      float* y, ptrdiff_t ldy) {
  Walk(DensePanel{w, ldw, in}, rows, x, tokens, y, ldy);
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
