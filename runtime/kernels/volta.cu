// Tiled attention for compute capability 7.0, on mma.sync.m8n8k4 (PTX ISA, "Matrix fragments for
// mma.m8n8k4"; arXiv 2410.16663, section on Volta).
//
// The semantics are those of prefill.py and decode.py beside this file. One source holds all
// forms; sizes and switches are macros, given when it is compiled:
//
//   DECODE                   0: attention_prefill; 1: attention_decode and attention_merge
//   HEAD_DIM, VALUE_DIM      multiples of 8
//   GROUP                    query heads a key head
//   BLOCK_M, BLOCK_N, WARPS  rows and keys of a tile, multiples of 16; prefill shares the rows
//                            out to its warps, decode the keys
//   CARRY                    pieces of 16 bytes of the next tile that a thread holds while it
//                            computes; what is left of the tile follows after them
//   P_PATH                   how weights become an operand: 0 by shuffles, 1 by shared memory
//   CAUSAL, TOP_LEFT, WINDOW, CHUNK, SOFTCAP, PADDING_MASK, ALIBI, SINKS, VARLEN, KV_LENS, LSE
//   BIAS                     0, or the bits of an element of the bias: 16 or 32
//   RING, PAGE               slots of the ring, tokens of a page, or 0
//
// Layout letters: B batch, S query tokens, T key tokens, H query heads, G key heads.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

// ---- machine instructions ------------------------------------------------------------------

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two halves in a register, `low` in the lower bits. This machine has no cvt.f16x2.
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 packed;
  asm("{ .reg .f16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b}; }"
      : "=r"(packed) : "f"(low), "f"(high));
  return packed;
}

__device__ __forceinline__ float from_half(u16 bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

__device__ __forceinline__ u16 to_half(float x) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

// Hides from the compiler what a value is, so that what hangs on it is not computed ahead.
__device__ __forceinline__ void conceal(int& x) { asm volatile("" : "+r"(x)); }

__device__ __forceinline__ u32 shuffle_xor(u32 x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

__device__ __forceinline__ float shuffle_xor(float x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}

// Four products [8, 4] by [4, 8], one in each quadpair of lanes, added to fp32 sums. B is read by
// columns: an element of `b` is B[i][t].
__device__ __forceinline__ void mma_row_col(float (&c)[8], u32 a0, u32 a1, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]),
        "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
      : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
}

// The same with B read by rows: an element of `b` is B[lane % 4][i + 4 h].
__device__ __forceinline__ void mma_row_row(float (&c)[8], u32 a0, u32 a1, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m8n8k4.row.row.f32.f16.f16.f32 "
      "{%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, {%0, %1, %2, %3, %4, %5, %6, %7};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]),
        "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
      : "r"(a0), "r"(a1), "r"(b0), "r"(b1));
}

// ---- sizes ---------------------------------------------------------------------------------

#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
// The running maximum starts here rather than at -inf: differences to it stay finite, and a row
// that sees no key ends with the sum 0.
#define LOWEST (-1.0e30f)
#define NONE (-__int_as_float(0x7f800000))

constexpr int THREADS = 32 * WARPS;
constexpr int ROWS = DECODE ? BLOCK_M : BLOCK_M / WARPS;  // of a warp
constexpr int M_TILES = ROWS / 16;
constexpr int N_TILES = BLOCK_N / 16;
// Heads in pieces of 8 elements, 16 bytes; values in whole tiles of 16 columns.
constexpr int K_CHUNKS = HEAD_DIM / 8;
constexpr int V_CHUNKS = (VALUE_DIM + 15) / 16 * 2;
constexpr int P_CHUNKS = BLOCK_N / 8;
constexpr int V_TILES = V_CHUNKS / 2;

static_assert(HEAD_DIM % 8 == 0 && VALUE_DIM % 8 == 0, "heads are loaded by 16 bytes");
static_assert(ROWS % 16 == 0 && BLOCK_N % 16 == 0, "a warp multiplies 16 by 16");
static_assert(!DECODE || !VARLEN, "decode reads a cache, not sequences one behind the other");

// ---- shared memory -------------------------------------------------------------------------

// Where the chunks of an operand's rows lie, so that the lanes of one load meet in no bank. A
// load of Q, K or P reads rows 0-3 and 8-11, or 4-7 and 12-15, of a tile of 16: row bits 0, 1
// and 3 must pick the bank. In rows of whole 128 bytes they are XORed into the chunk's number;
// other rows get an odd number of chunks, and bits 2 and 3 of the row's number change places.
template <int CHUNKS>
struct Rows {
  static constexpr bool XOR = CHUNKS % 8 == 0;
  static constexpr int PITCH = 16 * (XOR ? CHUNKS : CHUNKS | 1);

  static __device__ __forceinline__ int base(int row) {
    if (XOR) return row * PITCH + 16 * ((row & 3) | ((row >> 1) & 4));
    return ((row & ~12) | ((row << 1) & 8) | ((row >> 1) & 4)) * PITCH;
  }
};

// The same of V, read by rows: a load takes four rows and two chunks next to each other.
template <int CHUNKS>
struct Columns {
  static constexpr bool XOR = CHUNKS % 8 == 0;
  static constexpr int PITCH = 16 * (CHUNKS % 4 == 0 && !XOR ? CHUNKS + 2 : CHUNKS);

  static __device__ __forceinline__ int base(int row) {
    return row * PITCH + (XOR ? 32 * (row & 3) : 0);
  }
};

// The byte at which a chunk of a row lies, from the row's base.
template <class Layout>
__device__ __forceinline__ int place(int base, int chunk) {
  if (Layout::XOR) return (base ^ ((chunk & 7) * 16)) + (chunk & ~7) * 16;
  return base + chunk * 16;
}

constexpr int whole(int bytes) { return (bytes + 127) / 128 * 128; }

typedef Rows<K_CHUNKS> KeyRows;
typedef Columns<V_CHUNKS> ValueRows;
typedef Rows<P_CHUNKS> WeightRows;

// Warps of decode have tiles of their own and wait for nobody.
constexpr int OWNERS = DECODE ? WARPS : 1;
constexpr int LOADERS = THREADS / OWNERS;
constexpr int Q_BYTES = whole(BLOCK_M * KeyRows::PITCH);
constexpr int K_BYTES = whole(BLOCK_N * KeyRows::PITCH);
constexpr int V_BYTES = whole(BLOCK_N * ValueRows::PITCH);
constexpr int P_BYTES = P_PATH ? whole(ROWS * WeightRows::PITCH) : 0;  // of a warp

extern __shared__ __align__(128) unsigned char shared[];

__device__ __forceinline__ void wait_for_owners() {
  if (DECODE) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// ---- tiles on their way --------------------------------------------------------------------

// Where the keys of one head lie.
struct Held {
  const u16* base;
  i64 stride_b, stride_t;
  const int* table;  // pages of the row
  int first;         // ring slot of key 0, or the key at which a sequence begins
  int count;         // keys there are

  __device__ __forceinline__ const u16* row(int key) const {
    if (PAGE) {
      const int inside = key % (PAGE ? PAGE : 1);
      return base + table[key / (PAGE ? PAGE : 1)] * stride_b + inside * stride_t;
    }
    int slot = first + key;
    if (RING && slot >= RING) slot -= RING;
    return base + slot * stride_t;
  }
};

constexpr int power_above(int size) {
  int power = 1;
  while (power < size) power *= 2;
  return power;
}

// The part of a tile of BLOCK_N keys that one thread brings from global to shared memory: CARRY
// pieces at once, of which the first are fetched long before they are stored. A thread's pieces
// lie below each other: a row is shared out to a power of two of threads, of which some idle.
// REAL chunks of each row are in global memory, the others are 0.
template <class Layout, int REAL, int CHUNKS>
struct Carried {
  static constexpr int ACROSS = power_above(CHUNKS), DOWN = LOADERS / ACROSS;
  static constexpr int EACH = (BLOCK_N + DOWN - 1) / DOWN;
  static constexpr int HELD = EACH < CARRY ? EACH : CARRY;
  uint4 parts[HELD];

  static __device__ __forceinline__ int chunk_of(int loader) { return loader % ACROSS; }
  static __device__ __forceinline__ int row_of(int loader, int i) {
    return loader / ACROSS + i * DOWN;
  }
  static __device__ __forceinline__ bool inside(int row, int i) {
    return i < EACH && (BLOCK_N % DOWN == 0 || row < BLOCK_N);
  }

  __device__ __forceinline__ void fetch(const Held& held, int start, int loader, int from = 0) {
    const int chunk = chunk_of(loader);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int row = row_of(loader, from + i);
      parts[i] = make_uint4(0, 0, 0, 0);
      if (inside(row, from + i) && start + row < held.count && (REAL == ACROSS || chunk < REAL)) {
        parts[i] = __ldg(reinterpret_cast<const uint4*>(held.row(start + row) + chunk * 8));
      }
    }
  }

  __device__ __forceinline__ void store(unsigned char* tile, const Held& held, int start,
                                        int loader) {
    const int chunk = chunk_of(loader);
#pragma unroll
    for (int from = 0; from < EACH; from += HELD) {
      if (from) {
        // Without it the compiler fetches them all at once, for which there are no registers.
        __syncwarp();
        fetch(held, start, loader, from);
      }
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
        const int row = row_of(loader, from + i);
        if (inside(row, from + i) && (CHUNKS == ACROSS || chunk < CHUNKS)) {
          *reinterpret_cast<uint4*>(tile + place<Layout>(Layout::base(row), chunk)) = parts[i];
        }
      }
    }
  }
};

// ---- fragments -----------------------------------------------------------------------------

// A lane's place in the 16 by 16 tile of a warp. Quadpair q (lanes 4q to 4q+3 and 16 above them)
// has the rows 8 (q & 1) and the columns 8 (q >> 1). As an operand lane has one row, as a sum two:
// `first` and `first + 2`, with the columns `pair`, `pair + 1`, `pair + 4`, `pair + 5`.
struct Lane {
  int id, across, operand, first, pair;

  __device__ __forceinline__ explicit Lane(int lane) {
    id = lane;
    const int high = lane >> 4, down = (lane >> 2) & 1;
    across = (lane >> 3) & 1;
    operand = 8 * down + (lane & 3) + 4 * high;
    first = 8 * down + (lane & 1) + 4 * high;
    pair = 8 * across + (lane & 2);
  }
};

// Sums of a quadpair's 8 by 8 tile as an operand of 16 bits: the lane's row, columns 0 to 7. The
// lane at a distance of 2 has the other half of both rows: each sends what the other needs.
__device__ __forceinline__ void to_operand(const float (&c)[8], const Lane& lane, u32 (&a)[4]) {
  const bool upper = lane.id & 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const u32 low = pack(c[4 * half], c[4 * half + 1]);
    const u32 high = pack(c[4 * half + 2], c[4 * half + 3]);
    const u32 kept = upper ? high : low;
    const u32 got = shuffle_xor(upper ? low : high, 2);
    a[2 * half] = upper ? got : kept;
    a[2 * half + 1] = upper ? kept : got;
  }
}

// The largest, and the sum, of what the four lanes of a row have.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 2));
  return fmaxf(x, shuffle_xor(x, 8));
}

__device__ __forceinline__ float row_sum(float x) {
  x += shuffle_xor(x, 2);
  return x + shuffle_xor(x, 8);
}

__device__ __forceinline__ int down(int x, int step) {  // x / step, rounded down
  return (x < 0 ? x - step + 1 : x) / step;
}

#if DECODE
#define KERNEL attention_decode
#else
#define KERNEL attention_prefill
#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) KERNEL(
    const u16* __restrict__ q_ptr,        // [B, H, S, HEAD_DIM], by strides
    const u16* __restrict__ k_ptr,        // [B, G, T, HEAD_DIM]; paged: [pages, G, PAGE, HEAD_DIM]
    const u16* __restrict__ v_ptr,        // the same, VALUE_DIM
#if DECODE
    float* __restrict__ part_ptr,         // [B, H, S, splits, VALUE_DIM]: result of every span
    float* __restrict__ part_lse_ptr,     // [B, H, S, splits]: its log-sum-exp, to base 2
#else
    u16* __restrict__ out_ptr,            // [B, H, S, VALUE_DIM], by strides
    float* __restrict__ lse_ptr,          // [B, H, S]: natural logarithm of the sum
#endif
    const signed char* __restrict__ mask_ptr,  // [B, T]: nonzero at real keys
    const void* __restrict__ bias_ptr,    // [B, H, S, T], by strides, 0 where it broadcasts
    const float* __restrict__ slopes_ptr, // [H]
    const int* __restrict__ positions_ptr,  // [B, T]: ALiBi position of every key
#if !DECODE
    const float* __restrict__ sinks_ptr,  // [H]
    const int* __restrict__ cu_seqlens_q_ptr,  // [B + 1]: where each sequence begins, and the end
    const int* __restrict__ cu_seqlens_k_ptr,  // [B + 1]: the same among the keys
#endif
    const int* __restrict__ kv_lens_ptr,  // [B]: keys of each row, where they are fewer than T
    const int* __restrict__ block_table_ptr,  // [B, block_table_width]: page of the pool
    const int* __restrict__ ring_start_ptr,  // [B]: ring slot of key 0
    i64 q_stride_b, i64 q_stride_h, i64 q_stride_s,
    i64 k_stride_b, i64 k_stride_h, i64 k_stride_t,
    i64 v_stride_b, i64 v_stride_h, i64 v_stride_t,
#if !DECODE
    i64 o_stride_b, i64 o_stride_h, i64 o_stride_s,
#endif
    i64 bias_stride_b, i64 bias_stride_h, i64 bias_stride_s, i64 bias_stride_t,
    int block_table_width, int S, int T, int H, float scale) {
  const int warp = threadIdx.x / 32;
  const Lane lane(threadIdx.x % 32);
  int loader = DECODE ? lane.id : threadIdx.x;

  // ---- what this block computes
  const int capacity = T;
  const int heads = DECODE ? H / GROUP : H;
  const int batch = blockIdx.y / heads;
  const int group = DECODE ? blockIdx.y % heads : blockIdx.y % heads / GROUP;
  // The last rows of a causal prefill see the most keys: they start first.
  const int start_row = BLOCK_M * (DECODE ? blockIdx.z : gridDim.x - 1 - blockIdx.x);
  i64 q_batch = batch, k_batch = batch;
  int q_first = 0, k_first = 0;
#if !DECODE
  const int lse_rows = S;
  if (VARLEN) {
    q_first = cu_seqlens_q_ptr[batch];
    k_first = cu_seqlens_k_ptr[batch];
    S = cu_seqlens_q_ptr[batch + 1] - q_first;
    T = cu_seqlens_k_ptr[batch + 1] - k_first;
    q_batch = k_batch = 0;
    if (start_row >= S) return;
  }
#endif
  if (KV_LENS) T = min(T, kv_lens_ptr[batch]);
  if (RING) k_first = ring_start_ptr[batch];
  // Query i stands at key i + shift. Rows of decode are the heads of the group, token by token.
  const int shift = TOP_LEFT ? 0 : T - S;
  const int rows = DECODE ? S * GROUP : S;
  auto token_of = [&](int row) { return DECODE ? row / GROUP : row; };
  auto head_of = [&](int row) {
    return DECODE ? group * GROUP + row % GROUP : static_cast<int>(blockIdx.y) % heads;
  };

  // ---- which keys: from `low` up to `high`; between the inner two every row sees every key
  int low = 0, high = T;
  int inner_low = 0, inner_high = T / BLOCK_N * BLOCK_N;
  const int first_position = token_of(start_row) + shift;
  const int last_position = token_of(min(start_row + BLOCK_M, rows) - 1) + shift;
  if (CAUSAL) {
    high = min(high, max(last_position + 1, 0));
    inner_high = min(inner_high, max(first_position + 1, 0) / BLOCK_N * BLOCK_N);
  }
  if (WINDOW) {
    low = max(first_position - WINDOW + 1, 0) / BLOCK_N * BLOCK_N;
    inner_low = (max(last_position - WINDOW + 1, 0) + BLOCK_N - 1) / BLOCK_N * BLOCK_N;
  }
  if (CHUNK) {
    constexpr int LENGTH = CHUNK ? CHUNK : 1;
    const int one = down(first_position, LENGTH), other = down(last_position, LENGTH);
    low = max(low, max(one * LENGTH, 0) / BLOCK_N * BLOCK_N);
    high = min(high, max((other + 1) * LENGTH, 0));
    inner_low = max(inner_low, (max(other * LENGTH, 0) + BLOCK_N - 1) / BLOCK_N * BLOCK_N);
    inner_high = min(inner_high, max((one + 1) * LENGTH, 0) / BLOCK_N * BLOCK_N);
  }
  constexpr int STEP = BLOCK_N * OWNERS;
#if DECODE
  // A span hangs on the number of keys alone: a row's result is the same in any batch.
  const int splits = gridDim.x, split = blockIdx.x;
  const int span = ((T + splits - 1) / splits + BLOCK_N - 1) / BLOCK_N * BLOCK_N;
  low = max(low, split * span);
  high = min(high, split * span + span);
  const int begin = low + warp * BLOCK_N;
#else
  const int begin = low;
#endif

  const Held keys{k_ptr + group * k_stride_h + (PAGE ? 0 : k_batch * k_stride_b), k_stride_b,
                  k_stride_t, block_table_ptr + (PAGE ? batch * block_table_width : 0), k_first, T};
  const Held values{v_ptr + group * v_stride_h + (PAGE ? 0 : k_batch * v_stride_b), v_stride_b,
                    v_stride_t, keys.table, k_first, T};

  // ---- shared memory: Q, then K, V and P of each owner
  unsigned char* const q_tile = shared;
  unsigned char* const k_tile =
      shared + Q_BYTES + (DECODE ? warp : 0) * (K_BYTES + V_BYTES + P_BYTES);
  unsigned char* const v_tile = k_tile + K_BYTES;
  unsigned char* const p_tile = v_tile + V_BYTES + (DECODE ? 0 : warp) * P_BYTES;
  for (int i = threadIdx.x; i < BLOCK_M * K_CHUNKS; i += THREADS) {
    const int row = i / K_CHUNKS, chunk = i % K_CHUNKS;
    uint4 part = make_uint4(0, 0, 0, 0);
    if (start_row + row < rows) {
      const u16* from = q_ptr + q_batch * q_stride_b + head_of(start_row + row) * q_stride_h +
                        (q_first + token_of(start_row + row)) * q_stride_s;
      part = __ldg(reinterpret_cast<const uint4*>(from + chunk * 8));
    }
    *reinterpret_cast<uint4*>(q_tile + place<KeyRows>(KeyRows::base(row), chunk)) = part;
  }
  if (DECODE) __syncthreads();

  const int warp_row = DECODE ? 0 : warp * ROWS;
  int q_base = KeyRows::base(warp_row + lane.operand);
  int k_base = KeyRows::base(8 * lane.across + lane.operand % 8);
  int p_base = WeightRows::base(lane.operand);
  // Keys of a quadpair's own sums come first, then those of the quadpair that has the other
  // columns of the same rows: no lane has to sort what it gets.
  const int v_row = lane.id & 3, v_inside = 8 * (lane.id >> 4);
  int v_base[2] = {
      place<ValueRows>(ValueRows::base(v_row + 8 * lane.across), lane.across) + v_inside,
      place<ValueRows>(ValueRows::base(v_row + 8 - 8 * lane.across), lane.across) + v_inside};

  // ---- running maximum and sum of the lane's rows; each lane sums its own columns
  float top[M_TILES][2], total[M_TILES][2], sums[M_TILES][V_TILES][8];
  float slope[M_TILES][2];
  i64 bias_row[M_TILES][2];
  int at[M_TILES][2];
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = start_row + warp_row + 16 * m + lane.first + 2 * r;
      const int real = min(row, rows - 1);
      at[m][r] = token_of(row) + shift;
      top[m][r] = LOWEST;
      total[m][r] = 0.0f;
#if !DECODE
      if (SINKS) {
        top[m][r] = sinks_ptr[head_of(real)] * LOG2E;
        total[m][r] = lane.pair == 0 ? 1.0f : 0.0f;
      }
#endif
      if (ALIBI) slope[m][r] = slopes_ptr[head_of(real)] * LOG2E;
      if (BIAS) {
        bias_row[m][r] = q_batch * bias_stride_b + head_of(real) * bias_stride_h +
                         token_of(real) * bias_stride_s;
      }
    }
#pragma unroll
    for (int j = 0; j < V_TILES; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[m][j][i] = 0.0f;
    }
  }
  // What a score is times to be an exponent to base 2; where something is added to it, it
  // already is one. Multiplied with the maximum's subtraction, in one rounding.
  const float factor = scale * LOG2E;
  const float unit = SOFTCAP > 0 || ALIBI || BIAS ? 1.0f : factor;

  Carried<KeyRows, K_CHUNKS, K_CHUNKS> key_part;
  Carried<ValueRows, VALUE_DIM / 8, V_CHUNKS> value_part;
  if (begin < high) {
    key_part.fetch(keys, begin, loader);
    key_part.store(k_tile, keys, begin, loader);
    value_part.fetch(values, begin, loader);
  }
  wait_for_owners();

  for (int start = begin; start < high; start += STEP) {
    // Dozens of addresses hang on these: computed in every round they are cheap, kept from round
    // to round they would cost the registers of a tile.
    conceal(loader);
    conceal(q_base);
    conceal(k_base);
    conceal(p_base);
    conceal(v_base[0]);
    conceal(v_base[1]);

    // ---- scores; this tile's values are on their way
    float scores[M_TILES][N_TILES][8];
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 8; ++i) scores[m][n][i] = 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < K_CHUNKS; ++k) {
      uint4 a[M_TILES];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
        a[m] = *reinterpret_cast<const uint4*>(q_tile + place<KeyRows>(q_base, k) +
                                               16 * m * KeyRows::PITCH);
      }
#pragma unroll
      for (int n = 0; n < N_TILES; ++n) {
        const uint4 b = *reinterpret_cast<const uint4*>(k_tile + place<KeyRows>(k_base, k) +
                                                        16 * n * KeyRows::PITCH);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) mma_row_col(scores[m][n], a[m].x, a[m].y, b.x, b.y);
#pragma unroll
        for (int m = 0; m < M_TILES; ++m) mma_row_col(scores[m][n], a[m].z, a[m].w, b.z, b.w);
      }
    }
    value_part.store(v_tile, values, start, loader);
    wait_for_owners();

    // ---- the next tile's keys are on their way from here
    const bool more = start + STEP < high;
    if (more) key_part.fetch(keys, start + STEP, loader);

    const bool edge = start < inner_low || start >= inner_high;
    if (edge || PADDING_MASK || SOFTCAP > 0 || ALIBI || BIAS) {
#pragma unroll
      for (int n = 0; n < N_TILES; ++n) {
        // Without it the compiler fetches the bias of all tiles at once.
        if (BIAS) __syncwarp();
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int i = (c & 1) | ((c & 2) << 1);  // 0, 1, 4, 5
          const int key = start + 16 * n + lane.pair + i;
          const bool present = key < T;
          bool known = true;
          float position = 0.0f;
          if (PADDING_MASK) known = present && mask_ptr[batch * (i64)capacity + key] != 0;
          if (ALIBI) position = present ? positions_ptr[batch * (i64)capacity + key] : 0;
#pragma unroll
          for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              float& score = scores[m][n][i | (r << 1)];
              if (SOFTCAP > 0) {
                // cap tanh(x / cap), by tanh(y) = 1 - 2 / (exp(2 y) + 1).
                const float grown = exp2_of(score * (factor * (2.0f / SOFTCAP)));
                score = SOFTCAP * LOG2E - 2.0f * SOFTCAP * LOG2E * reciprocal(grown + 1.0f);
              } else if (ALIBI || BIAS) {
                score *= factor;
              }
              if (ALIBI) score += slope[m][r] * position;
              if (BIAS && present) {
                const i64 where = bias_row[m][r] + key * bias_stride_t;
                const float added = BIAS == 16 ? from_half(static_cast<const u16*>(bias_ptr)[where])
                                               : static_cast<const float*>(bias_ptr)[where];
                score += added * LOG2E;
              }
              bool seen = known;
              if (edge) {
                seen = seen && present;
                if (CAUSAL) seen = seen && key <= at[m][r];
                if (WINDOW) seen = seen && key > at[m][r] - WINDOW;
                if (CHUNK) {
                  constexpr int LENGTH = CHUNK ? CHUNK : 1;
                  seen = seen && key / LENGTH == down(at[m][r], LENGTH);
                }
              }
              if (!seen) score = NONE;
            }
          }
        }
      }
    }

    // ---- weights, in place of the scores
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
      float shrink[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float largest = NONE;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            largest = fmaxf(largest, scores[m][n][(c & 1) | ((c & 2) << 1) | (r << 1)]);
          }
        }
        const float raised = fmaxf(top[m][r], row_max(largest) * unit);
        shrink[r] = exp2_of(top[m][r] - raised);
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < N_TILES; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            float& weight = scores[m][n][(c & 1) | ((c & 2) << 1) | (r << 1)];
            weight = exp2_of(fmaf(weight, unit, -raised));
            added += weight;
          }
        }
        total[m][r] = fmaf(total[m][r], shrink[r], added);
        top[m][r] = raised;
      }
      // Times 1 changes nothing: most tiles after the first few raise no maximum.
      if (__any_sync(0xffffffffu, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
        for (int j = 0; j < V_TILES; ++j) {
#pragma unroll
          for (int i = 0; i < 8; ++i) sums[m][j][i] *= shrink[(i >> 1) & 1];
        }
      }
    }

    // ---- weights times values
    if (P_PATH) {
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          unsigned char* const row =
              p_tile + 16 * m * WeightRows::PITCH + 2 * (lane.id & 2);
          const int base = WeightRows::base(lane.first + 2 * r);
#pragma unroll
          for (int n = 0; n < N_TILES; ++n) {
            const float* const c = scores[m][n] + 2 * r;
            u32* const to =
                reinterpret_cast<u32*>(row + place<WeightRows>(base, 2 * n + lane.across));
            to[0] = pack(c[0], c[1]);
            to[2] = pack(c[4], c[5]);
          }
        }
      }
      __syncwarp();
    }
#pragma unroll
    for (int n = 0; n < N_TILES; ++n) {
      u32 weights[M_TILES][2][4];
#pragma unroll
      for (int m = 0; m < M_TILES; ++m) {
        if (P_PATH) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint4 part = *reinterpret_cast<const uint4*>(
                p_tile + 16 * m * WeightRows::PITCH +
                place<WeightRows>(p_base, 2 * n + (lane.across ^ half)));
            weights[m][half][0] = part.x;
            weights[m][half][1] = part.y;
            weights[m][half][2] = part.z;
            weights[m][half][3] = part.w;
          }
        } else {
          to_operand(scores[m][n], lane, weights[m][0]);
#pragma unroll
          for (int i = 0; i < 4; ++i) weights[m][1][i] = shuffle_xor(weights[m][0][i], 8);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int j = 0; j < V_TILES; ++j) {
            const uint2 b = *reinterpret_cast<const uint2*>(
                v_tile + place<ValueRows>(v_base[half], 2 * j) +
                (16 * n + 4 * step) * ValueRows::PITCH);
#pragma unroll
            for (int m = 0; m < M_TILES; ++m) {
              mma_row_row(sums[m][j], weights[m][half][2 * step], weights[m][half][2 * step + 1],
                          b.x, b.y);
            }
          }
        }
      }
    }

    if (more) {
      key_part.store(k_tile, keys, start + STEP, loader);
      value_part.fetch(values, start + STEP, loader);
    }
    wait_for_owners();
  }

#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) total[m][r] = row_sum(total[m][r]);
  }

#if !DECODE
  u16* const out = out_ptr + q_batch * o_stride_b + head_of(0) * o_stride_h;
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
    float share[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = start_row + warp_row + 16 * m + lane.first + 2 * r;
      const bool some = total[m][r] > 0.0f;
      share[r] = some ? 1.0f / total[m][r] : 0.0f;
      if (LSE && lane.pair == 0 && row < S) {
        lse_ptr[(q_batch * H + head_of(0)) * lse_rows + q_first + row] =
            some ? (top[m][r] + log2_of(total[m][r])) * LN2 : NONE;
      }
    }
    // The way that makes an operand of sums also gives each lane 16 bytes of one row.
    const int row = start_row + warp_row + 16 * m + lane.operand;
#pragma unroll
    for (int j = 0; j < V_TILES; ++j) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[m][j][i] *= share[(i >> 1) & 1];
      u32 part[4];
      to_operand(sums[m][j], lane, part);
      const int column = 16 * j + 8 * lane.across;
      if (row < S && (VALUE_DIM % 16 == 0 || column < VALUE_DIM)) {
        *reinterpret_cast<uint4*>(out + (q_first + row) * o_stride_s + column) =
            make_uint4(part[0], part[1], part[2], part[3]);
      }
    }
  }
#else
  // The warps' results become one, as those of the spans do later.
  constexpr int MERGE_PITCH = 16 * V_TILES + 4;
  __syncthreads();
  float* const tops = reinterpret_cast<float*>(shared);  // [WARPS, BLOCK_M]
  float* const totals = tops + WARPS * BLOCK_M;          // the same
  float* const parts = totals + WARPS * BLOCK_M;         // [WARPS, BLOCK_M, MERGE_PITCH]
  if (lane.pair == 0) {
#pragma unroll
    for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int where = warp * BLOCK_M + 16 * m + lane.first + 2 * r;
        tops[where] = top[m][r];
        totals[where] = total[m][r];
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < M_TILES; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * m + lane.first + 2 * r;
      float raised = LOWEST;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) raised = fmaxf(raised, tops[w * BLOCK_M + row]);
      const float share = exp2_of(top[m][r] - raised);
      float* const to = parts + (warp * BLOCK_M + row) * MERGE_PITCH + lane.pair;
#pragma unroll
      for (int j = 0; j < V_TILES; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* const from = sums[m][j] + 4 * half + 2 * r;
          *reinterpret_cast<float2*>(to + 16 * j + 4 * half) =
              make_float2(from[0] * share, from[1] * share);
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < BLOCK_M * VALUE_DIM; i += THREADS) {
    const int row = i / VALUE_DIM, column = i % VALUE_DIM;
    if (start_row + row >= rows) break;
    float raised = LOWEST;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) raised = fmaxf(raised, tops[w * BLOCK_M + row]);
    float whole_total = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      whole_total += totals[w * BLOCK_M + row] * exp2_of(tops[w * BLOCK_M + row] - raised);
      sum += parts[(w * BLOCK_M + row) * MERGE_PITCH + column];
    }
    const bool some = whole_total > 0.0f;
    const i64 where =
        ((q_batch * H + head_of(start_row + row)) * S + token_of(start_row + row)) * splits + split;
    part_ptr[where * VALUE_DIM + column] = some ? sum / whole_total : 0.0f;
    if (column == 0) part_lse_ptr[where] = some ? raised + log2_of(whole_total) : NONE;
  }
#endif
}

#if DECODE
// One block merges the spans of one row: O = sum of exp(lse_i - lse) O_i. Any number of threads,
// and any number of blocks along the second axis, which share out the columns.
extern "C" __global__ void __launch_bounds__(64) attention_merge(
    const float* __restrict__ part_ptr,      // [B, H, S, splits, VALUE_DIM]
    const float* __restrict__ part_lse_ptr,  // [B, H, S, splits], to base 2
    const float* __restrict__ sinks_ptr,     // [H]
    u16* __restrict__ out_ptr,               // [B, H, S, VALUE_DIM], by strides
    float* __restrict__ lse_ptr,             // [B, H, S]
    i64 o_stride_b, i64 o_stride_h, i64 o_stride_s, int S, int H, int splits) {
  const i64 row = blockIdx.x;
  const int token = row % S, head = row / S % H;
  const i64 batch = row / S / H;
  const float* const lse = part_lse_ptr + row * splits;
  float top = LOWEST;
  if (SINKS) top = sinks_ptr[head] * LOG2E;
  const float sink = top;
  for (int i = 0; i < splits; ++i) top = fmaxf(top, lse[i]);
  float total = SINKS ? exp2_of(sink - top) : 0.0f;
  for (int i = 0; i < splits; ++i) total += exp2_of(lse[i] - top);
  const bool some = total > 0.0f;
  const float share = some ? 1.0f / total : 0.0f;
  u16* const out = out_ptr + batch * o_stride_b + head * o_stride_h + token * o_stride_s;
  for (int column = blockIdx.y * blockDim.x + threadIdx.x; column < VALUE_DIM;
       column += gridDim.y * blockDim.x) {
    float sum = 0.0f;
    for (int i = 0; i < splits; ++i) {
      sum += part_ptr[(row * splits + i) * VALUE_DIM + column] * exp2_of(lse[i] - top);
    }
    out[column] = to_half(sum * share);
  }
  if (LSE && blockIdx.y == 0 && threadIdx.x == 0) {
    lse_ptr[row] = some ? (top + log2_of(total)) * LN2 : NONE;
  }
}
#endif
