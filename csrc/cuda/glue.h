// What the CUDA glue of every operator needs beside common.h: the tensors' device and stream, workspaces, errors.
//
// The operators are `memcore::_<op>_fwd_cuda` and `_bwd_cuda`, with the arguments of `<op>_fwd` and `_bwd`: which implementation a
// CUDA tensor gets is chosen in Python. The tests build the same glue over the CPU shim (MC_ON_CPU) and register it for CPU tensors.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../common.h"

#ifdef MC_ON_CPU
#define MC_KEY CPU
#else
#define MC_KEY CUDA
extern "C" const char* mc_error_string(int64_t error);
#endif
#define MC_IMPL_(key, m) STABLE_TORCH_LIBRARY_IMPL(memcore, key, m)
#define MC_IMPL(m) MC_IMPL_(MC_KEY, m)

namespace memcore {
namespace cuda {

inline DType stored(const Tensor& t, const char* op) {
  const DType d = dtype_of(t);
  if (d == DType::f64) fail(std::string("memcore.") + op + ": the CUDA kernels take float32, bfloat16 and float16 tensors, got float64");
  return d;
}
inline void small(const char* op, std::initializer_list<int64_t> sizes) {
  for (int64_t n : sizes)
    if (n > 2000000000) fail(std::string("memcore.") + op + ": the CUDA kernels take sizes up to 2000000000, got " + std::to_string(n));
}

// The tensors' device is current while this lives.
class OnDevice {
 public:
#ifdef MC_ON_CPU
  explicit OnDevice(const Tensor&) {}
  int64_t index() const { return 0; }
  void* stream() const { return nullptr; }
  void check(const char*, int64_t) const {}
#else
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {}
  int64_t index() const { return index_; }
  void* stream() const {
#if TORCH_TARGET_VERSION >= 0x020d000000000000
    return torch::stable::accelerator::getCurrentStream(index_).nativeHandle();
#else  // Only libtorch_cuda tells, which this library must not need: torch has loaded it where there is a CUDA tensor.
    using Current = AOTITorchError (*)(int32_t, void**);
    static const Current current = (Current)dlsym(dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD), "aoti_torch_get_current_cuda_stream");
    if (!current) fail("memcore: libtorch_cuda.so does not tell the current stream");
    void* found = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current(index_, &found));
    return found;
#endif
  }
  void check(const char* op, int64_t error) const {
    if (error) fail(std::string("memcore.") + op + ": CUDA error: " + mc_error_string(error));
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Scratch of `bytes` in the tensors' device memory, up to the next element; mostly none is needed.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    const int64_t width = (int64_t)like.element_size();
    if (bytes > 0) tensor_ = make(like, {(bytes + width - 1) / width});
  }
  void* data() const { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  OptionalTensor tensor_;
};

}  // namespace cuda
}  // namespace memcore
