// What an expert does between its products. Included once per instruction set, inside its namespace, after `Simd` and
// exp.inl.h.

// out[i] = bf16(gate[i] / (1 + e^-gate[i]) * up[i]) for n values, n a multiple of 16.
static void SwiGlu(const float* gate, const float* up, int n, bf16* out) {
  using F32 = typename Simd::F32;
  const F32 one = Simd::Splat(1.0f);
  for (int i = 0; i < n; i += 16) {
    const F32 g = Simd::LoadF32(gate + i);
    const F32 silu = Simd::Div(g, Simd::Add(one, Exp(Simd::Mul(g, Simd::Splat(-1.0f)))));
    Simd::StoreBf16(out + i, Simd::Mul(silu, Simd::LoadF32(up + i)));
  }
}

// out[i] += weight * y[i], fused, for n values, n a multiple of 16.
static void AddScaled(float weight, const float* y, int n, float* out) {
  const typename Simd::F32 w = Simd::Splat(weight);
  for (int i = 0; i < n; i += 16)
    Simd::Store(out + i, Simd::Fma(w, Simd::LoadF32(y + i), Simd::LoadF32(out + i)));
}
