// u8 x s8 matrix product for few rows (decode) on x86, straight from oneDNN's packed weight.
//
// A product with few rows is a stream over the weight, so these kernels are written for bandwidth: every byte of the
// weight is read once, in order, with prefetching, and each load feeds every row of a tile from registers.
// AVX512-VNNI serves up to 6 rows at a time, AMX tiles up to 16.
//
// Weight layout (verified byte by byte when a weight is packed): blocks of 64 output channels; inside a block, groups
// of 4 input channels, [padded K / 4][64][4]: what vpdpbusd consumes, and 16 groups by 16 channels are one AMX tile.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#define SQ_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define SQ_AMX __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,amx-tile,amx-int8")))

namespace {

constexpr int64_t kBlock = 64;       // output channels per block
constexpr int64_t kGroup = 4;        // input channels per 32-bit lane
constexpr int64_t kTileDepth = 64;   // input channels per AMX tile
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

// Rounds float32 to bfloat16, half to even. The values are finite: int32 times a finite scale.
SQ_VNNI inline __m256i to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

// y[row, at : at + 64] = (acc - 128 sum) * scale; the zero point comes out of the integer sum exactly.
SQ_VNNI inline void store(const Problem& p, int64_t row, int64_t at, const __m512i (&acc)[4]) {
  for (int c = 0; c < 4 && at + 16 * c < p.n; ++c) {
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

// One block of 64 outputs for R rows from `row`.
template <int R>
SQ_VNNI void block_vnni(const Problem& p, int64_t row, int64_t at) {
  __m512i acc[R][4];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_si512();
  const uint8_t* q = p.q + row * p.k;
  const int8_t* w = p.w + at * p.padded_k;
  int64_t i = 0;
  for (; i + kGroup <= p.k; i += kGroup, w += kGroup * kBlock) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch + 64 * c), _MM_HINT_T0);
      b[c] = _mm512_loadu_si512(w + 64 * c);
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, q + r * p.k + i, kGroup);
      const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], a, b[c]);
    }
  }
  for (int r = 0; i < p.k && r < R; ++r) {  // the last group, where k is no multiple of 4
    int32_t four = 0;
    std::memcpy(&four, q + r * p.k + i, p.k - i);
    for (int c = 0; c < 4; ++c)
      acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], _mm512_set1_epi32(four), _mm512_loadu_si512(w + 64 * c));
  }
  for (int r = 0; r < R; ++r) store(p, row + r, at, acc[r]);
}

// Tiles 0-3: int32 [rows, 16] each; 4 and 6: u8 [rows, 64]; 5 and 7: s8 [16 groups, 16 channels x 4].
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

SQ_AMX void configure(int64_t rows) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.bytes[t] = 64;
    config.rows[t] = static_cast<uint8_t>(t == 5 || t == 7 ? 16 : rows);
  }
  _tile_loadconfig(&config);
}

// One block of 64 outputs for up to 16 rows; k is a multiple of 64.
SQ_AMX void block_amx(const Problem& p, int64_t row, int64_t rows, int64_t at) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const uint8_t* q = p.q + row * p.k;
  const int8_t* w = p.w + at * p.padded_k;
  for (int64_t i = 0; i < p.k; i += kTileDepth, w += kTileDepth * kBlock) {
    for (int64_t line = 0; line < kTileDepth * kBlock; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(w + 2 * kPrefetch + line), _MM_HINT_T0);
    _tile_loadd(4, q + i, p.k);
    _tile_loadd(5, w, 4 * kBlock);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(7, w + 64, 4 * kBlock);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, w + 128, 4 * kBlock);
    _tile_dpbusd(2, 4, 5);
    _tile_loadd(7, w + 192, 4 * kBlock);
    _tile_dpbusd(3, 4, 7);
  }
  alignas(64) int32_t c[16][kBlock];
  _tile_stored(0, c[0], 4 * kBlock);
  _tile_stored(1, c[0] + 16, 4 * kBlock);
  _tile_stored(2, c[0] + 32, 4 * kBlock);
  _tile_stored(3, c[0] + 48, 4 * kBlock);
  for (int64_t r = 0; r < rows; ++r) {
    __m512i acc[4];
    for (int j = 0; j < 4; ++j) acc[j] = _mm512_load_si512(c[r] + 16 * j);
    store(p, row + r, at, acc);
  }
}

void rows_vnni(const Problem& p, int64_t at) {
  for (int64_t row = 0; row < p.m;) {
    // 6 rows x 4 accumulators + 4 weights + 1 activation fit the 32 vector registers
    const int64_t left = p.m - row;
    if (left >= 6) block_vnni<6>(p, row, at), row += 6;
    else if (left >= 4) block_vnni<4>(p, row, at), row += 4;
    else if (left >= 2) block_vnni<2>(p, row, at), row += 2;
    else block_vnni<1>(p, row, at), row += 1;
  }
}

}  // namespace

// All arrays dense; see Problem. `amx` is honoured for m <= 16 and k a multiple of 64.
extern "C" void sqcompile_matmul_u8s8(const uint8_t* q, const int8_t* w, const float* scale, const int32_t* sum,
                                      void* y, int64_t bf16, int64_t m, int64_t n, int64_t k, int64_t padded_k,
                                      int64_t threads, int64_t amx) {
  const Problem p{q, w, scale, sum, static_cast<char*>(y), bf16 != 0, m, n, k, padded_k};
  const bool tiles = amx && m <= 16 && k % kTileDepth == 0;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel num_threads(threads)
  {
    if (tiles) configure(m);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < blocks; ++j) {
      if (tiles) block_amx(p, 0, m, j * kBlock);
      else rows_vnni(p, j * kBlock);
    }
    if (tiles) [] SQ_AMX { _tile_release(); }();
  }
}
