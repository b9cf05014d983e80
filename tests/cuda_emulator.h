// Runs a CUDA kernel on the CPU, one fiber a thread, lanes of a warp in step where the kernel
// exchanges data. What includes this defines the machine instructions of its kernel, and then
// includes the kernel's source without them.
//
// Fibers change places by _setjmp and _longjmp, which leave the signal mask, a call of the system,
// alone; and headers are few, since this is compiled anew for every set of constants.
//
// What it shows: index arithmetic, layouts, barriers that are missing where another warp would
// still read (fibers of a block run in a changed order from barrier to barrier), reads of shared
// memory that was never written (it holds NaN). What it cannot show: anything of the compiler.

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }

struct Index { unsigned x, y, z; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }

static Index threadIdx, blockIdx, blockDim, gridDim;
static constexpr int SHARED_LIMIT = 232448, GUARD = 4096;
alignas(1024) unsigned char shared[SHARED_LIMIT + GUARD];

namespace emulator {

struct Barrier { int arrived = 0, wanted = 0; unsigned turn = 0; };
struct Slot { unsigned words[4]; };
struct Warp { Barrier barrier; Slot slots[2][32]; unsigned parity[32]; };

static constexpr size_t STACK = 256 * 1024;
static constexpr int MOST = 1024;  // threads of a block

// A thread's fiber, which runs the body once for every block.
struct Fiber { ucontext_t start; jmp_buf place; char* stack; bool started, done; };

static jmp_buf scheduler;
static Fiber fibers[MOST];
static Warp warps[MOST / 32];
static Barrier block;
static int current;
static void (*body)();

static void yield() {
  const int me = current;
  if (!_setjmp(fibers[me].place)) _longjmp(scheduler, 1);
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

static void live() {
  for (;;) {
    body();
    fibers[current].done = true;
    --block.wanted;  // a thread that has returned is not waited for
    if (block.wanted && block.arrived == block.wanted) { block.arrived = 0; ++block.turn; }
    yield();
  }
}

// Lets a fiber go on until it yields.
static void enter(int number) {
  Fiber& fiber = fibers[number];
  current = number;
  threadIdx = {static_cast<unsigned>(number), 0, 0};
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  fiber.stack = new char[STACK];
  getcontext(&fiber.start);
  fiber.start.uc_stack = {fiber.stack, 0, STACK};
  makecontext(&fiber.start, live, 0);
  setcontext(&fiber.start);
}

static void run_block(int threads, unsigned seed) {
  memset(warps, 0, sizeof warps);
  for (Warp& warp : warps) warp.barrier.wanted = 32;
  block = {0, threads, 0};
  for (int i = 0; i < threads; ++i) fibers[i].done = false;
  const int count = threads / 32;
  int first = 0;
  for (bool left = true; left;) {
    left = false;
    seed = seed * 1664525u + 1013904223u;
    first = (first + (seed >> 16) % count) % count;
    for (int turn = 0; turn < count; ++turn) {
      const int warp = (first + turn) % count;
      // A warp goes on for a while before the next may: that is how missing barriers show.
      for (int round = 0; round < 1 + static_cast<int>((seed >> 8) % 64); ++round) {
        for (int i = 32 * warp; i < 32 * warp + 32; ++i) {
          if (fibers[i].done) continue;
          left = true;
          enter(i);
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
  bool any = false;
  for (int i = 0; i < 32; ++i) any |= slots[i].words[0] != 0;
  return any;
}
template <class T> static inline T __ldg(const T* from) {
  if (reinterpret_cast<size_t>(from) % sizeof(T)) { fputs("misaligned load\n", stderr); abort(); }
  return *from;
}
static inline float __int_as_float(int bits) { float y; memcpy(&y, &bits, 4); return y; }
static inline unsigned bits_of(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
