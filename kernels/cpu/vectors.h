// Vectors of 16 float32 values, which the compiler splits where the machine has smaller ones: read, written, and activated.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace rows {

constexpr int kLanes = 16;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));

enum Activation { kNone, kRelu, kSilu, kGelu, kGeluTanh };

// float32 or bfloat16 values; null for none.
struct Array {
  const void* data;
  bool bf16;

  // 16 values from `at`, as float32.
  Vector read(int64_t at) const {
    Vector v;
    if (!bf16) {
      std::memcpy(&v, static_cast<const float*>(data) + at, sizeof(v));
      return v;
    }
    const uint16_t* from = static_cast<const uint16_t*>(data) + at;
#if defined(__AVX512F__)  // what GCC makes of the lines below takes four instructions
    return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16);
#else
    uint16_t half __attribute__((vector_size(2 * kLanes)));
    std::memcpy(&half, from, sizeof(half));
    return (Vector)(__builtin_convertvector(half, Lanes) << 16);
#endif
  }
};

// Writes 16 values to float32 or bfloat16, rounded to the nearest, ties to even.
inline void store(void* out, bool bf16, int64_t at, Vector v) {
  if (!bf16) {
    std::memcpy(static_cast<float*>(out) + at, &v, sizeof(v));
    return;
  }
  Lanes bits;
  std::memcpy(&bits, &v, sizeof(bits));
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = v == v ? bits : Lanes{} + 0x7fc0;  // a NaN whose bits the addition would carry over
  uint16_t half __attribute__((vector_size(2 * kLanes)));
  half = __builtin_convertvector(bits, decltype(half));
  std::memcpy(static_cast<uint16_t*>(out) + at, &half, sizeof(half));
}

// a * b + c; rounded once where the machine has that.
inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}

inline Vector all(float x) { return Vector{} + x; }

// 1 / v to 2 units in the last place; 0 of infinity.
inline Vector reciprocal(Vector v) {
#if defined(__AVX512F__)
  const Vector near = (Vector)_mm512_rcp14_ps((__m512)v);
  const Vector nearer = fma(fma(-v, near, all(1.0f)), near, near);
  return v == HUGE_VALF ? Vector{} : nearer;  // 0 times infinity is NaN
#else
  return 1.0f / v;
#endif
}

inline Vector abs(Vector v) {
  Lanes bits;
  std::memcpy(&bits, &v, sizeof(bits));
  bits &= 0x7fffffff;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

// e^x to 2 units in the last place, infinity above 88 or 89, e^-87 below -87; NaN stays NaN.
inline Vector exp(Vector x) {
#if defined(__AVX512F__)  // which gives the second of two operands where one is NaN
  x = (Vector)_mm512_min_ps((__m512)all(89.0f), _mm512_max_ps((__m512)all(-87.0f), (__m512)x));
#else
  const Vector given = x;
  x = x < -87.0f ? Vector{} - 87.0f : x;
  x = x > 88.0f ? Vector{} + 88.0f : x;
#endif
  const Vector shifted = fma(x, all(1.44269504f), all(12582912.0f));  // 1.5 * 2^23: the sum is an integer
  const Vector n = shifted - 12582912.0f;
  const Vector r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));  // ln 2 in two parts
  Vector p = fma(r, all(1.9875691500e-4f), all(1.3981999507e-3f));  // Cephes, expf
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p * r, r, r + 1.0f);
#if defined(__AVX512F__)
  return (Vector)_mm512_scalef_ps((__m512)p, (__m512)n);  // p 2^n
#else
  Lanes bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = ((bits - 0x4b400000) + 127) << 23;  // 2^n
  Vector power;
  std::memcpy(&power, &bits, sizeof(power));
  return given > 88.0f ? all(HUGE_VALF) : p * power;
#endif
}

// x/2 (1 + erf(x / sqrt 2)) by erfc of |x|, to 2e-7 of |x| (Abramowitz and Stegun 7.1.26).
inline Vector gelu(Vector x) {
  const Vector size = abs(x);
  const Vector t = reciprocal(fma(size, all(0.3275911f * 0.70710678f), all(1.0f)));
  Vector p = fma(t, all(1.061405429f), all(-1.453152027f));
  p = fma(p, t, all(1.421413741f));
  p = fma(p, t, all(-0.284496736f));
  p = fma(p, t, all(0.254829592f));
  const Vector tail = x * (0.5f * p * t * exp(-0.5f * size * size));
  return x < 0.0f ? tail : x - tail;
}

inline Vector activated(Vector x, int activation) {
  switch (activation) {
    case kRelu: return x < 0.0f ? Vector{} : x;  // NaN stays
    case kSilu: return x * reciprocal(exp(-x) + 1.0f);
    case kGelu: return gelu(x);
    case kGeluTanh: return x * reciprocal(exp(fma(x * x, all(0.044715f), all(1.0f)) * x * -1.59576912f) + 1.0f);
    default: return x;
  }
}

inline float total(Vector v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

inline Vector loaded(const float* h, int64_t at) {
  Vector v;
  std::memcpy(&v, h + at, sizeof(v));
  return v;
}

}  // namespace rows
