// Tiled attention of many query tokens for Hopper: wgmma products, tiles brought by the bulk
// tensor copy engine.
//
// A block of threads stays on its core and takes tiles of BLOCK_M query rows of one head from a
// common counter. Its first warpgroup loads: one thread of it sends for tiles and waits on
// barriers. Every other warpgroup multiplies: 64 rows each. The order of work within such a
// warpgroup and the turns that two of them take, one multiplying while the other works on its
// exponentials, are those of FlashAttention-3 (arXiv 2407.08608, sections 3.1 and 3.2). Keys are
// walked from the last to the first, so that masked blocks come first.
//
// Constants, given in front of this text: HEAD_DIM and VALUE_DIM (multiples of 16), GROUP,
// CONSUMERS, BLOCK_M = 64 CONSUMERS, BLOCK_N, STAGES, LOADER_REGISTERS, CONSUMER_REGISTERS, BF16,
// CAUSAL, TOP_LEFT, WINDOW (0: none), SOFTCAP (0: none), SINKS, VARLEN, KV_LENS, LSE, and the
// functions wgmma_scores and wgmma_values.

struct alignas(64) TensorMap {
  char bytes[128];
};

// Tiles lie in panels of 64 columns: 128 bytes a row, swizzled in groups of 8 rows.
constexpr int KEY_PANELS = (HEAD_DIM + 63) / 64;
constexpr int VALUE_PANELS = (VALUE_DIM + 63) / 64;
constexpr int QUERY_PANEL_BYTES = BLOCK_M * 128;
constexpr int KEY_PANEL_BYTES = BLOCK_N * 128;
constexpr int QUERY_BYTES = KEY_PANELS * QUERY_PANEL_BYTES;
constexpr int KEY_BYTES = KEY_PANELS * KEY_PANEL_BYTES;
constexpr int VALUE_BYTES = VALUE_PANELS * KEY_PANEL_BYTES;
constexpr int SWIZZLE_GROUP_BYTES = 1024;

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
// The running maximum starts here rather than at -inf: differences to it stay finite, and a row
// that sees no key ends with the sum 0.
constexpr float LOWEST = -1.0e30f;

// Barriers and copies ----------------------------------------------------------------------------

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(unsigned barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, int phase) {
  asm volatile(
      "{ .reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready: }" ::"r"(barrier), "r"(phase) : "memory");
}

__device__ __forceinline__ void copy_tile(unsigned target, const TensorMap* map, unsigned barrier,
                                          int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target), "l"(map), "r"(barrier), "r"(column),
      "r"(row), "r"(head), "r"(batch) : "memory");
}

// A place in a ring of STAGES buffers, and how often it went round.
struct Place {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Products ---------------------------------------------------------------------------------------

// A matrix in shared memory, swizzled by 128 bytes (PTX ISA, matrix descriptor format).
__device__ __forceinline__ unsigned long long descriptor(unsigned address, int leading) {
  return 1ull << 62 | (unsigned long long)(SWIZZLE_GROUP_BYTES >> 4) << 32 |
         (unsigned long long)(leading >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// scores [64, BLOCK_N] = queries [64, HEAD_DIM] keys^T; both lie with their columns in a row.
__device__ __forceinline__ void multiply_keys(float (&scores)[BLOCK_N / 2], unsigned queries,
                                              unsigned keys) {
#pragma unroll
  for (int i = 0; i < HEAD_DIM / 16; ++i)
    wgmma_scores(scores, descriptor(queries + i / 4 * QUERY_PANEL_BYTES + i % 4 * 32, 16),
                 descriptor(keys + i / 4 * KEY_PANEL_BYTES + i % 4 * 32, 16), i > 0);
}

// sums [64, VALUE_DIM] += weights [64, BLOCK_N] values, the weights from registers.
__device__ __forceinline__ void multiply_values(float (&sums)[VALUE_DIM / 2],
                                                const unsigned (&weights)[BLOCK_N / 4],
                                                unsigned values) {
#pragma unroll
  for (int i = 0; i < BLOCK_N / 16; ++i)
    wgmma_values(sums, weights + 4 * i, descriptor(values + i * 2048, KEY_PANEL_BYTES));
}

__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned both;
#if BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
  return both;
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The kernel -------------------------------------------------------------------------------------

struct Sizes {
  int queries, keys, heads;  // S, T, H; with VARLEN those of all sequences together
  int blocks;                // tiles of a head
  int tiles;                 // of all heads and rows
};

// One tile: whose rows it holds, and which blocks of keys they see.
struct Tile {
  int head, batch, block;       // block of BLOCK_M query rows
  int queries, keys;            // of this row of the batch
  int first_query, first_key;   // where its sequence begins
  int shift;                    // query i stands at key i + shift
  int begin, end;               // blocks of BLOCK_N keys
};

__device__ __forceinline__ Tile tile_of(int number, const Sizes& sizes, const int* cu_seqlens_q,
                                        const int* cu_seqlens_k, const int* kv_lens) {
  Tile tile;
  int row = number / sizes.blocks;
  // The last rows of a causal attention see the most keys: they start first.
  tile.block = sizes.blocks - 1 - number % sizes.blocks;
  tile.head = row % sizes.heads;
  tile.batch = row / sizes.heads;
  tile.queries = sizes.queries;
  tile.keys = sizes.keys;
  tile.first_query = tile.first_key = 0;
#if VARLEN
  tile.first_query = cu_seqlens_q[tile.batch];
  tile.first_key = cu_seqlens_k[tile.batch];
  tile.queries = cu_seqlens_q[tile.batch + 1] - tile.first_query;
  tile.keys = cu_seqlens_k[tile.batch + 1] - tile.first_key;
#endif
#if KV_LENS
  tile.keys = min(sizes.keys, kv_lens[tile.batch]);
#endif
  tile.shift = TOP_LEFT ? 0 : tile.keys - tile.queries;
  int first_position = tile.block * BLOCK_M + tile.shift;
  tile.begin = 0;
  tile.end = (tile.keys + BLOCK_N - 1) / BLOCK_N;
#if CAUSAL
  tile.end = min(tile.end, max(first_position + BLOCK_M + BLOCK_N - 1, 0) / BLOCK_N);
#endif
#if WINDOW
  tile.begin = max(first_position - WINDOW + 1, 0) / BLOCK_N;
#endif
  if (tile.block * BLOCK_M >= tile.queries) tile.end = 0;
  return tile;
}

extern "C" __global__ void __launch_bounds__((CONSUMERS + 1) * 128, 1)
attention_prefill(const __grid_constant__ TensorMap q_map,  // [B, H, S, HEAD_DIM]
                  const __grid_constant__ TensorMap k_map,  // [B, G, T, HEAD_DIM]
                  const __grid_constant__ TensorMap v_map,  // [B, G, T, VALUE_DIM]
                  unsigned short* out,                      // [B, H, S, VALUE_DIM], by strides
                  float* lse,                               // [B, H, S], contiguous
                  const float* sinks,                       // [H]
                  const int* cu_seqlens_q,                        // [B + 1]
                  const int* cu_seqlens_k,                        // [B + 1]
                  const int* kv_lens,                       // [B]
                  int* counter,  // two zeros, which are zeros again at the end
                  Sizes sizes, float scale, long long out_stride_b, long long out_stride_h,
                  long long out_stride_s) {
  extern __shared__ char memory[];
  unsigned base = (shared_address(memory) + SWIZZLE_GROUP_BYTES - 1) & -SWIZZLE_GROUP_BYTES;
  unsigned q_tile = base, k_tiles = q_tile + QUERY_BYTES, v_tiles = k_tiles + STAGES * KEY_BYTES;
  unsigned barriers = v_tiles + STAGES * VALUE_BYTES;
  unsigned q_full = barriers, q_empty = q_full + 8, k_full = q_empty + 8,
           k_empty = k_full + 8 * STAGES, v_full = k_empty + 8 * STAGES,
           v_empty = v_full + 8 * STAGES, tile_full = v_empty + 8 * STAGES,
           tile_empty = tile_full + 8;
  __shared__ int next_tile;
  int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    barrier_init(q_full, 1);
    barrier_init(q_empty, CONSUMERS);
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(k_full + 8 * i, 1);
      barrier_init(v_full + 8 * i, 1);
      barrier_init(k_empty + 8 * i, CONSUMERS);
      barrier_init(v_empty + 8 * i, CONSUMERS);
    }
    barrier_init(tile_full, 1);
    barrier_init(tile_empty, CONSUMERS * 128);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADER_REGISTERS));
    if (threadIdx.x != 0) return;
    Place k_place, v_place;
    int turn = 0, q_phase = 0;
    for (int number = blockIdx.x;; ++turn) {
      barrier_wait(tile_empty, (turn & 1) ^ 1);
      next_tile = number;
      barrier_arrive(tile_full);
      if (number >= sizes.tiles) break;
      Tile tile = tile_of(number, sizes, cu_seqlens_q, cu_seqlens_k, kv_lens);
      number = gridDim.x + atomicAdd(counter, 1);
      int kv_head = tile.head / GROUP, row_of_batch = VARLEN ? 0 : tile.batch;
      if (tile.begin >= tile.end) continue;
      barrier_wait(q_empty, q_phase ^ 1);
      q_phase ^= 1;
      barrier_expect(q_full, QUERY_BYTES);
      for (int panel = 0; panel < KEY_PANELS; ++panel)
        copy_tile(q_tile + panel * QUERY_PANEL_BYTES, &q_map, q_full, panel * 64,
                  tile.first_query + tile.block * BLOCK_M, tile.head, row_of_batch);
      // Values are needed a step later than their keys.
      for (int n = tile.end - 1; n >= tile.begin - 1; --n) {
        if (n >= tile.begin) {
          unsigned full = k_full + 8 * k_place.stage;
          barrier_wait(k_empty + 8 * k_place.stage, k_place.phase ^ 1);
          barrier_expect(full, KEY_BYTES);
          for (int panel = 0; panel < KEY_PANELS; ++panel)
            copy_tile(k_tiles + k_place.stage * KEY_BYTES + panel * KEY_PANEL_BYTES, &k_map, full,
                      panel * 64, tile.first_key + n * BLOCK_N, kv_head, row_of_batch);
          k_place.advance();
        }
        if (n + 1 < tile.end) {
          unsigned full = v_full + 8 * v_place.stage;
          barrier_wait(v_empty + 8 * v_place.stage, v_place.phase ^ 1);
          barrier_expect(full, VALUE_BYTES);
          for (int panel = 0; panel < VALUE_PANELS; ++panel)
            copy_tile(v_tiles + v_place.stage * VALUE_BYTES + panel * KEY_PANEL_BYTES, &v_map, full,
                      panel * 64, tile.first_key + (n + 1) * BLOCK_N, kv_head, row_of_batch);
          v_place.advance();
        }
      }
    }
    // Every block takes one number too many; the last one leaves zeros behind.
    __threadfence();
    if (atomicAdd(counter + 1, 1) == gridDim.x - 1) counter[0] = counter[1] = 0;
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
  int consumer = warpgroup - 1, thread = threadIdx.x % 128, lane = thread % 32;
  // This thread holds parts of two rows: `row` and the eighth after it.
  int row = consumer * 64 + thread / 32 * 16 + lane / 4;
  unsigned queries = q_tile + consumer * 64 * 128;
  Place k_place, v_place;
  int q_phase = 0;
  // Turns: a warpgroup multiplies when the one before it has sent off its products.
  if (CONSUMERS > 1 && consumer == CONSUMERS - 1) asm volatile("bar.arrive 1, 256;" ::: "memory");

  for (int turn = 0;; ++turn) {
    barrier_wait(tile_full, turn & 1);
    int number = next_tile;
    barrier_arrive(tile_empty);
    if (number >= sizes.tiles) break;
    Tile tile = tile_of(number, sizes, cu_seqlens_q, cu_seqlens_k, kv_lens);
    int place = tile.block * BLOCK_M + row + tile.shift;

    float sums[VALUE_DIM / 2], scores[BLOCK_N / 2];
    unsigned weights[BLOCK_N / 4];
    float top[2] = {LOWEST, LOWEST}, total[2] = {0.0f, 0.0f}, shrink[2];
#pragma unroll
    for (int i = 0; i < VALUE_DIM / 2; ++i) sums[i] = 0.0f;
    // What a score is times to be an exponent to base 2.
    float unit = SOFTCAP > 0 ? SOFTCAP * LOG2E : scale * LOG2E;
#if SINKS
    top[0] = top[1] = sinks[tile.head] * LOG2E / unit;
    total[0] = total[1] = lane % 4 == 0 ? 1.0f : 0.0f;  // four threads share a row
#endif

    auto limit_scores = [&](int n) {
      if (SOFTCAP > 0) {
        // tanh(x / cap), by tanh(y) = 1 - 2 / (exp(2 y) + 1).
        float inner = scale * (2.0f * LOG2E / SOFTCAP);
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; ++i)
          scores[i] = 1.0f - __fdividef(2.0f, power_of_two(scores[i] * inner) + 1.0f);
      }
      int first = n * BLOCK_N, lowest_place = tile.block * BLOCK_M + consumer * 64 + tile.shift;
      bool edge = first + BLOCK_N > tile.keys;
      if (CAUSAL) edge = edge || first + BLOCK_N - 1 > lowest_place;
      if (WINDOW) edge = edge || first <= lowest_place + 63 - WINDOW;
      if (!edge) return;
#pragma unroll
      for (int i = 0; i < BLOCK_N / 2; ++i) {
        int key = first + i / 4 * 8 + lane % 4 * 2 + i % 2, own = place + i / 2 % 2 * 8;
        bool seen = key < tile.keys;
        if (CAUSAL) seen = seen && key <= own;
        if (WINDOW) seen = seen && key > own - WINDOW;
        scores[i] = seen ? scores[i] : __int_as_float(0xff800000);
      }
    };
    auto exponentials = [&]() {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float high = top[r];
#pragma unroll
        for (int i = 0; i < BLOCK_N / 8; ++i)
          high = fmaxf(high, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
        shrink[r] = power_of_two((top[r] - high) * unit);
        top[r] = high;
        float minus = high * unit, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < BLOCK_N / 8; ++i) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float weight = power_of_two(fmaf(scores[4 * i + 2 * r + c], unit, -minus));
            scores[4 * i + 2 * r + c] = weight;
            sum += weight;
          }
        }
        total[r] = total[r] * shrink[r] + sum;
      }
    };
    // Scores lie in registers as the next product wants its left side to lie.
    auto round_weights = [&]() {
#pragma unroll
      for (int i = 0; i < BLOCK_N / 4; ++i) weights[i] = pack(scores[2 * i], scores[2 * i + 1]);
    };

    if (tile.begin < tile.end) {
      barrier_wait(q_full, q_phase);
      q_phase ^= 1;
      barrier_wait(k_full + 8 * k_place.stage, k_place.phase);
      wgmma_fence();
      multiply_keys(scores, queries, k_tiles + k_place.stage * KEY_BYTES);
      wgmma_commit();
      wgmma_wait<0>();
      if (thread == 0) barrier_arrive(k_empty + 8 * k_place.stage);
      k_place.advance();
      limit_scores(tile.end - 1);
      exponentials();
      round_weights();
      for (int n = tile.end - 2; n >= tile.begin; --n) {
        barrier_wait(k_full + 8 * k_place.stage, k_place.phase);
        if (CONSUMERS > 1) asm volatile("bar.sync %0, 256;" ::"r"(1 + consumer) : "memory");
        wgmma_fence();
        multiply_keys(scores, queries, k_tiles + k_place.stage * KEY_BYTES);
        wgmma_commit();
        barrier_wait(v_full + 8 * v_place.stage, v_place.phase);
        wgmma_fence();
        multiply_values(sums, weights, v_tiles + v_place.stage * VALUE_BYTES);
        wgmma_commit();
        if (CONSUMERS > 1)
          asm volatile("bar.arrive %0, 256;" ::"r"(1 + (consumer + 1) % CONSUMERS) : "memory");
        wgmma_wait<1>();
        if (thread == 0) barrier_arrive(k_empty + 8 * k_place.stage);
        k_place.advance();
        limit_scores(n);
        exponentials();
        wgmma_wait<0>();
        if (thread == 0) barrier_arrive(v_empty + 8 * v_place.stage);
        v_place.advance();
#pragma unroll
        for (int i = 0; i < VALUE_DIM / 2; ++i) sums[i] *= shrink[i / 2 % 2];
        round_weights();
      }
      if (thread == 0) barrier_arrive(q_empty);
      barrier_wait(v_full + 8 * v_place.stage, v_place.phase);
      wgmma_fence();
      multiply_values(sums, weights, v_tiles + v_place.stage * VALUE_BYTES);
      wgmma_commit();
      wgmma_wait<0>();
      if (thread == 0) barrier_arrive(v_empty + 8 * v_place.stage);
      v_place.advance();
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += __shfl_xor_sync(~0u, total[r], 1);
      total[r] += __shfl_xor_sync(~0u, total[r], 2);
      float factor = total[r] > 0.0f ? 1.0f / total[r] : 0.0f;
      int index = tile.block * BLOCK_M + row + 8 * r;
      if (index >= tile.queries) continue;
      index += tile.first_query;
      int row_of_batch = VARLEN ? 0 : tile.batch;
      unsigned short* line = out + row_of_batch * out_stride_b + tile.head * out_stride_h +
                             index * out_stride_s + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < VALUE_DIM / 8; ++i)
        *reinterpret_cast<unsigned*>(line + 8 * i) =
            pack(sums[4 * i + 2 * r] * factor, sums[4 * i + 2 * r + 1] * factor);
#if LSE
      if (lane % 4 == 0)
        lse[((long long)row_of_batch * sizes.heads + tile.head) * sizes.queries + index] =
            total[r] > 0.0f ? (top[r] * unit + __log2f(total[r])) * LN2
                            : __int_as_float(0xff800000);
#endif
    }
  }
}
