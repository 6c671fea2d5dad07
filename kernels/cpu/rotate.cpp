// Rotation of rows by Hadamard matrices in blocks, and their quantization: one read of x, one write of its integers.
//
// A row is kept in cache as float32. Pairs of channels up to 8 apart lie in one vector of 16: a stage is a shuffle and a
// multiply-add; pairs further apart lie in two. Sums, scale and rounding are those of `rotation.rotate_quantize`, bit for bit.
// Vectors are the compiler's own, which it splits where the machine has smaller ones.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace rotation {

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));

// v of the lanes `Step` apart: lane i takes lane i ^ Step.
template <int Step>
inline Vector exchanged(Vector v) {
  constexpr Lanes from = {0 ^ Step, 1 ^ Step, 2 ^ Step,  3 ^ Step,  4 ^ Step,  5 ^ Step,  6 ^ Step,  7 ^ Step,
                          8 ^ Step, 9 ^ Step, 10 ^ Step, 11 ^ Step, 12 ^ Step, 13 ^ Step, 14 ^ Step, 15 ^ Step};
#if defined(__clang__)
  return __builtin_shufflevector(v, v, 0 ^ Step, 1 ^ Step, 2 ^ Step, 3 ^ Step, 4 ^ Step, 5 ^ Step, 6 ^ Step, 7 ^ Step,
                                 8 ^ Step, 9 ^ Step, 10 ^ Step, 11 ^ Step, 12 ^ Step, 13 ^ Step, 14 ^ Step, 15 ^ Step);
#else
  return __builtin_shuffle(v, from);
#endif
}

// (a, b) -> (a + b, a - b) for lanes `Step` apart; lane i holds a where i & Step is 0.
template <int Step>
inline Vector paired(Vector v) {
  Vector sign;
  for (int i = 0; i < kLanes; ++i) sign[i] = i & Step ? -1.0f : 1.0f;
  return exchanged<Step>(v) + sign * v;
}

template <int Block>
inline void rotate_block(Vector (&v)[Block / kLanes]) {
  constexpr int kVectors = Block / kLanes;
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) v[i] = paired<8>(paired<4>(paired<2>(paired<1>(v[i]))));
#pragma GCC unroll 3
  for (int step = 1; step < kVectors; step *= 2)
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i)
      if (!(i & step)) {
        const Vector a = v[i], b = v[i + step];
        v[i] = a + b, v[i + step] = a - b;
      }
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(Block)));
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) v[i] *= norm;
}

struct Task {
  const void* x;        // [rows, k], float32 or bfloat16
  const float* scale;   // static, or null for one per row
  void* q;              // int8, or uint8 with the zero point 128
  float* factors;       // [rows]
  int64_t k, block;
  bool bf16;
  int32_t zero_point;
};

// 16 values of x from `at`, as float32.
inline Vector read(const Task& t, int64_t at) {
  Vector v;
  if (!t.bf16) {
    std::memcpy(&v, static_cast<const float*>(t.x) + at, sizeof(v));
    return v;
  }
  uint16_t half __attribute__((vector_size(2 * kLanes)));
  std::memcpy(&half, static_cast<const uint16_t*>(t.x) + at, sizeof(half));
  const Lanes bits = __builtin_convertvector(half, Lanes) << 16;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// clamp(round_half_even(y * inverse), -127, 127) + zero_point of 16 values; NaN becomes 0.
inline void write(const Task& t, Vector y, float inverse, uint8_t* q) {
  Vector v = y * inverse;
  v = v == v ? v : Vector{};
  v = v < -127.0f ? Vector{} - 127.0f : v;
  v = (v > 127.0f ? Vector{} + 127.0f : v) + 12582912.0f;  // 1.5 * 2^23: the addition rounds half to even
  Lanes low;
  std::memcpy(&low, &v, sizeof(low));
  uint8_t bytes __attribute__((vector_size(kLanes)));
  bytes = __builtin_convertvector(low + t.zero_point, decltype(bytes));
  std::memcpy(q, &bytes, sizeof(bytes));
}

// Rotates a row into y; gives its absmax as bits, which order like the values, NaN above infinity.
template <int Block>
int32_t rotate_row(const Task& t, int64_t row, float* y) {
  Lanes largest = {};
  for (int64_t at = 0; at < t.k; at += Block) {
    Vector v[Block / kLanes];
    for (int i = 0; i < Block / kLanes; ++i) v[i] = read(t, row * t.k + at + i * kLanes);
    rotate_block<Block>(v);
    for (int i = 0; i < Block / kLanes; ++i) {
      Lanes size;
      std::memcpy(&size, &v[i], sizeof(size));
      size &= 0x7fffffff;
      largest = size > largest ? size : largest;
    }
    std::memcpy(y + at, v, sizeof(v));
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = largest[i] > most ? largest[i] : most;
  return most;
}

inline void run_row(const Task& t, int64_t row, float* y) {
  const int32_t largest = t.block == 16   ? rotate_row<16>(t, row, y)
                          : t.block == 32 ? rotate_row<32>(t, row, y)
                          : t.block == 64 ? rotate_row<64>(t, row, y)
                                          : rotate_row<128>(t, row, y);
  const bool finite = largest < 0x7f800000;
  float absmax, scale;
  std::memcpy(&absmax, &largest, sizeof(absmax));
  if (t.scale) {
    scale = *t.scale;
    t.factors[row] = finite ? 1.0f : NAN;
  } else {
    scale = (absmax < 1e-30f ? 1e-30f : absmax) * static_cast<float>(1.0 / 127);
    t.factors[row] = scale = finite ? scale : NAN;
  }
  const float inverse = static_cast<float>(1.0 / static_cast<double>(scale));
  uint8_t* q = static_cast<uint8_t*>(t.q) + row * t.k;
  for (int64_t i = 0; i < t.k; i += kLanes) {
    Vector v;
    std::memcpy(&v, y + i, sizeof(v));
    write(t, v, inverse, q + i);
  }
}

}  // namespace rotation

// All arrays dense. k is a multiple of block: 16, 32, 64 or 128.
extern "C" void sqcompile_rotate(const void* x, const float* scale, void* q, float* factors, int64_t rows, int64_t k,
                                 int64_t block, int64_t bf16, int64_t zero_point, int64_t threads) {
  const rotation::Task t{x, scale, q, factors, k, block, bf16 != 0, static_cast<int32_t>(zero_point)};
#pragma omp parallel num_threads(threads) if (rows > 1 && threads > 1)
  {
    std::vector<float> y(k);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) rotation::run_row(t, row, y.data());
  }
}
