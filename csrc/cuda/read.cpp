#include "read.h"

#include "glue.h"

namespace memcore {
namespace cuda {
namespace {

const char kName[] = "read";

ReadArgs arguments(const OnDevice& on, const Tensor& memory, const Tensor& weights) {
  ReadArgs a{};
  a.dtype = (int64_t)stored(memory, kName), a.device = on.index();
  a.B = weights.size(0), a.H = weights.size(1), a.N = weights.size(2), a.W = memory.size(memory.dim() - 1);
  small(kName, {a.H, a.N, a.W});
  a.memory_stride = memory.dim() == 2 ? 0 : a.N * a.W;
  a.memory = in(memory), a.weights = in(weights);
  return a;
}

Tensor fwd(Tensor memory, Tensor weights) {
  const OnDevice on(memory);
  memory = dense(memory), weights = dense(weights);
  ReadArgs a = arguments(on, memory, weights);
  Tensor result = make(memory, {a.B, a.H, a.W});
  a.result = out(result);
  const Workspace workspace(memory, mc_read_fwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_read_fwd(&a, on.stream()));
  return result;
}

std::tuple<Tensor, Tensor> bwd(OptionalTensor grad, Tensor memory, Tensor weights) {
  const OnDevice on(memory);
  memory = dense(memory), weights = dense(weights);
  ReadArgs a = arguments(on, memory, weights);
  Tensor g = dense_or_zero(grad, memory, {a.B, a.H, a.W});
  Tensor dmemory = make_like(memory), dweights = make_like(weights);
  a.grad = in(g), a.dmemory = out(dmemory), a.dweights = out(dweights);
  const Workspace workspace(memory, mc_read_bwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_read_bwd(&a, on.stream()));
  return {dmemory, dweights};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_read_fwd_cuda", TORCH_BOX(&memcore::cuda::fwd));
  m.impl("_read_bwd_cuda", TORCH_BOX(&memcore::cuda::bwd));
}
