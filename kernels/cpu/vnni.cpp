// u8 x s8 matrix product for few rows (decode) with AVX512-VNNI, straight from oneDNN's packed weight.
//
// A product with few rows is a stream over the weight, so the kernel is written for bandwidth: every byte of the
// weight is read once, in order, with prefetching, and each load feeds up to 6 rows from registers.

namespace {

// The last group of a row, where k is no multiple of 4; zeros after it.
inline int32_t last_group(const uint8_t* q, int64_t left) {
  uint32_t four = 0;
  for (int64_t i = 0; i < left; ++i) four |= static_cast<uint32_t>(q[i]) << 8 * i;
  return static_cast<int32_t>(four);
}

// acc += a b of unsigned and signed bytes. As assembly, since GCC 12 copies the sums of the intrinsic, and spills them.
SQ_VNNI inline __attribute__((always_inline)) void add_products(__m512i& acc, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
}

// One block of 64 outputs for R rows from `row`. Every loop over the sums is unrolled, nothing is called between, and the
// last group comes first: else the compiler keeps sums in memory, at half the speed.
template <int R>
SQ_VNNI void block_vnni(const Problem& p, int64_t row, int64_t at) {
  __m512i acc[R][4];
  const int64_t k = p.k, whole = k / kGroup * kGroup;
  const uint8_t* q = p.q + row * k;
  const int8_t* w = p.w + at * p.padded_k;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_setzero_si512();
  if (whole < k) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_set1_epi32(last_group(q + r * k + whole, k - whole));
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add_products(acc[r][c], a, _mm512_loadu_si512(w + whole * kBlock + 64 * c));
    }
  }
  for (int64_t i = 0; i < whole; i += kGroup, w += kGroup * kBlock) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch + 64 * c), _MM_HINT_T0);
      b[c] = _mm512_loadu_si512(w + 64 * c);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, q + r * k + i, kGroup);
      const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add_products(acc[r][c], a, b[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store(p, row + r, at, acc[r]);
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

// All arrays dense; see Problem.
extern "C" void sqcompile_vnni(const uint8_t* q, const int8_t* w, const float* scale, const int32_t* sum, void* y,
                               int64_t bf16, int64_t m, int64_t n, int64_t k, int64_t padded_k, int64_t threads) {
  const Problem p{q, w, scale, sum, static_cast<char*>(y), bf16 != 0, m, n, k, padded_k};
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  crowd::Region region;
#pragma omp parallel num_threads(threads)
  {
    region.work();
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < blocks; ++j) rows_vnni(p, j * kBlock);
    region.done();
  }
}
