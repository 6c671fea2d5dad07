// Recordings of launches, and how they are launched again. Part of replay.cpp.

#include <ATen/ops/empty_strided.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace {

// ---- what of the CUDA driver is called, declared here so that no CUDA toolkit is needed to build this ----

struct Attribute {  // CUlaunchAttribute
  int id, none;
  int value, rest[15];
};
constexpr int kEarly = 6;  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

struct Config {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  Attribute* attributes;
  unsigned count;
};

using Launch = int (*)(const Config*, void* function, void** parameters, void** extra);
using Encode = int (*)(void* map, int type, uint32_t rank, void* address, const uint64_t* sizes, const uint64_t* strides,
                       const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill);
using Fill = int (*)(void* address, unsigned char byte, size_t bytes, void* stream);
using Stream = int32_t (*)(int32_t device, void** stream);

Launch launch_kernel = nullptr;
Encode encode_map = nullptr;
Fill fill_memory = nullptr;
Stream current_stream = nullptr;  // null where there is no CUDA, as in tests

// ---- recordings ----

enum Kind : int64_t { kNumber = 0, kPointer = 1, kMap = 2 };

struct Parameter {
  Kind kind;
  int64_t number = 0;          // kNumber: the bytes of the value; else: which buffer's address, -1 for none
  int type = 0, swizzle = 0;   // kMap
  std::vector<uint64_t> sizes, strides;
  std::vector<uint32_t> box;
};

struct Kernel {
  void* function;
  unsigned grid[3], threads, shared;
  bool early;       // may begin before the kernel before it has ended
  int64_t scratch;  // bytes for all programs
  std::vector<Parameter> parameters;
};

struct Buffer {  // made for a call: an output, or memory between two kernels
  at::ScalarType type;
  int64_t byte;  // that it is filled with; -1 for none
  std::vector<int64_t> sizes, strides;
};

struct Recording {
  std::vector<Buffer> buffers;  // the outputs first
  size_t outputs = 0;
  std::vector<Kernel> kernels;
  bool usable() const { return outputs > 0; }
};

void check(int code, const char* what) {
  TORCH_CHECK(code == 0, "sqcompile: ", what, " failed with the CUDA driver's error ", code);
}

void launch(const Kernel& k, const std::vector<char*>& addresses, char* scratch, void* stream) {
  struct alignas(64) Map { char bytes[128]; };
  size_t maps = 0, count = k.parameters.size();
  for (const Parameter& p : k.parameters) maps += p.kind == kMap;
  std::vector<Map> descriptors(maps);
  std::vector<void*> values(count + 2), pointers(count + 2);
  size_t map = 0;
  for (size_t i = 0; i < count; ++i) {
    const Parameter& p = k.parameters[i];
    char* address = p.kind == kNumber || p.number < 0 ? nullptr : addresses[p.number];
    if (p.kind == kMap) {
      const uint32_t steps[5] = {1, 1, 1, 1, 1};
      check(encode_map(&descriptors[map], p.type, p.sizes.size(), address, p.sizes.data(), p.strides.data(), p.box.data(),
                       steps, /*no interleave*/ 0, p.swizzle, /*128 bytes of L2*/ 2, /*zeros outside*/ 0),
            "cuTensorMapEncodeTiled");
      pointers[i] = &descriptors[map++];
      continue;
    }
    if (p.kind == kNumber) std::memcpy(&values[i], &p.number, 8);
    else values[i] = address;
    pointers[i] = &values[i];
  }
  values[count] = scratch, values[count + 1] = nullptr;  // what Triton adds: scratch memory, and a profiler's
  pointers[count] = &values[count], pointers[count + 1] = &values[count + 1];
  Attribute early{kEarly, 0, 1, {}};
  const Config config{{k.grid[0], k.grid[1], k.grid[2]}, {k.threads, 1, 1}, k.shared, stream, &early, k.early};
  check(launch_kernel(&config, k.function, pointers.data(), nullptr), "a kernel launch");
}

// ``poison``: what new memory is filled with before, so that what is left of it is seen; -1 for nothing.
std::vector<at::Tensor> run(const Recording& r, std::vector<char*> addresses, at::Device device, int64_t poison = -1) {
  std::vector<at::Tensor> made;
  std::vector<char*> scratch(r.kernels.size(), nullptr);
  const auto options = at::TensorOptions().device(device);
  made.reserve(r.buffers.size() + r.kernels.size());
  for (const Buffer& b : r.buffers) {
    made.push_back(at::empty_strided(b.sizes, b.strides, options.dtype(b.type)));
    addresses.push_back(static_cast<char*>(made.back().data_ptr()));
  }
  for (size_t i = 0; i < r.kernels.size(); ++i)
    if (r.kernels[i].scratch) {
      made.push_back(at::empty_strided({r.kernels[i].scratch}, {1}, options.dtype(at::kByte)));
      scratch[i] = static_cast<char*>(made.back().data_ptr());
    }
  void* stream = nullptr;
  std::optional<c10::impl::VirtualGuardImpl> guard;
  c10::Device before = device;
  if (current_stream != nullptr) {
    check(current_stream(device.index(), &stream), "the current stream");
    guard.emplace(device.type());
    before = guard->exchangeDevice(device);
  }
  try {
    for (size_t i = 0; i < r.buffers.size(); ++i)
      if (const int64_t byte = r.buffers[i].byte >= 0 ? r.buffers[i].byte : poison; byte >= 0 && made[i].numel())
        check(fill_memory(made[i].data_ptr(), byte, made[i].storage().nbytes(), stream), "cuMemsetD8Async");
    for (size_t i = 0; i < r.kernels.size(); ++i) launch(r.kernels[i], addresses, scratch[i], stream);
  } catch (...) {
    if (guard) guard->uncheckedSetDevice(before);
    throw;
  }
  if (guard && before != device) guard->uncheckedSetDevice(before);
  made.resize(r.outputs);
  return made;
}


}  // namespace
