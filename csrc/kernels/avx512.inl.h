// What the two AVX-512 sets share: a register of 16 fp32 lanes. Included once per set, inside its namespace and its
// target region, before its `Simd`, which adds how weights and activations of bf16 are loaded and multiplied.

struct Lanes {
  using F32 = __m512;

  static inline F32 Zero() { return _mm512_setzero_ps(); }
  static inline F32 Splat(float v) { return _mm512_set1_ps(v); }
  static inline F32 Widen(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  // 32 bf16 of as many int8: of two registers of fp32 the upper halves, the lower ones being zero.
  static inline __m512i FromInt8(const int8_t* p) {
    const __m512i low = Number(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m512i high = Number(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)));
    const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31,
                                         29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    return _mm512_permutex2var_epi16(low, odd, high);
  }
  static inline __m512i Number(__m128i bytes) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
  }
  // 32 bf16 of as many e4m3, see layout.h: sign and bits shifted to their places under the exponent, or of those
  // whose own exponent is zero a look into a table, which has entries for the three bits that are left.
  static inline __m512i FromE4m3(const E4m3* p) {
    const __m512i word = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kE4m3Small)));
    const __mmask32 small = _mm512_testn_epi16_mask(word, _mm512_set1_epi16(0x78));
    // (a & b) | c
    const __m512i size = _mm512_ternarylogic_epi32(_mm512_slli_epi16(word, 4), _mm512_set1_epi16(0x7F0),
                                                   _mm512_set1_epi16(0x3800), 0xEA);
    const __m512i value = _mm512_mask_permutexvar_epi16(size, small, word, table);
    return _mm512_ternarylogic_epi32(word, _mm512_set1_epi16(static_cast<short>(0x8000)), value, 0xEA);
  }
  static inline F32 LoadF32(const float* p) { return _mm512_loadu_ps(p); }
  static inline void Store(float* p, F32 v) { _mm512_storeu_ps(p, v); }
  // In integers: the conversion instruction would flush subnormals.
  static inline void StoreBf16(bf16* p, F32 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(near, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }

  // A block of activations in the order of layout.h: of each register every fourth word.
  static inline void PrepareBlock(const bf16* x, bf16* prepared) {
    __m512i v[4];
    for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_si512(x + 32 * i);
    for (int k = 0; k < 4; ++k) {
      const __m512i low = _mm512_permutex2var_epi16(v[0], Fourths(k), v[1]);
      const __m512i high = _mm512_permutex2var_epi16(v[2], Fourths(k), v[3]);
      _mm512_storeu_si512(prepared + 32 * k, _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1));
    }
  }
  // Words k, k + 4, … of two registers, in the lower half.
  static inline __m512i Fourths(int k) {
    const __m256i first = _mm256_setr_epi16(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    return _mm512_castsi256_si512(_mm256_add_epi16(first, _mm256_set1_epi16(static_cast<short>(k))));
  }

  static inline F32 Fma(F32 a, F32 b, F32 sum) { return _mm512_fmadd_ps(a, b, sum); }
  static inline F32 Add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static inline F32 Mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static inline F32 Div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  static inline F32 Min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  static inline F32 Max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static inline F32 Round(F32 v) {
    return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static inline F32 Exp2(F32 n) {
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
  }

  // Lanes 8, 4, 2 and 1 apart are added, in this order.
  static inline float Sum(F32 v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // The tree of `Sum` for eight at once, pairs of vectors sharing each step.
  static inline void SumEight(const F32* v, float* out) {
    F32 four[4], two[2];
    for (int i = 0; i < 4; ++i)
      four[i] = Add(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x44),
                    _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xEE));
    for (int i = 0; i < 2; ++i)
      two[i] = Add(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                   _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xDD));
    const F32 one = Add(_mm512_shuffle_ps(two[0], two[1], 0x44), _mm512_shuffle_ps(two[0], two[1], 0xEE));
    const F32 all = Add(_mm512_shuffle_ps(one, one, 0x88), _mm512_shuffle_ps(one, one, 0xDD));
    // Lane 4i holds the sum of v[i], lane 4i + 1 that of v[i + 4].
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all)));
  }
  template <int N>
  static inline void Sums(const F32* v, float* out) {
    int i = 0;
    for (; i + 8 <= N; i += 8) SumEight(v + i, out + i);
    for (; i < N; ++i) out[i] = Sum(v[i]);
  }
  template <bool kOnce>
  static inline void Prefetch(const void* p) {
    FetchAhead<kOnce>(p);
  }
};
