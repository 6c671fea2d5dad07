// u8 x s8 matrix product for few rows (decode), AVX512-VNNI, straight from oneDNN's packed weight.
//
// A product with few rows is a stream over the weight, so this kernel is written for bandwidth: every byte of the
// weight is read once, in order, with prefetching, and each load feeds every row of a tile from registers.
//
// Weight layout (verified byte by byte when a weight is packed): blocks of 64 output channels; inside a block, groups
// of 4 input channels, [padded K / 4][64][4], which is what vpdpbusd consumes.

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define SQ_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

namespace {

constexpr int64_t kBlock = 64;      // output channels per block
constexpr int64_t kGroup = 4;       // input channels per vpdpbusd lane
constexpr int64_t kPrefetch = 4096; // bytes ahead; past the end it is a no-op
constexpr int32_t kZeroPoint = 128; // of the uint8 activations

// Rounds float32 to bfloat16, half to even. The values are finite: int32 times a finite scale.
SQ_TARGET inline __m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// One block of 64 outputs for R rows: y[r, 0:columns] = (sum_k q[r, k] w[n, k] - 128 sum_k w[n, k]) * scale[n]
template <int R>
SQ_TARGET void block(const uint8_t* q, const int8_t* w, const float* scale, const int32_t* sum, void* y, bool bf16,
                     int64_t k, int64_t stride, int64_t columns) {
  __m512i acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + kGroup <= k; i += kGroup, w += kGroup * kBlock) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch + 64 * c), _MM_HINT_T0);
      b[c] = _mm512_loadu_si512(w + 64 * c);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, q + r * k + i, kGroup);
      const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], a, b[c]);
    }
  }
  for (int r = 0; i < k && r < R; ++r) {  // the last group, where k is no multiple of 4
    int32_t four = 0;
    std::memcpy(&four, q + r * k + i, k - i);
    for (int c = 0; c < 4; ++c)
      acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], _mm512_set1_epi32(four), _mm512_loadu_si512(w + 64 * c));
  }
  for (int c = 0; c < 4 && 16 * c < columns; ++c) {
    const int64_t left = columns - 16 * c;
    const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
    const __m512i zero = _mm512_slli_epi32(_mm512_maskz_loadu_epi32(mask, sum + 16 * c), 7);  // 128 * sum
    static_assert(kZeroPoint == 1 << 7, "the shift above");
    const __m512 s = _mm512_maskz_loadu_ps(mask, scale + 16 * c);
    for (int r = 0; r < R; ++r) {
      const __m512 f = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(acc[r][c], zero)), s);
      if (bf16)
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(y) + r * stride + 16 * c, mask, to_bf16(f));
      else
        _mm512_mask_storeu_ps(static_cast<float*>(y) + r * stride + 16 * c, mask, f);
    }
  }
}

}  // namespace

// q u8 [m, k], w packed, scale f32 [n], sum s32 [n], y f32 or bf16 [m, n]; all dense.
extern "C" void sqcompile_matmul_u8s8(const uint8_t* q, const int8_t* w, const float* scale, const int32_t* sum,
                                      void* y, int64_t bf16, int64_t m, int64_t n, int64_t k, int64_t padded_k,
                                      int64_t threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < blocks; ++j) {
    const int64_t at = j * kBlock, columns = n - at < kBlock ? n - at : kBlock;
    const int8_t* wj = w + j * kBlock * padded_k;
    for (int64_t r = 0; r < m;) {
      void* out = static_cast<char*>(y) + (r * n + at) * (bf16 ? 2 : 4);
      const uint8_t* in = q + r * k;
      const int64_t rows = m - r;
      // 6 rows x 4 accumulators + 4 weights + 1 activation fit the 32 vector registers
#define SQ_ROWS(R) (block<R>(in, wj, scale + at, sum + at, out, bf16, k, n, columns), r += R)
      if (rows >= 6) SQ_ROWS(6);
      else if (rows >= 4) SQ_ROWS(4);
      else if (rows >= 2) SQ_ROWS(2);
      else SQ_ROWS(1);
#undef SQ_ROWS
    }
  }
}
