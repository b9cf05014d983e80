// What stands in front of a product of few tokens, for the kernel in whose front this stands: a norm
// or a gate, and a Kronecker transform. Each block of threads does it for itself, and keeps what
// comes out in shared memory: all of a token is little, and a kernel for it would be waited for.
//
// Constants: BF16, WARPS; NORM (of x), SUM (of x + y, which is written), GATE (act(x) y: ACTIVATION,
// of activations.cu, says which); N1, N2 (a token is transformed as a matrix [N1, N2], N2 a multiple
// of 8; 0: it is not), LEFT, RIGHT (which factors there are).
//
// What is rounded to 16 bits, as by a kernel of its own: x + y; the norm, or the gate; what the
// right factor gives; what the left one gives. All between is fp32.

typedef unsigned int word;
typedef unsigned short half_bits;

extern __shared__ __align__(16) unsigned char shared[];

// machine instructions ---------------------------------------------------------------------------

__device__ __forceinline__ float widened(half_bits bits) {
#if BF16
  return __uint_as_float((word)bits << 16);
#else
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
#endif
}

__device__ __forceinline__ word pair(float low, float high) {
  word both;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}

__device__ __forceinline__ float first_of(word both) {
  return widened(static_cast<half_bits>(both & 0xffff));
}
__device__ __forceinline__ float second_of(word both) {
  return widened(static_cast<half_bits>(both >> 16));
}

// The codes in the low four bits of both halves of a word, as two numbers, `less` added.
__device__ __forceinline__ word two_codes(word bits, word less) {
  word values;
#if BF16
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43084308, 0x6a;" : "=r"(values) : "r"(bits));
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(values) : "r"(0x3f803f80u), "r"(less));
#else
  asm("lop3.b32 %0, %1, 0x000f000f, 0x64086408, 0x6a;" : "=r"(values) : "r"(bits));
  asm("add.rn.f16x2 %0, %0, %1;" : "+r"(values) : "r"(less));
#endif
  return values;
}

// Bytes 0 and 1 of a word, or 2 and 3, each in the low half of 16 bits.
__device__ __forceinline__ word spread(word bytes, bool second) {
  return __byte_perm(bytes, 0, second ? 0x4342 : 0x4140);
}

// sums [16, 8] += left [16, 16] right [16, 8].
__device__ __forceinline__ void multiply(float (&sums)[4], word left_0, word left_1, word left_2,
                                         word left_3, word right_0, word right_1) {
#if BF16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#else
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#endif
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
               : "r"(left_0), "r"(left_1), "r"(left_2), "r"(left_3), "r"(right_0), "r"(right_1));
}

// Read once: not kept in the first cache.
__device__ __forceinline__ uint4 sixteen_bytes(const unsigned char* at) {
  uint4 bytes;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bytes.x), "=r"(bytes.y), "=r"(bytes.z), "=r"(bytes.w) : "l"(at));
  return bytes;
}

// Its line comes into the second cache.
__device__ __forceinline__ void bring_near(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

__device__ __forceinline__ float of_lane_across(float value, int distance) {
  return __shfl_xor_sync(~0u, value, distance);
}

__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }

__device__ __forceinline__ half_bits of_lane(half_bits value, int lane) {
  return __shfl_sync(~0u, value, lane);
}

// The next kernel may start; and what was in front has ended.
__device__ __forceinline__ void let_start() {
  asm volatile("griddepcontrol.launch_dependents;");
}
__device__ __forceinline__ void wait_for_front() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Four matrices of 8 x 8, of which each lane says where a row lies, and has of every row two
// neighbours: of row lane / 4 those at 2 (lane % 4).
__device__ __forceinline__ void load_matrices(word (&values)[4], const half_bits* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(shared_address(row)) : "memory");
}
// The same of their transposes, and back.
__device__ __forceinline__ void load_turned(word (&values)[4], const half_bits* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(values[0]), "=r"(values[1]), "=r"(values[2]), "=r"(values[3])
               : "r"(shared_address(row)) : "memory");
}
__device__ __forceinline__ void store_turned(half_bits* row, const word (&values)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(row)),
               "r"(values[0]), "r"(values[1]), "r"(values[2]), "r"(values[3])
               : "memory");
}

// Copies a piece of 4, 8 or 16 bytes to shared memory while a thread goes on.
template <int BYTES>
__device__ __forceinline__ void send_piece(half_bits* target, const half_bits* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(target)),
               "l"(source), "n"(BYTES)
               : "memory");
}
__device__ __forceinline__ void wait_for_pieces() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// tokens -----------------------------------------------------------------------------------------

constexpr int SPAN = 128, HALF = 64;
// Of what is transformed 16 bytes lie between 64 features and the next, so that rows of it, which
// are written eight at a time, begin in different banks.
constexpr int SKEW = N1 > 0 ? 8 : 0;

struct Operands {
  const void* x;            // [M, K], rows `x_stride` elements apart
  const float* x_scales;    // [M], or null
  const unsigned char* codes;
  const half_bits* scales;  // [K / group, N]
  const half_bits* zeros;   // [K / group, N]: what a number is too large by
  const half_bits* bias;    // [N], or null
  half_bits* out;           // [M, N], of a gated pair [M, N / 2]
  const half_bits* y;       // [M, K], what is added to x, or multiplied with act(x)
  const half_bits* gain;    // [K], or null
  half_bits* sum;           // [M, K]
  int M, N, spans;
  int each;                 // spans that share scales
  long long x_stride, y_stride;
  float eps, offset;        // of the norm: x / root(mean of squares + eps) * (gain + offset)
  const half_bits* left;    // [N1, N1], or null
  const half_bits* right;   // [N2, N2], or null
};

#if N1
constexpr int up_to_16(int size) { return (size + 15) / 16 * 16; }
// Sizes as matrix units multiply them; and rows of both factors and of tokens, with 16 bytes behind
// them, so that eight rows of a column begin in different banks.
constexpr int ROWS_1 = up_to_16(N1), ROWS_2 = up_to_16(N2);
constexpr int PITCH_1 = ROWS_1 + 8, PITCH_2 = ROWS_2 + 8;
constexpr int LEFT_SIZE = LEFT ? ROWS_1 * PITCH_1 : 0, RIGHT_SIZE = RIGHT ? ROWS_2 * PITCH_2 : 0;
constexpr int TOKEN_SIZE = ROWS_1 * PITCH_2;
#endif

// Where eight features of a token lie before it is transformed, if it is.
__device__ __forceinline__ uint4* eight_of(half_bits* tokens, int token, int at, int K) {
#if N1
  half_bits* const found = tokens + token * TOKEN_SIZE + at / N2 * PITCH_2 + at % N2;
#else
  half_bits* const found = tokens + token * K + at;
#endif
  return reinterpret_cast<uint4*>(found);
}

#if NORM || N1
// Puts what is to be transformed, or multiplied, of all tokens where `held` is; `squares` has room
// for one number of each warp and token.
__device__ __forceinline__ void take_tokens(const Operands& given, half_bits* held,
                                            float* squares) {
  const int K = given.spans * SPAN, thread = threadIdx.x, warp = thread / 32;
  for (int token = 0; token < given.M; ++token) {
    const half_bits* x = static_cast<const half_bits*>(given.x) + token * given.x_stride;
    float square = 0.0f;
    for (int at = 8 * thread; at < K; at += 8 * 32 * WARPS) {
      uint4 values = *reinterpret_cast<const uint4*>(x + at);
      word* both = reinterpret_cast<word*>(&values);
#if SUM || GATE
      uint4 others = *reinterpret_cast<const uint4*>(given.y + token * given.y_stride + at);
      const word* other = reinterpret_cast<const word*>(&others);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#if GATE
        both[i] = pair(activation(first_of(both[i])) * first_of(other[i]),
                       activation(second_of(both[i])) * second_of(other[i]));
#else
        both[i] = pair(first_of(both[i]) + first_of(other[i]),
                       second_of(both[i]) + second_of(other[i]));
      if (blockIdx.x == 0)
        *reinterpret_cast<uint4*>(given.sum + (long long)token * K + at) = values;
#endif
#endif
#if NORM
#pragma unroll
      for (int i = 0; i < 4; ++i)
        square += first_of(both[i]) * first_of(both[i]) + second_of(both[i]) * second_of(both[i]);
#endif
      *eight_of(held, token, at, K) = values;
    }
#if NORM
#pragma unroll
    for (int step = 16; step; step /= 2) square += of_lane_across(square, step);
    if (thread % 32 == 0) squares[token * WARPS + warp] = square;
#endif
  }
  __syncthreads();
#if NORM
  for (int token = 0; token < given.M; ++token) {
    float square = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) square += squares[token * WARPS + w];
    const float root = reciprocal_root(square / K + given.eps);
    // What a thread has put there itself.
    for (int at = 8 * thread; at < K; at += 8 * 32 * WARPS) {
      uint4 values = *eight_of(held, token, at, K), gains = values;
      word* both = reinterpret_cast<word*>(&values);
      const word* gain = reinterpret_cast<const word*>(&gains);
      if (given.gain) gains = *reinterpret_cast<const uint4*>(given.gain + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float first = first_of(both[i]) * root, second = second_of(both[i]) * root;
        if (given.gain) {
          first *= first_of(gain[i]) + given.offset;
          second *= second_of(gain[i]) + given.offset;
        }
        both[i] = pair(first, second);
      }
      *eight_of(held, token, at, K) = values;
    }
  }
  __syncthreads();
#endif
}
#endif

// a Kronecker transform --------------------------------------------------------------------------

#if N1
__device__ __forceinline__ void fill_with_zeros(half_bits* at, int count) {
  for (int i = 2 * threadIdx.x; i < count; i += 2 * 32 * WARPS)
    *reinterpret_cast<word*>(at + i) = 0;
}

// Sends for a factor [SIZE, SIZE], rows PITCH apart; with zeros in the rows that a product reads
// behind its last. Columns behind the last are read too: what they give is not kept.
template <int SIZE, int ROWS, int PITCH>
__device__ __forceinline__ void send_for_factor(half_bits* target, const half_bits* source) {
  constexpr int BYTES = SIZE % 8 == 0 ? 16 : SIZE % 4 == 0 ? 8 : 4, EACH = 2 * SIZE / BYTES;
  for (int piece = threadIdx.x; piece < SIZE * EACH; piece += 32 * WARPS)
    send_piece<BYTES>(target + piece / EACH * PITCH + piece % EACH * (BYTES / 2),
                      source + piece * (BYTES / 2));
  fill_with_zeros(target + SIZE * PITCH, (ROWS - SIZE) * PITCH);
}

// Both factors, and zeros where a product reads behind the rows and columns of tokens.
__device__ __forceinline__ void prepare_transform(const Operands& given, half_bits* factors,
                                                  half_bits* tokens) {
  if (LEFT) send_for_factor<N1, ROWS_1, PITCH_1>(factors, given.left);
  if (RIGHT) send_for_factor<N2, ROWS_2, PITCH_2>(factors + LEFT_SIZE, given.right);
  for (int token = 0; token < given.M; ++token) {
    half_bits* const x = tokens + token * TOKEN_SIZE;
    fill_with_zeros(x + N1 * PITCH_2, (ROWS_1 - N1) * PITCH_2);
    constexpr int WORDS = (ROWS_2 - N2) / 2;  // behind a row
    for (int i = threadIdx.x; i < N1 * WORDS; i += 32 * WARPS)
      *reinterpret_cast<word*>(x + i / max(WORDS, 1) * PITCH_2 + N2 + 2 * (i % max(WORDS, 1))) = 0;
  }
}

// left^T x right of all tokens, turned: a warp has 16 columns of x right, which become, as its
// products leave them in registers, the left side of the product by the left factor.
__device__ __forceinline__ void transform(const Operands& given, const half_bits* factors,
                                          const half_bits* tokens, half_bits* out) {
  const half_bits *const left = factors, *const right = factors + LEFT_SIZE;
  const int lane = threadIdx.x % 32, K = given.spans * SPAN;
  constexpr int STRIPS = ROWS_2 / 16, STEPS = ROWS_1 / 16;
  constexpr int AT_ONCE = 2;  // squares whose products need not wait for each other
  // This lane's row of four matrices that are the quarters of a square, and where it begins: of
  // quarters that follow each other across, and down.
  const int row_across = lane % 8 + lane / 16 * 8, begin_across = lane / 8 % 2 * 8;
  const int row_down = lane % 8 + lane / 8 % 2 * 8, begin_down = lane / 16 * 8;
  for (int item = threadIdx.x / 32; item < given.M * STRIPS; item += WARPS) {
    const int token = item / STRIPS, first = item % STRIPS * 16;
    const half_bits* const x = tokens + token * TOKEN_SIZE;
    half_bits* const target = out + token * (K + K / HALF * SKEW);
    // Writes [16 columns, 16 TILES rows from `row` on] of the result.
    auto put = [&](int row, const float (&sums)[2][4]) {
      const word values[4] = {pair(sums[0][0], sums[0][1]), pair(sums[0][2], sums[0][3]),
                              pair(sums[1][0], sums[1][1]), pair(sums[1][2], sums[1][3])};
      const int i = row + row_across, j = first + begin_across, at = i * N2 + j;
      // Rows and columns behind the last go where nothing is read.
      const bool there = i < N1 && j < N2;
      store_turned(there ? target + at + at / HALF * SKEW : reinterpret_cast<half_bits*>(shared),
                   values);
    };
    word between[STEPS][4];
#pragma unroll
    for (int step = 0; step < STEPS; step += AT_ONCE) {
      const int tiles = min(AT_ONCE, STEPS - step);
#if RIGHT
      float sums[AT_ONCE][2][4] = {};
#pragma unroll
      for (int k = 0; k < STRIPS; ++k) {
        word a[4];
        load_turned(a, right + (16 * k + row_across) * PITCH_2 + first + begin_across);
#pragma unroll
        for (int t = 0; t < AT_ONCE; ++t) {
          if (t >= tiles) break;
          word b[4];
          load_matrices(b, x + (16 * (step + t) + row_across) * PITCH_2 + 16 * k + begin_across);
          multiply(sums[t][0], a[0], a[1], a[2], a[3], b[0], b[1]);
          multiply(sums[t][1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
      }
#pragma unroll
      for (int t = 0; t < AT_ONCE; ++t) {
        if (t >= tiles) break;
#if LEFT
        word(&made)[4] = between[step + t];
        made[0] = pair(sums[t][0][0], sums[t][0][1]);
        made[1] = pair(sums[t][0][2], sums[t][0][3]);
        made[2] = pair(sums[t][1][0], sums[t][1][1]);
        made[3] = pair(sums[t][1][2], sums[t][1][3]);
#else
        put(16 * (step + t), sums[t]);
#endif
      }
#else
#pragma unroll
      for (int t = 0; t < AT_ONCE; ++t)
        if (t < tiles)
          load_turned(between[step + t], x + (16 * (step + t) + row_across) * PITCH_2 + first + begin_across);
#endif
    }
#if LEFT
#pragma unroll
    for (int step = 0; step < STEPS; step += AT_ONCE) {
      const int tiles = min(AT_ONCE, STEPS - step);
      float sums[AT_ONCE][2][4] = {};
#pragma unroll
      for (int k = 0; k < STEPS; ++k)
#pragma unroll
        for (int t = 0; t < AT_ONCE; ++t) {
          if (t >= tiles) break;
          word b[4];
          load_turned(b, left + (16 * k + row_down) * PITCH_1 + 16 * (step + t) + begin_down);
          multiply(sums[t][0], between[k][0], between[k][1], between[k][2], between[k][3], b[0], b[1]);
          multiply(sums[t][1], between[k][0], between[k][1], between[k][2], between[k][3], b[2], b[3]);
        }
#pragma unroll
      for (int t = 0; t < AT_ONCE; ++t)
        if (t < tiles) put(16 * (step + t), sums[t]);
    }
#endif
  }
  __syncthreads();
}
#endif
