// INT8 products, and the registration of all operators of dispatch*.cpp.

namespace {

Tensor matmul_u8s8(Tensor given, Tensor w, Tensor w_scale, Tensor w_sum, ScalarType dtype, Maybe factors, Maybe bias) {
  const Tensor q = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const int64_t k = q.size(q.dim() - 1), n = w_scale.numel(), rows = q.numel() ? q.numel() / k : 0;
  const bool amx = kernels.amx_rows >= 0 && rows >= kernels.amx_rows;
  const bool half = dtype == ScalarType::BFloat16;
  const int32_t result = half ? aoti_torch_dtype_bfloat16() : aoti_torch_dtype_float32();
  if (!rows) return empty(with_last(q, n), result);
  Inputs in;
  in.floats(factors);
  in.array(0, bias);
  const bool each = factors && factors->numel() == rows;
  const bool one_each = (!factors || each || factors->numel() == 1) && (!bias || bias->numel() == n);
  if (!in.fits || !one_each || ((factors || bias) && (w.dim() == 3 || !w_sum.numel()))) {
    auto stack = called<1>("sqcompile_python::matmul_u8s8", q, w, w_scale, w_sum, dtype, factors, bias);
    return to<Tensor>(stack[0]);
  }
  if (w.dim() == 3) {  // packed for AVX2, by which everything of it is computed
    const Tensor y = empty(with_last(q, n), result);
    const Tensor wide = empty({rows * ((k + 1) / 2 * 2)}, aoti_torch_dtype_int16());
    kernels.avx2(q.data_ptr(), w.data_ptr(), w_scale.data_ptr(), y.data_ptr(), half, rows, n, k,
                 torch::stable::get_num_threads(), wide.data_ptr());
    return y;
  }
  if (!w_sum.numel()) {
    const Tensor zeros = empty({n}, aoti_torch_dtype_int64());
    std::fill_n(static_cast<int64_t*>(zeros.data_ptr()), n, 0);
    auto stack = called<1>("onednn::qlinear_pointwise", q, 1.0, int64_t{128}, w, w_scale, zeros, Maybe{}, 1.0, int64_t{0},
                           std::optional<ScalarType>(dtype), std::string("none"), std::vector<int64_t>{}, std::string());
    return to<Tensor>(stack[0]);
  }
  const void* packed = reinterpret_cast<const void*>(to<int64_t>(called<1>("mkldnn::data_ptr", w)[0]));
  const Tensor y = empty(with_last(q, n), result);
  const void* const arrays[] = {q.data_ptr(), packed, w_scale.data_ptr(), w_sum.data_ptr(), y.data_ptr(), at(factors), at(bias)};
  const int64_t numbers[] = {half, rows, n, k, (k + 63) / 64 * 64, each, in.half, torch::stable::get_num_threads()};
  (amx ? kernels.amx : kernels.vnni)(arrays, numbers);
  return y;
}

}  // namespace

// Has the dispatcher call the operators here from now on. Null, or what is wrong. `functions` and `limits` are as in `kernels`.
extern "C" const char* sqcompile_dispatch(void* const* functions, const int64_t* limits) {
  static auto& kept = *new std::vector<std::unique_ptr<torch::stable::detail::StableLibrary>>;  // for ever
  static std::string wrong;
  kernels.rows = reinterpret_cast<decltype(kernels.rows)>(functions[0]);
  kernels.vnni = reinterpret_cast<decltype(kernels.vnni)>(functions[1]);
  kernels.amx = reinterpret_cast<decltype(kernels.amx)>(functions[2]);
  kernels.flash = reinterpret_cast<decltype(kernels.flash)>(functions[3]);
  kernels.avx2 = reinterpret_cast<decltype(kernels.avx2)>(functions[4]);
  kernels.amx_rows = limits[0], kernels.flash_queries = limits[1], kernels.products = limits[2];
  try {
    for (const char* key : {"CPU", "MkldnnCPU"}) {
      using torch::stable::detail::StableLibrary;
      kept.push_back(std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "sqcompile", key, __FILE__, __LINE__));
      StableLibrary& library = *kept.back();
      library.impl("matmul_u8s8", TORCH_BOX(&matmul_u8s8));  // packed weights carry the other key
      if (std::string(key) != "CPU") continue;
      library.impl("linear_act_quantize", TORCH_BOX(&linear_act_quantize));
      library.impl("linear_norm_quantize", TORCH_BOX(&linear_norm_quantize));
      library.impl("rotate_quantize", TORCH_BOX(&rotate_quantize));
      library.impl("attention", TORCH_BOX(&attention));
      library.impl("mask_kind", TORCH_BOX(&mask_kind));
      library.impl("checked_ids", TORCH_BOX(&checked_ids));
      library.impl("stored", TORCH_BOX(&stored));
    }
  } catch (const std::exception& e) {
    wrong = e.what();
    return wrong.c_str();
  }
  return nullptr;
}

// Bytes of memory that is free, and kept for the next results; and gives it back to the system.
extern "C" int64_t sqcompile_kept() { return pool::Pool::one().kept(); }
extern "C" void sqcompile_release() { pool::Pool::one().release(); }
