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
};

// Tasks [0, count) for the threads of a parallel region. Each begins with a range of its own: about the same rows in every
// product, and in what makes and reads them (rows.cpp), where there are many. They are in its cache, and lines that another
// core wrote cost more to read than the products do. A thread that is done takes tasks of the others, so that a core that is busy with something else does not
// hold all.
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

// Rounds float32 to bfloat16, half to even. The values are finite: int32 times a finite scale.
SQ_VNNI inline __m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// y[row, at : at + 64] = (acc - 128 sum) * scale; the zero point comes out of the integer sum exactly.
SQ_VNNI inline void store(const Problem& p, int64_t row, int64_t at, const __m512i (&acc)[4]) {
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    if (at + 16 * c >= p.n) break;
    const int64_t column = at + 16 * c, left = p.n - column;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
    const __m512i zero = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, p.sum + column), 7);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, p.scale + column);
    const __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(acc[c], zero)), scale);
    char* out = p.y + (row * p.n + column) * (p.bf16 ? 2 : 4);
    if (p.bf16)
      _mm256_mask_storeu_epi16(out, mask, to_bf16(f));
    else
      _mm512_mask_storeu_ps(out, mask, f);
  }
}

}  // namespace
