// INT4 rows times many tokens where registers are few: rows are unpacked to fp32 once for 32 tokens. Included by the
// instruction sets that ask for it, inside their namespace, after matmul.
//
// The order of every sum is that of matmul.inl.h, so the bits are. A part of the columns at a time, activations and rows
// lie in fp32 in the order in which a block adds them: position k, then the even and the odd words, 16 lanes each. The
// sums of the panel's rows wait in memory meanwhile, in the second-level cache with the activations.

inline constexpr int kFewestUnpacked = 16;  // tokens that are worth it
inline constexpr int kUnpackTokens = 32;
inline constexpr int kUnpackPanel = 64;  // rows
inline constexpr int kUnpackGroup = 8;   // rows that are unpacked together, and stay in the first-level cache
inline constexpr int kUnpackBlocks = 4;  // of a part
inline constexpr int kUnpackColumns = kUnpackBlocks * kBlock;
inline constexpr int kUnpackStride =
    kUnpackColumns + 8;  // so that a tile's tokens meet in other banks of the cache

struct UnpackedRow {
  alignas(64) float weight[kUnpackColumns];
  typename Simd::F32 scale[kUnpackBlocks];
};

static void UnpackRow(const Int4Matrix& m, int row, int begin, int end, UnpackedRow& out) {
  const uint8_t* packed = m.PackedRow(row);
  const bf16* scale = m.ScaleRow(row);
  const int full = m.in / kBlock, tail = m.in % kBlock;
  for (int b = begin; b < end; ++b) {
    const bool whole = b < full;
    const uint8_t* at = packed + static_cast<ptrdiff_t>(b) * (kBlock / 2);
    const bf16* groups = scale + static_cast<ptrdiff_t>(b) * (kBlock / kGroup);
    Simd::ToFloats(whole ? Simd::Unpack(at) : Simd::UnpackTail(at, tail / 2),
                   out.weight + (b - begin) * kBlock);
    out.scale[b - begin] = whole ? Simd::Scales(groups) : Simd::ScalesTail(groups, tail / kGroup);
  }
}

// Rows r of `rows` and tokens t of `x`, `blocks` blocks: added to sum[r * kUnpackTokens + t].
template <int R, int T>
static void AddUnpacked(const UnpackedRow* rows, const float (*x)[kUnpackStride], int blocks,
                        typename Simd::F32* sum) {
  for (int b = 0; b < blocks; ++b) {
    const float* w[R];
    for (int r = 0; r < R; ++r) w[r] = rows[r].weight + b * kBlock;
    typename Simd::F32 scale[R];
    for (int r = 0; r < R; ++r) scale[r] = rows[r].scale[b];
    Simd::template AddFloats<R, T, kUnpackStride, kUnpackTokens>(w, &x[0][b * kBlock], scale, sum);
  }
}

// The tokens of a tile stay in the first-level cache while the group's rows pass by.
template <int T>
static void AddTile(const UnpackedRow* group, int rows, const float (*x)[kUnpackStride], int blocks,
                    typename Simd::F32* sum) {
  int row = 0;
  for (; row + 2 <= rows; row += 2) AddUnpacked<2, T>(group + row, x, blocks, sum + row * kUnpackTokens);
  if (row < rows) AddUnpacked<1, T>(group + row, x, blocks, sum + row * kUnpackTokens);
}

// As Int4Rows, for at most kUnpackPanel rows and kUnpackTokens tokens. Its frame takes 217 KB of the stack.
[[gnu::noinline]] static void UnpackedTile(const Int4Matrix& m, int row0, int rows, const bf16* const* x,
                                           int tokens, float* y, ptrdiff_t ldy) {
  alignas(64) float active[kUnpackTokens][kUnpackStride];
  typename Simd::F32 waiting[kUnpackPanel * kUnpackTokens];
  UnpackedRow unpacked[kUnpackGroup];
  for (int i = 0; i < rows * kUnpackTokens; ++i) waiting[i] = Simd::Zero();
  const int steps = PaddedBlocks(m.in);
  for (int begin = 0; begin < steps; begin += kUnpackBlocks) {
    const int end = steps - begin < kUnpackBlocks ? steps : begin + kUnpackBlocks;
    for (int t = 0; t < tokens; ++t)
      for (int b = begin; b < end; ++b)
        Simd::ToFloats(x[t] + static_cast<ptrdiff_t>(b) * kBlock, active[t] + (b - begin) * kBlock);
    for (int first = 0; first < rows; first += kUnpackGroup) {
      const int group = rows - first < kUnpackGroup ? rows - first : kUnpackGroup;
      for (int r = 0; r < group; ++r) UnpackRow(m, row0 + first + r, begin, end, unpacked[r]);
      typename Simd::F32* sum = waiting + first * kUnpackTokens;
      int t = 0;
      for (; t + 4 <= tokens; t += 4) AddTile<4>(unpacked, group, active + t, end - begin, sum + t);
      if (tokens - t == 3) AddTile<3>(unpacked, group, active + t, end - begin, sum + t);
      if (tokens - t == 2) AddTile<2>(unpacked, group, active + t, end - begin, sum + t);
      if (tokens - t == 1) AddTile<1>(unpacked, group, active + t, end - begin, sum + t);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < tokens; ++t) Simd::template Sums<1>(waiting + r * kUnpackTokens + t, y + t * ldy + r);
}

// Panel after panel, so that its weights come from the second-level cache for all tokens but the first 32.
static void UnpackedRows(const Int4Matrix& m, int row0, int rows, const bf16* const* x, int tokens, float* y,
                         ptrdiff_t ldy) {
  const int tiles = (tokens + kUnpackTokens - 1) / kUnpackTokens;
  for (int top = 0; top < rows; top += kUnpackPanel) {
    const int count = rows - top < kUnpackPanel ? rows - top : kUnpackPanel;
    for (int tile = 0, t = 0; tile < tiles; ++tile) {
      const int take = (tokens - t) / (tiles - tile);
      UnpackedTile(m, row0 + top, count, x + t, take, y + t * ldy + top, ldy);
      t += take;
    }
  }
}

// Int4Rows of the table.
static void FewOrManyRows(const Int4Matrix& m, int row0, int rows, const bf16* const* x, int tokens, float* y,
                          ptrdiff_t ldy) {
  if (tokens < kFewestUnpacked) return Int4Rows(m, row0, rows, x, tokens, y, ldy);
  UnpackedRows(m, row0, rows, x, tokens, y, ldy);
}
