#include "content_addressing.h"

#include "common.h"

namespace memcore {
namespace {

ContentArgs arguments(const Tensor& key, const Tensor& memory, const OptionalTensor& strength, const OptionalTensor& mask, bool cosine) {
  ContentArgs a{};
  a.dtype = dtype_of(key);
  a.B = key.size(0), a.H = key.size(1), a.W = key.size(2), a.N = memory.size(memory.dim() - 2);
  a.cosine = cosine;
  a.key = in(key), a.memory = in(memory), a.memory_stride = memory.dim() == 2 ? 0 : a.N * a.W;
  a.strength = in(strength), a.mask = (const bool*)in(mask);
  return a;
}

Tensor forward(Tensor key, Tensor memory, OptionalTensor strength, OptionalTensor mask, bool cosine, OptionalTensor* kept) {
  key = dense(key), memory = dense(memory), strength = dense(strength), mask = dense(mask);
  ContentArgs a = arguments(key, memory, strength, mask, cosine);
  Tensor weights = make(key, {a.B, a.H, a.N});
  a.weights = out(weights);
  if (kept) a.kept = out(kept->emplace(make_kept(memory, a.H)));
  auto* kernel = MC_PICK(content_addressing_fwd);
  parallel(a.B, a.H * a.N * (a.W + 16), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    OptionalTensor grad, const OptionalTensor& kept, Tensor key, Tensor memory, OptionalTensor strength, OptionalTensor mask, bool cosine) {
  key = dense(key), memory = dense(memory), strength = dense(strength), mask = dense(mask);
  ContentArgs a = arguments(key, memory, strength, mask, cosine);
  Tensor g = dense_or_zero(grad, key, {a.B, a.H, a.N});
  Tensor dkey = make_like(key), dmemory = make_like(memory), dstrength = strength ? make_like(*strength) : make(key, {0});
  a.kept = kept_of(kept, memory, a.H);
  a.grad = in(g), a.dkey = out(dkey), a.dmemory = out(dmemory), a.dstrength = out(dstrength);
  std::vector<char> coefficients;
  if (memory.dim() == 2) {
    coefficients.resize((size_t)(a.B * a.coefficient_size()) * (a.dtype == DType::f64 ? 8 : 4) + 1);
    a.coefficients = coefficients.data();
  }
  auto* kernel = MC_PICK(content_addressing_bwd);
  parallel(a.B, 3 * a.H * a.N * (a.W + 16), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  if (memory.dim() == 2) {
    auto* rows = MC_PICK(content_addressing_bwd_shared);
    parallel(a.N, a.B * a.H * a.W, [&](int64_t n, int64_t e) { rows(a, n, e); });
  }
  return {dkey, dmemory, dstrength};
}

Tensor content_addressing_fwd(Tensor key, Tensor memory, OptionalTensor strength, OptionalTensor mask, bool cosine) {
  return forward(key, memory, strength, mask, cosine, nullptr);
}
std::tuple<Tensor, Tensor> content_addressing_kept_fwd(Tensor key, Tensor memory, OptionalTensor strength, OptionalTensor mask, bool cosine) {
  OptionalTensor kept;
  const Tensor weights = forward(key, memory, strength, mask, cosine, &kept);
  return {weights, *kept};
}
std::tuple<Tensor, Tensor, Tensor> content_addressing_bwd(
    OptionalTensor grad, Tensor key, Tensor memory, OptionalTensor strength, OptionalTensor mask, bool cosine) {
  return backward(grad, std::nullopt, key, memory, strength, mask, cosine);
}
std::tuple<Tensor, Tensor, Tensor> content_addressing_kept_bwd(
    OptionalTensor grad, Tensor kept, Tensor key, Tensor memory, OptionalTensor strength, OptionalTensor mask, bool cosine) {
  return backward(grad, kept, key, memory, strength, mask, cosine);
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("content_addressing_fwd", TORCH_BOX(&memcore::content_addressing_fwd));
  m.impl("content_addressing_bwd", TORCH_BOX(&memcore::content_addressing_bwd));
  m.impl("content_addressing_kept_fwd", TORCH_BOX(&memcore::content_addressing_kept_fwd));
  m.impl("content_addressing_kept_bwd", TORCH_BOX(&memcore::content_addressing_kept_bwd));
}
