// Rows of activations on their way into an INT8 linear: one read of each value, one write of its integer.
//
// What one linear gives (its product, still to be scaled by the row's factor, and its bias), an activation or a residual and
// a norm, a multiplier, a rotation by Hadamard matrices in blocks, and the quantization for the next linear.
//
// A row is kept in cache as float32 from the first step to the last, so what PyTorch rounds to bfloat16 between is not rounded
// here. Scale and rounding are those of `reference.quantize`, bit for bit.

namespace rows {

enum Norm { kNoNorm, kLayerNorm, kRmsNorm };

struct Task {
  Array y;             // [rows, width]
  const float* scale;  // by which y is multiplied: [rows] or [1]; null for none
  Array bias;          // [width], which is added then
  Array residual;      // [rows, k]
  Array weight, shift;  // [k], of the norm
  void *sum, *normed;  // [rows, k] in the dtype of y: what the norm reads and gives, or null
  const float* multiplier;  // [k]
  const float* static_scale;  // or null for one per row
  void* q;             // int8, or uint8 with the zero point 128, [rows, k]
  float* factors;      // [rows]
  int64_t width, k, gate, up;  // the first column of what is activated, and of what it is multiplied by, or -1
  int64_t block;       // of channels that are rotated together; 0 for none
  int64_t activation, norm;
  bool scale_per_row;
  int32_t zero_point;
  float eps;
};

// clamp(round_half_even(y * inverse), -127, 127) + zero_point of 16 values; NaN becomes 0. Unless it Clamps, for |y| up to
// the absmax that inverse is of.
template <bool Clamps>
inline void write(const Task& t, Vector y, float inverse, uint8_t* q) {
  Vector v = y * inverse;
  if constexpr (Clamps) {
    v = v == v ? v : Vector{};
    v = v < -127.0f ? Vector{} - 127.0f : v;
    v = v > 127.0f ? Vector{} + 127.0f : v;
  }
  const Lanes low = (Lanes)(v + 12582912.0f);  // 1.5 * 2^23: the addition rounds half to even
  uint8_t bytes __attribute__((vector_size(kLanes)));
  bytes = __builtin_convertvector(low + t.zero_point, decltype(bytes));
  std::memcpy(q, &bytes, sizeof(bytes));
}

// Fills h [k] with the row before its norm.
template <int Activation>
void gather(const Task& t, int64_t row, float* h) {
  const float scale = t.scale ? t.scale[t.scale_per_row ? row : 0] : 1.0f;
  const int64_t from = row * t.width;
  for (int64_t at = 0; at < t.k; at += kLanes) {
    Vector v = t.y.read(from + t.gate + at);
    if (t.scale) v *= scale;
    if (t.bias.data) v += t.bias.read(t.gate + at);
    v = activated(v, Activation);
    if (t.up >= 0) {
      Vector u = t.y.read(from + t.up + at);
      if (t.scale) u *= scale;
      if (t.bias.data) u += t.bias.read(t.up + at);
      v *= u;
    }
    if (t.residual.data) v += t.residual.read(row * t.k + at);
    if (t.sum) store(t.sum, t.y.bf16, row * t.k + at, v);
    std::memcpy(h + at, &v, sizeof(v));
  }
}

// The norm of a row, in place.
void normalize(const Task& t, int64_t row, float* h) {
  Vector sum = {}, squares = {};
  float mean = 0;
  if (t.norm == kLayerNorm) {
    for (int64_t at = 0; at < t.k; at += kLanes) sum += loaded(h, at);
    mean = total(sum) / t.k;
  }
  for (int64_t at = 0; at < t.k; at += kLanes) {
    const Vector v = loaded(h, at) - mean;
    squares += v * v;
  }
  const float inverse = 1.0f / std::sqrt(total(squares) / t.k + t.eps);
  for (int64_t at = 0; at < t.k; at += kLanes) {
    Vector v = (loaded(h, at) - mean) * inverse;
    if (t.weight.data) v *= t.weight.read(at);
    if (t.shift.data) v += t.shift.read(at);
    if (t.normed) store(t.normed, t.y.bf16, row * t.k + at, v);
    std::memcpy(h + at, &v, sizeof(v));
  }
}

// Multiplies and rotates a row in place; gives its absmax as bits, which order like the values, NaN above infinity.
template <int Block>
int32_t rotate_row(const Task& t, float* h) {
  constexpr int kStep = Block ? Block : kLanes;
  Lanes largest = {};
  for (int64_t at = 0; at < t.k; at += kStep) {
    Vector v[kStep / kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kStep / kLanes; ++i) v[i] = loaded(h, at + i * kLanes);  // one by one: GCC copies arrays by halves
    if (t.multiplier)
#pragma GCC unroll 8
      for (int i = 0; i < kStep / kLanes; ++i) v[i] *= loaded(t.multiplier, at + i * kLanes);
    if constexpr (Block > 0) rotate_block<Block>(v);
#pragma GCC unroll 8
    for (int i = 0; i < kStep / kLanes; ++i) {
      const Lanes size = (Lanes)v[i] & 0x7fffffff;
      largest = size > largest ? size : largest;
      if (t.multiplier || Block) std::memcpy(h + at + i * kLanes, &v[i], sizeof(Vector));
    }
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
  return most;
}

inline void quantize_row(const Task& t, int64_t row, const float* h, int32_t largest) {
  const bool finite = largest < 0x7f800000;
  float absmax, scale;
  std::memcpy(&absmax, &largest, sizeof(absmax));
  if (t.static_scale) {
    scale = *t.static_scale;
    t.factors[row] = finite ? 1.0f : NAN;
  } else {
    scale = (absmax < 1e-30f ? 1e-30f : absmax) * static_cast<float>(1.0 / 127);
    t.factors[row] = scale = finite ? scale : NAN;
  }
  const float inverse = static_cast<float>(1.0 / static_cast<double>(scale));
  uint8_t* q = static_cast<uint8_t*>(t.q) + row * t.k;
  if (t.static_scale || !finite)
    for (int64_t i = 0; i < t.k; i += kLanes) write<true>(t, loaded(h, i), inverse, q + i);
  else
    for (int64_t i = 0; i < t.k; i += kLanes) write<false>(t, loaded(h, i), inverse, q + i);
}

inline void run_row(const Task& t, int64_t row, float* h) {
  switch (t.activation) {
    case kRelu: gather<kRelu>(t, row, h); break;
    case kSilu: gather<kSilu>(t, row, h); break;
    case kGelu: gather<kGelu>(t, row, h); break;
    case kGeluTanh: gather<kGeluTanh>(t, row, h); break;
    default: gather<kNone>(t, row, h);
  }
  if (t.norm) normalize(t, row, h);
  const int32_t largest = t.block == 16    ? rotate_row<16>(t, h)
                          : t.block == 32  ? rotate_row<32>(t, h)
                          : t.block == 64  ? rotate_row<64>(t, h)
                          : t.block == 128 ? rotate_row<128>(t, h)
                                           : rotate_row<0>(t, h);
  quantize_row(t, row, h, largest);
}

template <int Block>
void rotate_blocks(Array x, float* y, int64_t first, int64_t end) {
  for (int64_t at = first; at < end; at += Block) {
    Vector v[Block / kLanes];
    for (int i = 0; i < Block / kLanes; ++i) v[i] = x.read(at + i * kLanes);
    rotate_block<Block>(v);
    for (int i = 0; i < Block / kLanes; ++i) std::memcpy(y + at + i * kLanes, &v[i], sizeof(Vector));
  }
}

}  // namespace rows

// x H of `count` values, a multiple of block; both dense.
extern "C" void sqcompile_rotate(const void* x, int64_t bf16, float* y, int64_t count, int64_t block, int64_t threads) {
  constexpr int64_t kPart = 1 << 14;
  const rows::Array from{x, bf16 != 0};
  const bool several = count > kPart && threads > 1;
  crowd::Region region;
#pragma omp parallel num_threads(threads) if (several)
  {
    region.work();
#pragma omp for schedule(static) nowait
    for (int64_t first = 0; first < count; first += kPart) {
      const int64_t end = first + kPart < count ? first + kPart : count;
      if (block == 16) rows::rotate_blocks<16>(from, y, first, end);
      else if (block == 32) rows::rotate_blocks<32>(from, y, first, end);
      else if (block == 64) rows::rotate_blocks<64>(from, y, first, end);
      else rows::rotate_blocks<128>(from, y, first, end);
    }
    if (several) region.done();
  }
}

// All arrays dense; k is a multiple of 16, and of block. `half` has a bit for each of y, bias, residual, weight, shift that is
// bfloat16. Pointers: y, scale, bias, residual, weight, shift, sum, normed, multiplier, static scale, q, factors. Numbers: rows,
// width, k, gate, up, block, activation, norm, whether there is a scale per row, zero point, half, threads.
extern "C" void sqcompile_rows(void* const* pointers, const int64_t* numbers, float eps) {
  void* const* p = pointers;
  const int64_t* n = numbers;
  const auto array = [&](int i, int bit) { return rows::Array{p[i], (n[10] >> bit & 1) != 0}; };
  const auto floats = [&](int i) { return static_cast<const float*>(p[i]); };
  const rows::Task t{array(0, 0), floats(1), array(2, 1), array(3, 2), array(4, 3), array(5, 4), p[6], p[7], floats(8), floats(9),
                     p[10], static_cast<float*>(p[11]), n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8] != 0,
                     static_cast<int32_t>(n[9]), eps};
  const int64_t count = n[0];
  const int threads = static_cast<int>(n[11]);
  const bool several = count > 1 && threads > 1;
  crowd::Region region;
#pragma omp parallel num_threads(threads) if (several)
  {
    region.work();
    std::vector<float> h(t.k);
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < count; ++row) rows::run_row(t, row, h.data());
    if (several) region.done();
  }
}
