// u8 x s8 matrix product with AVX512-VNNI, straight from oneDNN's packed weight, for any number of rows.
//
//   few rows (decode): a stream over the weight. Every byte of it is read once, in order, with prefetching, and each load
//   feeds up to 6 rows from registers;
//   more: panels of rows, as many as fit the L2 cache, by some blocks of 64 outputs. 6 rows by 64 outputs at a time in
//   24 registers; where a block of the weight would not fit that cache, it comes in parts, and the sums wait in a buffer.

namespace {

constexpr int64_t kStreamed = 32;  // most rows that are a stream
constexpr int64_t kRegisters = 6;  // rows x 4 sums + 4 weights + 1 activation fit the 32 vector registers
constexpr int64_t kPart = 4096;    // input channels between two visits of a sum, a multiple of 4

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

// sums [R][64] = the products of R rows of q, k apart, and one block of the weight over input channels [i0, i1), which end at k or
// a multiple of 4; added to what is there unless they begin at 0. Every loop over the sums is unrolled, nothing is called between,
// and the last group comes first: else the compiler keeps sums in memory, at half the speed. Streams: the weight comes from
// memory. Else it is in the cache, and meanwhile a part of what comes next is fetched from `ahead` on, so many bytes with each
// group.
template <int R, bool Streams>
SQ_VNNI void products(const uint8_t* q, int64_t k, const int8_t* w, int64_t i0, int64_t i1, int32_t* sums, const int8_t* ahead,
                      int64_t bytes) {
  __m512i acc[R][4];
  const int64_t end = i1 / kGroup * kGroup;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[r][c] = i0 ? _mm512_load_si512(sums + r * kBlock + 16 * c) : _mm512_setzero_si512();
  if (end < i1) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_set1_epi32(last_group(q + r * k + end, i1 - end));
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add_products(acc[r][c], a, _mm512_loadu_si512(w + end * kBlock + 64 * c));
    }
  }
  w += i0 * kBlock;
  for (int64_t i = i0; i < end; i += kGroup, w += kGroup * kBlock) {
    __m512i b[4];
    if constexpr (!Streams) _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1), ahead += bytes;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      if constexpr (Streams) _mm_prefetch(reinterpret_cast<const char*>(w + kPrefetch + 64 * c), _MM_HINT_T0);
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
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_store_si512(sums + r * kBlock + 16 * c, acc[r][c]);
}

// One block of 64 outputs from `at` for rows [row, end) over input channels [i0, i1). Where those are not all, sums wait in
// `partial` [end - row][64].
template <bool Streams>
void rows_vnni(const Problem& p, int64_t at, int64_t row, int64_t end, int64_t i0, int64_t i1, int32_t* partial) {
  alignas(64) int32_t own[kRegisters * kBlock];
  const int8_t* w = p.w + at * p.padded_k;
  const int8_t* ahead = w + i1 * kBlock;  // the next channels, or the next block
  const int64_t passes = std::max<int64_t>(1, (end - row) / kRegisters), bytes = kGroup * kBlock / passes + 1;
  while (row < end) {
    const int64_t left = end - row, now = left >= kRegisters ? kRegisters : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    int32_t* const sums = i0 || i1 < p.k ? partial : own;
    const auto run = now == 6 ? products<6, Streams> : now == 4 ? products<4, Streams>
                     : now == 2 ? products<2, Streams> : products<1, Streams>;
    run(p.q + row * p.k, p.k, w, i0, i1, sums, ahead, bytes);
    if (i1 == p.k) store_rows(p, row, row + now, at, sums);
    row += now, partial += now * kBlock, ahead += (i1 - i0) / kGroup * bytes;
  }
}

// Blocks [j0, j1) of 64 outputs for rows [row, end).
void panel_vnni(const Problem& p, int64_t row, int64_t end, int64_t j0, int64_t j1) {
  alignas(64) static thread_local int32_t partial[Panels::kMost * kBlock];
  for (int64_t j = j0; j < j1; ++j)
    for (int64_t i0 = 0; i0 < p.k; i0 += kPart) {
      const int64_t i1 = std::min(i0 + kPart, p.k), first = std::min(row + kRegisters, end);
      rows_vnni<true>(p, j * kBlock, row, first, i0, i1, partial);
      rows_vnni<false>(p, j * kBlock, first, end, i0, i1, partial + kRegisters * kBlock);
    }
}

}  // namespace

// See `problem_of`.
extern "C" void sqcompile_vnni(const void* const* arrays, const int64_t* numbers) {
  const Problem p = problem_of(arrays, numbers);
  const int64_t threads = numbers[7];
  const Panels panels(p, threads, kRegisters);
  Shares shares(panels.count, threads);
  crowd::Region region;
#pragma omp parallel num_threads(threads)
  {
    region.work();
    if (p.m <= kStreamed) {
#pragma omp for schedule(static) nowait
      for (int64_t j = 0; j < panels.blocks; ++j) rows_vnni<true>(p, j * kBlock, 0, p.m, 0, p.k, nullptr);
    } else {
      shares.work([&](int64_t t) {
        panels.work(t, [&](int64_t row, int64_t end, int64_t j0, int64_t j1) { panel_vnni(p, row, end, j0, j1); });
      });
    }
    region.done();
  }
}
