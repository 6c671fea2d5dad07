// An int8 weight in oneDNN's layout (u8s8.h), and the sum of each row, which takes the zero point out of a product.

namespace {

// Block j of w [n, k], dense: 64 times padded_k bytes, zeros where w has nothing.
void pack_block(const int8_t* w, int8_t* out, int64_t n, int64_t k, int64_t padded_k, int64_t j) {
  const int64_t rows = std::min(kBlock, n - j * kBlock), whole = k / 64 * 64;
  if (rows < kBlock) std::memset(out, 0, kBlock * padded_k);
  // 64 channels of 64 inputs at a time: what is written stays in the first cache
  for (int64_t i = 0; i < padded_k; i += 64) {
    for (int64_t r = 0; r < rows; ++r) {
      const int8_t* from = w + (j * kBlock + r) * k + i;
      int8_t line[64];
      if (i >= whole) {  // the row ends in it
        std::memset(line, 0, 64);
        std::memcpy(line, from, k - i);
        from = line;
      }
      int8_t* to = out + i * kBlock + r * kGroup;
#pragma GCC unroll 16
      for (int64_t c = 0; c < 16; ++c) std::memcpy(to + c * kBlock * kGroup, from + c * kGroup, kGroup);
    }
  }
}

void sum_block(const int8_t* w, int32_t* sum, int64_t n, int64_t k, int64_t j) {
  for (int64_t r = j * kBlock; r < std::min(n, (j + 1) * kBlock); ++r) {
    int32_t total = 0;
    for (int64_t i = 0; i < k; ++i) total += w[r * k + i];
    sum[r] = total;
  }
}

}  // namespace

// w: [n, k], dense. packed: n rounded up to 64 times padded_k bytes, k rounded up to 64. sum: [n].
extern "C" void sqcompile_pack(const int8_t* w, int8_t* packed, int32_t* sum, int64_t n, int64_t k, int64_t padded_k,
                               int64_t threads) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t j = 0; j < blocks; ++j) {
    pack_block(w, packed + j * kBlock * padded_k, n, k, padded_k, j);
    sum_block(w, sum, n, k, j);
  }
}

// Whether `packed` is what sqcompile_pack makes of w, and the sums. buffer: 64 times padded_k bytes.
extern "C" int64_t sqcompile_is_packed(const int8_t* w, const int8_t* packed, int32_t* sum, int8_t* buffer, int64_t n,
                                       int64_t k, int64_t padded_k) {
  for (int64_t j = 0; j * kBlock < n; ++j) {
    pack_block(w, buffer, n, k, padded_k, j);
    if (std::memcmp(buffer, packed + j * kBlock * padded_k, kBlock * padded_k) != 0) return 0;
    sum_block(w, sum, n, k, j);
  }
  return 1;
}

// Sets how many threads OpenMP takes for the calling thread; gives how many it took.
extern "C" int64_t sqcompile_set_threads(int64_t count) {
  const int64_t before = omp_get_max_threads();
  omp_set_num_threads(static_cast<int>(count));
  return before;
}
