// What attention (flash.cpp) is made of: keys and values packed into tiles, products of tiles, and powers of 2.
//
// A row of such a tile is one vector of 16 pairs, which AMX, the dot products of bfloat16 and float32 products take alike.

#include <type_traits>

namespace {

constexpr int64_t kRows = 32;   // queries of a task, keys of a step
constexpr int64_t kKeys = 256;  // keys of a block
constexpr int64_t kDots = 8;    // queries whose sums stay in registers

// By what the products are made: AMX's tiles, dot products of bfloat16, or float32 products of what bfloat16 holds. Intel's cores
// make a dot product of two in the time of four float32 products, AMD's in that of one.
enum Products { kFloats, kDotProducts, kTiles };

struct Attention {
  const uint16_t *q, *k, *v;      // bfloat16; the last dimension is dense
  uint16_t* out;                  // [batch, queries, heads, d]
  uint16_t *packed_k, *packed_v;  // per key head: [keys / 16][d / 32][16][16][2], [keys / 32][d / 16][16][16][2]
  int64_t batch, heads, groups, queries, keys, d;
  int64_t q_stride[3], k_stride[3], v_stride[3], mask_stride[3];  // of batch, head, position, in elements
  const void* mask;                                               // added to the scores; null for none
  float scale;                                                    // of the scores, positive
  bool causal, mask_half;                                         // the latter: bfloat16

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

// The same of float32 values a, with float32 products.
SQ_BF16 void eight_rows(float* c, int64_t ld, bool add, const float* a, int64_t lda, const uint16_t* b0, const uint16_t* b1,
                        int64_t steps, int64_t b_step) {
  const __m512i high = _mm512_set1_epi32(0xffff0000);
  __m512 sum[kDots][2];
  for (int64_t r = 0; r < kDots; ++r)
    for (int64_t t = 0; t < 2; ++t) sum[r][t] = add ? _mm512_load_ps(c + r * ld + 16 * t) : _mm512_setzero_ps();
  for (int64_t i = 0; i < steps; ++i, a += 32, b0 += b_step, b1 += b_step)
    for (int64_t j = 0; j < 32; j += 2) {
      const __m512i left = _mm512_load_si512(b0 + 16 * j), right = _mm512_load_si512(b1 + 16 * j);
      const __m512 even[2] = {(__m512)_mm512_slli_epi32(left, 16), (__m512)_mm512_slli_epi32(right, 16)};
      const __m512 odd[2] = {(__m512)_mm512_and_si512(left, high), (__m512)_mm512_and_si512(right, high)};
#pragma GCC unroll 8
      for (int64_t r = 0; r < kDots; ++r) {
        const __m512 first = _mm512_set1_ps(a[r * lda + j]), second = _mm512_set1_ps(a[r * lda + j + 1]);
        sum[r][0] = _mm512_fmadd_ps(first, even[0], sum[r][0]);
        sum[r][1] = _mm512_fmadd_ps(first, even[1], sum[r][1]);
        sum[r][0] = _mm512_fmadd_ps(second, odd[0], sum[r][0]);
        sum[r][1] = _mm512_fmadd_ps(second, odd[1], sum[r][1]);
      }
    }
  for (int64_t r = 0; r < kDots; ++r)
    for (int64_t t = 0; t < 2; ++t) _mm512_store_ps(c + r * ld + 16 * t, sum[r][t]);
}

// `square_bf16`, or without tiles of the first `rows` rows alone, rounded up to kDots. Value is what a is kept as.
template <Products By, typename Value>
inline void square(int64_t rows, float* c, int64_t ld, bool add, const Value* a, int64_t lda, const uint16_t* b0,
                   const uint16_t* b1, int64_t steps, int64_t b_step) {
  if constexpr (By == kTiles)
    square_bf16(c, ld, add, a, lda, b0, b1, steps, b_step);
  else
    for (int64_t r = 0; r < rows; r += kDots) eight_rows(c + r * ld, ld, add, a + r * lda, lda, b0, b1, steps, b_step);
}

}  // namespace
