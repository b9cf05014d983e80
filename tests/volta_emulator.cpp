// The Volta kernels on the CPU (see cuda_emulator.h). KERNEL_SOURCE is included with its machine
// instructions replaced by those here: fragments of the matrix instruction are as in the PTX ISA,
// "Matrix fragments for mma.m8n8k4".

#include "cuda_emulator.h"

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
static struct Floats {
  float of_bits[1 << 16];
  Floats() {
    for (int i = 0; i < 1 << 16; ++i) {
      const unsigned short bits = i;
      _Float16 y;
      memcpy(&y, &bits, 2);
      of_bits[i] = static_cast<float>(y);
    }
  }
} floats;
static inline float from_half(unsigned short bits) { return floats.of_bits[bits]; }
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
