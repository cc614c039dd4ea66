#include "lrua_write.h"

#include "glue.h"

namespace memcore {
namespace cuda {
namespace {

const char kName[] = "lrua_write";

LruaArgs arguments(
    const OnDevice& on, const Tensor& memory, const Tensor& word, const Tensor& previous, const Tensor& usage, const Tensor& gate, bool zero) {
  LruaArgs a{};
  a.dtype = (int64_t)stored(memory, kName), a.device = on.index();
  a.B = memory.size(0), a.H = word.size(1), a.N = memory.size(1), a.W = memory.size(2), a.zero = zero;
  small(kName, {a.H, a.N, a.W});
  a.memory = in(memory), a.word = in(word), a.previous = in(previous), a.usage = in(usage), a.gate = in(gate);
  return a;
}

std::tuple<Tensor, Tensor> fwd(Tensor memory, Tensor word, Tensor previous, Tensor usage, Tensor gate, bool zero) {
  const OnDevice on(memory);
  memory = dense(memory), word = dense(word), previous = dense(previous), usage = dense(usage), gate = dense(gate);
  LruaArgs a = arguments(on, memory, word, previous, usage, gate, zero);
  Tensor written = make_like(memory), weights = make_like(previous);
  a.written = out(written), a.weights = out(weights);
  const Workspace workspace(memory, mc_lrua_write_fwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_lrua_write_fwd(&a, on.stream()));
  return {written, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(
    OptionalTensor grad_written, OptionalTensor grad_weights, Tensor memory, Tensor word, Tensor previous, Tensor usage, Tensor gate,
    bool zero) {
  const OnDevice on(memory);
  memory = dense(memory), word = dense(word), previous = dense(previous), usage = dense(usage), gate = dense(gate);
  grad_written = dense(grad_written), grad_weights = dense(grad_weights);
  LruaArgs a = arguments(on, memory, word, previous, usage, gate, zero);
  Tensor dmemory = make_like(memory), dword = make_like(word), dprevious = make_like(previous), dgate = make_like(gate);
  a.grad_written = in(grad_written), a.grad_weights = in(grad_weights);
  a.dmemory = out(dmemory), a.dword = out(dword), a.dprevious = out(dprevious), a.dgate = out(dgate);
  const Workspace workspace(memory, mc_lrua_write_bwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_lrua_write_bwd(&a, on.stream()));
  return {dmemory, dword, dprevious, dgate};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_lrua_write_fwd_cuda", TORCH_BOX(&memcore::cuda::fwd));
  m.impl("_lrua_write_bwd_cuda", TORCH_BOX(&memcore::cuda::bwd));
}
