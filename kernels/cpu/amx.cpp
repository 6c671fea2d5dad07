// u8 x s8 matrix product with AMX tiles, straight from oneDNN's packed weight, for any number of rows.
//
// The activations are copied once into tiles ([m / 32][k / 64][32][64]), zeros past the last row and channel: rows a
// power of two apart would fall into a few sets of the cache. Then:
//   up to 16 rows: a stream over the weight, each tile of it read once, in order, with prefetching;
//   more: tasks of up to 512 rows by 256 outputs. For each 1024 input channels, 32 x 32 outputs at a time in four
//   tiles; the partial sums wait in a buffer that fits the L2 cache beside the operands.

namespace {

constexpr int64_t kTile = 16;    // rows of a tile
constexpr int64_t kDepth = 64;   // input channels of a tile
constexpr int64_t kChunk = 1024; // input channels between two visits of a partial sum
constexpr int64_t kPanel = 512;  // rows of a task
constexpr int64_t kWide = 4;     // blocks of 64 outputs of a task

// Tiles 0-3: int32 [16, 16] each; the others: u8 [16, 64] or s8 [16 groups, 16 channels x 4].
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

SQ_AMX void configure() {
  TileConfig config;
  std::fill_n(config.bytes, 8, 64);
  std::fill_n(config.rows, 8, 16);
  // GCC's intrinsic declares only the first bytes as read; without this, the stores of the rest may be dropped
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

SQ_AMX void release() { _tile_release(); }

SQ_AMX inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Tiles 0-3 from and to a square of 32 x 32 values of 4 bytes, rows `ld` values apart.
template <class T>
SQ_AMX inline void load_square(const T* c, int64_t ld) {
  _tile_loadd(0, c, 4 * ld);
  _tile_loadd(1, c + 16, 4 * ld);
  _tile_loadd(2, c + 16 * ld, 4 * ld);
  _tile_loadd(3, c + 16 * ld + 16, 4 * ld);
}

template <class T>
SQ_AMX inline void store_square(T* c, int64_t ld) {
  _tile_stored(0, c, 4 * ld);
  _tile_stored(1, c + 16, 4 * ld);
  _tile_stored(2, c + 16 * ld, 4 * ld);
  _tile_stored(3, c + 16 * ld + 16, 4 * ld);
}

// The tiles of rows [row, row + rows) and input channels [i, i + 64).
SQ_VNNI void pack(const Problem& p, int64_t row, int64_t rows, int64_t i, uint8_t* tiles) {
  uint8_t* out = tiles + row * p.padded_k + i * rows;
  const __mmask64 mask = p.k - i >= kDepth ? ~0ull : (1ull << (p.k - i)) - 1;
  for (int64_t r = row; r < row + rows; ++r, out += kDepth)
    _mm512_store_si512(out, r < p.m ? _mm512_maskz_loadu_epi8(mask, p.q + r * p.k + i) : _mm512_setzero_si512());
}

SQ_AMX void store_rows(const Problem& p, int64_t row, int64_t end, int64_t at, const int32_t* c) {
  for (; row < end; ++row, c += kBlock) {
    __m512i acc[4];
    for (int j = 0; j < 4; ++j) acc[j] = _mm512_load_si512(c + 16 * j);
    store(p, row, at, acc);
  }
}

// One block of 64 outputs for up to 16 rows.
SQ_AMX void block_amx(const Problem& p, const uint8_t* a, int64_t at) {
  zero_tiles();
  const int8_t* w = p.w + at * p.padded_k;
  for (int64_t i = 0; i < p.padded_k; i += kDepth, w += kDepth * kBlock, a += kTile * kDepth) {
    for (int64_t line = 0; line < kDepth * kBlock; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(w + 2 * kPrefetch + line), _MM_HINT_T0);
    _tile_loadd(4, a, kDepth);
    _tile_loadd(5, w, 4 * kBlock);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(7, w + 64, 4 * kBlock);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, w + 128, 4 * kBlock);
    _tile_dpbusd(2, 4, 5);
    _tile_loadd(7, w + 192, 4 * kBlock);
    _tile_dpbusd(3, 4, 7);
  }
  alignas(64) int32_t c[16 * kBlock];
  _tile_stored(0, c, 4 * kBlock);
  _tile_stored(1, c + 16, 4 * kBlock);
  _tile_stored(2, c + 32, 4 * kBlock);
  _tile_stored(3, c + 48, 4 * kBlock);
  store_rows(p, 0, p.m, at, c);
}

// c [32, 32 of 64] += the product of two tiles of rows by 32 outputs over input channels [i0, i1).
SQ_AMX void square(const uint8_t* a, const int8_t* w, int64_t i0, int64_t i1, int32_t* c) {
  if (i0)
    load_square(c, kBlock);
  else
    zero_tiles();
  for (int64_t i = i0; i < i1; i += kDepth) {
    const uint8_t* tile = a + i * 2 * kTile;
    _tile_loadd(6, w + i * kBlock, 4 * kBlock);
    _tile_loadd(4, tile, kDepth);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, w + i * kBlock + 64, 4 * kBlock);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, tile + kTile * kDepth, kDepth);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  store_square(c, kBlock);
}

// Blocks [j0, j1) of 64 outputs for rows [row, end); row is a multiple of 32.
void task(const Problem& p, const uint8_t* tiles, int64_t row, int64_t end, int64_t j0, int64_t j1) {
  alignas(64) static thread_local int32_t partial[kWide * kPanel * kBlock];
  for (int64_t i0 = 0; i0 < p.padded_k; i0 += kChunk) {
    const int64_t i1 = std::min(i0 + kChunk, p.padded_k);
    int32_t* c = partial;
    for (int64_t j = j0; j < j1; ++j) {
      const int8_t* w = p.w + j * kBlock * p.padded_k;
      for (int64_t r = row; r < end; r += 2 * kTile, c += 2 * kTile * kBlock) {
        const uint8_t* a = tiles + r * p.padded_k;
        square(a, w, i0, i1, c);
        square(a, w + 128, i0, i1, c + 32);
        if (i1 == p.padded_k) store_rows(p, r, std::min(r + 2 * kTile, end), j * kBlock, c);
      }
    }
  }
}

}  // namespace

// All arrays dense; see Problem. `tiles`: m rounded up to 32 times padded_k bytes, 64-byte aligned.
extern "C" void sqcompile_amx(const uint8_t* q, const int8_t* w, const float* scale, const int32_t* sum, void* y,
                              int64_t bf16, int64_t m, int64_t n, int64_t k, int64_t padded_k, int64_t threads,
                              uint8_t* tiles) {
  const Problem p{q, w, scale, sum, static_cast<char*>(y), bf16 != 0, m, n, k, padded_k};
  const bool few = m <= kTile;
  const int64_t rows = few ? kTile : 2 * kTile;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  int64_t panel = kPanel, wide = kWide;
  auto tasks = [&] { return ((m + panel - 1) / panel) * ((blocks + wide - 1) / wide); };
  while (wide > 1 && tasks() < 4 * threads) wide /= 2;
  while (panel > 64 && tasks() < 4 * threads) panel /= 2;
  const int64_t groups = (blocks + wide - 1) / wide;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static) collapse(2)
    for (int64_t row = 0; row < m; row += rows)
      for (int64_t i = 0; i < padded_k; i += kDepth) pack(p, row, rows, i, tiles);
    configure();
    if (few) {
#pragma omp for schedule(static)
      for (int64_t j = 0; j < blocks; ++j) block_amx(p, tiles, j * kBlock);
    } else {
#pragma omp for schedule(dynamic) collapse(2)
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t row = 0; row < m; row += panel)
          task(p, tiles, row, std::min(row + panel, m), g * wide, std::min((g + 1) * wide, blocks));
    }
    release();
  }
}
