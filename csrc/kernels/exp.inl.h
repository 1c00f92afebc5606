// The exponential. Included once per instruction set, inside its namespace, after `Simd`.

// e^x to about 2 units in the last place over the whole range of fp32 (beyond it the nearest value within): the
// argument is reduced by multiples of ln 2 in two pieces; the polynomial is that of Cephes' expf.
static inline typename Simd::F32 Exp(typename Simd::F32 x) {
  using F32 = typename Simd::F32;
  x = Simd::Max(Simd::Min(x, Simd::Splat(88.0f)), Simd::Splat(-87.0f));
  const F32 n = Simd::Round(Simd::Mul(x, Simd::Splat(1.44269504f)));
  F32 r = Simd::Fma(n, Simd::Splat(-0.693359375f), x);
  r = Simd::Fma(n, Simd::Splat(2.12194440e-4f), r);
  F32 p = Simd::Splat(1.9875691500e-4f);
  p = Simd::Fma(p, r, Simd::Splat(1.3981999507e-3f));
  p = Simd::Fma(p, r, Simd::Splat(8.3334519073e-3f));
  p = Simd::Fma(p, r, Simd::Splat(4.1665795894e-2f));
  p = Simd::Fma(p, r, Simd::Splat(1.6666665459e-1f));
  p = Simd::Fma(p, r, Simd::Splat(5.0000001201e-1f));
  p = Simd::Add(Simd::Fma(p, Simd::Mul(r, r), r), Simd::Splat(1.0f));
  return Simd::Mul(p, Simd::Exp2(n));
}
