#include "content_addressing.h"

#include "glue.h"

namespace memcore {
namespace cuda {
namespace {

const char kName[] = "content_addressing";

ContentArgs arguments(
    const OnDevice& on, const Tensor& key, const Tensor& memory, const OptionalTensor& strength, const OptionalTensor& mask, bool cosine) {
  ContentArgs a{};
  a.dtype = (int64_t)stored(key, kName), a.device = on.index();
  a.B = key.size(0), a.H = key.size(1), a.W = key.size(2), a.N = memory.size(memory.dim() - 2);
  small(kName, {a.H, a.N, a.W});
  a.cosine = cosine;
  a.key = in(key), a.memory = in(memory), a.memory_stride = memory.dim() == 2 ? 0 : a.N * a.W;
  a.strength = in(strength), a.mask = in(mask);
  return a;
}

Tensor fwd(Tensor key, Tensor memory, OptionalTensor strength, OptionalTensor mask, bool cosine) {
  const OnDevice on(key);
  key = dense(key), memory = dense(memory), strength = dense(strength), mask = dense(mask);
  ContentArgs a = arguments(on, key, memory, strength, mask, cosine);
  Tensor weights = make(key, {a.B, a.H, a.N});
  a.weights = out(weights);
  const Workspace workspace(key, mc_content_addressing_fwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_content_addressing_fwd(&a, on.stream()));
  return weights;
}

std::tuple<Tensor, Tensor, Tensor> bwd(
    OptionalTensor grad, Tensor key, Tensor memory, OptionalTensor strength, OptionalTensor mask, bool cosine) {
  const OnDevice on(key);
  key = dense(key), memory = dense(memory), strength = dense(strength), mask = dense(mask);
  ContentArgs a = arguments(on, key, memory, strength, mask, cosine);
  Tensor g = dense_or_zero(grad, key, {a.B, a.H, a.N});
  Tensor dkey = make_like(key), dmemory = make_like(memory), dstrength = strength ? make_like(*strength) : make(key, {0});
  a.grad = in(g), a.dkey = out(dkey), a.dmemory = out(dmemory), a.dstrength = out(dstrength);
  const Workspace workspace(key, mc_content_addressing_bwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_content_addressing_bwd(&a, on.stream()));
  return {dkey, dmemory, dstrength};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_content_addressing_fwd_cuda", TORCH_BOX(&memcore::cuda::fwd));
  m.impl("_content_addressing_bwd_cuda", TORCH_BOX(&memcore::cuda::bwd));
}
