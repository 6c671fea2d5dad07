// Operators whose launches are replayed: what Python and Triton did for a call, done again for calls like it.
//
// A call is like another where its numbers, its words and the layouts of its tensors are equal. The first of its kind runs
// in Python, which says what it launched (replay.py); the second time nothing but addresses differ. A launch that was
// recorded has to give the same bytes as Python's before it is kept.

#include <ATen/core/stack.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <unordered_map>

namespace {

using Key = std::vector<int64_t>;
struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t h = 1469598103934665603ull;
    for (int64_t x : key) h = (h ^ static_cast<uint64_t>(x)) * 1099511628211ull, h ^= h >> 29;
    return h;
  }
};

struct Operator {
  c10::OperatorHandle python;
  std::shared_mutex mutex;
  std::unordered_map<Key, std::shared_ptr<const Recording>, Hash> recordings;
};

constexpr size_t kMost = 4096;  // recordings of an operator; calls of further kinds stay with Python
std::unordered_map<std::string, std::unique_ptr<Operator>> operators;
std::vector<std::unique_ptr<torch::Library>> libraries;
thread_local std::shared_ptr<const Recording> left;  // by Python, for the call that it has just run
thread_local std::string failure;

struct Reader {
  const int64_t* at;
  int64_t next() { return *at++; }
  template <typename T>
  std::vector<T> list() {
    std::vector<T> found(next());
    for (T& x : found) x = static_cast<T>(next());
    return found;
  }
};

// What a call is, but for the addresses of its tensors; false for what no operator here takes.
bool describe(c10::ArrayRef<c10::IValue> arguments, Key& key, std::vector<char*>& addresses, at::Device& device) {
  for (const c10::IValue& v : arguments) {
    if (v.isTensor()) {
      const at::Tensor& t = v.toTensor();
      if (!t.defined() || t.layout() != at::kStrided) return false;
      char* address = static_cast<char*>(t.data_ptr());
      int64_t alias = -1;  // of tensors at one place, any stands for all
      for (size_t i = 0; alias < 0 && i < addresses.size(); ++i)
        if (addresses[i] == address) alias = i;
      if (addresses.empty()) device = t.device();
      if (t.device() != device) return false;
      addresses.push_back(address);
      key.push_back(1 | static_cast<int64_t>(t.scalar_type()) << 8 | t.dim() << 16 |
                    (reinterpret_cast<uintptr_t>(address) & 15) << 24 | static_cast<int64_t>(t.is_conj() || t.is_neg()) << 32);
      key.push_back(alias);
      for (int64_t x : t.sizes()) key.push_back(x);
      for (int64_t x : t.strides()) key.push_back(x);
    } else if (v.isNone()) {
      key.push_back(2);
    } else if (v.isInt()) {
      key.push_back(3), key.push_back(v.toInt());
    } else if (v.isBool()) {
      key.push_back(4 | static_cast<int64_t>(v.toBool()) << 8);
    } else if (v.isDouble()) {
      const double x = v.toDouble();
      int64_t bits;
      std::memcpy(&bits, &x, 8);
      key.push_back(5), key.push_back(bits);
    } else if (v.isString()) {
      const std::string_view s = v.toStringView();
      key.push_back(6 | static_cast<int64_t>(s.size()) << 8);
      for (size_t i = 0; i < s.size(); i += 8) {
        int64_t eight = 0;
        std::memcpy(&eight, s.data() + i, std::min<size_t>(8, s.size() - i));
        key.push_back(eight);
      }
    } else {
      return false;
    }
  }
  if (addresses.empty()) return false;
  key.push_back(device.index());
  return true;
}

bool same(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.strides() != b.strides() || a.scalar_type() != b.scalar_type()) return false;
  if (a.numel() == 0) return true;
  const int64_t bytes = a.numel() * a.element_size();  // both fill their memory
  const auto raw = [bytes](const at::Tensor& t) {
    return at::from_blob(t.data_ptr(), {bytes}, at::TensorOptions().dtype(at::kByte).device(t.device()));
  };
  return at::equal(raw(a), raw(b));
}

// Whether a recording does what Python did for a call.
bool holds(const Recording& r, const std::vector<char*>& addresses, at::Device device, c10::ArrayRef<c10::IValue> outputs) {
  if (r.outputs != outputs.size()) return false;
  const std::vector<at::Tensor> found = run(r, addresses, device, 0xA5);
  for (size_t i = 0; i < found.size(); ++i)
    if (!outputs[i].isTensor() || !same(found[i], outputs[i].toTensor())) return false;
  return true;
}

void replay(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Operator& mine = *operators.at(op.operator_name().name);
  const size_t count = op.schema().arguments().size();
  Key key;
  key.reserve(96);
  std::vector<char*> addresses;
  addresses.reserve(24);
  at::Device device(at::kCPU);
  if (!describe(torch::jit::last(*stack, count), key, addresses, device)) return mine.python.callBoxed(stack);
  std::shared_ptr<const Recording> found;
  bool room;
  {
    std::shared_lock lock(mine.mutex);
    const auto at = mine.recordings.find(key);
    if (at != mine.recordings.end()) found = at->second;
    room = mine.recordings.size() < kMost;
  }
  if (found != nullptr && found->usable()) {
    std::vector<at::Tensor> outputs = run(*found, std::move(addresses), device);
    torch::jit::drop(*stack, count);
    for (at::Tensor& y : outputs) stack->emplace_back(std::move(y));
    return;
  }
  if (found != nullptr || !room) return mine.python.callBoxed(stack);
  const std::vector<c10::IValue> kept(stack->end() - count, stack->end());  // holds the inputs until the comparison
  const size_t below = stack->size() - count;
  left = nullptr;
  mine.python.callBoxed(stack);
  const std::shared_ptr<const Recording> made = std::move(left);
  left = nullptr;
  if (made == nullptr) return;  // not now, as while a CUDA graph is recorded
  const auto outputs = c10::ArrayRef<c10::IValue>(stack->data() + below, stack->size() - below);
  bool good = false;
  try {
    good = made->usable() && holds(*made, addresses, device, outputs);
  } catch (const c10::OutOfMemoryError&) {
    return;  // Python's result stands, and a later call is compared
  } catch (const std::exception&) {
  }
  std::unique_lock lock(mine.mutex);
  mine.recordings[key] = good ? made : std::make_shared<const Recording>();
}

}  // namespace

extern "C" {

// Finds the driver's functions; says in words what is missing, null if nothing is.
const char* sqcompile_replay_driver(const char* driver, const char* torch_cuda) {
  void* cuda = dlopen(driver, RTLD_NOW);
  launch_kernel = cuda ? reinterpret_cast<Launch>(dlsym(cuda, "cuLaunchKernelEx")) : nullptr;
  encode_map = cuda ? reinterpret_cast<Encode>(dlsym(cuda, "cuTensorMapEncodeTiled")) : nullptr;
  fill_memory = cuda ? reinterpret_cast<Fill>(dlsym(cuda, "cuMemsetD8Async")) : nullptr;
  if (launch_kernel == nullptr || encode_map == nullptr || fill_memory == nullptr) return "the CUDA driver is too old";
  if (torch_cuda == nullptr) return nullptr;
  void* torch = dlopen(torch_cuda, RTLD_NOW | RTLD_NOLOAD);
  current_stream = torch ? reinterpret_cast<Stream>(dlsym(torch, "aoti_torch_get_current_cuda_stream")) : nullptr;
  return current_stream == nullptr ? "PyTorch does not tell its current stream" : nullptr;
}

// sqcompile::name on CUDA (or, in tests, on the CPU) is replayed from now on, and sqcompile_triton::name is what is recorded.
const char* sqcompile_replay(const char* name, int cuda) {
  try {
    const std::string full = std::string("sqcompile::") + name;
    const auto python = c10::Dispatcher::singleton().findSchemaOrThrow((std::string("sqcompile_triton::") + name).c_str(), "");
    operators[full] = std::unique_ptr<Operator>(new Operator{python});
    const auto key = cuda ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
    auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "sqcompile", key, __FILE__, __LINE__);
    library->impl(name, torch::CppFunction::makeFromBoxedFunction<&replay>());
    libraries.push_back(std::move(library));
    return nullptr;
  } catch (const std::exception& e) {
    failure = e.what();
    return failure.c_str();
  }
}

// What the call that runs in this thread launched, in the words of replay.py; no outputs: it cannot be replayed.
void sqcompile_replay_leave(const int64_t* words) {
  Reader in{words};
  auto r = std::make_shared<Recording>();
  r->outputs = in.next();
  r->buffers.resize(in.next());
  for (Buffer& b : r->buffers) {
    b.type = static_cast<at::ScalarType>(in.next());
    b.byte = in.next();
    b.sizes = in.list<int64_t>();
    b.strides = in.list<int64_t>();
  }
  r->kernels.resize(in.next());
  for (Kernel& k : r->kernels) {
    k.function = reinterpret_cast<void*>(in.next());
    for (unsigned& x : k.grid) x = in.next();
    k.threads = in.next(), k.shared = in.next(), k.early = in.next(), k.scratch = in.next();
    k.parameters.resize(in.next());
    for (Parameter& p : k.parameters) {
      p.kind = static_cast<Kind>(in.next());
      p.number = in.next();
      if (p.kind != kMap) continue;
      p.type = in.next(), p.swizzle = in.next();
      p.sizes = in.list<uint64_t>();
      p.strides = in.list<uint64_t>();
      p.box = in.list<uint32_t>();
    }
  }
  left = r;
}

// How many kinds of calls of an operator are replayed, and how many are known not to be.
void sqcompile_replay_count(const char* name, int64_t* replayed, int64_t* others) {
  Operator& mine = *operators.at(std::string("sqcompile::") + name);
  std::shared_lock lock(mine.mutex);
  *replayed = *others = 0;
  for (const auto& [key, r] : mine.recordings) ++*(r->usable() ? replayed : others);
}

}
