// Rows of bf16, int8 or e4m3 times bf16 activations. Included once per instruction set, inside its namespace, after
// `Simd` and tiles.
//
// A value of int8 or e4m3 is exact in bf16, so a block of them is loaded as what the dot product takes; scales, one a
// row, are applied to the finished sums.
//
// Order, the same for every tile shape: blocks of 32 columns in ascending order into one accumulator of 16 lanes
// per row and token, which is summed as a tree at the end. The chain of one row and token takes six cycles a cache
// line of bf16, a third of what memory needs for it; with several tokens the chains of a tile hide each other's latency.

inline constexpr int kDenseBlock = 32;

// What a panel knows of its weights: an element, how a block and a part of one are loaded, kOneRows of tiles.inl.h, and
// kUnit, what a loaded 1 stands for.
struct Bf16Values {
  using Element = bf16;
  static constexpr int kOneRows = 1;
  static inline auto Load(const bf16* p) { return Simd::Load(p); }
  static inline auto LoadTail(const bf16* p, int n) { return Simd::LoadTail(p, n); }
};

// The chain of one row would take twice as long as the memory needs for half the bytes: two rows run side by side.
template <class Element_>
struct ByteValues {
  using Element = Element_;
  static constexpr int kOneRows = 2;
  static inline auto Load(const Element* p) { return Simd::Load(p); }
  static inline auto LoadTail(const Element* p, int n) {
    Element block[kDenseBlock] = {};
    std::memcpy(block, p, static_cast<size_t>(n));
    return Simd::Load(block);
  }
};
struct Int8Values : ByteValues<int8_t> {
  static constexpr float kUnit = 1.0f;
};
struct E4m3Values : ByteValues<E4m3> {
  static constexpr float kUnit = kE4m3Unit;
};

template <class Values>
struct DensePanel {
  using Element = typename Values::Element;
  static constexpr int kTokens = Simd::kDenseTokens;
  static constexpr int kRows = Simd::kDenseRows;
  static constexpr int kOneRows = Values::kOneRows;
  static constexpr int kStepBytes = kDenseBlock * 2;
  static constexpr int kPartBytes = 16 << 10;  // its weights are four times as wide
  static constexpr bool kTwoInOneRow = true;

  const Element* w;
  ptrdiff_t ldw;
  int in;

  int steps() const { return (in + kDenseBlock - 1) / kDenseBlock; }

  template <int R, int T, bool kOnce>
  inline void Tile(int row, int begin, int end, const bf16* const* x, typename Simd::F32* total) const {
    const Element* at[R];
    typename Simd::F32 sum[R * T];
    for (int r = 0; r < R; ++r) at[r] = w + (row + r) * ldw;
    for (int i = 0; i < R * T; ++i) sum[i] = total[i];
    const int full = in / kDenseBlock;
    // A row is followed by the next one; several, or a part of them, by the same columns of those that come next.
    constexpr ptrdiff_t kAhead = kPrefetchBytes / static_cast<int>(sizeof(Element));
    const ptrdiff_t tile = R * ldw > 0 ? R * ldw : 1;
    ptrdiff_t ahead = kAhead / 2;
    if (end - begin < steps())
      ahead = tile;
    else if (R > 1)
      ahead = (kAhead + tile - 1) / tile * tile;
    for (int b = begin; b < end && b < full; ++b) {
      decltype(Values::Load(w)) rows[R];
      for (int r = 0; r < R; ++r) {
        Simd::template Prefetch<kOnce>(at[r] + b * kDenseBlock + ahead);
        rows[r] = Values::Load(at[r] + b * kDenseBlock);
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
          sum[r * T + t] = Simd::Dot(sum[r * T + t], Values::LoadTail(at[r] + full * kDenseBlock, n), v);
      }
    for (int i = 0; i < R * T; ++i) total[i] = sum[i];
  }
};

static void DenseRows(const bf16* w, ptrdiff_t ldw, int in, int rows, const bf16* const* x, int tokens,
                      float* y, ptrdiff_t ldy) {
  Walk(DensePanel<Bf16Values>{w, ldw, in}, rows, x, tokens, y, ldy);
}

template <class Values>
static void ScaledRows(const typename Values::Element* w, const float* scale, ptrdiff_t ldw, int in, int rows,
                       const bf16* const* x, int tokens, float* y, ptrdiff_t ldy) {
  Walk(DensePanel<Values>{w, ldw, in}, rows, x, tokens, y, ldy);
  for (int t = 0; t < tokens; ++t)
    for (int r = 0; r < rows; ++r) y[t * ldy + r] *= scale[r] * Values::kUnit;
}

static void Int8Rows(const int8_t* w, const float* scale, ptrdiff_t ldw, int in, int rows,
                     const bf16* const* x, int tokens, float* y, ptrdiff_t ldy) {
  ScaledRows<Int8Values>(w, scale, ldw, in, rows, x, tokens, y, ldy);
}

static void E4m3Rows(const E4m3* w, const float* scale, ptrdiff_t ldw, int in, int rows, const bf16* const* x,
                     int tokens, float* y, ptrdiff_t ldy) {
  ScaledRows<E4m3Values>(w, scale, ldw, in, rows, x, tokens, y, ldy);
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
