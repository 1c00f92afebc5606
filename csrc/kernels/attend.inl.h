// Attention of some heads over a block of latent rows. Included once per instruction set, inside its namespace, after
// `Simd`, dense.inl.h and ffn.inl.h (Exp).
//
// Scores are bf16 dot products with fp32 sums; maximum, exponentials and sums of weights are fp32, and so are the
// weights when they meet the values. Order: a column of a head's output is one chain over the rows, ascending. Rows
// pass by in pieces that stay in the first-level cache while all heads take them.

inline constexpr int kMixRows = kAttendPage / 2;
static_assert(kAttendRows % kAttendPage == 0 && kAttendPage % kMixRows == 0);

// out[h * ldo + 16 j ..] += sum over rows r of weight[h * ldw + r] * row r.
template <int H, int V>
static inline void MixTile(const bf16* row, ptrdiff_t width, int rows, const float* weight, ptrdiff_t ldw,
                           float* out, ptrdiff_t ldo) {
  typename Simd::F32 sum[H * V];
  for (int h = 0; h < H; ++h)
    for (int j = 0; j < V; ++j) sum[h * V + j] = Simd::LoadF32(out + h * ldo + 16 * j);
  for (int r = 0; r < rows; ++r) {
    typename Simd::F32 value[V];
    for (int j = 0; j < V; ++j) value[j] = Simd::Widen(row + r * width + 16 * j);
    for (int h = 0; h < H; ++h) {
      const typename Simd::F32 w = Simd::Splat(weight[h * ldw + r]);
      for (int j = 0; j < V; ++j) sum[h * V + j] = Simd::Fma(w, value[j], sum[h * V + j]);
    }
  }
  for (int h = 0; h < H; ++h)
    for (int j = 0; j < V; ++j) Simd::Store(out + h * ldo + 16 * j, sum[h * V + j]);
}

template <int H>
static inline void MixHeads(const bf16* row, ptrdiff_t width, int rows, const float* weight, ptrdiff_t ldw,
                            int latent, float* out) {
  int at = 0;
  constexpr int V = Simd::kMixColumns;
  for (; at + 16 * V <= latent; at += 16 * V)
    MixTile<H, V>(row + at, width, rows, weight, ldw, out + at, latent);
  for (; at < latent; at += 16) MixTile<H, 1>(row + at, width, rows, weight, ldw, out + at, latent);
}

static void Attend(const AttendBlock& block, float* scores, const AttendSums& sums) {
  using F32 = typename Simd::F32;
  const ptrdiff_t width = block.latent + block.rope;
  for (int at = 0; at < block.rows; at += kAttendPage) {
    const int rows = block.rows - at < kAttendPage ? block.rows - at : kAttendPage;
    DenseRows(block.pages[at / kAttendPage], width, static_cast<int>(width), rows, block.q, block.heads,
              scores + at, kAttendRows);
  }
  const F32 scale = Simd::Splat(block.scale);
  const int padded = (block.rows + 15) / 16 * 16;
  for (int h = 0; h < block.heads; ++h) {
    float* score = scores + h * kAttendRows;
    for (int i = block.rows; i < padded; ++i) score[i] = score[block.rows - 1];
    F32 best = Simd::Splat(sums.peak[h]);
    for (int i = 0; i < padded; i += 16) best = Simd::Max(Simd::Mul(Simd::LoadF32(score + i), scale), best);
    float lanes[16];
    Simd::Store(lanes, best);
    float peak = lanes[0];
    for (const float lane : lanes) peak = lane > peak ? lane : peak;
    const F32 top = Simd::Splat(-peak);
    F32 total = Simd::Zero(), wrong = Simd::Zero();
    for (int i = 0; i < padded; i += 16) {
      const F32 s = Simd::LoadF32(score + i);
      Simd::Store(score + i, Exp(Simd::Fma(s, scale, top)));
      wrong = Simd::Fma(s, Simd::Zero(), wrong);  // NaN if a score is none: Exp would hide it
    }
    for (int i = block.rows; i < padded; ++i) score[i] = 0.0f;
    for (int i = 0; i < padded; i += 16) total = Simd::Add(total, Simd::LoadF32(score + i));
    Simd::Store(lanes, Exp(Simd::Splat(sums.peak[h] - peak)));
    const float fade = sums.total[h] == 0.0f ? 0.0f : lanes[0];
    sums.peak[h] = peak;
    float sum[2];
    const F32 both[2] = {total, wrong};
    Simd::template Sums<2>(both, sum);
    sums.total[h] = sums.total[h] * fade + sum[0] + sum[1];
    float* out = sums.out + static_cast<ptrdiff_t>(h) * block.latent;
    for (int i = 0; i < block.latent; i += 16)
      Simd::Store(out + i, Simd::Mul(Simd::LoadF32(out + i), Simd::Splat(fade)));
  }
  for (int at = 0; at < block.rows; at += kMixRows) {
    const int rows = block.rows - at < kMixRows ? block.rows - at : kMixRows;
    const bf16* row = block.pages[at / kAttendPage] + (at % kAttendPage) * width;
    int h = 0;
    for (; h + 4 <= block.heads; h += 4)
      MixHeads<4>(row, width, rows, scores + h * kAttendRows + at, kAttendRows, block.latent,
                  sums.out + static_cast<ptrdiff_t>(h) * block.latent);
    for (; h < block.heads; ++h)
      MixHeads<1>(row, width, rows, scores + h * kAttendRows + at, kAttendRows, block.latent,
                  sums.out + static_cast<ptrdiff_t>(h) * block.latent);
  }
}

// Rows of e4m3 latents with a scale per 128 values, and a rotary part in bf16 (k2hybrid/cache/rows.py), as bf16. The bits
// of an e4m3, moved to the places of an fp32's, are 2^-120 times its value; scales are powers of two, so what comes out
// has no bit below bf16's.
static void DecodeRows(const uint8_t* stored, ptrdiff_t row_bytes, int rows, int latent, int rope,
                       bf16* out) {
  const int groups = (latent + kScaleGroup - 1) / kScaleGroup;
  for (int r = 0; r < rows; ++r, stored += row_bytes) {
    for (int g = 0; g < groups; ++g) {
      float scale;
      std::memcpy(&scale, stored + latent + 4 * g, sizeof(scale));
      const float factor = scale * 0x1p120f;
      const int end = (g + 1) * kScaleGroup < latent ? (g + 1) * kScaleGroup : latent;
      for (int i = g * kScaleGroup; i < end; ++i) {
        const uint32_t byte = stored[i];
        const float value = std::bit_cast<float>((byte & 0x80u) << 24 | (byte & 0x7Fu) << 20) * factor;
        out[i] = static_cast<bf16>(std::bit_cast<uint32_t>(value) >> 16);
      }
    }
    std::memcpy(out + latent, stored + latent + 4 * groups, static_cast<size_t>(rope) * sizeof(bf16));
    out += latent + rope;
  }
}
