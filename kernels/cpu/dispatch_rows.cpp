// The operators of rows (rows.cpp).

namespace {

// Refuses what would be read behind a row's end, and rotations that there are none of.
void check(int64_t width, int64_t k, int64_t gate, int64_t up, int64_t block) {
  const bool rotates = block == 0 || ((block == 16 || block == 32 || block == 64 || block == 128) && k % block == 0);
  if (!rotates || gate < 0 || up < -1 || std::max(gate, up) + k > width)
    throw std::runtime_error("columns " + std::to_string(gate) + " and " + std::to_string(up) + " to " + std::to_string(k) +
                             " more, rotated by " + std::to_string(block) + ", of " + std::to_string(width) + " channels");
}

// What the kernel reads: whether it can, and in which dtypes.
struct Inputs {
  bool fits = true;
  int64_t half = 0;

  void array(int bit, Maybe& t) {
    if (!t) return;
    const int32_t dtype = dtype_of(*t);
    if (dtype == aoti_torch_dtype_bfloat16()) half |= int64_t{1} << bit;
    fits = fits && (dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float32());
    dense(t);
  }
  void floats(Maybe& t) {
    fits = fits && (!t || dtype_of(*t) == aoti_torch_dtype_float32());
    dense(t);
  }
  static void dense(Maybe& t) {  // parameters may be views, with steps of their own
    if (t && !t->is_contiguous()) t = torch::stable::contiguous(*t);
  }
};

int64_t code_of(const std::string& activation) {
  constexpr const char* kNames[] = {"none", "relu", "silu", "gelu", "gelu_tanh"};
  for (int64_t i = 0; i < 5; ++i)
    if (activation == kNames[i]) return i;
  throw std::runtime_error("there is no activation " + activation);
}

std::tuple<Tensor, Tensor> rotate_quantize(Tensor given, int64_t block, Maybe fixed, int64_t zero_point) {
  Inputs in;
  Maybe source = given;
  in.array(0, source);
  in.floats(fixed);
  const Tensor& x = *source;
  const int64_t k = x.dim() ? x.size(x.dim() - 1) : 0, rows = k ? x.numel() / k : 0;
  if (!in.fits || !block || k % kLanes || !rows) {
    auto stack = called<2>("sqcompile_python::rotate_quantize", given, block, fixed, zero_point);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  check(k, k, 0, -1, block);
  const Tensor q = empty(with_last(x, k), zero_point ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8());
  const Tensor factors = empty(with_last(x, 1), aoti_torch_dtype_float32());
  void* const pointers[] = {x.data_ptr(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                            nullptr, at(fixed), q.data_ptr(), factors.data_ptr()};
  const int64_t numbers[] = {rows, k, k, 0, -1, block, 0, kNone, false, zero_point, in.half, torch::stable::get_num_threads()};
  kernels.rows(pointers, numbers, 0.0f);
  return {q, factors};
}

std::tuple<Tensor, Tensor> linear_act_quantize(Tensor given, Maybe scale, Maybe bias, int64_t gate, int64_t up, int64_t k,
                                               std::string activation, Maybe multiplier, int64_t rotation, Maybe fixed,
                                               int64_t zero_point) {
  Inputs in;
  Maybe source = given;
  in.array(0, source);
  in.array(1, bias);
  for (Maybe* t : {&scale, &multiplier, &fixed}) in.floats(*t);
  const Tensor& y = *source;
  const int64_t code = code_of(activation);
  if (!in.fits || k % kLanes) {
    auto stack = called<2>("sqcompile_python::linear_act_quantize", y, scale, bias, gate, up, k, activation, multiplier, rotation,
                           fixed, zero_point);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  const Tensor q = empty(with_last(y, k), zero_point ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8());
  const Tensor factors = empty(with_last(y, 1), aoti_torch_dtype_float32());
  const int64_t width = y.size(y.dim() - 1), rows = width ? y.numel() / width : 0;
  check(width, k, gate, up, rotation);
  void* const pointers[] = {y.data_ptr(), at(scale), at(bias), nullptr, nullptr, nullptr, nullptr, nullptr,
                            at(multiplier), at(fixed), q.data_ptr(), factors.data_ptr()};
  const int64_t numbers[] = {rows, width, k, gate, up, rotation, code, kNone, scale && scale->numel() == rows, zero_point,
                             in.half, torch::stable::get_num_threads()};
  if (rows) kernels.rows(pointers, numbers, 0.0f);
  return {q, factors};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_norm_quantize(Tensor given, Maybe scale, Maybe bias, Maybe residual, Maybe weight,
                                                                Maybe shift, double eps, bool rms, bool round_first,
                                                                Maybe multiplier, int64_t rotation, Maybe fixed,
                                                                int64_t zero_point, bool keep_sum, bool keep_norm) {
  Inputs in;
  Maybe source = given;
  Maybe* const arrays[] = {&source, &bias, &residual, &weight, &shift};
  for (int i = 0; i < 5; ++i) in.array(i, *arrays[i]);
  for (Maybe* t : {&scale, &multiplier, &fixed}) in.floats(*t);
  const Tensor& y = *source;
  const int64_t k = y.size(y.dim() - 1);
  if (!in.fits || k % kLanes) {
    auto stack = called<4>("sqcompile_python::linear_norm_quantize", y, scale, bias, residual, weight, shift, eps, rms,
                           round_first, multiplier, rotation, fixed, zero_point, keep_sum, keep_norm);
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3])};
  }
  const Tensor& like = residual ? *residual : y;
  const int32_t dtype = dtype_of(y);
  const Tensor q = empty(with_last(like, k), zero_point ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8());
  const Tensor factors = empty(with_last(like, 1), aoti_torch_dtype_float32());
  const Tensor sum = empty(keep_sum ? with_last(like, k) : std::vector<int64_t>{0}, dtype);
  const Tensor normed = empty(keep_norm ? with_last(like, k) : std::vector<int64_t>{0}, dtype);
  const int64_t rows = k ? y.numel() / k : 0;
  check(k, k, 0, -1, rotation);
  void* const pointers[] = {y.data_ptr(), at(scale), at(bias), at(residual), at(weight), at(shift),
                            keep_sum ? sum.data_ptr() : nullptr, keep_norm ? normed.data_ptr() : nullptr,
                            at(multiplier), at(fixed), q.data_ptr(), factors.data_ptr()};
  const int64_t numbers[] = {rows, k, k, 0, -1, rotation, 0, rms ? kRmsNorm : kLayerNorm, scale && scale->numel() == rows,
                             zero_point, in.half, torch::stable::get_num_threads()};
  if (rows) kernels.rows(pointers, numbers, static_cast<float>(eps));
  return {q, factors, sum, normed};
}

}  // namespace
