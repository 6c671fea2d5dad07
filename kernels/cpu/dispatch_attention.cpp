// Attention in float, what its mask says, and what is checked and stored in front of the layers. Each is the function of its name
// in kernels/attention.py and kernels/ops.py, to the last bit.

namespace {

constexpr int64_t kGeneral = 0, kCausal = 1, kFull = 2;

Tensor viewed(const Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                              strides.data(), t.storage_offset(), &made));
  return Tensor(made);
}

// The second and the third of four dims exchanged.
Tensor turned(const Tensor& t) {
  return viewed(t, {t.size(0), t.size(2), t.size(1), t.size(3)}, {t.stride(0), t.stride(2), t.stride(1), t.stride(3)});
}

Tensor stored(Tensor x) {
  if (!x.is_contiguous()) return torch::stable::clone(x);
  const auto sizes = x.sizes(), strides = x.strides();
  const Tensor y = strided({sizes.begin(), sizes.end()}, {strides.begin(), strides.end()}, dtype_of(x));
  if (x.numel()) std::memcpy(y.data_ptr(), x.data_ptr(), x.numel() * x.element_size());
  return y;
}

// Refuses integers below low, and from end on.
template <typename Integer>
void check_range(const Tensor& ids, int64_t low, int64_t end, const std::string& what) {
  const Integer* const all = static_cast<const Integer*>(ids.data_ptr());
  const int64_t count = ids.numel();
  if (!count) return;
  Integer least = all[0], most = all[0];
  for (int64_t i = 1; i < count; ++i) least = std::min(least, all[i]), most = std::max(most, all[i]);
  if (least < low || most >= end)
    throw std::runtime_error(what + ", which takes " + std::to_string(low) + " to " + std::to_string(end - 1) + ", and is " +
                             std::to_string(least < low ? least : most) + " at one place");
}

Tensor checked_ids(Tensor ids, int64_t low, int64_t end, std::string what) {
  const int32_t dtype = dtype_of(ids);
  const Tensor dense = ids.is_contiguous() ? ids : torch::stable::contiguous(ids);
  if (dtype == aoti_torch_dtype_int64()) check_range<int64_t>(dense, low, end, what);
  else if (dtype == aoti_torch_dtype_int32()) check_range<int32_t>(dense, low, end, what);
  else return to<Tensor>(called<1>("sqcompile_python::checked_ids", ids, low, end, what)[0]);
  return stored(ids);
}

// Of matrices [queries, keys], one behind the other; minus infinity and the lowest number as bits.
template <typename Bits>
int64_t kind_of(const Tensor& mask, int64_t queries, int64_t keys, Bits infinity, Bits lowest) {
  const Bits* const all = static_cast<const Bits*>(mask.data_ptr());
  const int64_t count = mask.numel();
  int64_t zeros = 0;
  for (; zeros < count; zeros += 64) {
    Bits any = 0;
    for (int64_t i = zeros; i < std::min(zeros + 64, count); ++i) any |= all[i];
    if (any) break;
  }
  if (zeros >= count) return kFull;
  const Bits blocked = all[keys - 1];  // the last key, as the first query sees it
  if (queries < 2 || (blocked != infinity && blocked != lowest)) return kGeneral;
  for (int64_t row = 0; row < count / keys; ++row) {
    const int64_t seen = std::min(row % queries + 1, keys);
    Bits wrong = 0;
    for (int64_t i = 0; i < seen; ++i) wrong |= all[row * keys + i];
    for (int64_t i = seen; i < keys; ++i) wrong |= all[row * keys + i] ^ blocked;
    if (wrong) return kGeneral;
  }
  return kCausal;
}

Tensor mask_kind(Tensor given) {
  const Tensor mask = given.is_contiguous() ? given : torch::stable::contiguous(given);
  const int64_t dims = mask.dim(), queries = dims > 1 ? mask.size(dims - 2) : 1, keys = dims ? mask.size(dims - 1) : 1;
  const int32_t dtype = dtype_of(mask);
  int64_t kind;
  if (dtype == aoti_torch_dtype_bfloat16()) kind = kind_of<uint16_t>(mask, queries, keys, 0xff80, 0xff7f);
  else if (dtype == aoti_torch_dtype_float16()) kind = kind_of<uint16_t>(mask, queries, keys, 0xfc00, 0xfbff);
  else if (dtype == aoti_torch_dtype_float32()) kind = kind_of<uint32_t>(mask, queries, keys, 0xff800000, 0xff7fffff);
  else if (dtype == aoti_torch_dtype_float64())
    kind = kind_of<uint64_t>(mask, queries, keys, 0xfff0000000000000, 0xffefffffffffffff);
  else return to<Tensor>(called<1>("sqcompile_python::mask_kind", mask)[0]);
  const Tensor found = strided({}, {}, aoti_torch_dtype_int64());
  *static_cast<int64_t*>(found.data_ptr()) = kind;
  return found;
}

Tensor pytorchs(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, bool causal,
                const std::optional<double>& scale, bool grouped) {
  return to<Tensor>(called<1>("aten::scaled_dot_product_attention", q, k, v, mask, 0.0, causal, scale, grouped)[0]);
}

// Strides of a mask as if it were expanded to [batch, heads, queries, keys], but for the last.
std::array<int64_t, 3> expanded_strides(const Maybe& mask) {
  std::array<int64_t, 3> found{};
  for (int64_t i = 0; mask && i + 1 < mask->dim(); ++i)
    if (mask->size(i) != 1) found[4 - mask->dim() + i] = mask->stride(i);
  return found;
}

bool mask_fits(const Tensor& mask, const std::array<int64_t, 4>& shape) {
  const int64_t dims = mask.dim();
  if (dims < 2 || dims > 4 || mask.size(dims - 1) != shape[3] || mask.stride(dims - 1) != 1) return false;
  for (int64_t i = 0; i < dims; ++i)
    if (mask.size(i) != 1 && mask.size(i) != shape[4 - dims + i]) return false;
  return dtype_of(mask) == aoti_torch_dtype_bfloat16() || dtype_of(mask) == aoti_torch_dtype_float32();
}

bool flash_fits(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, bool causal,
                const std::optional<double>& scale) {
  const int64_t d = q.size(3), keys = k.size(2), groups = k.size(1), batch = q.size(0);
  for (const Tensor* t : {&q, &k, &v})
    if (dtype_of(*t) != aoti_torch_dtype_bfloat16() || t->stride(3) != 1 || t->size(3) != d || t->size(0) != batch) return false;
  const bool alike = v.size(1) == groups && v.size(2) == keys && groups && q.size(1) % groups == 0;
  const bool masked = !mask || (!causal && mask_fits(*mask, {batch, q.size(1), q.size(2), keys}));
  return alike && masked && d % 32 == 0 && d > 0 && d <= 256 && q.numel() && k.numel() && (!scale || *scale > 0);
}

Tensor flash(const Tensor& q, const Tensor& k, const Tensor& v, const Maybe& mask, bool causal,
             const std::optional<double>& scale) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), d = q.size(3), groups = k.size(1), keys = k.size(2);
  const Tensor out = strided({batch, heads, queries, d}, {queries * heads * d, d, heads * d, 1}, aoti_torch_dtype_bfloat16());
  const Tensor packed = empty({2 * batch * groups * ((keys + 31) / 32 * 32) * d}, aoti_torch_dtype_bfloat16());
  const auto by_mask = expanded_strides(mask);
  const int64_t sizes[] = {batch,       heads,       groups,      queries,     keys,        d,           q.stride(0), q.stride(1),
                           q.stride(2), k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), by_mask[0],
                           by_mask[1],  by_mask[2],  mask && dtype_of(*mask) == aoti_torch_dtype_bfloat16()};
  const double by = scale ? *scale : std::pow(static_cast<double>(d), -0.5);
  kernels.flash(q.data_ptr(), k.data_ptr(), v.data_ptr(), at(mask), out.data_ptr(), packed.data_ptr(), sizes,
                static_cast<float>(by), causal, kernels.products, torch::stable::get_num_threads());
  return out;
}

Tensor attention(Tensor q, Tensor k, Tensor v, Maybe mask, Maybe about, bool causal, std::optional<double> scale) {
  const bool kind_known = mask && about && about->dim() == 0;
  if (q.dim() != 4 || k.dim() != 4 || v.dim() != 4 || (kind_known && dtype_of(*about) != aoti_torch_dtype_int64()))
    return to<Tensor>(called<1>("sqcompile_python::attention", q, k, v, mask, about, causal, scale)[0]);
  if (kind_known) {
    const int64_t kind = *static_cast<const int64_t*>(about->data_ptr());
    if (kind != kGeneral) mask.reset(), causal = kind == kCausal;
  }
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), d = q.size(3), groups = k.size(1);
  const bool shared = !mask || mask->dim() < 3 || mask->size(mask->dim() - 3) == 1;  // one mask for all heads
  if (queries == 1 && groups != heads && groups && heads % groups == 0 && shared && !causal) {
    // decode: the query heads of a group are the queries of one attention, which reads each key once
    const int64_t each = heads / groups;
    const Tensor grouped =
        viewed(q, {batch, groups, each, d}, {q.stride(0), each * q.stride(1), q.stride(1), q.stride(3)});
    const Tensor made = pytorchs(grouped, k, v, mask, false, scale, false);
    const Tensor y = made.is_contiguous() ? made : torch::stable::contiguous(made);
    const int64_t width = v.size(3);
    return viewed(y, {batch, heads, 1, width}, {heads * width, width, heads * width, 1});
  }
  if (kernels.flash_queries >= 0 && queries >= kernels.flash_queries && flash_fits(q, k, v, mask, causal, scale))
    return flash(q, k, v, mask, causal, scale);
  const Tensor y = pytorchs(q, k, v, mask, causal, scale, groups != heads), rows = turned(y);
  return rows.is_contiguous() ? y : turned(torch::stable::contiguous(rows));
}

}  // namespace
