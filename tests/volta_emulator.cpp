// Runs a CUDA kernel on the CPU, one fiber a thread, lanes of a warp in step where the kernel
// exchanges data. KERNEL_SOURCE is included with its machine instructions replaced by those here:
// fragments of the matrix instruction are as in the PTX ISA, "Matrix fragments for mma.m8n8k4".
//
// What it shows: index arithmetic, layouts, barriers that are missing where another warp would
// still read (fibers of a block run in a changed order from barrier to barrier), reads of shared
// memory that was never written (it holds NaN). What it cannot show: anything of the compiler.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

using std::max;
using std::min;

struct Index { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

static Index threadIdx, blockIdx, blockDim, gridDim;
static constexpr int SHARED_LIMIT = 98304, GUARD = 4096;
alignas(128) unsigned char shared[SHARED_LIMIT + GUARD];

namespace emulator {

struct Barrier { int arrived = 0, wanted = 0; unsigned turn = 0; };
struct Slot { unsigned words[4]; };
struct Warp { Barrier barrier; Slot slots[2][32]; unsigned parity[32]; };

static constexpr size_t STACK = 256 * 1024;
static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<char> done;
static std::vector<Warp> warps;
static Barrier block;
static int current;
static void (*body)();

static void yield() {
  const int me = current;
  swapcontext(&fibers[me], &scheduler);
  current = me;
  threadIdx = {static_cast<unsigned>(me), 0, 0};
}

static void arrive(Barrier& barrier) {
  const unsigned turn = barrier.turn;
  if (++barrier.arrived == barrier.wanted) {
    barrier.arrived = 0;
    ++barrier.turn;
    return;
  }
  while (barrier.turn == turn) yield();
}

// Gives every lane what all lanes of its warp have put in.
static const Slot* exchange(Slot mine) {
  Warp& warp = warps[current / 32];
  const int lane = current % 32;
  Slot* const slots = warp.slots[warp.parity[lane]++ & 1];
  slots[lane] = mine;
  arrive(warp.barrier);
  return slots;
}

static void leave() {
  body();
  done[current] = 1;
  --block.wanted;  // a thread that has returned is not waited for
  if (block.wanted && block.arrived == block.wanted) { block.arrived = 0; ++block.turn; }
  swapcontext(&fibers[current], &scheduler);
}

static void run_block(int threads, unsigned seed) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new char[STACK]);
  fibers.assign(threads, {});
  done.assign(threads, 0);
  warps.assign(threads / 32, {});
  for (Warp& warp : warps) warp.barrier.wanted = 32;
  block = {0, threads, 0};
  for (int i = 0; i < threads; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack = {stacks[i].get(), 0, STACK};
    fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], leave, 0);
  }
  std::vector<int> order(threads / 32);
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  for (bool left = true; left;) {
    left = false;
    seed = seed * 1664525u + 1013904223u;
    std::rotate(order.begin(), order.begin() + (seed >> 16) % order.size(), order.end());
    for (const int warp : order) {
      // A warp goes on for a while before the next may: that is how missing barriers show.
      for (int round = 0; round < 1 + static_cast<int>((seed >> 8) % 64); ++round) {
        for (int i = 32 * warp; i < 32 * warp + 32; ++i) {
          if (done[i]) continue;
          left = true;
          current = i;
          threadIdx = {static_cast<unsigned>(i), 0, 0};
          swapcontext(&scheduler, &fibers[i]);
        }
      }
    }
  }
}

template <class... Arguments>
struct Call {
  static void (*kernel)(Arguments...);
  static void** values;

  template <size_t... I>
  static void unpack(std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<Arguments>*>(values[I])...);
  }
  static void once() { unpack(std::index_sequence_for<Arguments...>()); }
};
template <class... Arguments> void (*Call<Arguments...>::kernel)(Arguments...);
template <class... Arguments> void** Call<Arguments...>::values;

// Returns 0, or 1 where a block wrote behind the shared memory it was given.
template <class... Arguments>
int launch(void (*kernel)(Arguments...), Index grid, int threads, int bytes, void** values) {
  Call<Arguments...>::kernel = kernel;
  Call<Arguments...>::values = values;
  body = Call<Arguments...>::once;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        memset(shared, 0xff, sizeof shared);
        run_block(threads, 12345 + x + 7 * y + 31 * z);
        for (int i = bytes; i < bytes + GUARD; ++i) {
          if (shared[i] != 0xff) return 1;
        }
      }
    }
  }
  return 0;
}

}  // namespace emulator

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))

static inline void __syncthreads() { emulator::arrive(emulator::block); }
static inline void __syncwarp() { emulator::exchange({}); }
static inline bool __any_sync(unsigned, bool mine) {
  const emulator::Slot* slots = emulator::exchange({{mine}});
  return std::any_of(slots, slots + 32, [](const emulator::Slot& s) { return s.words[0] != 0; });
}
template <class T> static inline T __ldg(const T* from) {
  if (reinterpret_cast<size_t>(from) % sizeof(T)) { fputs("misaligned load\n", stderr); abort(); }
  return *from;
}
static inline float __int_as_float(int bits) { float y; memcpy(&y, &bits, 4); return y; }
static inline unsigned bits_of(float x) { unsigned y; memcpy(&y, &x, 4); return y; }

static inline void conceal(int&) {}
static inline float exp2_of(float x) { return exp2f(x); }
static inline float log2_of(float x) { return log2f(x); }
static inline float reciprocal(float x) { return 1.0f / x; }
static inline unsigned short to_half(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  unsigned short bits;
  memcpy(&bits, &y, 2);
  return bits;
}
static inline float from_half(unsigned short bits) {
  _Float16 y;
  memcpy(&y, &bits, 2);
  return static_cast<float>(y);
}
static inline unsigned pack(float low, float high) { return to_half(low) | to_half(high) << 16; }
static inline unsigned shuffle_xor(unsigned x, int mask) {
  const int from = (emulator::current % 32) ^ mask;
  return emulator::exchange({{x}})[from].words[0];
}
static inline float shuffle_xor(float x, int mask) {
  return __int_as_float(shuffle_xor(bits_of(x), mask));
}

static inline float half_of(const unsigned* words, int i) {
  return from_half(words[i / 2] >> (i % 2 * 16) & 0xffff);
}

template <bool B_BY_ROWS>
static inline void multiply(float (&c)[8], unsigned a0, unsigned a1, unsigned b0, unsigned b1) {
  const emulator::Slot* slots = emulator::exchange({{a0, a1, b0, b1}});
  const int lane = emulator::current % 32, quadpair = lane >> 2 & 3, h = lane >> 4;
  auto lane_of = [&](int t) { return 4 * quadpair + t % 4 + 16 * (t / 4); };
  for (int i = 0; i < 8; ++i) {
    const int row = (lane & 1) + (i & 2) + 4 * h, column = (i & 4) + (lane & 2) + (i & 1);
    for (int k = 0; k < 4; ++k) {
      const float a = half_of(slots[lane_of(row)].words, k);
      const float b = B_BY_ROWS ? half_of(slots[lane_of(k + column / 4 * 4)].words + 2, column % 4)
                                : half_of(slots[lane_of(column)].words + 2, k);
      c[i] += a * b;
    }
  }
}
static inline void mma_row_col(float (&c)[8], unsigned a0, unsigned a1, unsigned b0, unsigned b1) {
  multiply<false>(c, a0, a1, b0, b1);
}
static inline void mma_row_row(float (&c)[8], unsigned a0, unsigned a1, unsigned b0, unsigned b1) {
  multiply<true>(c, a0, a1, b0, b1);
}

#include KERNEL_SOURCE

extern "C" int run(int kernel, unsigned x, unsigned y, unsigned z, int threads, int bytes,
                   void** values) {
#if DECODE
  if (kernel == 1) return emulator::launch(attention_merge, {x, y, z}, threads, bytes, values);
#endif
  return emulator::launch(KERNEL, {x, y, z}, threads, bytes, values);
}

extern "C" int place_of(int which, int row, int chunk) {
  return which ? place<ValueRows>(ValueRows::base(row), chunk)
               : place<KeyRows>(KeyRows::base(row), chunk);
}
