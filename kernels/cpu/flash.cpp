// Attention of bfloat16 (FlashAttention, arXiv 2205.14135) with AMX tiles, with AVX512's dot products, or with float32 products
// where those are faster: causal or full, grouped heads.
//
// A task is 32 queries of one head. Over key blocks of up to 256: scores in tiles, an online softmax in float32 (base
// 2), probabilities rounded to bfloat16, and their product with the values added to the output. Key blocks in a
// query's future are never touched. Keys and values are packed into tiles once per key head.

namespace {

// Scores s of a query times scale, plus its mask, where it has one.
SQ_BF16 inline void add_mask(const Attention& a, const char* mask, int64_t keys, float* s) {
  const __m512 by = _mm512_set1_ps(a.scale);
  for (int64_t j = 0; j < keys; j += 16) {
    const __mmask16 some = lanes(keys - j);
    const __m512 m = a.mask_half ? from_bf16(_mm256_maskz_loadu_epi16(some, mask + 2 * j))
                                 : _mm512_maskz_loadu_ps(some, mask + 4 * j);
    _mm512_store_ps(s + j, _mm512_fmadd_ps(_mm512_load_ps(s + j), by, m));
  }
}

// One query's scores s of a block become probabilities p = exp(by · (s - the largest score so far)); what was summed before is
// scaled to that, unless this is the first block. `sum` has 16 partial sums. Keys from `seen` on do not count.
template <typename Value>
SQ_BF16 inline void softmax_row(bool first, float* s, int64_t keys, int64_t seen, float by, Value* p, float& top, float* sum,
                                float* out, int64_t d) {
  const __m512 never = _mm512_set1_ps(-__builtin_inff());
  for (int64_t j = std::max<int64_t>(0, seen) / 16 * 16; j < keys; j += 16)
    _mm512_store_ps(s + j, _mm512_mask_mov_ps(never, lanes(seen - j), _mm512_load_ps(s + j)));
  __m512 m0 = never, m1 = never;
  for (int64_t j = 0; j < keys; j += 32) {
    m0 = _mm512_max_ps(m0, _mm512_load_ps(s + j));
    m1 = _mm512_max_ps(m1, _mm512_load_ps(s + j + 16));
  }
  const float now = std::max(top, _mm512_reduce_max_ps(_mm512_max_ps(m0, m1)));
  // where all scores were -inf so far there is nothing to subtract: 2^-inf is the 0 they deserve
  const __m512 shift = _mm512_set1_ps(now == -__builtin_inff() ? 0.0f : now), log2 = _mm512_set1_ps(by * 1.44269504f);
  __m512 total = first ? _mm512_setzero_ps() : _mm512_load_ps(sum);
  if (!first && top != now) {
    const __m512 keep = exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_set1_ps(top), shift), log2));
    total = _mm512_mul_ps(total, keep);
    for (int64_t i = 0; i < d; i += 16) _mm512_store_ps(out + i, _mm512_mul_ps(_mm512_load_ps(out + i), keep));
  }
  top = now;
  for (int64_t j = 0; j < keys; j += 16) {
    const __m512 e = exp2(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(s + j), shift), log2));
    total = _mm512_add_ps(total, e);
    if constexpr (std::is_same_v<Value, float>)
      _mm512_store_ps(p + j, e);
    else
      _mm256_store_si256(reinterpret_cast<__m256i*>(p + j), (__m256i)_mm512_cvtneps_pbh(e));
  }
  _mm512_store_ps(sum, total);
}

// The mask of a query; null for none.
inline const char* mask_of(const Attention& a, int64_t b, int64_t h, int64_t query) {
  const int64_t at = b * a.mask_stride[0] + h * a.mask_stride[1] + query * a.mask_stride[2];
  return a.mask ? static_cast<const char*>(a.mask) + at * (a.mask_half ? 2 : 4) : nullptr;
}

// Queries [row, row + 32) of one head.
template <Products By>
SQ_BF16 void attend(const Attention& a, int64_t b, int64_t h, int64_t row) {
  using Value = std::conditional_t<By == kFloats, float, uint16_t>;
  constexpr int64_t kMaxD = 256;
  alignas(64) float scores[kRows * kKeys], out[kRows * kMaxD], sum[kRows * 16], top[kRows];
  alignas(64) Value q[kRows * kMaxD], probabilities[By == kFloats ? 16 : kRows * kKeys];
  Value* p = probabilities;
  if constexpr (By == kFloats) p = scores;
  const int64_t d = a.d, rows = std::min(kRows, a.queries - row), head = b * a.groups + h / (a.heads / a.groups);
  const uint16_t* from = a.q + b * a.q_stride[0] + h * a.q_stride[1] + row * a.q_stride[2];
  for (int64_t r = 0; r < rows; ++r, from += a.q_stride[2]) {
    if constexpr (By == kFloats)
      for (int64_t i = 0; i < d; i += 16)
        _mm512_store_ps(q + r * d + i, from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
    else
      std::memcpy(q + r * d, from, sizeof(uint16_t) * d);
  }
  std::memset(q + rows * d, 0, sizeof(Value) * (kRows - rows) * d);
  std::fill_n(top, kRows, -__builtin_inff());
  const int64_t end = a.causal ? std::min(a.keys, row + rows) : a.keys;
  const uint16_t* k = a.packed_k + head * a.padded() * d;
  const uint16_t* v = a.packed_v + head * a.padded() * d;

  for (int64_t at = 0; at < end; at += kKeys) {
    const int64_t keys = (std::min(kKeys, end - at) + kRows - 1) / kRows * kRows;
    for (int64_t j = 0; j < keys; j += kRows) {
      const uint16_t* packed = k + (at + j) * d;
      square<By>(rows, scores + j, kKeys, false, q, d, packed, packed + 16 * d, d / 32, 512);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = (a.causal ? std::min(end, row + r + 1) : end) - at;  // keys this query attends to, here
      float* s = scores + r * kKeys;
      const char* mask = mask_of(a, b, h, row + r);
      if (mask) add_mask(a, mask + at * (a.mask_half ? 2 : 4), std::min(keys, end - at), s);
      softmax_row(at == 0, s, keys, seen, mask ? 1.0f : a.scale, p + r * kKeys, top[r], sum + 16 * r, out + r * d, d);
    }
    for (int64_t r = rows; r < kRows; ++r) std::memset(p + r * kKeys, 0, sizeof(Value) * keys);
    for (int64_t i = 0; i < d; i += 32) {
      const uint16_t* packed = v + at * d + i / 16 * 512;
      square<By>(rows, out + i, d, at > 0, p, kKeys, packed, packed + 512, keys / 32, 32 * d);
    }
  }
  uint16_t* to = a.out + ((b * a.queries + row) * a.heads + h) * d;
  for (int64_t r = 0; r < rows; ++r, to += a.heads * d) {
    const float total = _mm512_reduce_add_ps(_mm512_load_ps(sum + 16 * r));
    const __m512 inverse = _mm512_set1_ps(total == 0.0f ? 0.0f : 1.0f / total);  // none: the mask has -inf for every key
    for (int64_t i = 0; i < d; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), to_bf16(_mm512_mul_ps(_mm512_load_ps(out + r * d + i), inverse)));
  }
}

template <Products By>
void attend_all(const Attention& a, int64_t threads) {
  const int64_t steps = a.padded() / kRows, parts = (a.queries + kRows - 1) / kRows;
  Shares packs(a.batch * a.groups * steps, threads), tasks(a.batch * a.heads * parts, threads);
  crowd::Region region;
#pragma omp parallel num_threads(threads)
  {
    region.work();
    packs.work([&](int64_t t) { pack_keys(a, t / steps, t % steps * kRows); });
#pragma omp barrier
    if constexpr (By == kTiles) configure();
    tasks.work([&](int64_t t) { attend<By>(a, t / parts / a.heads, t / parts % a.heads, t % parts * kRows); });
    if constexpr (By == kTiles) release();
    region.done();
  }
}

}  // namespace

// `mask`: null, or what is added to the scores. `sizes`: batch, heads, groups, queries, keys, d (a multiple of 32, at most 256),
// then three strides each of q, k, v and mask, and whether mask is bfloat16, else float32; its last dimension is dense.
// `packed`: 2 * batch * groups * (keys rounded up to 32) * d elements, 64-byte aligned. `products`: one of Products.
extern "C" void sqcompile_flash(const uint16_t* q, const uint16_t* k, const uint16_t* v, const void* mask, uint16_t* out,
                                uint16_t* packed, const int64_t* sizes, float scale, int64_t causal, int64_t products,
                                int64_t threads) {
  Attention a{q, k, v, out, packed, nullptr, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  std::copy_n(sizes + 6, 3, a.q_stride);
  std::copy_n(sizes + 9, 3, a.k_stride);
  std::copy_n(sizes + 12, 3, a.v_stride);
  std::copy_n(sizes + 15, 3, a.mask_stride);
  a.mask = mask, a.mask_half = sizes[18] != 0;
  a.scale = scale, a.causal = causal != 0;
  a.packed_v = packed + a.batch * a.groups * a.padded() * a.d;
  if (products == kTiles) attend_all<kTiles>(a, threads);
  else if (products == kDotProducts) attend_all<kDotProducts>(a, threads);
  else attend_all<kFloats>(a, threads);
}

// Whether this CPU has the dot products of bfloat16.
extern "C" int64_t sqcompile_has_dots() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

// By what products this CPU is fastest, tiles left aside; -1 where it has no vectors of 512 bits.
extern "C" int64_t sqcompile_products() {
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl")) return -1;
  return sqcompile_has_dots() && !__builtin_cpu_is("intel") ? kDotProducts : kFloats;
}
