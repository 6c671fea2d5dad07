// Shared by the u8 x s8 kernels of x86: the problem, the epilogue of 64 output channels, and how threads share tasks.
//
// Weight layout (oneDNN's, verified byte by byte when a weight is packed): blocks of 64 output channels; inside a
// block, groups of 4 input channels, [padded K / 4][64][4]: what vpdpbusd consumes, and 16 groups by 16 channels are
// one AMX tile.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#define SQ_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define SQ_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
// every CPU with AMX has all of these
#define SQ_AMX \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16,amx-tile,amx-int8,amx-bf16")))

namespace {

constexpr int64_t kBlock = 64;       // output channels per block
constexpr int64_t kGroup = 4;        // input channels per 32-bit lane
constexpr int64_t kPrefetch = 4096;  // bytes ahead; past the end it is a no-op

struct Problem {
  const uint8_t* q;      // [m, k], zero point 128
  const int8_t* w;       // packed [n, k]
  const float* scale;    // [n]
  const int32_t* sum;    // [n], sum of each row of w
  char* y;               // [m, n], float32 or bfloat16
  bool bf16;
  int64_t m, n, k, padded_k;
  const float* factors;  // by which y is multiplied: [m] or [1]; null for none
  bool per_row;
  const void* bias;  // [n], float32 or bfloat16, which is added then; null for none
  bool half_bias;
};

// Arrays, all dense: q, w, scale, sum, y, factors, bias. Numbers: whether y is bfloat16, m, n, k, padded k, whether there is a
// factor per row, whether bias is bfloat16; then, for others, the number of threads.
inline Problem problem_of(const void* const* a, const int64_t* n) {
  return {static_cast<const uint8_t*>(a[0]), static_cast<const int8_t*>(a[1]), static_cast<const float*>(a[2]),
          static_cast<const int32_t*>(a[3]), static_cast<char*>(const_cast<void*>(a[4])), n[0] != 0, n[1], n[2], n[3], n[4],
          static_cast<const float*>(a[5]), n[5] != 0, a[6], n[6] != 0};
}

// Tasks [0, count) for the threads of a parallel region. Each begins with a range of its own: about the same rows in every
// product, and in what makes and reads them (rows.cpp), where there are many. They are in its cache, and lines that another
// core wrote cost more to read than the products do. A thread that is done takes tasks of the others, so that a core that is
// busy with something else does not hold all.
class Shares {
 public:
  Shares(int64_t count, int64_t threads) : count_(count), taken_(threads) {}

  template <class Run>
  void work(Run run) {
    const int64_t threads = static_cast<int64_t>(taken_.size());
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t whose = (omp_get_thread_num() + i) % threads;
      const int64_t first = whose * count_ / threads, end = (whose + 1) * count_ / threads;
      std::atomic<int64_t>& taken = taken_[whose].tasks;
      if (first + taken.load(std::memory_order_relaxed) >= end) continue;  // many threads may read it at once
      for (int64_t t; (t = first + taken.fetch_add(1, std::memory_order_relaxed)) < end;) run(t);
    }
  }

 private:
  struct alignas(64) Taken {
    std::atomic<int64_t> tasks{0};
  };
  int64_t count_;
  std::vector<Taken> taken_;
};

// Tasks of a product with many rows: panels of rows that fit the L2 cache, by groups of blocks of 64 outputs.
struct Panels {
  static constexpr int64_t kFewest = 128;      // rows, where there are as many: fewer do not repay reading the weight
  static constexpr int64_t kMost = 512;        // rows
  static constexpr int64_t kCached = 1 << 20;  // bytes of the activations of a panel
  static constexpr int64_t kTasks = 4;         // for each thread

  Panels(const Problem& p, int64_t threads, int64_t multiple) : problem(p), blocks((p.n + kBlock - 1) / kBlock) {
    const auto up = [&](int64_t x) { return (x + multiple - 1) / multiple * multiple; };
    const int64_t fits = std::min(kMost, std::max(kFewest, kCached / p.padded_k)) / multiple * multiple;
    rows = std::min(fits, std::max(kFewest / multiple * multiple, up((p.m + threads - 1) / threads)));
    const int64_t panels = (p.m + rows - 1) / rows;
    groups = std::min(blocks, (kTasks * threads + panels - 1) / panels);
    count = panels * groups;
  }

  // Runs task t: `run` gets its first row, the row after its last, its first block, and the block after its last.
  template <class Run>
  void work(int64_t t, Run run) const {
    const int64_t row = t / groups * rows, g = t % groups;
    run(row, std::min(row + rows, problem.m), g * blocks / groups, (g + 1) * blocks / groups);
  }

  const Problem& problem;
  int64_t blocks, rows, groups, count;
};

// To bfloat16, half to even; NaN stays NaN. What cvtneps_pbh does, for CPUs that lack it.
SQ_VNNI inline __m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

// 16 values of bfloat16 as float32.
SQ_VNNI inline __m512 from_bf16(__m256i x) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

// The first `count` of 16 lanes, at least none.
inline __mmask16 lanes(int64_t count) {
  return count >= 16 ? 0xffff : static_cast<__mmask16>((1u << std::max<int64_t>(0, count)) - 1);
}

// What 16 outputs from `at` need of a weight, those that `mask` has.
struct Columns {
  SQ_VNNI Columns(const Problem& p, int64_t at, __mmask16 mask) {
    zero = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, p.sum + at), 7);
    scale = _mm512_maskz_loadu_ps(mask, p.scale + at);
    bias = _mm512_setzero_ps();
    if (!p.bias) return;
    if (p.half_bias)
      bias = from_bf16(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p.bias) + at));
    else
      bias = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p.bias) + at);
  }
  // (sum - 128 the weight's sum) * scale: the zero point comes out of the integer sum exactly.
  SQ_VNNI __m512 scaled(__m512i sum) const { return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, zero)), scale); }
  __m512i zero;
  __m512 scale, bias;
};

inline float factor_of(const Problem& p, int64_t row) { return p.factors ? p.factors[p.per_row ? row : 0] : 1.0f; }

// y[row, at : at + 64] of the sums [64].
SQ_VNNI inline void store(const Problem& p, int64_t row, int64_t at, const int32_t* sums) {
  const __m512 factor = _mm512_set1_ps(factor_of(p, row));
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    if (at + 16 * c >= p.n) break;
    const int64_t column = at + 16 * c;
    const __mmask16 mask = lanes(p.n - column);
    const Columns columns(p, column, mask);
    __m512 f = columns.scaled(_mm512_load_si512(sums + 16 * c));
    // rounded twice, as PyTorch does: Inductor has the compiler fuse no products and sums
    if (p.factors || p.bias) f = _mm512_add_ps(_mm512_mul_ps(f, factor), columns.bias);
    char* out = p.y + (row * p.n + column) * (p.bf16 ? 2 : 4);
    if (p.bf16)
      _mm256_mask_storeu_epi16(out, mask, to_bf16(f));
    else
      _mm512_mask_storeu_ps(out, mask, f);
  }
}

// The same of whole blocks in bfloat16 and rows [row, end): faster, with 0 for results below the smallest normal number.
SQ_BF16 void store_whole(const Problem& p, int64_t row, int64_t end, int64_t at, const int32_t* sums) {
  const Columns columns[4] = {{p, at, 0xffff}, {p, at + 16, 0xffff}, {p, at + 32, 0xffff}, {p, at + 48, 0xffff}};
  const bool more = p.factors || p.bias;
  char* out = p.y + 2 * (row * p.n + at);
  for (; row < end; ++row, sums += kBlock, out += 2 * p.n) {
    const __m512 factor = _mm512_set1_ps(factor_of(p, row));
    __m512 f[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      f[j] = columns[j].scaled(_mm512_load_si512(sums + 16 * j));
      if (more) f[j] = _mm512_add_ps(_mm512_mul_ps(f[j], factor), columns[j].bias);
    }
    _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(f[1], f[0]));
    _mm512_storeu_si512(out + 64, (__m512i)_mm512_cvtne2ps_pbh(f[3], f[2]));
  }
}

// y[row : end, at : at + 64] of c [end - row][64].
inline void store_rows(const Problem& p, int64_t row, int64_t end, int64_t at, const int32_t* c) {
  static const bool converts = __builtin_cpu_supports("avx512bf16");
  if (converts && p.bf16 && at + kBlock <= p.n) return store_whole(p, row, end, at, c);
  for (; row < end; ++row, c += kBlock) store(p, row, at, c);
}

}  // namespace
