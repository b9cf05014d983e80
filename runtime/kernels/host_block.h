// Attention of some query rows over a span of keys of one key head: included once for each
// instruction set, behind host_vectors.h.
//
// Rows are the query heads of a key head, times the tokens of a step: each key is read once for all
// of them. Keys are taken BLOCK at a time: scores, their maximum, exponentials, then values.

// Queries times a block of keys: scores [rows, BLOCK].
template <class T>
void block_scores(const Span& s, int first, int count, float* scores, char* scratch) {
  const int padded = padded_dim(s.dim);
  const bool whole = s.dim % W == 0;
  const char* rows[BLOCK + 4];
  for (int n = 0; n < count; ++n) rows[n] = s.k + static_cast<int64_t>(first + n) * s.k_row;
  if (!whole) {
    // A vector would reach into the row behind: keys are written out as floats, zeros behind them.
    float* wide = reinterpret_cast<float*>(scratch);
    for (int n = 0; n < count; ++n) {
      for (int d = 0; d < padded; ++d)
        wide[n * padded + d] = d < s.dim ? as_float(reinterpret_cast<const T*>(rows[n])[d]) : 0.0f;
      rows[n] = reinterpret_cast<const char*>(wide + n * padded);
    }
  }
  for (int n = count; n < count + 4; ++n) rows[n] = rows[count - 1];
  for (int n = 0; n < count; n += 4) {
    const char* const keys[4] = {rows[n], rows[n + 1], rows[n + 2], rows[n + 3]};
    // Values come while scores are computed, and the next block's keys while values are added.
    const char* values = s.v + static_cast<int64_t>(first + n) * s.v_row;
    for (int64_t byte = 0; byte < 4 * s.v_row; byte += 64) prefetch(values + byte);
    for (int r = 0; r < s.rows; r += 4) {
      const int left = s.rows - r;
      float* out = scores + r * BLOCK + n;
      const float* q = s.q + r * padded;
#if defined(ISA_AVX512_BF16)
      if (std::is_same<T, BF16>::value && s.q_pairs != nullptr) {
        const BF16* pairs = s.q_pairs + r * s.dim;
        if (left >= 4) dots_of_pairs<4>(pairs, s.dim, keys, s.dim, out, BLOCK);
        else if (left == 3) dots_of_pairs<3>(pairs, s.dim, keys, s.dim, out, BLOCK);
        else if (left == 2) dots_of_pairs<2>(pairs, s.dim, keys, s.dim, out, BLOCK);
        else dots_of_pairs<1>(pairs, s.dim, keys, s.dim, out, BLOCK);
        continue;
      }
#endif
      const int dim = whole ? s.dim : padded;
      if (whole) {
        if (left >= 4) dots<4, T>(q, padded, keys, dim, out, BLOCK);
        else if (left == 3) dots<3, T>(q, padded, keys, dim, out, BLOCK);
        else if (left == 2) dots<2, T>(q, padded, keys, dim, out, BLOCK);
        else dots<1, T>(q, padded, keys, dim, out, BLOCK);
      } else {
        if (left >= 4) dots<4, float>(q, padded, keys, dim, out, BLOCK);
        else if (left == 3) dots<3, float>(q, padded, keys, dim, out, BLOCK);
        else if (left == 2) dots<2, float>(q, padded, keys, dim, out, BLOCK);
        else dots<1, float>(q, padded, keys, dim, out, BLOCK);
      }
    }
  }
}

// Adds weights [rows, BLOCK] times values, for ROWS rows and COLUMNS vectors of features at once.
template <class T, int ROWS, int COLUMNS>
inline void add_values(const float* weights, const char* v, int64_t v_row, int count, float* acc,
                       int width, const float* alpha, const char* ahead, int64_t ahead_row) {
  Vec x[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c)
      x[r][c] = mul(load(acc + r * width + c * W), set1(alpha[r]));
  for (int n = 0; n < count; ++n) {
    const T* row = reinterpret_cast<const T*>(v + n * v_row);
    if (ahead != nullptr)
      for (size_t byte = 0; byte < COLUMNS * W * sizeof(T); byte += 64)
        prefetch(ahead + n * ahead_row + byte);
    Vec value[COLUMNS];
#pragma GCC unroll 4
    for (int c = 0; c < COLUMNS; ++c) value[c] = load(row + c * W);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const Vec weight = set1(weights[r * BLOCK + n]);
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) x[r][c] = fma(weight, value[c], x[r][c]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) store(acc + r * width + c * W, x[r][c]);
}

template <class T, int COLUMNS>
inline void add_values_of(int left, const float* weights, const char* v, int64_t v_row, int count,
                          float* acc, int width, const float* alpha, const char* ahead,
                          int64_t ahead_row) {
  constexpr int MOST = W == 8 ? 2 : 4;  // 16 registers hold two rows of four vectors
  for (int r = 0; r < left; r += MOST) {
    const int rows = std::min(MOST, left - r);
    const float* w = weights + r * BLOCK;
    float* out = acc + r * width;
    const char* next = r == 0 ? ahead : nullptr;
    const float* a = alpha + r;
    if (rows == 4) add_values<T, 4, COLUMNS>(w, v, v_row, count, out, width, a, next, ahead_row);
    else if (rows == 3) add_values<T, 3, COLUMNS>(w, v, v_row, count, out, width, a, next, ahead_row);
    else if (rows == 2) add_values<T, 2, COLUMNS>(w, v, v_row, count, out, width, a, next, ahead_row);
    else add_values<T, 1, COLUMNS>(w, v, v_row, count, out, width, a, next, ahead_row);
  }
}

// Weights [rows, BLOCK] times a block of values, onto acc [rows, padded width].
template <class T>
void block_values(const Span& s, int first, int count, const float* weights, const float* alpha,
                  float* acc, char* scratch) {
  const int padded = padded_dim(s.width);
  const char* v = s.v + static_cast<int64_t>(first) * s.v_row;
  if (s.width % W != 0) {
    float* wide = reinterpret_cast<float*>(scratch);
    for (int n = 0; n < count; ++n)
      for (int d = 0; d < padded; ++d)
        wide[n * padded + d] =
            d < s.width ? as_float(reinterpret_cast<const T*>(v + n * s.v_row)[d]) : 0.0f;
    for (int d = 0; d < padded; d += W)
      add_values_of<float, 1>(s.rows, weights, reinterpret_cast<const char*>(wide + d),
                              padded * static_cast<int64_t>(sizeof(float)), count, acc + d, padded,
                              alpha, nullptr, 0);
    return;
  }
  const char* ahead = s.k + static_cast<int64_t>(first + BLOCK) * s.k_row;
  int d = 0;
  for (; d + 4 * W <= s.width; d += 4 * W) {
    const int64_t at = d * sizeof(T);
    add_values_of<T, 4>(s.rows, weights, v + at, s.v_row, count, acc + d, padded, alpha,
                        ahead + at, s.k_row);
  }
  for (; d < s.width; d += W) {
    const int64_t at = d * sizeof(T);
    add_values_of<T, 1>(s.rows, weights, v + at, s.v_row, count, acc + d, padded, alpha,
                        ahead + at, s.k_row);
  }
}

// Attention over the keys `begin` to `end` of a span, onto its maxima, sums and accumulators.
template <class T>
void attend_span(const Span& s, int begin, int end, char* scratch) {
  constexpr bool CODES = std::is_same<T, I8>::value;
  const int padded_width = padded_dim(s.width);
  float* scores = reinterpret_cast<float*>(scratch);
  float* alpha = scores + s.rows * BLOCK;
  float* k_scale = alpha + s.rows;  // of codes: scales and zero points of keys and values
  float* k_zero = k_scale + BLOCK;
  float* v_scale = k_zero + BLOCK;
  float* v_zero = v_scale + BLOCK;
  char* rest = reinterpret_cast<char*>(v_zero + BLOCK);
  const float none = -std::numeric_limits<float>::infinity();
  for (int first = begin; first < end; first += BLOCK) {
    const int count = std::min(BLOCK, end - first);
    const char* v_rows = s.v + static_cast<int64_t>(first) * s.v_row;
    block_scores<T>(s, first, count, scores, rest);
    if (CODES)
      for (int n = 0; n < count; ++n) {
        const char* k = s.k + static_cast<int64_t>(first + n) * s.k_row + s.dim;
        const char* v = v_rows + n * s.v_row + s.width;
        std::memcpy(k_scale + n, k, 4), std::memcpy(k_zero + n, k + 4, 4);
        std::memcpy(v_scale + n, v, 4), std::memcpy(v_zero + n, v + 4, 4);
      }
    const int round_up = (count + W - 1) / W * W;
    bool any = false;
    for (int r = 0; r < s.rows; ++r) {
      float* row = scores + r * BLOCK;
      const int low = std::max(s.low[r] - s.start - first, 0);
      const int high = std::min(s.high[r] - s.start - first, count);
      for (int n = std::max(high, 0); n < round_up; ++n) row[n] = none;
      for (int n = 0; n < std::min(low, round_up); ++n) row[n] = none;
      alpha[r] = 1.0f;
      if (low >= high) {
        for (int n = 0; n < round_up; ++n) row[n] = 0.0f;
        continue;
      }
      any = true;
      if (CODES)
        for (int n = low; n < high; ++n)
          row[n] = (row[n] - k_zero[n] * s.q_sum[r]) * k_scale[n];
      Vec top = set1(none);
      for (int n = 0; n < round_up; n += W) {
        Vec x = mul(load(row + n), set1(s.scale));
        if (s.softcap > 0.0f) {
          // tanh by what exp gives of a number that is not positive.
          const Vec size = div(max(x, mul(x, set1(-1.0f))), set1(s.softcap));
          const Vec e = exp_of(max(mul(size, set1(-2.0f)), set1(-80.0f)));
          const Vec t = div(add(set1(1.0f), mul(e, set1(-1.0f))), add(set1(1.0f), e));
          float signs[W], given[W];
          store(given, x);
          for (int i = 0; i < W; ++i)
            signs[i] = given[i] == none ? none : (given[i] < 0.0f ? -s.softcap : s.softcap);
          x = mul(t, load(signs));
        }
        store(row + n, x);
        top = max(top, x);
      }
      const float before = s.top[r], now = std::max(before, max_of(top));
      s.top[r] = now;
      alpha[r] = before == none ? 0.0f : std::exp(before - now);
      Vec total = zero();
      for (int n = 0; n < round_up; n += W) {
        // What is masked is -inf, of which exp_of makes almost 0: it is made 0 below.
        Vec e = exp_of(add(load(row + n), set1(-now)));
        store(row + n, e);
        if (n < low || n + W > high)
          for (int i = 0; i < W; ++i)
            if (n + i < low || n + i >= high) row[n + i] = 0.0f;
        total = add(total, load(row + n));
      }
      s.total[r] = s.total[r] * alpha[r] + sum_of(total);
      if (CODES) {
        float correction = 0.0f;
        for (int n = low; n < high; ++n) {
          row[n] *= v_scale[n];
          correction += row[n] * v_zero[n];
        }
        s.correction[r] = s.correction[r] * alpha[r] + correction;
      }
    }
    if (any) block_values<T>(s, first, count, scores, alpha, s.acc, rest);
  }
  if (CODES)
    for (int r = 0; r < s.rows; ++r) {
      for (int d = 0; d < s.width; ++d) s.acc[r * padded_width + d] -= s.correction[r];
      s.correction[r] = 0.0f;
    }
}

inline void attend(int type, const Span& s, int begin, int end, char* scratch) {
  if (type == TYPE_F32) attend_span<float>(s, begin, end, scratch);
  else if (type == TYPE_BF16) attend_span<BF16>(s, begin, end, scratch);
  else if (type == TYPE_F16) attend_span<F16>(s, begin, end, scratch);
  else attend_span<I8>(s, begin, end, scratch);
}

// The sum of a span as 32-bit numbers: what reading memory takes, and nothing else.
inline uint64_t sum_words(const char* from, int64_t bytes) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(from);
  uint32_t sums[16] = {0};
  const int64_t count = bytes / 4;
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    for (int j = 0; j < 16; ++j) sums[j] += words[i + j];
  uint64_t sum = 0;
  for (int j = 0; j < 16; ++j) sum += sums[j];
  for (; i < count; ++i) sum += words[i];
  return sum;
}
