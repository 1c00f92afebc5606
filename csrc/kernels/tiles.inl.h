// How a panel of output rows is walked, whatever the weights are. Included once per instruction set, inside its
// namespace, after `Simd`.
//
// Tokens go in tiles of at most `Panel::kTokens`, dealt evenly (5 of at most 4 are 3 + 2). Columns go in parts, so
// that a tile's activations stay in the first-level cache while all rows of the panel pass by; between two parts the
// lanes of each sum wait in memory, where they keep their bits. One token takes all columns at once, row after row:
// one stream is what the hardware prefetcher likes best (kOneRows 1), unless one chain of sums is too slow for it.
//
// A Panel has kTokens, kRows and kOneRows (rows of a tile of several tokens, and of one), kStepBytes (of an activation row, a step),
// kPartBytes (activations of a tile and part, which share the cache with the weights that pass by), steps(),
// and Tile<R, T, kOnce>(row, begin, end, x, sum): adds the steps begin..end of R rows and T tokens to
// sum[r * T + t]; kOnce: the weights are not read again by another tile of the same tokens.

inline constexpr int kPanelRows = 128;        // whose sums wait between two parts
inline constexpr int kWholeBytes = 28 << 10;  // activations that stay in the first-level cache as they are

template <int R, int T, bool kOnce, class Panel>
static inline void WalkRows(const Panel& panel, int row, int begin, int end, const bf16* const* x,
                            typename Simd::F32* waiting, float* y, ptrdiff_t ldy) {
  typename Simd::F32 sum[R * T];
  if (begin == 0) {
    for (int i = 0; i < R * T; ++i) sum[i] = Simd::Zero();
  } else {
    for (int i = 0; i < R * T; ++i) sum[i] = waiting[i];
  }
  panel.template Tile<R, T, kOnce>(row, begin, end, x, sum);
  if (end < panel.steps()) {
    for (int i = 0; i < R * T; ++i) waiting[i] = sum[i];
    return;
  }
  float out[R * T];
  Simd::template Sums<R * T>(sum, out);
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) y[t * ldy + row + r] = out[r * T + t];
}

template <int T, int R, bool kWhole, bool kOnce, class Panel>
static void WalkPanel(const Panel& panel, int rows, const bf16* const* x, float* y, ptrdiff_t ldy) {
  const int steps = panel.steps();
  const int parts = kWhole ? 1 : (T * steps * Panel::kStepBytes + Panel::kPartBytes - 1) / Panel::kPartBytes;
  const int part = (steps + parts - 1) / parts;
  typename Simd::F32 waiting[kWhole ? R * T : kPanelRows * T];
  for (int top = 0; top < rows; top += kPanelRows) {
    const int bottom = rows - top < kPanelRows ? rows : top + kPanelRows;
    for (int begin = 0; begin < steps; begin += part) {
      const int end = steps - begin < part ? steps : begin + part;
      int row = top;
      for (; row + R <= bottom; row += R)
        WalkRows<R, T, kOnce>(panel, row, begin, end, x, waiting + (kWhole ? 0 : (row - top) * T), y, ldy);
      for (int left = 1; left < R && row < bottom; ++left, ++row)
        WalkRows<1, T, kOnce>(panel, row, begin, end, x, waiting + (kWhole ? 0 : (row - top) * T), y, ldy);
    }
  }
}

template <int T, bool kOnce, class Panel>
static void WalkTokens(const Panel& panel, int rows, const bf16* const* x, float* y, ptrdiff_t ldy) {
  if constexpr (T == 1) {
    WalkPanel<T, Panel::kOneRows, true, kOnce>(panel, rows, x, y, ldy);
  } else {
    // Two tokens have chains enough for one row at a time, if the cache holds all of their columns.
    if constexpr (T == 2 && Panel::kOneRows == 1 && Panel::kTwoInOneRow)
      if (T * panel.steps() * Panel::kStepBytes <= kWholeBytes)
        return WalkPanel<T, 1, true, kOnce>(panel, rows, x, y, ldy);
    WalkPanel<T, Panel::kRows, false, kOnce>(panel, rows, x, y, ldy);
  }
}

template <int T, bool kOnce, class Panel>
static inline void WalkTile(const Panel& panel, int rows, int tokens, const bf16* const* x, float* y,
                            ptrdiff_t ldy) {
  if constexpr (T > 1)
    if (tokens < T) return WalkTile<T - 1, kOnce>(panel, rows, tokens, x, y, ldy);
  WalkTokens<T, kOnce>(panel, rows, x, y, ldy);
}

// y[t * ldy + r] = row r of the panel . x[t], for `rows` rows and `tokens` tokens.
template <class Panel>
static void Walk(const Panel& panel, int rows, const bf16* const* x, int tokens, float* y, ptrdiff_t ldy) {
  const int tiles = (tokens + Panel::kTokens - 1) / Panel::kTokens;
  if (tiles == 1) return WalkTile<Panel::kTokens, true>(panel, rows, tokens, x, y, ldy);
  for (int tile = 0, t = 0; tile < tiles; ++tile) {
    const int take = (tokens - t) / (tiles - tile);
    WalkTile<Panel::kTokens, false>(panel, rows, take, x + t, y + t * ldy, ldy);
    t += take;
  }
}
