// Decode attention on a CPU: few query tokens over many keys, which are read once and in order.
//
// What it takes is the time of reading keys and values. Keys are divided into spans, which threads
// take in order, each thread a part of the memory of its own first (the part that it touched first,
// so that it lies near), then what others have left. Whoever ends the last span of a key head merges
// the spans of that head by their log-sum-exp. The instruction set is chosen when a job runs.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#endif

namespace {

struct BF16 { uint16_t bits; };
struct F16 { uint16_t bits; };
struct I8 { int8_t code; };
enum Type { TYPE_F32, TYPE_BF16, TYPE_F16, TYPE_I8 };
enum Level { LEVEL_ANY, LEVEL_PLAIN, LEVEL_AVX2, LEVEL_AVX512, LEVEL_AVX512_BF16 };

constexpr int BLOCK = 64;       // keys whose scores are computed before their values are read
constexpr int SPANS = 8;        // spans a thread, at least, where there are keys enough
constexpr int LEAST_SPAN = 256, MOST_SPAN = 4096;

inline float as_float(float x) { return x; }
inline float as_float(I8 x) { return x.code; }
inline float as_float(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float as_float(F16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t exponent = (x.bits >> 10) & 31, fraction = x.bits & 1023;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -value : value;
  }
  const uint32_t bits =
      sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline int padded_dim(int dim) { return (dim + 15) / 16 * 16; }
// Into the second cache: the first is full of what is computed with, and has few lines on their way.
inline void prefetch(const char* address) { __builtin_prefetch(address, 0, 2); }

// Query rows of one key head, and where its keys and values lie.
struct Span {
  const float* q;       // [rows, padded dim]
  const BF16* q_pairs;  // [rows, dim], or null
  const float* q_sum;   // [rows]: of codes
  const char* k;
  const char* v;
  int64_t k_row, v_row;  // bytes
  int rows, dim, width;
  int start;        // the slot that lies at `k` and `v`
  const int* low;   // [rows]: the slots that a row sees
  const int* high;
  float scale, softcap;
  float* top;    // [rows]
  float* total;  // [rows]
  float* correction;  // [rows]
  float* acc;    // [rows, padded width]
};

namespace plain {
#include "host_vectors.h"
#include "host_block.h"
}  // namespace plain

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define ISA_AVX2
namespace avx2 {
#include "host_vectors.h"
#include "host_block.h"
}  // namespace avx2
#undef ISA_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define ISA_AVX512
namespace avx512 {
#include "host_vectors.h"
#include "host_block.h"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
#define ISA_AVX512_BF16
namespace avx512_bf16 {
#include "host_vectors.h"
#include "host_block.h"
}  // namespace avx512_bf16
#undef ISA_AVX512_BF16
#undef ISA_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

int best_level() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return LEVEL_PLAIN;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return LEVEL_AVX2;
  return __builtin_cpu_supports("avx512bf16") ? LEVEL_AVX512_BF16 : LEVEL_AVX512;
}

void attend_span(int level, int type, const Span& span, int begin, int end, char* scratch) {
  if (level == LEVEL_AVX512_BF16) avx512_bf16::attend(type, span, begin, end, scratch);
  else if (level == LEVEL_AVX512) avx512::attend(type, span, begin, end, scratch);
  else if (level == LEVEL_AVX2) avx2::attend(type, span, begin, end, scratch);
  else plain::attend(type, span, begin, end, scratch);
}

uint64_t sum_words(int level, const char* from, int64_t bytes) {
  return level >= LEVEL_AVX512 ? avx512::sum_words(from, bytes)
         : level == LEVEL_AVX2 ? avx2::sum_words(from, bytes)
                               : plain::sum_words(from, bytes);
}

#else

int best_level() { return LEVEL_PLAIN; }

void attend_span(int, int type, const Span& span, int begin, int end, char* scratch) {
  plain::attend(type, span, begin, end, scratch);
}

uint64_t sum_words(int, const char* from, int64_t bytes) { return plain::sum_words(from, bytes); }

#endif

// Numbers too small to be normal count as 0 while this lives: weights of keys that nobody attends to
// are such numbers, and processors take a hundred times as long for them.
class TinyIsZero {
 public:
#if defined(__x86_64__)
  TinyIsZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~TinyIsZero() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
#endif
};

// Threads that sleep between jobs, after a while of waiting awake.
class Pool {
 public:
  Pool(int threads, bool pin) : count_(std::max(threads, 1)) {
    for (int i = 1; i < count_; ++i) threads_.emplace_back([this, i, pin] { work(i, pin); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  int count() const { return count_; }

  // Runs `job(number)` in every thread, the caller's among them, and waits for all.
  template <class Job>
  void run(const Job& job) {
    std::lock_guard<std::mutex> alone(caller_);
    call_ = [](const void* what, int number) { (*static_cast<const Job*>(what))(number); };
    job_ = &job;
    left_.store(count_ - 1, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (count_ > 1) wake_.notify_all();
    job(0);
    for (int turn = 0; left_.load(std::memory_order_acquire) > 0; ++turn)
      if (turn > 1000) std::this_thread::yield();
  }

 private:
  void work(int number, bool pin) {
    if (pin) pin_to(number);
    uint64_t seen = 0;
    for (;;) {
      uint64_t now = generation_.load(std::memory_order_acquire);
      for (int turn = 0; now == seen && turn < 4000; ++turn) {
#if defined(__x86_64__)
        _mm_pause();
#endif
        now = generation_.load(std::memory_order_acquire);
      }
      if (now == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        now = generation_.load(std::memory_order_acquire);
      }
      seen = now;
      if (stop_) return;
      call_(job_, number);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  // A thread stays on one of the processors that this process may use.
  static void pin_to(int number) {
#if defined(__linux__)
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) return;
    const int total = CPU_COUNT(&allowed);
    int place = total ? number % total : 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &allowed) && place-- == 0) {
        CPU_ZERO(&one);
        CPU_SET(cpu, &one);
        pthread_setaffinity_np(pthread_self(), sizeof one, &one);
        return;
      }
#else
    (void)number;
#endif
  }

  const int count_;
  std::vector<std::thread> threads_;
  std::mutex caller_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> left_{0};
  void (*call_)(const void*, int) = nullptr;
  const void* job_ = nullptr;
  bool stop_ = false;
};

// A row of items for threads: each takes those of its own part, then what others have left.
class Items {
 public:
  Items(int64_t total, int threads)
      : total_(total), threads_(threads), next_(new Next[threads]) {
    for (int t = 0; t < threads; ++t) next_[t].value.store(begin(t), std::memory_order_relaxed);
  }

  template <class Run>
  void take(int thread, const Run& run) {
    for (int turn = 0; turn < threads_; ++turn) {
      const int owner = (thread + turn) % threads_;
      const int64_t end = begin(owner + 1);
      for (;;) {
        const int64_t item = next_[owner].value.fetch_add(1, std::memory_order_relaxed);
        if (item >= end) break;
        run(item);
      }
    }
  }

 private:
  struct alignas(64) Next { std::atomic<int64_t> value{0}; };
  int64_t begin(int thread) const { return total_ * thread / threads_; }
  const int64_t total_;
  const int threads_;
  std::unique_ptr<Next[]> next_;
};

}  // namespace

// What one attention needs; the fields stand in `graphopt.runtime.host_attention.Job` too.
struct Job {
  const void* q;      // [B, H, S, D], of q_type, without gaps
  const void* new_k;  // [B, G, S, k_row] bytes: appended behind the keys of each row; or null
  const void* new_v;  // [B, G, S, v_row] bytes
  void* k;            // [pieces, B, G, piece, k_row] bytes
  void* v;            // [pieces, B, G, piece, v_row] bytes
  const int32_t* lens;  // [B]: tokens before the step
  const float* sinks;   // [H], or null
  float* out;           // [B, H, S, Dv]
  float* lse;           // [B, H, S]
  int64_t k_head, v_head;  // bytes from one key head to the next
  int64_t k_row, v_row;    // bytes from one key to the next
  int64_t k_piece, v_piece;  // bytes from one piece to the next
  int32_t batch, heads, key_heads, queries, dim, width;
  int32_t first;    // the token in slot 0
  int32_t slots;    // of all pieces
  int32_t piece;    // slots of a piece
  int32_t begin;    // the first slot that is read
  int32_t own;      // whether the step's own tokens are in memory: each query sees those up to its own
  int32_t window;   // keys that a query sees, its own included; 0 for all
  int32_t q_type, kv_type;
  float scale, softcap;  // softcap 0 for none
  int32_t level;    // the instruction set; LEVEL_ANY for the best
  int32_t append_only;
  int32_t failed;   // set where there was no memory
};

namespace {

// Neighbouring slots of a piece; `head` is the row of the batch times G, and the key head.
struct Chunk { int32_t head, begin, end, part; };

// Scratch of a thread, kept from job to job.
char* scratch_of(size_t bytes) {
  thread_local std::unique_ptr<char, void (*)(void*)> held(nullptr, std::free);
  thread_local size_t size = 0;
  if (bytes > size) {
    size = (bytes + 4095) / 4096 * 4096;
    held.reset(static_cast<char*>(std::aligned_alloc(64, size)));
    if (held == nullptr) size = 0;
  }
  return held.get();
}

void append(const Job& job) {
  const int heads = job.batch * job.key_heads;
  for (int head = 0; head < heads; ++head)
    for (int i = 0; i < job.queries; ++i) {
      const int64_t slot = static_cast<int64_t>(job.lens[head / job.key_heads]) + i - job.first;
      if (slot < 0 || slot >= job.slots) continue;
      const int64_t from = static_cast<int64_t>(head) * job.queries + i;
      const int64_t piece = slot / job.piece, place = slot % job.piece;
      std::memcpy(
          static_cast<char*>(job.k) + piece * job.k_piece + head * job.k_head + place * job.k_row,
          static_cast<const char*>(job.new_k) + from * job.k_row, job.k_row);
      std::memcpy(
          static_cast<char*>(job.v) + piece * job.v_piece + head * job.v_head + place * job.v_row,
          static_cast<const char*>(job.new_v) + from * job.v_row, job.v_row);
    }
}

float q_at(const Job& job, int64_t index) {
  if (job.q_type == TYPE_F32) return static_cast<const float*>(job.q)[index];
  if (job.q_type == TYPE_BF16) return as_float(static_cast<const BF16*>(job.q)[index]);
  return as_float(static_cast<const F16*>(job.q)[index]);
}

void attend(Job& job, Pool& pool) {
  const int group = job.heads / job.key_heads, rows = group * job.queries;
  const int heads = job.batch * job.key_heads;
  const int dim = padded_dim(job.dim), width = padded_dim(job.width);
  const int level = job.level == LEVEL_ANY ? best_level() : job.level;
  const float none = -std::numeric_limits<float>::infinity();

  // The slots that each row of queries sees, and those that any of a key head's does.
  std::vector<int> low(job.batch * job.queries), high(job.batch * job.queries);
  std::vector<Chunk> chunks;
  int64_t total = 0;
  std::vector<int> begins(job.batch), ends(job.batch);
  for (int b = 0; b < job.batch; ++b) {
    begins[b] = job.slots, ends[b] = 0;
    for (int i = 0; i < job.queries; ++i) {
      const int64_t position = static_cast<int64_t>(job.lens[b]) + i;
      const int64_t seen = (job.own ? position + 1 : job.lens[b]) - job.first;
      const int64_t oldest = job.window > 0 ? position - job.window + 1 - job.first : 0;
      const int64_t from = std::max<int64_t>(oldest, job.begin);
      const int last = static_cast<int>(std::clamp<int64_t>(seen, 0, job.slots));
      const int start = static_cast<int>(std::clamp<int64_t>(from, 0, last));
      low[b * job.queries + i] = start, high[b * job.queries + i] = last;
      begins[b] = std::min(begins[b], start), ends[b] = std::max(ends[b], last);
    }
    begins[b] = std::min(begins[b], ends[b]);
    total += static_cast<int64_t>(ends[b] - begins[b]) * job.key_heads;
  }
  const int64_t wanted = total / (static_cast<int64_t>(pool.count()) * SPANS);
  const int span = static_cast<int>(
      std::clamp<int64_t>((wanted + BLOCK - 1) / BLOCK * BLOCK, LEAST_SPAN, MOST_SPAN));
  std::vector<int> first_chunk(heads + 1);
  for (int head = 0; head < heads; ++head) {
    first_chunk[head] = static_cast<int>(chunks.size());
    const int b = head / job.key_heads;
    for (int begin = begins[b]; begin < ends[b];) {
      const int end = std::min({begin + span, ends[b], (begin / job.piece + 1) * job.piece});
      chunks.push_back({head, begin, end, static_cast<int32_t>(chunks.size())});
      begin = end;
    }
  }
  first_chunk[heads] = static_cast<int>(chunks.size());
  // In the order of memory.
  std::stable_sort(chunks.begin(), chunks.end(), [&](const Chunk& a, const Chunk& b) {
    return a.begin / job.piece < b.begin / job.piece;
  });

  // Queries as floats, the query heads of a key head beside each other, their tokens inside.
  const bool pairs = job.q_type == TYPE_BF16 && job.kv_type == TYPE_BF16 && job.dim % 32 == 0;
  std::vector<float> q(static_cast<size_t>(heads) * rows * dim, 0.0f), q_sum(heads * rows, 0.0f);
  std::vector<BF16> q_pairs(pairs ? static_cast<size_t>(heads) * rows * job.dim : 0);
  for (int row = 0; row < heads * rows; ++row)
    for (int d = 0; d < job.dim; ++d) {
      const int64_t from = static_cast<int64_t>(row) * job.dim + d;
      const float value = q_at(job, from);
      q[static_cast<size_t>(row) * dim + d] = value;
      q_sum[row] += value;
      if (pairs) q_pairs[from] = static_cast<const BF16*>(job.q)[from];
    }
  std::vector<int> row_low(static_cast<size_t>(job.batch) * rows), row_high(row_low.size());
  for (int b = 0; b < job.batch; ++b)
    for (int row = 0; row < rows; ++row) {
      row_low[b * rows + row] = low[b * job.queries + row % job.queries];
      row_high[b * rows + row] = high[b * job.queries + row % job.queries];
    }

  // What each chunk makes: for each row its maximum, sum and accumulator.
  const size_t part = static_cast<size_t>(rows) * (width + 2);
  std::vector<float> parts(chunks.size() * part);
  std::unique_ptr<std::atomic<int>[]> left(new std::atomic<int>[heads]);
  for (int head = 0; head < heads; ++head)
    left[head].store(first_chunk[head + 1] - first_chunk[head], std::memory_order_relaxed);

  const auto merge = [&](int head) {
    for (int row = 0; row < rows; ++row) {
      // Row `h S + i` of a key head is query head h, token i: as they lie in the output.
      const int64_t place = static_cast<int64_t>(head) * rows + row;
      const float* sink =
          job.sinks == nullptr
              ? nullptr
              : job.sinks + (head % job.key_heads) * group + row / job.queries;
      float top = sink == nullptr ? none : *sink;
      for (int c = first_chunk[head]; c < first_chunk[head + 1]; ++c)
        top = std::max(top, parts[c * part + row]);
      float* out = job.out + place * job.width;
      std::fill(out, out + job.width, 0.0f);
      if (top == none) {
        job.lse[place] = none;
        continue;
      }
      double sum = sink == nullptr ? 0.0 : std::exp(*sink - top);
      for (int c = first_chunk[head]; c < first_chunk[head + 1]; ++c) {
        const float* own = &parts[c * part];
        if (own[row] == none) continue;
        const float weight = std::exp(own[row] - top);
        const float* acc = own + 2 * rows + static_cast<size_t>(row) * width;
        sum += static_cast<double>(weight) * own[rows + row];
        for (int d = 0; d < job.width; ++d) out[d] += weight * acc[d];
      }
      const float share = static_cast<float>(1.0 / sum);
      for (int d = 0; d < job.width; ++d) out[d] *= share;
      job.lse[place] = top + static_cast<float>(std::log(sum));
    }
  };
  for (int head = 0; head < heads; ++head)
    if (first_chunk[head] == first_chunk[head + 1]) merge(head);

  Items items(static_cast<int64_t>(chunks.size()), pool.count());
  std::atomic<int> failed{0};
  const size_t widest = std::max(dim, width);
  const size_t scratch_bytes =
      sizeof(float) * (static_cast<size_t>(rows) * (BLOCK + 2) + 4 * BLOCK + BLOCK * widest + 64);
  pool.run([&](int thread) {
    const TinyIsZero mode;
    char* scratch = scratch_of(scratch_bytes);
    items.take(thread, [&](int64_t index) {
      const Chunk& chunk = chunks[index];
      float* own = &parts[chunk.part * part];
      if (scratch == nullptr) {
        failed.store(1);
        return;
      }
      std::fill(own, own + rows, none);
      std::fill(own + rows, own + part, 0.0f);
      Span s;
      const int b = chunk.head / job.key_heads;
      s.q = &q[static_cast<size_t>(chunk.head) * rows * dim];
      s.q_pairs = pairs ? &q_pairs[static_cast<size_t>(chunk.head) * rows * job.dim] : nullptr;
      s.q_sum = &q_sum[chunk.head * rows];
      const int64_t piece = chunk.begin / job.piece, start = piece * job.piece;
      s.k = static_cast<const char*>(job.k) + piece * job.k_piece + chunk.head * job.k_head;
      s.v = static_cast<const char*>(job.v) + piece * job.v_piece + chunk.head * job.v_head;
      s.start = static_cast<int>(start);
      s.k_row = job.k_row, s.v_row = job.v_row;
      s.rows = rows, s.dim = job.dim, s.width = job.width;
      s.low = &row_low[b * rows], s.high = &row_high[b * rows];
      s.scale = job.scale, s.softcap = job.softcap;
      s.top = own, s.total = own + rows, s.acc = own + 2 * rows;
      s.correction = reinterpret_cast<float*>(scratch);
      std::fill(s.correction, s.correction + rows, 0.0f);
      attend_span(level, job.kv_type, s, static_cast<int>(chunk.begin - start),
                  static_cast<int>(chunk.end - start),
                  scratch + sizeof(float) * ((rows + 15) / 16 * 16));
      if (left[chunk.head].fetch_sub(1, std::memory_order_acq_rel) == 1) merge(chunk.head);
    });
  });
  job.failed |= failed.load();
}

std::mutex pool_mutex;
Pool* the_pool = nullptr;  // kept to the end of the process: nobody joins threads there
int wanted_threads = 0;

Pool& pool() {
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (the_pool == nullptr) {
#if defined(__linux__)
    // A child of fork has none of the threads, and makes its own.
    static const int once = pthread_atfork(nullptr, nullptr, [] { the_pool = nullptr; });
    (void)once;
#endif
    int threads = wanted_threads;
#if defined(__linux__)
    cpu_set_t allowed;
    const int here =
        sched_getaffinity(0, sizeof allowed, &allowed) ? 1 : CPU_COUNT(&allowed);
#else
    const int here = static_cast<int>(std::thread::hardware_concurrency());
#endif
    // One is left to whoever waits for the device, of many.
    if (threads <= 0) threads = here < 8 ? here : here - 1;
    the_pool = new Pool(threads, threads > 1 && threads <= here);
  }
  return *the_pool;
}

}  // namespace

extern "C" {

// Threads of all jobs from now on; 0 for the processors of this process, less one where they are many.
void graphopt_set_threads(int threads) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  wanted_threads = threads;
  delete the_pool;
  the_pool = nullptr;
}

int graphopt_threads() { return pool().count(); }

int graphopt_level() { return best_level(); }

// Runs a job: attention over what is there, and the step's keys and values put behind it. The step's
// own tokens are seen only where `own` says that they are.
void graphopt_host_step(void* given) {
  Job& job = *static_cast<Job*>(given);
  try {
    if (job.new_k != nullptr && job.own) append(job);
    if (!job.append_only) attend(job, pool());
    if (job.new_k != nullptr && !job.own) append(job);
  } catch (const std::bad_alloc&) {
    job.failed = 1;
  }
}

// Memory of zeros, in large pages where the system has them, each part touched first by the thread
// that reads it later. Null where there is not enough.
void* graphopt_host_allocate(int64_t bytes, int64_t part) {
#if defined(__linux__)
  void* made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (made == MAP_FAILED) return nullptr;
  madvise(made, bytes, MADV_HUGEPAGE);
#else
  void* made = std::malloc(bytes);
  if (made == nullptr) return nullptr;
#endif
  char* start = static_cast<char*>(made);
  Pool& threads = pool();
  const int64_t pages = 2097152;
  for (int64_t from = 0; from < bytes; from += part) {
    const int64_t size = std::min(part, bytes - from);
    Items items((size + pages - 1) / pages, threads.count());
    threads.run([&](int thread) {
      items.take(thread, [&](int64_t page) {
        const int64_t begin = from + page * pages;
        std::memset(start + begin, 0, std::min(pages, from + size - begin));
      });
    });
  }
  return made;
}

void graphopt_host_free(void* memory, int64_t bytes) {
#if defined(__linux__)
  munmap(memory, bytes);
#else
  (void)bytes;
  std::free(memory);
#endif
}

// Reads memory by all threads and returns a sum of it.
uint64_t graphopt_host_sum(const void* memory, int64_t bytes) {
  const int64_t part = 1 << 20;
  Pool& threads = pool();
  Items items((bytes + part - 1) / part, threads.count());
  std::atomic<uint64_t> sum{0};
  const int level = best_level();
  threads.run([&](int thread) {
    uint64_t own = 0;
    items.take(thread, [&](int64_t index) {
      const int64_t begin = index * part;
      own += sum_words(level, static_cast<const char*>(memory) + begin,
                       std::min(part, bytes - begin));
    });
    sum.fetch_add(own, std::memory_order_relaxed);
  });
  return sum.load();
}

}  // extern "C"
