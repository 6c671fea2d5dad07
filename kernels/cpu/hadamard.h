// Rotation by orthonormal Hadamard matrices. Pairs of channels up to 8 apart lie in one vector of 16: a stage is a shuffle and
// a multiply-add; pairs further apart lie in two. The sums are those of `rotation.rotate`, bit for bit.

namespace rows {

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
#define SQ_SIGN(i) ((i) & Step ? -1.0f : 1.0f)
  constexpr Vector sign = {SQ_SIGN(0), SQ_SIGN(1), SQ_SIGN(2),  SQ_SIGN(3),  SQ_SIGN(4),  SQ_SIGN(5),  SQ_SIGN(6),  SQ_SIGN(7),
                           SQ_SIGN(8), SQ_SIGN(9), SQ_SIGN(10), SQ_SIGN(11), SQ_SIGN(12), SQ_SIGN(13), SQ_SIGN(14), SQ_SIGN(15)};
#undef SQ_SIGN
  return fma(sign, v, exchanged<Step>(v));  // the product is exact
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

}  // namespace rows
