// What the glue of every operator needs: torch's stable ABI, errors without a source path in their text, tensors as the
// kernels want them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "blocks.h"
#include "cpu/dtype.h"
#include "cpu/kept.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name before torch 2.12
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace memcore {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

inline DType dtype_of(const Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: fail("memcore: kernels take float64, float32, bfloat16 and float16 tensors");
  }
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
inline OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(dense(*t)) : t; }
// The gradient of an output that may not have been used.
inline Tensor dense_or_zero(const OptionalTensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  return t ? dense(*t) : torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()));
}

// Whether fresh tensors come through PyTorch's dispatcher, where modes see them and `fill_uninitialized_memory` fills them: for tests.
#ifndef MC_ALLOCATE_BY_ATEN
#define MC_ALLOCATE_BY_ATEN 0
#endif
inline std::atomic<bool> allocate_by_aten{MC_ALLOCATE_BY_ATEN};

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
struct Strides {
  int64_t data[8];
  explicit Strides(Sizes shape) {
    if (shape.size() > 8) fail("memcore: tensors of at most 8 dimensions");
    int64_t step = 1;
    for (size_t i = shape.size(); i-- > 0; step *= shape[i] > 1 ? shape[i] : 1) data[i] = step;
  }
};

// Uninitialised, on `like`'s device and by default of its type. torch::stable::new_empty looks aten's operator up by name at every
// call, which takes 1.5 us.
inline Tensor allocate(const Tensor& like, Sizes shape, std::optional<torch::headeronly::ScalarType> type) {
  if (allocate_by_aten.load(std::memory_order_relaxed)) return torch::stable::new_empty(like, shape, type);
  const Strides strides(shape);
  int32_t dtype, device, index;
  if (type) dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  else STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)shape.size(), shape.data(), strides.data, dtype, device, index, &made));
  return Tensor(made);
}
// A tensor in a block, which is given back with the last reference to it. (Of what torch_from_blob can object to nothing is left; who owned the block
// then, it would not say.)
inline Tensor over(void* block, int64_t bytes, Sizes shape, const Strides& strides, torch::headeronly::ScalarType type) {
  const auto free = [](void* block, void* bytes) { give_block(block, (int64_t)(intptr_t)bytes); };
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block, (int64_t)shape.size(), shape.data(), strides.data, 0, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), -1, &made, aoti_torch_layout_strided(), nullptr, 0, free, (void*)(intptr_t)bytes));
  return Tensor(made);
}
inline int64_t width_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float: return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    default: fail("memcore: kernels make tensors of float64, float32, bfloat16, float16 and int64");
  }
}
inline Tensor make(const Tensor& like, Sizes shape, std::optional<torch::headeronly::ScalarType> type = std::nullopt) {
  int64_t bytes = type ? width_of(*type) : (int64_t)like.element_size();
  bool counted = true;
  for (int64_t n : shape) counted &= !__builtin_mul_overflow(bytes, n, &bytes);
  if (counted && bytes >= kBlock && like.is_cpu() && !allocate_by_aten.load(std::memory_order_relaxed)) {
    const Strides strides(shape);
    if (void* block = take_block(bytes)) return over(block, bytes, shape, strides, type ? *type : like.scalar_type());
  }
  return allocate(like, shape, type);
}
inline Tensor make(const Tensor& like, std::initializer_list<int64_t> shape) { return make(like, Sizes(shape.begin(), shape.size())); }
inline Tensor make_like(const Tensor& t) { return make(t, t.sizes()); }

// What a forward keeps for the backward (cpu/kept.h): B elements' share.
inline torch::headeronly::ScalarType accumulated(const Tensor& t) {
  using torch::headeronly::ScalarType;
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}
inline Tensor make_kept(const Tensor& memory, int64_t H) {
  if (memory.dim() != 3) fail("memcore: a forward that keeps similarities wants a memory for each element");
  const int64_t shape[] = {memory.size(0) * similar_numbers(H, memory.size(1))};
  return make(memory, Sizes(shape, 1), accumulated(memory));
}
// The same in the backward, which only reads it; null if nothing was kept.
inline void* kept_of(const OptionalTensor& kept, const Tensor& memory, int64_t H) {
  if (!kept || kept->numel() == 0) return nullptr;
  if (memory.dim() != 3 || kept->numel() != memory.size(0) * similar_numbers(H, memory.size(1)) || kept->scalar_type() != accumulated(memory) ||
      !kept->is_contiguous())
    fail("memcore: what the forward kept has another size or type");
  return const_cast<void*>(kept->const_data_ptr());
}

// `t` has this shape, and type and device of `like`: what a kernel would read past the end of, or as something else, if nobody checked before.
inline void expect(const char* op, const char* name, const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  bool fits = t.dim() == (int64_t)shape.size() && t.scalar_type() == like.scalar_type() && t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index();
  int64_t i = 0;
  for (auto n = shape.begin(); fits && n != shape.end(); n++, i++) fits = t.size(i) == *n;
  if (fits) return;
  std::string wanted, got;
  for (int64_t n : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(n);
  for (i = 0; i < t.dim(); i++) got += (got.empty() ? "" : ", ") + std::to_string(t.size(i));
  fail(std::string("memcore.") + op + ": '" + name + "' must have shape (" + wanted + "), type and device of the memory, got shape (" + got + ")" +
       (t.scalar_type() == like.scalar_type() ? "" : " and another type"));
}

inline const void* in(const Tensor& t) { return t.const_data_ptr(); }
inline const void* in(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
inline void* out(const Tensor& t) { return t.mutable_data_ptr(); }

// Items 0..n in parallel ranges, each worth a thread's while; `cost` is roughly the multiply-adds of one item.
template <class F> inline void parallel(int64_t n, int64_t cost, const F& f) {
  if (n <= 0) return;
  const int64_t grain = 30000 / (cost > 0 ? cost : 1) + 1;
  if (n <= grain) return f(0, n);
  torch::stable::parallel_for(0, n, grain, f);
}

}  // namespace memcore
