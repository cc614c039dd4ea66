#include "ntm_addressing.h"

#include "glue.h"

namespace memcore {
namespace cuda {
namespace {

const char kName[] = "ntm_addressing";

struct Call {
  const OnDevice on;
  Tensor key, memory, strength, gate, shift, gamma, previous;
  NtmAddressingArgs a{};

  Call(const Tensor& k, const Tensor& m, const Tensor& b, const Tensor& g, const Tensor& s, const Tensor& y, const Tensor& w)
      : on(k), key(dense(k)), memory(dense(m)), strength(dense(b)), gate(dense(g)), shift(dense(s)), gamma(dense(y)), previous(dense(w)) {
    a.dtype = (int64_t)stored(key, kName), a.device = on.index();
    a.B = key.size(0), a.H = key.size(1), a.W = key.size(2), a.N = memory.size(memory.dim() - 2), a.S = shift.size(2);
    small(kName, {a.H, a.N, a.W, a.S});
    a.memory_stride = memory.dim() == 2 ? 0 : a.N * a.W;
    a.key = in(key), a.memory = in(memory), a.strength = in(strength), a.gate = in(gate);
    a.shift = in(shift), a.gamma = in(gamma), a.previous = in(previous);
  }
};

Tensor fwd(Tensor key, Tensor memory, Tensor strength, Tensor gate, Tensor shift, Tensor gamma, Tensor previous) {
  Call c(key, memory, strength, gate, shift, gamma, previous);
  Tensor weights = make_like(c.previous);
  c.a.weights = out(weights);
  const Workspace workspace(key, mc_ntm_addressing_fwd_workspace(&c.a));
  c.a.workspace = workspace.data();
  c.on.check(kName, mc_ntm_addressing_fwd(&c.a, c.on.stream()));
  return weights;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    OptionalTensor grad, Tensor key, Tensor memory, Tensor strength, Tensor gate, Tensor shift, Tensor gamma, Tensor previous) {
  Call c(key, memory, strength, gate, shift, gamma, previous);
  NtmAddressingArgs& a = c.a;
  Tensor g = dense_or_zero(grad, key, {a.B, a.H, a.N});
  Tensor dkey = make_like(c.key), dmemory = make_like(c.memory), dstrength = make_like(c.strength), dgate = make_like(c.gate);
  Tensor dshift = make_like(c.shift), dgamma = make_like(c.gamma), dprevious = make_like(c.previous);
  a.grad = in(g), a.dkey = out(dkey), a.dmemory = out(dmemory), a.dstrength = out(dstrength), a.dgate = out(dgate);
  a.dshift = out(dshift), a.dgamma = out(dgamma), a.dprevious = out(dprevious);
  const Workspace workspace(key, mc_ntm_addressing_bwd_workspace(&a));
  a.workspace = workspace.data();
  c.on.check(kName, mc_ntm_addressing_bwd(&a, c.on.stream()));
  return {dkey, dmemory, dstrength, dgate, dshift, dgamma, dprevious};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_ntm_addressing_fwd_cuda", TORCH_BOX(&memcore::cuda::fwd));
  m.impl("_ntm_addressing_bwd_cuda", TORCH_BOX(&memcore::cuda::bwd));
}
