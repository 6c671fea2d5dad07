// CPU operators that PyTorch's dispatcher calls without Python, which takes longer than a decoded token's kernels do: what they
// share.
//
// Written against PyTorch's stable interface, which compiles in a second. Operands of dtypes that the kernels do not take, which
// no lowered graph has, go on to the same operator in Python, `sqcompile_python::`.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
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
  using Product = void (*)(const void* const*, const int64_t*);
  Product vnni, amx;
  void (*flash)(const void*, const void*, const void*, const void*, void*, void*, const int64_t*, float, int64_t, int64_t,
                int64_t);
  void (*avx2)(const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int64_t, int64_t, void*);
  // The least rows for the product with tiles; the least queries of `flash`, and by what products. -1 for none.
  int64_t amx_rows, flash_queries, products;
} kernels;

template <int Outputs, typename... Arguments>
std::array<StableIValue, std::max<int>(sizeof...(Arguments), Outputs)> called(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, std::max<int>(sizeof...(Arguments), Outputs)> stack{from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

int64_t bytes_of(int32_t dtype) {
  if (dtype == aoti_torch_dtype_int8() || dtype == aoti_torch_dtype_uint8()) return 1;
  if (dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_int16()) return 2;
  return dtype == aoti_torch_dtype_float32() ? 4 : 0;  // of others none is large
}

// A tensor without gaps.
Tensor strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int32_t dtype) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  int64_t bytes = bytes_of(dtype);
  for (int64_t size : sizes) bytes *= size;
  AtenTensorHandle made;
  pool::Block* const block = bytes < pool::kLeast ? nullptr : pool::Pool::one().take(bytes);
  if (!block) {
    pool::Pool::one().small();
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
  }
  const auto give = [](void*, void* of) { pool::Pool::one().give(static_cast<pool::Block*>(of)); };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(block->data, dims, sizes.data(), strides.data(), 0, dtype,
                                                aoti_torch_device_type_cpu(), -1, &made, aoti_torch_layout_strided(), nullptr, 0,
                                                give, block));
  return Tensor(made);
}

Tensor empty(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return strided(sizes, strides, dtype);
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

}  // namespace
