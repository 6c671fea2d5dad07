// CPU operators that PyTorch's dispatcher calls without Python, which takes longer than a decoded token's kernels do.
//
// Written against PyTorch's stable interface, which compiles in a second. Operands of dtypes that the kernels do not take, which
// no lowered graph has, go on to the same operator in Python, `sqcompile_python::`.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // its name up to PyTorch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using torch::stable::detail::from;
using torch::stable::detail::to;

constexpr int64_t kLanes = 16;
constexpr int kNone = 0, kLayerNorm = 1, kRmsNorm = 2;

struct {
  void (*rows)(void* const*, const int64_t*, float);
  void (*vnni)(const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
  void (*amx)(const void*, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
              void*);
  void (*avx2)(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, void*);
  int64_t vnni_rows, amx_rows;  // the most rows for the one without tiles, the least for the other; -1 where there is none
} kernels;

template <int Outputs, typename... Arguments>
std::array<StableIValue, std::max<int>(sizeof...(Arguments), Outputs)> called(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, std::max<int>(sizeof...(Arguments), Outputs)> stack{from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                        dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

std::vector<int64_t> with_last(const Tensor& like, int64_t last) {
  const auto sizes = like.sizes();
  std::vector<int64_t> found(sizes.begin(), sizes.end());
  found.back() = last;
  return found;
}

int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

void* at(const Maybe& t) { return t ? t->data_ptr() : nullptr; }

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

Tensor matmul_u8s8(Tensor given, Tensor w, Tensor w_scale, Tensor w_sum, ScalarType dtype) {
  const Tensor q = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const int64_t k = q.size(q.dim() - 1), n = w_scale.numel(), rows = q.numel() ? q.numel() / k : 0;
  const bool amx = kernels.amx_rows >= 0 && rows >= kernels.amx_rows;
  const bool half = dtype == ScalarType::BFloat16;
  if (!rows) return empty(with_last(q, n), half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32());
  if (w.dim() == 3) {  // packed for AVX2, by which everything of it is computed
    const Tensor y = empty(with_last(q, n), half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32());
    const Tensor wide = empty({rows * ((k + 1) / 2 * 2)}, aoti_torch_dtype_int16());
    kernels.avx2(q.data_ptr(), w.data_ptr(), w_scale.data_ptr(), y.data_ptr(), half, rows, n, k,
                 torch::stable::get_num_threads(), wide.data_ptr());
    return y;
  }
  if (!w_sum.numel() || !(amx || rows <= kernels.vnni_rows)) {
    const Tensor zeros = empty({n}, aoti_torch_dtype_int64());
    std::fill_n(static_cast<int64_t*>(zeros.data_ptr()), n, 0);
    auto stack = called<1>("onednn::qlinear_pointwise", q, 1.0, int64_t{128}, w, w_scale, zeros, Maybe{}, 1.0, int64_t{0},
                           std::optional<ScalarType>(dtype), std::string("none"), std::vector<int64_t>{}, std::string());
    return to<Tensor>(stack[0]);
  }
  const void* packed = reinterpret_cast<const void*>(to<int64_t>(called<1>("mkldnn::data_ptr", w)[0]));
  const Tensor y = empty(with_last(q, n), half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32());
  const int64_t depth = (k + 63) / 64 * 64, threads = torch::stable::get_num_threads();
  if (amx) {
    const Tensor tiles = empty({(rows + 31) / 32 * 32 * depth}, aoti_torch_dtype_uint8());  // 64-byte aligned, as tensors are
    kernels.amx(q.data_ptr(), packed, w_scale.data_ptr(), w_sum.data_ptr(), y.data_ptr(), half, rows, n, k, depth, threads,
                tiles.data_ptr());
  } else {
    kernels.vnni(q.data_ptr(), packed, w_scale.data_ptr(), w_sum.data_ptr(), y.data_ptr(), half, rows, n, k, depth, threads);
  }
  return y;
}

}  // namespace

// Has the dispatcher call the operators here from now on. Null, or what is wrong.
extern "C" const char* sqcompile_dispatch(void* rows, void* vnni, void* amx, void* avx2, int64_t vnni_rows, int64_t amx_rows) {
  static auto& kept = *new std::vector<std::unique_ptr<torch::stable::detail::StableLibrary>>;  // for ever
  static std::string wrong;
  kernels.rows = reinterpret_cast<decltype(kernels.rows)>(rows);
  kernels.vnni = reinterpret_cast<decltype(kernels.vnni)>(vnni);
  kernels.amx = reinterpret_cast<decltype(kernels.amx)>(amx);
  kernels.avx2 = reinterpret_cast<decltype(kernels.avx2)>(avx2);
  kernels.vnni_rows = vnni_rows;
  kernels.amx_rows = amx_rows;
  try {
    for (const char* key : {"CPU", "MkldnnCPU"}) {
      using torch::stable::detail::StableLibrary;
      kept.push_back(std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "sqcompile", key, __FILE__, __LINE__));
      kept.back()->impl("matmul_u8s8", TORCH_BOX(&matmul_u8s8));  // packed weights carry the other key
      if (std::string(key) == "CPU") {
        kept.back()->impl("linear_act_quantize", TORCH_BOX(&linear_act_quantize));
        kept.back()->impl("linear_norm_quantize", TORCH_BOX(&linear_norm_quantize));
      }
    }
  } catch (const std::exception& e) {
    wrong = e.what();
    return wrong.c_str();
  }
  return nullptr;
}
