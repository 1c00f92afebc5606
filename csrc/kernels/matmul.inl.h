// INT4 rows times bf16 activations. Included once per instruction set, inside its namespace, after `Simd`.
//
// Identity:  y = sum_g scale_g * sum_{i in g} (nibble_i - 8) * x_i,  products exact, sums in fp32.
// Order, the same for every tile shape: per block of 128 weights four chained dot products from zero, over
// k = 0..3 (elements 4w + k), then one fused multiply-add of the block's scales into the row's accumulator of
// 16 lanes (lane j holds elements 8j..8j+7 of each block, so four lanes share a scale); at the end the lanes
// are summed as a tree. Four sums of two products of |x| * 8 cannot overflow fp32 for bf16 |x| < 1e36.
//
// A tile is R rows times T tokens: the nibbles are unpacked once for T tokens, an activation is loaded once
// for R rows. One row at a time for a single token: eight streams defeat the hardware prefetcher, one does
// not.

inline constexpr int kPrefetchBytes =
    8192;  // ahead of the row stream: 200 ns of DRAM latency at 40 GB/s a core

template <int R, int T>
static inline void Int4Tile(const uint8_t* const* packed, const bf16* const* scale, int in,
                            const bf16* const* x, float* y, ptrdiff_t ldy) {
  typename Simd::F32 sum[R][T];
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) sum[r][t] = Simd::Zero();
  const int full = in / kBlock;
  const int tail = in % kBlock;
  for (int b = 0; b < full + (tail != 0); ++b) {
    typename Simd::Weights w[R];
    typename Simd::F32 s[R];
    for (int r = 0; r < R; ++r) {
      if (b < full) {
        Simd::Prefetch(packed[r] + b * (kBlock / 2) + kPrefetchBytes);
        // A line of scales serves eight blocks; its stream is too thin for the hardware to run ahead of.
        if (b % 8 == 0) Simd::Prefetch(scale[r] + b * (kBlock / kGroup) + kPrefetchBytes / 16);
        w[r] = Simd::Unpack(packed[r] + b * (kBlock / 2));
        s[r] = Simd::Scales(scale[r] + b * (kBlock / kGroup));
      } else {
        w[r] = Simd::UnpackTail(packed[r] + b * (kBlock / 2), tail / 2);
        s[r] = Simd::ScalesTail(scale[r] + b * (kBlock / kGroup), tail / kGroup);
      }
    }
    for (int t = 0; t < T; ++t) {
      typename Simd::F32 dot[R];
      for (int r = 0; r < R; ++r) dot[r] = Simd::Zero();
      for (int k = 0; k < 4; ++k) {
        const typename Simd::Bf16 v = Simd::Load(x[t] + b * kBlock + k * (kBlock / 4));
        for (int r = 0; r < R; ++r) dot[r] = Simd::Dot(dot[r], w[r].part[k], v);
      }
      for (int r = 0; r < R; ++r) sum[r][t] = Simd::Fma(dot[r], s[r], sum[r][t]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int t = 0; t < T; ++t) y[t * ldy + r] = Simd::Sum(sum[r][t]);
}

template <int R>
static inline void Int4Tokens(const Int4Matrix& m, int row, const bf16* const* x, int tokens, float* y,
                              ptrdiff_t ldy) {
  const uint8_t* packed[R];
  const bf16* scale[R];
  for (int r = 0; r < R; ++r) {
    packed[r] = m.PackedRow(row + r);
    scale[r] = m.ScaleRow(row + r);
  }
  int t = 0;
  for (; t + 4 <= tokens; t += 4) Int4Tile<R, 4>(packed, scale, m.in, x + t, y + t * ldy, ldy);
  switch (tokens - t) {
    case 3:
      return Int4Tile<R, 3>(packed, scale, m.in, x + t, y + t * ldy, ldy);
    case 2:
      return Int4Tile<R, 2>(packed, scale, m.in, x + t, y + t * ldy, ldy);
    case 1:
      return Int4Tile<R, 1>(packed, scale, m.in, x + t, y + t * ldy, ldy);
    default:
      return;
  }
}

static void Int4Rows(const Int4Matrix& m, int row0, int rows, const bf16* const* x, int tokens, float* y,
                     ptrdiff_t ldy) {
  int r = 0;
  if (tokens > 1)
    for (; r + 2 <= rows; r += 2) Int4Tokens<2>(m, row0 + r, x, tokens, y + r, ldy);
  for (; r < rows; ++r) Int4Tokens<1>(m, row0 + r, x, tokens, y + r, ldy);
}

static void Prepare(const bf16* x, int in, bf16* prepared) {
  const int padded = PreparedSize(in);
  for (int b = 0; b < padded; b += kBlock)
    for (int k = 0; k < 4; ++k)
      for (int w = 0; w < kBlock / 4; ++w) {
        const int i = b + 4 * w + k;
        prepared[b + k * (kBlock / 4) + w] = i < in ? x[i] : bf16{0};
      }
}
