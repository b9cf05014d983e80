// Products of few tokens with weights of four bits, for Hopper: codes pass from memory to matrix
// units in registers.
//
// The weight [N, K] lies as `graphopt.runtime.packed_codes.pack_codes` puts it, uint8
// [K / 128, N, 64]: a lane of a warp has, of each row, 16 bytes that hold all it gives to eight
// products. A block of threads has 16 ROW_TILES rows of the weight, whose spans of 128 inputs its
// WARPS take in turns, each with AHEAD of them on their way in registers; sums of the warps are
// added at the end, in one order. Which is why nothing waits for another block.
//
// Of a gated pair of weights, one behind the other, a block has 8 ROW_TILES rows of each, which lie
// above each other in its tiles: it writes act(first) second.
//
// With NORM every block takes the norm of x for itself while its first codes are on their way, and
// keeps it in shared memory: all of x is little, and a kernel for it would be waited for.
//
// Constants, given in front of this text: BF16, CODES (x is int8), ZEROS, NORM (of x), SUM (of
// x + y, which is written), GATED, WARPS, ROW_TILES, AHEAD, TOKEN_TILES (of 8 tokens), GROUP (inputs that share a scale, 32 or 64; 128 for any number
// of whole spans; 0 for all of a row), and with GATED those of activations.cu.

typedef unsigned int word;
typedef unsigned short half_bits;

extern __shared__ __align__(16) unsigned char shared[];

// What a code's bits stand for behind those of 128 (of 1024 in fp16), its sign turned: 136 (1032)
// too much. A zero point makes it more; all of these are integers that 16 bits hold.
constexpr float TOO_MUCH = BF16 ? 136.0f : 1032.0f;

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

// codes ------------------------------------------------------------------------------------------

constexpr int SPAN = 128, HALF = 64;
constexpr int ROWS = 16 * ROW_TILES, TOKENS = 8 * TOKEN_TILES;
constexpr int PARTS = GROUP == 0 || GROUP > HALF ? 1 : SPAN / GROUP;  // groups of a span
constexpr bool KEPT = GROUP != 0;  // scales are those of some inputs
constexpr int PARTS_BYTES = (4 * WARPS * ROWS * (TOKENS + 1) + 15) / 16 * 16;

// Four bytes of a row: low bits are of four neighbours in the first half of a span, high bits of
// those as far into the second.
struct Codes {
  word low[2], high[2];
  __device__ __forceinline__ Codes(word bytes, word less_low, word less_high) {
    word first = spread(bytes, false), second = spread(bytes, true);
    low[0] = two_codes(first, less_low);
    low[1] = two_codes(second, less_low);
    high[0] = two_codes(first >> 4, less_high);
    high[1] = two_codes(second >> 4, less_high);
  }
};

__device__ __forceinline__ void add_product(float (&sums)[4], const word (&upper)[2],
                                            const word (&lower)[2], const word (&right)[2]) {
  multiply(sums, upper[0], lower[0], upper[1], lower[1], right[0], right[1]);
}

struct alignas(4) Four {
  signed char codes[4];
};

// Four neighbouring inputs of a token.
__device__ __forceinline__ void four_inputs(word (&values)[2], const void* x, long long at) {
#if CODES
  Four four = *reinterpret_cast<const Four*>(static_cast<const signed char*>(x) + at);
  values[0] = pair(four.codes[0], four.codes[1]);
  values[1] = pair(four.codes[2], four.codes[3]);
#else
  uint2 both = *reinterpret_cast<const uint2*>(static_cast<const half_bits*>(x) + at);
  values[0] = both.x;
  values[1] = both.y;
#endif
}

struct Operands {
  const void* x;            // [M, K], rows `x_stride` elements apart
  const float* x_scales;    // [M], or null
  const unsigned char* codes;
  const half_bits* scales;  // [K / group, N]
  const half_bits* zeros;   // [K / group, N]: what a number is too large by
  const half_bits* bias;    // [N], or null
  half_bits* out;           // [M, N], of a gated pair [M, N / 2]
  const half_bits* y;       // [M, K], what is added to x
  const half_bits* gain;    // [K], or null
  half_bits* sum;           // [M, K]
  int M, N, spans;
  int each;                 // spans that share scales
  long long x_stride, y_stride;
  float eps, offset;        // of the norm: x / root(mean of squares + eps) * (gain + offset)
};

#if NORM
// Puts the norms of all tokens [M, K] where `normed` is; `squares` has room for one number of each
// warp and token.
__device__ __forceinline__ void take_norms(const Operands& given, half_bits* normed,
                                           float* squares) {
  const int K = given.spans * SPAN, thread = threadIdx.x, warp = thread / 32;
  for (int token = 0; token < given.M; ++token) {
    const half_bits* x = static_cast<const half_bits*>(given.x) + token * given.x_stride;
    float square = 0.0f;
    for (int at = 8 * thread; at < K; at += 8 * 32 * WARPS) {
      uint4 values = *reinterpret_cast<const uint4*>(x + at);
      word* both = reinterpret_cast<word*>(&values);
#if SUM
      uint4 addends = *reinterpret_cast<const uint4*>(given.y + token * given.y_stride + at);
      const word* other = reinterpret_cast<const word*>(&addends);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        both[i] = pair(first_of(both[i]) + first_of(other[i]),
                       second_of(both[i]) + second_of(other[i]));
      if (blockIdx.x == 0)
        *reinterpret_cast<uint4*>(given.sum + (long long)token * K + at) = values;
#endif
#pragma unroll
      for (int i = 0; i < 4; ++i)
        square += first_of(both[i]) * first_of(both[i]) + second_of(both[i]) * second_of(both[i]);
      *reinterpret_cast<uint4*>(normed + token * K + at) = values;
    }
#pragma unroll
    for (int step = 16; step; step /= 2) square += of_lane_across(square, step);
    if (thread % 32 == 0) squares[token * WARPS + warp] = square;
  }
  __syncthreads();
  for (int token = 0; token < given.M; ++token) {
    float square = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) square += squares[token * WARPS + w];
    const float root = reciprocal_root(square / K + given.eps);
    // What a thread has put there itself.
    for (int at = 8 * thread; at < K; at += 8 * 32 * WARPS) {
      uint4 values = *reinterpret_cast<const uint4*>(normed + token * K + at), gains = values;
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
      *reinterpret_cast<uint4*>(normed + token * K + at) = values;
    }
  }
  __syncthreads();
}
#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS)
hopper_packed_few(const __grid_constant__ Operands given) {
  auto parts = reinterpret_cast<float(*)[ROWS][TOKENS + 1]>(shared);  // of each warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
  const int N = given.N, pairs = N / 2;
  const int first = blockIdx.x * (GATED ? ROWS / 2 : ROWS);  // of each of a pair
  let_start();

  uint4 bytes[AHEAD][ROW_TILES][2];
  // Of groups smaller than a span, a lane reads those of one and gets the others' from its row.
  half_bits scales[AHEAD][ROW_TILES][2], zeros[AHEAD][ROW_TILES][2];
  int rows[ROW_TILES][2];
  float total[ROW_TILES][TOKEN_TILES][4];
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) {
    // Rows behind the last are computed as the last, and not written.
    rows[r][0] = GATED ? min(first + 8 * r + group, pairs - 1) : min(first + 16 * r + group, N - 1);
    rows[r][1] = GATED ? rows[r][0] + pairs : min(first + 16 * r + group + 8, N - 1);
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[r][t][i] = 0.0f;
  }
  auto place_of = [&](int span, int row) {
    return (long long)(PARTS > 1 ? span * PARTS + part % PARTS : span / given.each) * N + row;
  };
  auto send_for = [&](int slot, int span) {
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int row = rows[r][h];
        bytes[slot][r][h] = sixteen_bytes(given.codes + ((long long)span * N + row) * HALF + 16 * part);
        if (KEPT) {
          scales[slot][r][h] = __ldg(given.scales + place_of(span, row));
          if (ZEROS) zeros[slot][r][h] = __ldg(given.zeros + place_of(span, row));
        } else if (ZEROS) {
          zeros[slot][r][h] = __ldg(given.zeros + row);
        }
      }
  };

  const int count = given.spans > warp ? (given.spans - warp + WARPS - 1) / WARPS : 0;
#pragma unroll
  for (int slot = 0; slot < AHEAD; ++slot)
    if (slot < count) send_for(slot, warp + slot * WARPS);
#if NORM
  // No cache holds a weight from one step to the next, and this one would be waited for behind x.
  constexpr int LINE = 64;  // 128 bytes
  if (given.gain)
    for (int at = LINE * threadIdx.x; at < given.spans * SPAN; at += LINE * 32 * WARPS)
      bring_near(given.gain + at);
#endif
  // What is in front may write x, and no weight.
  wait_for_front();
#if NORM
  half_bits* const inputs = reinterpret_cast<half_bits*>(shared + PARTS_BYTES);
  take_norms(given, inputs, reinterpret_cast<float*>(shared));
  const long long inputs_stride = given.spans * SPAN;
#else
  const void* const inputs = given.x;
  const long long inputs_stride = given.x_stride;
#endif

  for (int turn = 0; turn < count; turn += AHEAD) {
#pragma unroll
    for (int slot = 0; slot < AHEAD; ++slot) {
      if (turn + slot >= count) break;
      const int span = warp + (turn + slot) * WARPS;
      word x[TOKEN_TILES][2][4][2];
#pragma unroll
      for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            // Of tokens behind the last the columns of a product are not written.
            const int token = min(group + 8 * t, given.M - 1);
            four_inputs(x[t][h][k], inputs,
                        token * inputs_stride + span * SPAN + h * HALF + 16 * k + 4 * part);
          }
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        const word* above = reinterpret_cast<const word*>(&bytes[slot][r][0]);
        const word* below = reinterpret_cast<const word*>(&bytes[slot][r][1]);
        // Two sums, so that a product does not wait for the one before it.
        constexpr int TURNS = GROUP == 32 ? 2 : 1, BLOCKS = 4 / TURNS;
#pragma unroll
        for (int own = 0; own < TURNS; ++own) {
          float low[TOKEN_TILES][4], high[TOKEN_TILES][4];
#pragma unroll
          for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              low[t][i] = high[t][i] = 0.0f;
            }
          // Scales and zero points of the two rows, for low and for high bits.
          float scale[2][2];
          word less[2][2];
#pragma unroll
          for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              half_bits own_scale = scales[slot][r][h], own_zero = zeros[slot][r][h];
              if (PARTS > 1) {
                int from = (lane & ~3) | (own + side * PARTS / 2);
                own_scale = of_lane(own_scale, from);
                if (ZEROS) own_zero = of_lane(own_zero, from);
              }
              if (KEPT) scale[h][side] = widened(own_scale);
              float over = -TOO_MUCH - (ZEROS ? widened(own_zero) : 0.0f);
              less[h][side] = pair(over, over);
            }
#pragma unroll
          for (int block = 0; block < BLOCKS; ++block) {
            const int k = own * BLOCKS + block;
            Codes upper(above[k], less[0][0], less[0][1]), lower(below[k], less[1][0], less[1][1]);
#pragma unroll
            for (int t = 0; t < TOKEN_TILES; ++t) {
              add_product(low[t], upper.low, lower.low, x[t][0][k]);
              add_product(high[t], upper.high, lower.high, x[t][1][k]);
            }
          }
#pragma unroll
          for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              if (!KEPT)
                total[r][t][i] += low[t][i] + high[t][i];
              else if (PARTS == 1)
                total[r][t][i] += (low[t][i] + high[t][i]) * scale[i / 2][0];
              else
                total[r][t][i] += low[t][i] * scale[i / 2][0] + high[t][i] * scale[i / 2][1];
            }
        }
      }
      if (turn + slot + AHEAD < count) send_for(slot, span + AHEAD * WARPS);
    }
  }

#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int t = 0; t < TOKEN_TILES; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        parts[warp][16 * r + group + i / 2 * 8][8 * t + 2 * part + i % 2] = total[r][t][i];
  __syncthreads();
  auto finished = [&](int row, int token, int n) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[w][row][token];
    if (!KEPT) sum *= widened(given.scales[n]);
    if (given.x_scales) sum *= given.x_scales[token];
    if (given.bias) sum += widened(given.bias[n]);
    return sum;
  };
#if GATED
  for (int i = threadIdx.x; i < ROWS / 2 * given.M; i += 32 * WARPS) {
    int token = i / (ROWS / 2), place = i % (ROWS / 2), n = first + place;
    if (n >= pairs) continue;
    int row = place / 8 * 16 + place % 8;
    float made = activation(finished(row, token, n)) * finished(row + 8, token, n + pairs);
    given.out[(long long)token * pairs + n] = static_cast<half_bits>(pair(made, 0.0f));
  }
#else
  for (int i = threadIdx.x; i < ROWS * given.M; i += 32 * WARPS) {
    int token = i / ROWS, row = i % ROWS, n = first + row;
    if (n >= N) continue;
    given.out[(long long)token * N + n] = static_cast<half_bits>(pair(finished(row, token, n), 0.0f));
  }
#endif
}
