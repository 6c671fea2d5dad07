// u8 x s8 matrix product with AMX tiles, straight from oneDNN's packed weight, for any number of rows.
//
//   up to 16 rows: a stream over the weight, each tile of it read once, in order, with prefetching;
//   more: tasks of 128 rows and more, as many as fit the L2 cache, by some blocks of 64 outputs. For each 512 input
//   channels, 32 x 32 outputs at a time in four tiles; the partial sums wait in a buffer.
//
// Tiles of activations are read where they lie. Rows behind the last 32 whole ones, and channels that fill no tile, are
// copied into tiles ([k / 64][32][64]) with zeros behind them.

#include <new>

namespace {

constexpr int64_t kTile = 16;          // rows of a tile
constexpr int64_t kDepth = 64;         // input channels of a tile
constexpr int64_t kPair = 2 * kTile;   // rows of a task are a multiple of it
constexpr int64_t kChunk = 512;        // input channels between two visits of a partial sum: with them, a block fits the L1 cache

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

// The tile of `rows` rows from `row` on and of channels [i, i + 64): zeros behind the last row and channel.
SQ_VNNI void pack(const Problem& p, int64_t row, int64_t rows, int64_t i, uint8_t* out) {
  const __mmask64 mask = p.k - i >= kDepth ? ~0ull : (1ull << (p.k - i)) - 1;
  for (int64_t r = row; r < row + rows; ++r, out += kDepth)
    _mm512_store_si512(out, r < p.m ? _mm512_maskz_loadu_epi8(mask, p.q + r * p.k + i) : _mm512_setzero_si512());
  asm volatile("" : : : "memory");  // to GCC a load of a tile reads no memory, and could come before the stores
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

// Two tiles of 16 rows each: of activations where they lie, `ld` bytes apart, or of packed ones; `step` bytes to the next 64
// channels.
struct Pair {
  const uint8_t* q;
  int64_t ld, step;
};

// c [32, 32 of 64] += the product of two tiles of rows by 32 outputs over input channels [i0, i1).
SQ_AMX inline void square(const Pair& rows, const int8_t* w, int64_t i0, int64_t i1, int32_t* c) {
  if (i0)
    load_square(c, kBlock);
  else
    zero_tiles();
  const int64_t ld = rows.ld, step = rows.step;
  const uint8_t* a = rows.q + i0 / kDepth * step;
  const uint8_t* b = a + kTile * ld;
  w += i0 * kBlock;
  for (int64_t i = i0; i < i1; i += kDepth, a += step, b += step, w += kDepth * kBlock) {
    _tile_loadd(6, w, 4 * kBlock);
    _tile_loadd(4, a, ld);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, w + 64, 4 * kBlock);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, b, ld);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  store_square(c, kBlock);
}

// Blocks [j0, j1) of 64 outputs for rows [row, end); row is a multiple of 32. `tiles`: room for the rows that are packed.
SQ_AMX void task(const Problem& p, uint8_t* tiles, int64_t row, int64_t end, int64_t j0, int64_t j1) {
  alignas(64) static thread_local int32_t partial[Panels::kMost * kBlock];
  const int64_t whole = p.k % kDepth ? row : std::max(row, std::min(end, p.m / kPair * kPair));
  for (int64_t r = whole; r < end; r += kPair)
    for (int64_t i = 0; i < p.padded_k; i += kDepth) pack(p, r, kPair, i, tiles + (r - whole) * p.padded_k + i * kPair);
  const bool waits = p.padded_k > kChunk;
  for (int64_t j = j0; j < j1; ++j) {
    const int8_t* w = p.w + j * kBlock * p.padded_k;
    for (int64_t i0 = 0; i0 < p.padded_k; i0 += kChunk) {
      const int64_t i1 = std::min(i0 + kChunk, p.padded_k);
      for (int64_t r = row; r < end; r += kPair) {
        int32_t* c = partial + (waits ? (r - row) * kBlock : 0);
        const Pair pair = r < whole ? Pair{p.q + r * p.k, p.k, kDepth}
                                    : Pair{tiles + (r - whole) * p.padded_k, kDepth, kPair * kDepth};
        square(pair, w, i0, i1, c);
        square(pair, w + 128, i0, i1, c + 32);
        if (i1 == p.padded_k) store_rows(p, r, std::min(r + kPair, end), j * kBlock, c);
      }
    }
  }
}

// 64-byte aligned memory for packed tiles, made before the threads are: what cannot be had is an error and not the end.
class Tiles {
 public:
  explicit Tiles(int64_t bytes) : data(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t(64)))) {}
  ~Tiles() { ::operator delete(data, std::align_val_t(64)); }
  Tiles(const Tiles&) = delete;
  uint8_t* const data;
};

// Up to 16 rows.
void stream(const Problem& p, int64_t threads) {
  const int64_t blocks = (p.n + kBlock - 1) / kBlock;
  const Tiles tiles(kTile * p.padded_k);
  crowd::Region region;
#pragma omp parallel num_threads(threads)
  {
    region.work();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.padded_k; i += kDepth) pack(p, 0, kTile, i, tiles.data + i * kTile);
    configure();
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < blocks; ++j) block_amx(p, tiles.data, j * kBlock);
    release();
    region.done();
  }
}

void many_rows(const Problem& p, int64_t threads) {
  const Panels panels(p, threads, kPair);
  const int64_t packed = (p.k % kDepth ? panels.rows : p.m % kPair ? kPair : 0) * p.padded_k;  // bytes of a thread
  const Tiles tiles(threads * packed);
  Shares shares(panels.count, threads);
  crowd::Region region;
#pragma omp parallel num_threads(threads)
  {
    region.work();
    configure();
    uint8_t* const mine = tiles.data + omp_get_thread_num() * packed;
    shares.work([&](int64_t t) {
      panels.work(t, [&](int64_t row, int64_t end, int64_t j0, int64_t j1) { task(p, mine, row, end, j0, j1); });
    });
    release();
    region.done();
  }
}

}  // namespace

// See `problem_of`.
extern "C" void sqcompile_amx(const void* const* arrays, const int64_t* numbers) {
  const Problem p = problem_of(arrays, numbers);
  const int64_t threads = numbers[7];
  if (p.m <= kTile)
    stream(p, threads);
  else
    many_rows(p, threads);
}
