// The kernels for Hopper of few bits on the CPU (see cuda_emulator.h). KERNEL_SOURCE includes what
// is below MACHINE_INSTRUCTIONS in place of its own: fragments of matrix instructions are as in
// the PTX ISA, "Matrix fragments for mma.m16n8k16" and "Register fragments for wgmma".

#ifndef MACHINE_INSTRUCTIONS

#include "cuda_emulator.h"

#include <vector>

#define __grid_constant__

static inline unsigned __float_as_uint(float x) { return bits_of(x); }
static inline float __uint_as_float(unsigned bits) { return __int_as_float(bits); }

static inline float exponential(float x) { return expf(x); }
static inline float quotient(float x, float y) { return x / y; }
// 2^-11 of the result off, as the instruction may be.
static inline float rough_tanh(float x) { return tanhf(x) * (1.0f - 0x1p-11f); }

// Copies on their way: groups of what is copied when it is waited for.
struct Copy { unsigned target; const void* source; };
static std::vector<std::vector<Copy>> copies[emulator::MOST];
struct Piece { void* target; const void* source; int bytes; };
static std::vector<Piece> pieces[emulator::MOST];

#define MACHINE_INSTRUCTIONS
#include KERNEL_SOURCE

extern "C" int run(unsigned blocks, int threads, int bytes, void** values) {
  for (int i = 0; i < threads; ++i) copies[i].assign(1, {});
  return emulator::launch(KERNEL, {blocks, 1, 1}, threads, bytes, values);
}

#else

static inline unsigned short half_of(float x) {
  if (BF16) {
    unsigned bits = bits_of(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  const _Float16 y = static_cast<_Float16>(x);
  unsigned short bits;
  memcpy(&bits, &y, 2);
  return bits;
}
static inline float widened(unsigned short bits) {
  if (BF16) return __uint_as_float(static_cast<unsigned>(bits) << 16);
  _Float16 y;
  memcpy(&y, &bits, 2);
  return static_cast<float>(y);
}
static inline float first_of(word both) { return widened(both & 0xffff); }
static inline float second_of(word both) { return widened(both >> 16); }
static inline word pair(float first, float second) {
  return half_of(first) | static_cast<word>(half_of(second)) << 16;
}
static inline word product(word x, word y) {
  return pair(first_of(x) * first_of(y), second_of(x) * second_of(y));
}
static inline word two_codes(word bits, word less) {
  const word behind = (bits & 0x000f000f) ^ (BF16 ? 0x43084308 : 0x64086408);
  return pair(first_of(behind) + first_of(less), second_of(behind) + second_of(less));
}
static inline word spread(word bytes, bool second) {
  const word two = second ? bytes >> 16 : bytes;
  return (two & 0xff) | (two & 0xff00) << 8;
}
static inline float element(const unsigned* words, int i, int k) {
  return widened(words[i] >> (k % 2 * 16) & 0xffff);
}
static inline void multiply(float (&sums)[4], word left_0, word left_1, word left_2, word left_3,
                            word right_0, word right_1) {
  const emulator::Slot* slots = emulator::exchange({{left_0, left_1, left_2, left_3}});
  emulator::Slot left[32];
  memcpy(left, slots, sizeof left);
  slots = emulator::exchange({{right_0, right_1}});
  const int lane = emulator::current % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
    float sum = 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float a = element(left[row % 8 * 4 + k % 8 / 2].words, row / 8 + k / 8 * 2, k);
      sum += a * element(slots[column * 4 + k % 8 / 2].words, k / 8, k);
    }
    sums[i] += sum;
  }
}
// Of a warpgroup's product a warp has the 16 rows of its own left side.
template <int COUNT>
static inline void add_product(float (&sums)[COUNT], const word (&left)[4], unsigned right,
                               bool add) {
  const emulator::Slot* slots = emulator::exchange({{left[0], left[1], left[2], left[3]}});
  const int lane = emulator::current % 32;
  for (int i = 0; i < COUNT; ++i) {
    const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
    float sum = add ? sums[i] : 0.0f;
    for (int k = 0; k < 16; ++k) {
      const float a = element(slots[row % 8 * 4 + k % 8 / 2].words, row / 8 + k / 8 * 2, k);
      // A row's 16 bytes change places by the row's number among eight.
      unsigned at = right + column / 8 * 1024 + column % 8 * 128 + 2 * k;
      at ^= (at >> 7 & 7) << 4;
      unsigned short bits;
      memcpy(&bits, shared + at, 2);
      sum += a * widened(bits);
    }
    sums[i] = sum;
  }
}
static inline void let_products_see() {}
static inline void begin_products() {}
static inline void wait_for_products() {}
static inline uint4 sixteen_bytes(const unsigned char* at) {
  return __ldg(reinterpret_cast<const uint4*>(at));
}
static inline unsigned short of_lane(unsigned short value, int lane) {
  return emulator::exchange({{value}})[lane].words[0];
}
static inline float of_lane_across(float value, int distance) {
  const int from = emulator::current % 32 ^ distance;
  return __uint_as_float(emulator::exchange({{bits_of(value)}})[from].words[0]);
}
// Of four matrices of 8 x 8 a lane says where a row of one begins.
static inline void load_matrices(word (&values)[4], const half_bits* row, bool turned = false) {
  if (reinterpret_cast<size_t>(row) % 16) {
    fputs("misaligned matrix\n", stderr);
    abort();
  }
  emulator::Slot mine;
  memcpy(&mine, &row, sizeof row);
  const emulator::Slot* slots = emulator::exchange(mine);
  const int lane = emulator::current % 32, one = lane / 4, two = 2 * (lane % 4);
  for (int matrix = 0; matrix < 4; ++matrix) {
    auto element = [&](int i, int j) -> word {
      const half_bits* from;
      memcpy(&from, &slots[8 * matrix + i], sizeof from);
      return from[j];
    };
    values[matrix] = turned ? element(two, one) | element(two + 1, one) << 16
                            : element(one, two) | element(one, two + 1) << 16;
  }
}
static inline void load_turned(word (&values)[4], const half_bits* row) {
  load_matrices(values, row, true);
}
static inline void store_turned(half_bits* row, const word (&values)[4]) {
  const emulator::Slot* slots = emulator::exchange({{values[0], values[1], values[2], values[3]}});
  const int lane = emulator::current % 32;
  for (int i = 0; i < 8; ++i)
    row[i] = slots[4 * i + lane % 8 / 2].words[lane / 8] >> (lane % 2 * 16);
}
// On their way until they are waited for.
template <int BYTES>
static inline void send_piece(half_bits* target, const half_bits* source) {
  if (reinterpret_cast<size_t>(target) % BYTES || reinterpret_cast<size_t>(source) % BYTES) {
    fputs("misaligned copy\n", stderr);
    abort();
  }
  pieces[emulator::current].push_back({target, source, BYTES});
}
static inline void wait_for_pieces() {
  for (const Piece& piece : pieces[emulator::current])
    memcpy(piece.target, piece.source, piece.bytes);
  pieces[emulator::current].clear();
}
static inline void let_start() {}
// An address that is not there would end the test.
static inline void bring_near(const void* at) { (void)*static_cast<const volatile char*>(at); }
static inline void wait_for_front() {}
static inline unsigned shared_address(const void* pointer) {
  return static_cast<const unsigned char*>(pointer) - shared;
}
static inline void send_for(unsigned target, const void* source) {
  if (target % 16 || reinterpret_cast<size_t>(source) % 16) {
    fputs("misaligned copy\n", stderr);
    abort();
  }
  copies[emulator::current].back().push_back({target, source});
}
static inline void commit_copies() { copies[emulator::current].emplace_back(); }
template <int PENDING>
static inline void wait_for_copies() {
  auto& groups = copies[emulator::current];
  while (groups.size() > PENDING + 1) {
    for (const Copy& copy : groups.front()) memcpy(shared + copy.target, copy.source, 16);
    groups.erase(groups.begin());
  }
}
static inline word low_halves(word first, word second) {
  word both = 0;
  for (int i = 0; i < 8; ++i)
    both |= ((i < 4 ? first : second) >> (i % 4 * 8) & 15) << (4 * i);
  return both;
}
static inline float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
static inline void write_through(uint4* at, uint4 value) { *at = value; }

#endif
