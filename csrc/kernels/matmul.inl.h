// INT4 rows times bf16 activations. Included once per instruction set, inside its namespace, after `Simd` and tiles.
//
// Identity:  y = sum_g scale_g * sum_{i in g} (nibble_i - 8) * x_i,  products exact, sums in fp32.
// Order, the same for every tile shape: per block of 128 weights four chained dot products from zero, over
// k = 0..3 (elements 4w + k), then one fused multiply-add of the block's scales into the row's accumulator of
// 16 lanes (lane j holds elements 8j..8j+7 of each block, so four lanes share a scale); at the end the lanes
// are summed as a tree. Four sums of two products of |x| * 8 cannot overflow fp32 for bf16 |x| < 1e36.
//
// A tile is R rows times T tokens: the nibbles are unpacked once for T tokens, an activation is loaded once
// for R rows.

// Ahead of the row stream: 200 ns of DRAM latency at 40 GB/s a core. Half of it where it goes into a cache.
inline constexpr int kPrefetchBytes = 8192;

// The chains of `kChains` tokens run side by side, which hides the latency of the dot product.
template <class S, int R, int T>
static inline void ChainedBlock(const typename S::Weights (&w)[R], const typename S::F32 (&scale)[R],
                                const bf16* const* x, ptrdiff_t at, typename S::F32* sum) {
  constexpr int U = T < S::kChains ? T : S::kChains;
#pragma GCC unroll 8
  for (int t = 0; t < T; t += U) {
    typename S::F32 dot[R][U];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) dot[r][u] = S::Zero();
#pragma GCC unroll 8
    for (int k = 0; k < 4; ++k)
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) {
        if (t + u >= T) break;
        const typename S::Bf16 v = S::Load(x[t + u] + at + k * (kBlock / 4));
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) dot[r][u] = S::Dot(dot[r][u], w[r].part[k], v);
      }
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      if (t + u >= T) break;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r * T + t + u] = S::Fma(dot[r][u], scale[r], sum[r * T + t + u]);
    }
  }
}

// An instruction set with few registers has a way of its own through a block.
template <class S>
concept AddsBlocks = requires { requires S::kAddsBlocks; };

template <class S, int R, int T>
[[gnu::always_inline]] static inline void Int4Block(const typename S::Weights (&w)[R],
                                                    const typename S::F32 (&scale)[R], const bf16* const* x,
                                                    ptrdiff_t at, typename S::F32* sum) {
  if constexpr (AddsBlocks<S>)
    S::template AddBlock<R, T>(w, scale, x, at, sum);
  else
    ChainedBlock<S, R, T>(w, scale, x, at, sum);
}

struct Int4Panel {
  static constexpr int kTokens = 4;
  static constexpr int kRows = Simd::kInt4Rows;
  static constexpr int kOneRows = Simd::kInt4OneRows;
  static constexpr int kStepBytes = kBlock * 2;
  static constexpr int kPartBytes = 28 << 10;
  static constexpr bool kTwoInOneRow = false;

  const Int4Matrix& matrix;
  int row0;

  int steps() const { return PaddedBlocks(matrix.in); }

  template <int R, int T, bool kOnce>
  inline void Tile(int row, int begin, int end, const bf16* const* x, typename Simd::F32* total) const {
    const uint8_t* packed[R];
    const bf16* scale[R];
    typename Simd::F32 sum[R * T];
    for (int r = 0; r < R; ++r) {
      packed[r] = matrix.PackedRow(row0 + row + r);
      scale[r] = matrix.ScaleRow(row0 + row + r);
    }
    for (int i = 0; i < R * T; ++i) sum[i] = total[i];
    // What comes `ahead` bytes later is read next but a few: of one row the stream itself, of several the same
    // columns of the rows that follow, since a tile takes a part of them only.
    const int tile_bytes = R * (matrix.in / 2), far = kPastCaches ? kPrefetchBytes : kPrefetchBytes / 2;
    const int ahead = R * T == 1 ? far : (far + tile_bytes - 1) / tile_bytes * tile_bytes;
    const int full = matrix.in / kBlock;
    typename Simd::Weights w[R];
    typename Simd::F32 s[R];
    for (int b = begin; b < end && b < full; ++b) {
      for (int r = 0; r < R; ++r) {
        Simd::template Prefetch<kOnce>(packed[r] + b * (kBlock / 2) + ahead);
        // A line of scales serves eight blocks; its stream is too thin for the hardware to run ahead of.
        if (b % 8 == 0) Simd::template Prefetch<kOnce>(scale[r] + b * (kBlock / kGroup) + ahead / 16);
        w[r] = Simd::Unpack(packed[r] + b * (kBlock / 2));
        s[r] = Simd::Scales(scale[r] + b * (kBlock / kGroup));
      }
      Int4Block<Simd, R, T>(w, s, x, static_cast<ptrdiff_t>(b) * kBlock, sum);
    }
    if (end > full) {
      const int tail = matrix.in % kBlock;
      for (int r = 0; r < R; ++r) {
        w[r] = Simd::UnpackTail(packed[r] + full * (kBlock / 2), tail / 2);
        s[r] = Simd::ScalesTail(scale[r] + full * (kBlock / kGroup), tail / kGroup);
      }
      Int4Block<Simd, R, T>(w, s, x, static_cast<ptrdiff_t>(full) * kBlock, sum);
    }
    for (int i = 0; i < R * T; ++i) total[i] = sum[i];
  }
};

static void Int4Rows(const Int4Matrix& m, int row0, int rows, const bf16* const* x, int tokens, float* y,
                     ptrdiff_t ldy) {
  Walk(Int4Panel{m, row0}, rows, x, tokens, y, ldy);
}

static void Prepare(const bf16* x, int in, bf16* prepared) {
  const int full = in / kBlock * kBlock;
  for (int b = 0; b < full; b += kBlock) Simd::PrepareBlock(x + b, prepared + b);
  if (full == in) return;
  bf16 tail[kBlock] = {};
  std::memcpy(tail, x + full, static_cast<size_t>(in - full) * sizeof(bf16));
  Simd::PrepareBlock(tail, prepared + full);
}
