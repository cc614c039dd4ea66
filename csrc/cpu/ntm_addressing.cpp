#include "ntm_addressing.h"

#include "common.h"

namespace memcore {
namespace {

struct Inputs {
  Tensor key, memory, strength, gate, shift, gamma, previous;

  AddressingArgs arguments() {
    key = dense(key), memory = dense(memory), strength = dense(strength), gate = dense(gate);
    shift = dense(shift), gamma = dense(gamma), previous = dense(previous);
    AddressingArgs a{};
    a.dtype = dtype_of(key);
    a.B = key.size(0), a.H = key.size(1), a.W = key.size(2), a.N = memory.size(memory.dim() - 2), a.S = shift.size(2);
    a.memory_stride = memory.dim() == 2 ? 0 : a.N * a.W;
    a.key = in(key), a.memory = in(memory), a.strength = in(strength), a.gate = in(gate);
    a.shift = in(shift), a.gamma = in(gamma), a.previous = in(previous);
    return a;
  }
};

int64_t cost(const AddressingArgs& a) { return a.H * a.N * (a.W + 48); }

Tensor ntm_addressing_fwd(Tensor key, Tensor memory, Tensor strength, Tensor gate, Tensor shift, Tensor gamma, Tensor previous) {
  Inputs x{key, memory, strength, gate, shift, gamma, previous};
  AddressingArgs a = x.arguments();
  Tensor weights = make_like(previous);
  a.weights = out(weights);
  auto* kernel = MC_PICK(ntm_addressing_fwd);
  parallel(a.B, cost(a), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return weights;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ntm_addressing_bwd(
    OptionalTensor grad, Tensor key, Tensor memory, Tensor strength, Tensor gate, Tensor shift, Tensor gamma, Tensor previous) {
  Inputs x{key, memory, strength, gate, shift, gamma, previous};
  AddressingArgs a = x.arguments();
  const bool shared = memory.dim() == 2;
  Tensor g = dense_or_zero(grad, previous, {a.B, a.H, a.N});
  // A shared memory's gradient is the sum of the elements' own.
  Tensor dmemory = shared ? make(memory, {a.B, a.N, a.W}) : make_like(memory);
  Tensor dkey = make_like(key), dstrength = make_like(strength), dgate = make_like(gate), dshift = make_like(shift);
  Tensor dgamma = make_like(gamma), dprevious = make_like(previous);
  a.grad = in(g), a.dkey = out(dkey), a.dmemory = out(dmemory), a.dstrength = out(dstrength), a.dgate = out(dgate);
  a.dshift = out(dshift), a.dgamma = out(dgamma), a.dprevious = out(dprevious);
  auto* kernel = MC_PICK(ntm_addressing_bwd);
  parallel(a.B, 3 * cost(a), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  if (shared) {
    const int64_t batch[] = {0};
    dmemory = torch::stable::sum(dmemory, torch::headeronly::IntHeaderOnlyArrayRef(batch, 1));
  }
  return {dkey, dmemory, dstrength, dgate, dshift, dgamma, dprevious};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("ntm_addressing_fwd", TORCH_BOX(&memcore::ntm_addressing_fwd));
  m.impl("ntm_addressing_bwd", TORCH_BOX(&memcore::ntm_addressing_bwd));
}
