// What a layer does to a row between its products. Included once per instruction set, inside its namespace, after `Simd`
// and ffn.inl.h. Rows may have any length, and a row's bits depend on it alone.

// out[i] = bf16(x[i] / sqrt(mean of squares + eps) * weight[i]). Four registers of 16 sums each, then their tree.
static void RmsNorm(const float* x, const float* weight, float eps, int n, bf16* out) {
  using F32 = typename Simd::F32;
  F32 sums[4] = {Simd::Zero(), Simd::Zero(), Simd::Zero(), Simd::Zero()};
  int i = 0;
  for (; i + 16 <= n; i += 16) {
    const F32 v = Simd::LoadF32(x + i);
    F32& sum = sums[i / 16 % 4];
    sum = Simd::Fma(v, v, sum);
  }
  float square = Simd::Sum(Simd::Add(Simd::Add(sums[0], sums[1]), Simd::Add(sums[2], sums[3])));
  for (; i < n; ++i) square += x[i] * x[i];
  const float inverse = 1.0f / std::sqrt(square / static_cast<float>(n) + eps);
  const F32 each = Simd::Splat(inverse);
  for (i = 0; i + 16 <= n; i += 16)
    Simd::StoreBf16(out + i, Simd::Mul(Simd::Mul(Simd::LoadF32(x + i), each), Simd::LoadF32(weight + i)));
  for (; i < n; ++i) out[i] = ToBf16(x[i] * inverse * weight[i]);
}

// out[i] = 1 / (1 + e^-x[i]), for a multiple of 16.
static void Sigmoid(const float* x, int n, float* out) {
  using F32 = typename Simd::F32;
  const F32 one = Simd::Splat(1.0f);
  for (int i = 0; i < n; i += 16) {
    const F32 fall = Exp(Simd::Mul(Simd::LoadF32(x + i), Simd::Splat(-1.0f)));
    Simd::Store(out + i, Simd::Div(one, Simd::Add(one, fall)));
  }
}

// Adjacent pairs of x, each turned by its angle. Plain loops: the compiler finds their registers.
static void Rotate(const float* x, const float* cos, const float* sin, int pairs, bf16* out) {
  for (int i = 0; i < pairs; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    out[2 * i] = ToBf16(even * cos[i] - odd * sin[i]);
    out[2 * i + 1] = ToBf16(odd * cos[i] + even * sin[i]);
  }
}

static void Round(const float* x, int n, bf16* out) {
  for (int i = 0; i < n; ++i) out[i] = ToBf16(x[i]);
}
