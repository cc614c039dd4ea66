#include "erase_add_write.h"

#include "glue.h"

namespace memcore {
namespace cuda {
namespace {

const char kName[] = "erase_add_write";

EraseAddArgs arguments(const OnDevice& on, const Tensor& memory, const Tensor& weights, const Tensor& erase, const Tensor& add) {
  EraseAddArgs a{};
  a.dtype = (int64_t)stored(memory, kName), a.device = on.index();
  a.B = memory.size(0), a.H = weights.size(1), a.N = memory.size(1), a.W = memory.size(2);
  small(kName, {a.H, a.N, a.W});
  a.memory = in(memory), a.weights = in(weights), a.erase = in(erase), a.add = in(add);
  return a;
}

Tensor fwd(Tensor memory, Tensor weights, Tensor erase, Tensor add) {
  const OnDevice on(memory);
  memory = dense(memory), weights = dense(weights), erase = dense(erase), add = dense(add);
  EraseAddArgs a = arguments(on, memory, weights, erase, add);
  Tensor written = make_like(memory);
  a.written = out(written);
  on.check(kName, mc_erase_add_write_fwd(&a, on.stream()));
  return written;
}

// Every thread writes the elements it has read.
void in_place(Tensor memory, Tensor weights, Tensor erase, Tensor add) {
  const OnDevice on(memory);
  const Tensor m = dense(memory);
  weights = dense(weights), erase = dense(erase), add = dense(add);
  EraseAddArgs a = arguments(on, m, weights, erase, add);
  a.written = out(m);
  on.check(kName, mc_erase_add_write_fwd(&a, on.stream()));
  if (!memory.is_contiguous()) torch::stable::copy_(memory, m);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(OptionalTensor grad, Tensor memory, Tensor weights, Tensor erase, Tensor add) {
  const OnDevice on(memory);
  memory = dense(memory), weights = dense(weights), erase = dense(erase), add = dense(add);
  EraseAddArgs a = arguments(on, memory, weights, erase, add);
  Tensor g = dense_or_zero(grad, memory, {a.B, a.N, a.W});
  Tensor dmemory = make_like(memory), dweights = make_like(weights), derase = make_like(erase), dadd = make_like(add);
  a.grad = in(g), a.dmemory = out(dmemory), a.dweights = out(dweights), a.derase = out(derase), a.dadd = out(dadd);
  const Workspace workspace(memory, mc_erase_add_write_bwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_erase_add_write_bwd(&a, on.stream()));
  return {dmemory, dweights, derase, dadd};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_erase_add_write_fwd_cuda", TORCH_BOX(&memcore::cuda::fwd));
  m.impl("_erase_add_write_bwd_cuda", TORCH_BOX(&memcore::cuda::bwd));
  m.impl("_erase_add_write__cuda", TORCH_BOX(&memcore::cuda::in_place));
}
