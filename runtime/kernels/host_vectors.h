// Vectors of floats in one instruction set: included once for each, inside a namespace of its own.
//
// The includer defines ISA_AVX512, ISA_AVX512_BF16, ISA_AVX2 or none of them (plain C++), and turns
// the instructions on for what it includes. A Vec holds W floats. `load` reads W elements of a type
// as floats; `dots` is the inner product of ROWS rows of queries with 4 keys.

#if defined(ISA_AVX512)

constexpr int W = 16;
using Vec = __m512;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec set1(float x) { return _mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a, 8); }
inline float sum_of(Vec a) { return _mm512_reduce_add_ps(a); }
inline float max_of(Vec a) { return _mm512_reduce_max_ps(a); }
inline void store(float* to, Vec a) { _mm512_storeu_ps(to, a); }
inline Vec times_power_of_two(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }

inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
inline Vec load(const BF16* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load(const F16* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Vec load(const I8* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// The sums of 16 vectors, in their order.
inline Vec sums_of_16(const Vec* x) {
  Vec pair[8], four[4], two[2];
  for (int i = 0; i < 8; ++i)
    pair[i] = add(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]),
                  _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
    four[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                  _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i)
    two[i] = add(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                 _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
  return add(_mm512_shuffle_f32x4(two[0], two[1], 0x88),
             _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
}

template <int ROWS>
inline void put_sums(Vec (&x)[16], float* out, int stride) {
  const Vec sums = sums_of_16(x);
  _mm_storeu_ps(out, _mm512_castps512_ps128(sums));
  if (ROWS > 1) _mm_storeu_ps(out + stride, _mm512_extractf32x4_ps(sums, 1));
  if (ROWS > 2) _mm_storeu_ps(out + 2 * stride, _mm512_extractf32x4_ps(sums, 2));
  if (ROWS > 3) _mm_storeu_ps(out + 3 * stride, _mm512_extractf32x4_ps(sums, 3));
}

template <int ROWS, class T>
inline void dots(const float* q, int q_stride, const char* const (&keys)[4], int dim, float* out,
                 int stride) {
  Vec x[16];
  for (int i = 0; i < 16; ++i) x[i] = zero();
  for (int d = 0; d < dim; d += W) {
    Vec k[4];
    for (int n = 0; n < 4; ++n) k[n] = load(reinterpret_cast<const T*>(keys[n]) + d);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vec one = load(q + r * q_stride + d);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) x[4 * r + n] = fma(one, k[n], x[4 * r + n]);
    }
  }
  put_sums<ROWS>(x, out, stride);
}

#if defined(ISA_AVX512_BF16)
// Queries of bf16 with keys of bf16: 32 products an instruction, summed in fp32.
template <int ROWS>
inline void dots_of_pairs(const BF16* q, int q_stride, const char* const (&keys)[4], int dim,
                          float* out, int stride) {
  Vec x[16];
  for (int i = 0; i < 16; ++i) x[i] = zero();
  for (int d = 0; d < dim; d += 2 * W) {
    __m512bh k[4];
    for (int n = 0; n < 4; ++n)
      k[n] = (__m512bh)_mm512_loadu_si512(reinterpret_cast<const BF16*>(keys[n]) + d);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh one = (__m512bh)_mm512_loadu_si512(q + r * q_stride + d);
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) x[4 * r + n] = _mm512_dpbf16_ps(x[4 * r + n], one, k[n]);
    }
  }
  put_sums<ROWS>(x, out, stride);
}
#endif

#elif defined(ISA_AVX2)

constexpr int W = 8;
using Vec = __m256;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec set1(float x) { return _mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec round(Vec a) { return _mm256_round_ps(a, 8); }
inline __m128 halves(Vec a) {
  return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
}
inline float sum_of(Vec a) {
  const __m128 four = halves(a), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float max_of(Vec a) {
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline void store(float* to, Vec a) { _mm256_storeu_ps(to, a); }
inline Vec times_power_of_two(Vec a, Vec n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
}

inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
inline Vec load(const BF16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec load(const F16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Vec load(const I8* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

template <int ROWS, class T>
inline void dots(const float* q, int q_stride, const char* const (&keys)[4], int dim, float* out,
                 int stride) {
  // Two rows at a time: there are 16 registers.
  constexpr int PAIR = ROWS > 1 ? 2 : 1;
  for (int first = 0; first < ROWS; first += PAIR) {
    Vec x[PAIR][4];
    for (int r = 0; r < PAIR; ++r)
      for (int n = 0; n < 4; ++n) x[r][n] = zero();
    for (int d = 0; d < dim; d += W) {
      Vec k[4];
      for (int n = 0; n < 4; ++n) k[n] = load(reinterpret_cast<const T*>(keys[n]) + d);
      for (int r = 0; r < PAIR && first + r < ROWS; ++r) {
        const Vec one = load(q + (first + r) * q_stride + d);
        for (int n = 0; n < 4; ++n) x[r][n] = fma(one, k[n], x[r][n]);
      }
    }
    for (int r = 0; r < PAIR && first + r < ROWS; ++r) {
      const Vec ab = _mm256_hadd_ps(x[r][0], x[r][1]), cd = _mm256_hadd_ps(x[r][2], x[r][3]);
      _mm_storeu_ps(out + (first + r) * stride, halves(_mm256_hadd_ps(ab, cd)));
    }
  }
}

#else

constexpr int W = 1;
using Vec = float;

inline Vec zero() { return 0.0f; }
inline Vec set1(float x) { return x; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec round(Vec a) { return std::nearbyint(a); }
inline float sum_of(Vec a) { return a; }
inline float max_of(Vec a) { return a; }
inline void store(float* to, Vec a) { *to = a; }
inline Vec times_power_of_two(Vec a, Vec n) { return std::ldexp(a, static_cast<int>(n)); }

template <class T>
inline Vec load(const T* from) { return as_float(*from); }

template <int ROWS, class T>
inline void dots(const float* q, int q_stride, const char* const (&keys)[4], int dim, float* out,
                 int stride) {
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < 4; ++n) {
      const T* key = reinterpret_cast<const T*>(keys[n]);
      float sum = 0.0f;
      for (int d = 0; d < dim; ++d) sum += q[r * q_stride + d] * as_float(key[d]);
      out[r * stride + n] = sum;
    }
}

#endif

// exp of numbers that are not positive, to two units in the last place; 0 below -87.
inline Vec exp_of(Vec x) {
  const Vec kept = max(x, set1(-87.0f));
  const Vec n = round(mul(kept, set1(1.44269504088896341f)));
  Vec r = fma(n, set1(-0.693359375f), kept);
  r = fma(n, set1(2.12194440e-4f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), set1(1.0f));
  return times_power_of_two(p, n);
}
