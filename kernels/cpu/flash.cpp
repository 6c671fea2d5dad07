// Attention of bfloat16 (FlashAttention, arXiv 2205.14135) with AMX tiles, or with AVX512's dot products: causal or full,
// grouped heads.
//
// A task is 32 queries of one head. Over key blocks of up to 256: scores in tiles, an online softmax in float32 (base
// 2), probabilities rounded to bfloat16, and their product with the values added to the output. Key blocks in a
// query's future are never touched. Keys and values are packed into tiles once per key head. A row of such a tile is one vector of
// 16 pairs, which is what the dot products take, too.

namespace {

constexpr int64_t kRows = 32;   // queries of a task, keys of a step
constexpr int64_t kKeys = 256;  // keys of a block
constexpr int64_t kDots = 8;    // queries whose sums stay in registers

struct Attention {
  const uint16_t *q, *k, *v;      // bfloat16; the last dimension is dense
  uint16_t* out;                  // [batch, queries, heads, d]
  uint16_t *packed_k, *packed_v;  // per key head: [keys / 16][d / 32][16][16][2], [keys / 32][d / 16][16][16][2]
  int64_t batch, heads, groups, queries, keys, d;
  int64_t q_stride[3], k_stride[3], v_stride[3];  // of batch, head, position, in elements
  float scale;                                    // of the scores, positive, times log2(e)
  bool causal, tiles;  // tiles: AMX's

  int64_t padded() const { return (keys + kRows - 1) / kRows * kRows; }
};

// Row i, column j of 16 x 16 words goes to row j, column i: within lanes of 4, then lanes as wholes.
SQ_BF16 inline void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      rows[i + 2 * half] = _mm512_unpacklo_epi64(t[i + half], t[i + half + 2]);
      rows[i + 2 * half + 1] = _mm512_unpackhi_epi64(t[i + half], t[i + half + 2]);
    }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // lane l of row 4 i + c is column 4 l + c of rows 4 i to 4 i + 3
    const __m512i even0 = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd);
    const __m512i even1 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
    const __m512i odd1 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
  for (int i = 0; i < 16; ++i) rows[i] = t[i];
}

// Keys [at, at + 32) of one key head as tiles; zeros past the last key.
SQ_BF16 void pack_keys(const Attention& a, int64_t head, int64_t at) {
  const int64_t b = head / a.groups, g = head % a.groups;
  const uint16_t* k = a.k + b * a.k_stride[0] + g * a.k_stride[1];
  const uint16_t* v = a.v + b * a.v_stride[0] + g * a.v_stride[1];
  uint32_t* to_k = reinterpret_cast<uint32_t*>(a.packed_k + (head * a.padded() + at) * a.d);
  uint16_t* to_v = a.packed_v + (head * a.padded() + at) * a.d;
  for (int64_t j = 0; j < kRows; j += 16, to_k += 8 * a.d)  // pairs of a key's channels, transposed
    for (int64_t i = 0; i < a.d / 32; ++i) {
      __m512i pairs[16];
      for (int64_t r = 0; r < 16; ++r)
        pairs[r] = at + j + r < a.keys ? _mm512_loadu_si512(k + (at + j + r) * a.k_stride[2] + 32 * i)
                                       : _mm512_setzero_si512();
      transpose(pairs);
      for (int64_t r = 0; r < 16; ++r) _mm512_storeu_si512(to_k + 16 * (16 * i + r), pairs[r]);
    }
  alignas(64) uint16_t order[64];  // word i of the one key, word i of the other
  for (int i = 0; i < 64; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
  const __m512i left = _mm512_load_si512(order), right = _mm512_load_si512(order + 32);
  for (int64_t i = 0; i < a.d; i += 32, to_v += kRows * 32)  // pairs of keys, interleaved
    for (int64_t j = 0; j < kRows; j += 2) {
      __m512i pair[2];
#pragma GCC unroll 2
      for (int t = 0; t < 2; ++t)
        pair[t] = at + j + t < a.keys ? _mm512_loadu_si512(v + (at + j + t) * a.v_stride[2] + i) : _mm512_setzero_si512();
      _mm512_storeu_si512(to_v + 16 * j, _mm512_permutex2var_epi16(pair[0], left, pair[1]));
      _mm512_storeu_si512(to_v + 16 * (j + kRows), _mm512_permutex2var_epi16(pair[0], right, pair[1]));
    }
}

// 2^x to about 3e-6 relative, a thousandth of bfloat16's resolution; 0 where that is no normal number, because
// subnormal arithmetic is a hundred times slower; nan stays nan.
SQ_BF16 inline __m512 exp2(__m512 x) {
  const __m512 least = _mm512_set1_ps(-126.0f);
  const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
  x = _mm512_max_ps(least, x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.3333558e-3f);  // Taylor coefficients ln(2)^i / i!, |f| <= 1/2
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(normal, p, n);
}

// c [32, 32] (row stride ld) = or += a [32, 32 steps] (row stride lda) times `steps` pairs of packed tiles.
SQ_AMX void square_bf16(float* c, int64_t ld, bool add, const uint16_t* a, int64_t lda, const uint16_t* b0,
                          const uint16_t* b1, int64_t steps, int64_t b_step) {
  if (add)
    load_square(c, ld);
  else
    zero_tiles();
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, a + 32 * i, 2 * lda);
    _tile_loadd(6, b0 + b_step * i, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1 + b_step * i, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * lda + 32 * i, 2 * lda);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  store_square(c, ld);
}

// Rows [0, kDots) of the same, with dot products: 16 sums stay in registers.
SQ_BF16 void eight_rows(float* c, int64_t ld, bool add, const uint16_t* a, int64_t lda, const uint16_t* b0,
                        const uint16_t* b1, int64_t steps, int64_t b_step) {
  __m512 sum[kDots][2];
  for (int64_t r = 0; r < kDots; ++r)
    for (int64_t t = 0; t < 2; ++t) sum[r][t] = add ? _mm512_load_ps(c + r * ld + 16 * t) : _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; ++i, a += 32, b0 += b_step, b1 += b_step)
    for (int64_t j = 0; j < 32; j += 2) {
      const __m512bh left = (__m512bh)_mm512_load_si512(b0 + 16 * j), right = (__m512bh)_mm512_load_si512(b1 + 16 * j);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kDots; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * lda + j, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
        sum[r][0] = _mm512_dpbf16_ps(sum[r][0], both, left);
        sum[r][1] = _mm512_dpbf16_ps(sum[r][1], both, right);
      }
    }
  for (int64_t r = 0; r < kDots; ++r)
    for (int64_t t = 0; t < 2; ++t) _mm512_store_ps(c + r * ld + 16 * t, sum[r][t]);
}

// `square_bf16` by what the CPU has; with dot products of the first `rows` rows alone, rounded up to kDots.
inline void square(bool tiles, int64_t rows, float* c, int64_t ld, bool add, const uint16_t* a, int64_t lda,
                   const uint16_t* b0, const uint16_t* b1, int64_t steps, int64_t b_step) {
  if (tiles) return square_bf16(c, ld, add, a, lda, b0, b1, steps, b_step);
  for (int64_t r = 0; r < rows; r += kDots) eight_rows(c + r * ld, ld, add, a + r * lda, lda, b0, b1, steps, b_step);
}

// One query's scores s of a block become probabilities p, relative to the largest score so far; what was summed before
// is scaled to that, unless this is the first block. `sum` has 16 partial sums.
SQ_BF16 inline void softmax_row(bool first, float* s, int64_t keys, int64_t seen, float scale, uint16_t* p, float& top,
                                float* sum, float* out, int64_t d) {
  const __m512 never = _mm512_set1_ps(-__builtin_inff());
  for (int64_t j = std::max<int64_t>(0, seen) / 16 * 16; j < keys; j += 16) {
    const __mmask16 kept = static_cast<__mmask16>((1u << std::max<int64_t>(0, seen - j)) - 1);
    _mm512_store_ps(s + j, _mm512_mask_mov_ps(never, kept, _mm512_load_ps(s + j)));
  }
  __m512 m0 = never, m1 = never;
  for (int64_t j = 0; j < keys; j += 32) {
    m0 = _mm512_max_ps(m0, _mm512_load_ps(s + j));
    m1 = _mm512_max_ps(m1, _mm512_load_ps(s + j + 16));
  }
  const float now = std::max(top, scale * _mm512_reduce_max_ps(_mm512_max_ps(m0, m1)));
  // where all scores were -inf so far there is nothing to subtract: 2^-inf is the 0 they deserve
  const __m512 shift = _mm512_set1_ps(now == -__builtin_inff() ? 0.0f : now), by = _mm512_set1_ps(scale);
  __m512 total = first ? _mm512_setzero_ps() : _mm512_load_ps(sum);
  if (!first && top != now) {
    const __m512 keep = exp2(_mm512_sub_ps(_mm512_set1_ps(top), shift));
    total = _mm512_mul_ps(total, keep);
    for (int64_t i = 0; i < d; i += 16) _mm512_store_ps(out + i, _mm512_mul_ps(_mm512_load_ps(out + i), keep));
  }
  top = now;
  for (int64_t j = 0; j < keys; j += 16) {
    const __m512 e = exp2(_mm512_fmsub_ps(_mm512_load_ps(s + j), by, shift));
    total = _mm512_add_ps(total, e);
    _mm256_store_si256(reinterpret_cast<__m256i*>(p + j), (__m256i)_mm512_cvtneps_pbh(e));
  }
  _mm512_store_ps(sum, total);
}

// Queries [row, row + 32) of one head.
SQ_BF16 void attend(const Attention& a, int64_t b, int64_t h, int64_t row) {
  constexpr int64_t kMaxD = 256;
  alignas(64) float scores[kRows * kKeys], out[kRows * kMaxD], sum[kRows * 16], top[kRows];
  alignas(64) uint16_t q[kRows * kMaxD], p[kRows * kKeys];
  const int64_t d = a.d, rows = std::min(kRows, a.queries - row), head = b * a.groups + h / (a.heads / a.groups);
  const uint16_t* from = a.q + b * a.q_stride[0] + h * a.q_stride[1] + row * a.q_stride[2];
  for (int64_t r = 0; r < rows; ++r) std::memcpy(q + r * d, from + r * a.q_stride[2], sizeof(uint16_t) * d);
  std::memset(q + rows * d, 0, sizeof(uint16_t) * (kRows - rows) * d);
  std::fill_n(top, kRows, -__builtin_inff());
  const int64_t end = a.causal ? std::min(a.keys, row + rows) : a.keys;
  const uint16_t* k = a.packed_k + head * a.padded() * d;
  const uint16_t* v = a.packed_v + head * a.padded() * d;

  for (int64_t at = 0; at < end; at += kKeys) {
    const int64_t keys = (std::min(kKeys, end - at) + kRows - 1) / kRows * kRows;
    for (int64_t j = 0; j < keys; j += kRows) {
      const uint16_t* packed = k + (at + j) * d;
      square(a.tiles, rows, scores + j, kKeys, false, q, d, packed, packed + 16 * d, d / 32, 512);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = (a.causal ? std::min(end, row + r + 1) : end) - at;  // keys this query attends to, here
      softmax_row(at == 0, scores + r * kKeys, keys, seen, a.scale, p + r * kKeys, top[r], sum + 16 * r, out + r * d, d);
    }
    for (int64_t r = rows; r < kRows; ++r) std::memset(p + r * kKeys, 0, sizeof(uint16_t) * keys);
    for (int64_t i = 0; i < d; i += 32) {
      const uint16_t* packed = v + at * d + i / 16 * 512;
      square(a.tiles, rows, out + i, d, at > 0, p, kKeys, packed, packed + 512, keys / 32, 32 * d);
    }
  }
  uint16_t* to = a.out + ((b * a.queries + row) * a.heads + h) * d;
  for (int64_t r = 0; r < rows; ++r, to += a.heads * d) {
    const float inverse = 1.0f / _mm512_reduce_add_ps(_mm512_load_ps(sum + 16 * r));
    for (int64_t i = 0; i < d; i += 16) {
      const __m512 y = _mm512_mul_ps(_mm512_load_ps(out + r * d + i), _mm512_set1_ps(inverse));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)_mm512_cvtneps_pbh(y));
    }
  }
}

}  // namespace

// `sizes`: batch, heads, groups, queries, keys, d (a multiple of 32, at most 256), then three strides each of q, k, v.
// `packed`: 2 * batch * groups * (keys rounded up to 32) * d elements, 64-byte aligned.
extern "C" void sqcompile_flash(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out,
                                uint16_t* packed, const int64_t* sizes, float scale, int64_t causal, int64_t tiles,
                                int64_t threads) {
  Attention a{q, k, v, out, packed, nullptr, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  std::copy_n(sizes + 6, 3, a.q_stride);
  std::copy_n(sizes + 9, 3, a.k_stride);
  std::copy_n(sizes + 12, 3, a.v_stride);
  a.scale = scale * 1.44269504f;
  a.causal = causal != 0;
  a.tiles = tiles != 0;
  a.packed_v = packed + a.batch * a.groups * a.padded() * a.d;
  const int64_t steps = a.padded() / kRows, parts = (a.queries + kRows - 1) / kRows;
  Shares packs(a.batch * a.groups * steps, threads), tasks(a.batch * a.heads * parts, threads);
  crowd::Region region;
#pragma omp parallel num_threads(threads)
  {
    region.work();
    packs.work([&](int64_t t) { pack_keys(a, t / steps, t % steps * kRows); });
#pragma omp barrier
    if (a.tiles) configure();
    tasks.work([&](int64_t t) { attend(a, t / parts / a.heads, t / parts % a.heads, t % parts * kRows); });
    if (a.tiles) release();
    region.done();
  }
}

// Whether this CPU has the dot products of bfloat16.
extern "C" int64_t sqcompile_has_dots() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}
