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
// What stands in front of the product is in packed_front.cu: a block does it for itself while its
// first codes are on their way.
//
// Constants, given in front of this text: CODES (x is int8), ZEROS, GATED, WARPS, ROW_TILES, AHEAD,
// NEAR (spans of a warp behind these that come into the second cache early), TOKEN_TILES (of 8 tokens), GROUP (inputs that share a scale, 32 or 64; 128 for any number of whole
// spans; 0 for all of a row), those of packed_front.cu, and with GATED or GATE those of
// activations.cu.

// codes ------------------------------------------------------------------------------------------

// What a code's bits stand for behind those of 128 (of 1024 in fp16), its sign turned: 136 (1032)
// too much. A zero point makes it more; all of these are integers that 16 bits hold.
constexpr float TOO_MUCH = BF16 ? 136.0f : 1032.0f;

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
#if NEAR
  // What follows them comes into the second cache meanwhile: memory would have nothing to do until
  // x is there, and while what stands in front of the product is computed.
  for (int turn = AHEAD; turn < min(AHEAD + NEAR, count); ++turn) {
    const int span = warp + turn * WARPS;
    constexpr int LINES = ROWS / 2, EACH = GATED ? LINES / 2 : LINES;  // two rows of 64 bytes
    for (int line = lane; line < LINES; line += 32) {
      const int row = first + 2 * (line % EACH);
      if (row < (GATED ? pairs : N))
        bring_near(given.codes + ((long long)span * N + row + line / EACH * pairs) * HALF);
    }
    if (KEPT && lane < PARTS * LINES / EACH) {
      const int scale = PARTS > 1 ? span * PARTS + lane % PARTS : span / given.each;
      const long long at = (long long)scale * N + first + lane / PARTS * pairs;
      bring_near(given.scales + at);
      if (ZEROS) bring_near(given.zeros + at);
    }
  }
#endif
#if NORM
  // No cache holds a weight from one step to the next, and this one would be waited for behind x.
  constexpr int LINE = 64;  // 128 bytes
  if (given.gain)
    for (int at = LINE * threadIdx.x; at < given.spans * SPAN; at += LINE * 32 * WARPS)
      bring_near(given.gain + at);
#endif
#if N1
  half_bits* const factors = reinterpret_cast<half_bits*>(shared + PARTS_BYTES);
  half_bits* const tokens = factors + LEFT_SIZE + RIGHT_SIZE;
  half_bits* const inputs = tokens + given.M * TOKEN_SIZE;
  prepare_transform(given, factors, tokens);
  wait_for_pieces();
#endif
  // What is in front may write x, and no weight.
  wait_for_front();
#if N1
  take_tokens(given, tokens, reinterpret_cast<float*>(shared));
  transform(given, factors, tokens, inputs);
  const long long inputs_stride = given.spans * (SPAN + 2 * SKEW);
#elif NORM
  half_bits* const inputs = reinterpret_cast<half_bits*>(shared + PARTS_BYTES);
  take_tokens(given, inputs, reinterpret_cast<float*>(shared));
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
                        token * inputs_stride + span * (SPAN + 2 * SKEW) + h * (HALF + SKEW) +
                            16 * k + 4 * part);
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
