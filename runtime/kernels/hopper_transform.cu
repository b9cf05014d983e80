// Kronecker transforms of many tokens in bf16, for Hopper, with what stands in front of them and
// behind: a norm or a gate, and rounding to codes.
//
// A token [N1, N2] lies in shared memory as rows, where wgmma reads it. right^T x^T leaves the
// matrix units as they take the left side of (x right)^T left: what is between the products stays
// in registers. A warpgroup has 64 columns of a token and all N1 rows of them. A block stays on its
// core and goes from token to token, the next ones on their way meanwhile. A norm's root is one
// number of a token, and passes through both products and the rounding: it is in the scale, or
// times what is written.
//
// Constants, given in front of this text: N1, N2 (a multiple of 8), FRONT (0 none, 1 norm, 2 gate),
// SUM (norm of x + y, which is written), OFFSET (of the gain, 0 or 1), BITS (0: values), PAIRS (two
// codes a byte), CLIPPED, OVER (results are put together where the products read a token, which
// has no rows and columns to fill up), BLOCKS (of a core), STAGES, those of activations.cu, and the
// function wgmma_product.

constexpr int WARPS = (N2 + 63) / 64 * 4, THREADS = 32 * WARPS;
constexpr int STEPS = (N2 + 15) / 16;          // of the first product, 16 columns each
constexpr int ROWS = (N1 + 7) / 8 * 8;
constexpr int LEFT_STEPS = (ROWS + 15) / 16;   // of the second
constexpr int WIDTH = N1 * N2;
constexpr int TENSORS = FRONT == 2 || SUM ? 2 : 1;
// What wgmma reads lies in panels of 64 columns: 128 bytes a row, swizzled in groups of 8 rows.
constexpr int PANEL_BYTES = 128 * ROWS;
constexpr int PANELS = (STEPS + 3) / 4, LEFT_PANELS = (LEFT_STEPS + 3) / 4;
constexpr int OUT_BYTES = BITS == 0 ? 2 * N2 : PAIRS ? N2 / 2 : N2;  // of a row
// Rows begin in different banks.
constexpr int STAGED_STRIDE = ((BITS == 0 ? 2 * N2 : N2) + 15) / 16 * 16 + 16;
constexpr int STAGE_BYTES = TENSORS * WIDTH * 2;
constexpr int LEFT_AT = PANELS * PANEL_BYTES;
constexpr int RAW_AT = LEFT_AT + LEFT_PANELS * PANEL_BYTES;
constexpr int GAIN_AT = RAW_AT + STAGES * STAGE_BYTES;
constexpr int BEHIND_GAIN = GAIN_AT + (FRONT == 1 ? WIDTH * 2 : 0);
constexpr int OUT_AT = OVER ? 0 : BEHIND_GAIN;
// And behind it three numbers of each warp.
constexpr int WARPS_AT = BEHIND_GAIN + (OVER ? 0 : N1 * STAGED_STRIDE);
static_assert(!OVER || (N1 % 8 == 0 && N2 % 64 == 0 && N1 * STAGED_STRIDE <= LEFT_AT), "OVER");
// 1.5 * 2^23: a number of fp32 as large as this has no bits behind the point, so that a sum with
// it is rounded to the nearest integer, ties to even; its low bits are the integer.
constexpr float TO_INTEGER = 12582912.0f;
constexpr float LARGEST = 3.4028234663852886e38f;

typedef unsigned int word;
typedef unsigned short half_bits;

// As swizzles ask for.
extern __shared__ __align__(1024) unsigned char shared[];

// machine instructions ---------------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ float first_of(word both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float second_of(word both) {
  return __uint_as_float(both & 0xffff0000u);
}

__device__ __forceinline__ word pair(float first, float second) {
  word both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

__device__ __forceinline__ word product(word x, word y) {
  word both;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(x), "r"(y), "r"(0x80008000u));
  return both;
}

// What was written to shared memory is there for the matrix units.
__device__ __forceinline__ void let_products_see() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// sums [64, ROWS] = left [64, 16] right^T, or added to them; `right` [ROWS, 16] lies in a panel.
__device__ __forceinline__ void add_product(float (&sums)[ROWS / 2], const word (&left)[4],
                                            unsigned right, bool add) {
  // PTX ISA, matrix descriptor format: swizzled by 128 bytes, groups of 8 rows of 1024 bytes.
  unsigned long long descriptor =
      1ull << 62 | 64ull << 32 | 1ull << 16 | (right & 0x3FFFF) >> 4;
  wgmma_product(sums, left, descriptor, add);
}

__device__ __forceinline__ void send_for(unsigned target, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ float of_lane_across(float value, int distance) {
  return __shfl_xor_sync(~0u, value, distance);
}

// What was in front has ended.
__device__ __forceinline__ void wait_for_front() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// The low four bits of eight bytes, two in a byte.
__device__ __forceinline__ word low_halves(word first, word second) {
  first = (first & 0x000f000f) | (first >> 4 & 0x00f000f0);
  second = (second & 0x000f000f) | (second >> 4 & 0x00f000f0);
  return __byte_perm(first, second, 0x6420);
}

__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }

// Written once, and not read here again.
__device__ __forceinline__ void write_through(uint4* at, uint4 value) { __stcs(at, value); }

// the kernel -------------------------------------------------------------------------------------

struct Operands {
  const half_bits* x;      // [tokens, N1 N2], rows x_stride apart
  const half_bits* y;      // the same: what is added, or multiplied with the activation
  const half_bits* gain;   // [N1 N2], or null
  const half_bits* left;   // [N1, N1]
  const half_bits* right;  // [N2, N2]
  const half_bits* clip_low;   // one number each, or null: 1
  const half_bits* clip_high;
  half_bits* sum;          // [tokens, N1 N2]
  unsigned char* out;
  float* scales;           // [tokens]
  int tokens;
  float eps;
  long long x_stride, y_stride;
};

// Where a piece of 16 bytes, the eight elements of a row from column 8 piece on, lies in panels.
__device__ __forceinline__ int place_of(int row, int piece) {
  return piece / 8 * PANEL_BYTES + 128 * row + 16 * ((piece ^ row) & 7);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
hopper_transform(const __grid_constant__ Operands given) {
  unsigned char* const memory = shared;
  const unsigned base = shared_address(memory);
  float* const highs = reinterpret_cast<float*>(memory + WARPS_AT);  // of each warp
  float* const lows = highs + WARPS;
  float* const squares = lows + WARPS;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int group = lane / 4, part = lane % 4;
  constexpr int PIECES = WIDTH / 8, EACH = (PIECES + THREADS - 1) / THREADS;

  // Rows and columns that fill panels up stay zero.
  for (int i = thread; i < RAW_AT / 16; i += THREADS)
    reinterpret_cast<uint4*>(memory)[i] = make_uint4(0, 0, 0, 0);
#if FRONT == 1
  for (int i = thread; i < PIECES; i += THREADS)
    reinterpret_cast<uint4*>(memory + GAIN_AT)[i] =
        given.gain ? reinterpret_cast<const uint4*>(given.gain)[i]
                   : make_uint4(0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u);
#endif
  auto right_at = [&](int row, int column) -> word {
    return row < N2 && column < N2 ? given.right[row * N2 + column] : 0;
  };
  word right[STEPS][4];
#pragma unroll
  for (int k = 0; k < STEPS; ++k)
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      int j = 16 * warp + group + q % 2 * 8, i = 16 * k + 2 * part + q / 2 * 8;
      right[k][q] = right_at(i, j) | right_at(i + 1, j) << 16;
    }
  __syncthreads();
  for (int i = thread; i < N1 * N1; i += THREADS) {
    int k = i / N1, row = i % N1;
    *reinterpret_cast<half_bits*>(memory + LEFT_AT + place_of(row, k / 8) + 2 * (k % 8)) =
        given.left[i];
  }
  auto fetch = [&](long long token, int stage) {
    if (token < given.tokens) {
      const half_bits* x = given.x + token * given.x_stride;
      unsigned target = base + RAW_AT + stage * STAGE_BYTES;
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        int piece = thread + e * THREADS;
        if (PIECES % THREADS && piece >= PIECES) continue;
        send_for(target + 16 * piece, x + 8 * piece);
        if (TENSORS == 2)
          send_for(target + 2 * WIDTH + 16 * piece, given.y + token * given.y_stride + 8 * piece);
      }
    }
    commit_copies();
  };
  // It may have written x and y, and no factor.
  wait_for_front();
#pragma unroll
  for (int s = 0; s < STAGES; ++s) fetch(blockIdx.x + s * (long long)gridDim.x, s);
  int stage = 0;

  for (long long token = blockIdx.x; token < given.tokens; token += gridDim.x) {
    wait_for_copies<STAGES - 1>();
    const unsigned char* held = memory + RAW_AT + stage * STAGE_BYTES;
    float square = 0.0f;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      int piece = thread + e * THREADS;
      if (PIECES % THREADS && piece >= PIECES) continue;
      uint4 values = reinterpret_cast<const uint4*>(held)[piece], others = values;
      if (TENSORS == 2) others = reinterpret_cast<const uint4*>(held + 2 * WIDTH)[piece];
      word* x = reinterpret_cast<word*>(&values);
      const word* y = reinterpret_cast<const word*>(&others);
#if FRONT == 1
      if (SUM) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[i] = pair(first_of(x[i]) + first_of(y[i]), second_of(x[i]) + second_of(y[i]));
        reinterpret_cast<uint4*>(given.sum + token * WIDTH)[piece] = values;
      }
      uint4 gains = reinterpret_cast<const uint4*>(memory + GAIN_AT)[piece];
      const word* gain = reinterpret_cast<const word*>(&gains);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float first = first_of(x[i]), second = second_of(x[i]);
        square = fmaf(first, first, square);
        square = fmaf(second, second, square);
        x[i] = OFFSET ? pair(first * (first_of(gain[i]) + OFFSET),
                             second * (second_of(gain[i]) + OFFSET))
                      : product(x[i], gain[i]);
      }
#elif FRONT == 2
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = pair(activation(first_of(x[i])) * first_of(y[i]),
                    activation(second_of(x[i])) * second_of(y[i]));
#endif
      int row = piece / (N2 / 8), column = piece % (N2 / 8);
      *reinterpret_cast<uint4*>(memory + place_of(row, column)) = values;
    }
    let_products_see();
    __syncthreads();
    fetch(token + STAGES * (long long)gridDim.x, stage);
    if (++stage == STAGES) stage = 0;

    // sums[4 n + c] and z[4 n + c]: of column 16 warp + group, or 8 behind it for c of 2 and 3,
    // rows 8 n + 2 part and the next.
    float sums[ROWS / 2], z[ROWS / 2], high = 0.0f, low = 0.0f;
    word between[LEFT_STEPS][4];
    begin_products();
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
      add_product(sums, right[k], base + k / 4 * PANEL_BYTES + k % 4 * 32, k > 0);
    wait_for_products();
#pragma unroll
    for (int k = 0; k < LEFT_STEPS; ++k)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int at = 8 * k + q / 2 * 4 + q % 2 * 2;
        between[k][q] = at < ROWS / 2 ? pair(sums[at], sums[at + 1]) : 0;
      }
    begin_products();
#pragma unroll
    for (int k = 0; k < LEFT_STEPS; ++k)
      add_product(z, between[k], base + LEFT_AT + k / 4 * PANEL_BYTES + k % 4 * 32, k > 0);
    wait_for_products();
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) {
      high = fmaxf(high, CLIPPED ? z[i] : fabsf(z[i]));
      if (CLIPPED) low = fminf(low, z[i]);
    }
    // Of a whole token each value holds all of it: what is no number is in the first, or nowhere.
    const bool broken = !(fabsf(z[0]) <= LARGEST);
#pragma unroll
    for (int step = 16; step; step /= 2) {
      if (BITS) high = fmaxf(high, of_lane_across(high, step));
      if (BITS && CLIPPED) low = fminf(low, of_lane_across(low, step));
      if (FRONT == 1) square += of_lane_across(square, step);
    }
    if (lane == 0) {
      highs[warp] = broken ? __int_as_float(0x7fc00000) : high;
      lows[warp] = low;
      squares[warp] = square;
    }
    __syncthreads();
    float sum = 0.0f;
    bool number = true;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      number = number && highs[w] <= LARGEST;
      high = fmaxf(high, highs[w]);
      low = fminf(low, lows[w]);
      sum += squares[w];
    }
    float root = FRONT == 1 ? reciprocal_root(sum / WIDTH + given.eps) : 1.0f;
    unsigned char* staged = memory + OUT_AT;
#if BITS == 0
    float unit = root;
#else
    constexpr float MOST = (1 << (BITS - 1)) - 1;
    if (CLIPPED) {
      if (given.clip_high) high *= first_of(*given.clip_high);
      if (given.clip_low) low *= first_of(*given.clip_low);
      high = fmaxf(high, -low);
    }
    float scale = high / MOST;
    float unit = scale > 0.0f ? 1.0f / scale : 1.0f;
    // Of zeros, or of what becomes zero by a clip.
    scale = scale > 0.0f ? scale * root : 1.0f;
    if (thread == 0)
      given.scales[token] = number && scale <= LARGEST ? scale : __int_as_float(0x7fc00000);
#endif
#pragma unroll
    for (int i = 0; i < ROWS / 2; ++i) {
      int row = i / 4 * 8 + 2 * part + i % 2, column = 16 * warp + group + i / 2 % 2 * 8;
      if ((N1 % 8 && row >= N1) || (N2 % 64 && column >= N2)) continue;
      float value = z[i] * unit;
#if BITS == 0
      *reinterpret_cast<half_bits*>(staged + row * STAGED_STRIDE + 2 * column) =
          static_cast<half_bits>(pair(value, 0.0f));
#else
      if (CLIPPED) value = fminf(fmaxf(value, -MOST - 1.0f), MOST);
      staged[row * STAGED_STRIDE + column] =
          static_cast<unsigned char>(__float_as_uint(value + TO_INTEGER));
#endif
    }
    __syncthreads();
    // Pieces of 16 bytes, or of 8 or 4 where a row is no multiple of them.
    unsigned char* target = given.out + token * (N1 * OUT_BYTES);
    constexpr int PIECE = OUT_BYTES % 16 == 0 ? 16 : OUT_BYTES % 8 == 0 ? 8 : 4;
    constexpr int OF_ROW = OUT_BYTES / PIECE, ALL = N1 * OF_ROW;
#pragma unroll
    for (int e = 0; e < (ALL + THREADS - 1) / THREADS; ++e) {
      int piece = thread + e * THREADS;
      if (ALL % THREADS && piece >= ALL) continue;
      unsigned char* own = target + piece * PIECE;
#if PAIRS
      const word* source = reinterpret_cast<const word*>(
          staged + piece / OF_ROW * STAGED_STRIDE + 2 * (piece % OF_ROW * PIECE));
      word both[PIECE / 4];
#pragma unroll
      for (int i = 0; i < PIECE / 4; ++i) both[i] = low_halves(source[2 * i], source[2 * i + 1]);
      const word* values = both;
#else
      const word* values = reinterpret_cast<const word*>(
          staged + piece / OF_ROW * STAGED_STRIDE + piece % OF_ROW * PIECE);
#endif
      if (PIECE == 16)
        write_through(reinterpret_cast<uint4*>(own),
                      make_uint4(values[0], values[1], values[2], values[3]));
      if (PIECE == 8) *reinterpret_cast<uint2*>(own) = make_uint2(values[0], values[1]);
      if (PIECE == 4) *reinterpret_cast<word*>(own) = values[0];
    }
    // The next token goes where these were.
    if (OVER) __syncthreads();
  }
}
