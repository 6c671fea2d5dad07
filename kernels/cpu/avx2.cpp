// u8 x s8 matrix product with AVX2, for x86 CPUs without VNNI. Exact: AVX2's own product of bytes, vpmaddubsw, saturates where
// it adds two of them. So bytes are widened to 16 bits, of which vpmaddwd multiplies 16 and adds them by twos into 32 bits:
// twice as many products as a float32 FMA has, of a weight that is a fourth in memory.
//
// Weight layout: blocks of 16 output channels; inside a block, pairs of input channels, [padded K / 2][16][2].

#define SQ_AVX2 __attribute__((target("avx2,fma")))

namespace {

constexpr int64_t kChannels = 16;
constexpr int64_t kRowsHeld = 6;              // 6 x 2 sums, 2 weights, an activation and a product: 16 registers
constexpr int64_t kPanelBytes = 192 * 1024;   // of activations, which stay in the second cache
constexpr int64_t kBlocksHeld = 8;            // of a task

struct Narrow {
  const int16_t* q;    // [m, depth], without their zero point; zeros behind k
  const int8_t* w;     // packed
  const float* scale;  // [n]
  char* y;             // [m, n], float32 or bfloat16
  bool bf16;
  int64_t n, depth;
};

SQ_AVX2 inline void store_narrow(const Narrow& p, int64_t row, int64_t at, const __m256i (&acc)[2]) {
  alignas(32) float f[kChannels];
  alignas(32) float scale[kChannels] = {};
  const int64_t count = std::min(kChannels, p.n - at);
  std::memcpy(scale, p.scale + at, count * sizeof(float));
  for (int c = 0; c < 2; ++c)
    _mm256_store_ps(f + 8 * c, _mm256_mul_ps(_mm256_cvtepi32_ps(acc[c]), _mm256_load_ps(scale + 8 * c)));
  if (!p.bf16) {
    std::memcpy(p.y + (row * p.n + at) * 4, f, count * 4);
    return;
  }
  uint16_t half[kChannels];
  for (int64_t i = 0; i < kChannels; ++i) {  // to the nearest, ties to even; the values are finite
    uint32_t bits;
    std::memcpy(&bits, f + i, 4);
    half[i] = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
  std::memcpy(p.y + (row * p.n + at) * 2, half, count * 2);
}

// One block of 16 outputs for R rows from `row`.
template <int R>
SQ_AVX2 void block_avx2(const Narrow& p, int64_t row, int64_t at) {
  __m256i acc[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  const int8_t* w = p.w + at * p.depth;
  const int16_t* q = p.q + row * p.depth;
  for (int64_t i = 0; i < p.depth; i += 2, w += 2 * kChannels) {
    _mm_prefetch(reinterpret_cast<const char*>(w + 1024), _MM_HINT_T0);
    const __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
    const __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16)));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, q + r * p.depth + i, 4);
      const __m256i a = _mm256_set1_epi32(two);
      acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(a, low));
      acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(a, high));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store_narrow(p, row + r, at, acc[r]);
}

void rows_avx2(const Narrow& p, int64_t row, int64_t end, int64_t at) {
  for (; row + kRowsHeld <= end; row += kRowsHeld) block_avx2<kRowsHeld>(p, row, at);
  switch (end - row) {
    case 5: return block_avx2<5>(p, row, at);
    case 4: return block_avx2<4>(p, row, at);
    case 3: return block_avx2<3>(p, row, at);
    case 2: return block_avx2<2>(p, row, at);
    case 1: return block_avx2<1>(p, row, at);
  }
}

}  // namespace

// w: int8 [n, k], dense. packed: n rounded up to 16 times k rounded up to 2 bytes.
extern "C" void sqcompile_pack_avx2(const int8_t* w, int8_t* packed, int64_t n, int64_t k, int64_t threads) {
  const int64_t blocks = (n + kChannels - 1) / kChannels, depth = (k + 1) / 2 * 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < blocks; ++j) {
    int8_t* out = packed + j * kChannels * depth;
    std::memset(out, 0, kChannels * depth);
    for (int64_t c = 0; c < std::min(kChannels, n - j * kChannels); ++c) {
      const int8_t* row = w + (j * kChannels + c) * k;
      for (int64_t i = 0; i < k; ++i) out[i / 2 * 2 * kChannels + 2 * c + i % 2] = row[i];
    }
  }
}

// q: uint8 [m, k], zero point 128. wide: int16 [m, k rounded up to 2], to work in. scale: [n]. y: [m, n].
extern "C" void sqcompile_avx2(const uint8_t* q, const int8_t* w, const float* scale, void* y, int64_t bf16, int64_t m,
                               int64_t n, int64_t k, int64_t threads, int16_t* wide) {
  const int64_t depth = (k + 1) / 2 * 2, blocks = (n + kChannels - 1) / kChannels;
  const Narrow p{wide, w, scale, static_cast<char*>(y), bf16 != 0, n, depth};
  const int64_t panel = std::max<int64_t>(1, kPanelBytes / (2 * depth * kRowsHeld)) * kRowsHeld;
  const int64_t groups = (blocks + kBlocksHeld - 1) / kBlocksHeld;
  crowd::Region region;
#pragma omp parallel num_threads(threads)
  {
    region.work();
#pragma omp for schedule(static)
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < k; ++i) wide[row * depth + i] = static_cast<int16_t>(q[row * k + i] - 128);
      if (depth > k) wide[row * depth + k] = 0;
    }
#pragma omp for schedule(dynamic) collapse(2) nowait
    for (int64_t row = 0; row < m; row += panel)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t j = g * kBlocksHeld; j < std::min(blocks, (g + 1) * kBlocksHeld); ++j)
          rows_avx2(p, row, std::min(m, row + panel), j * kChannels);
    region.done();
  }
}
