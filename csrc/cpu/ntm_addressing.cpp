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

Tensor forward(Inputs x, OptionalTensor* kept) {
  AddressingArgs a = x.arguments();
  Tensor weights = make_like(x.previous);
  a.weights = out(weights);
  if (kept) a.kept = out(kept->emplace(make_kept(x.memory, a.H)));
  auto* kernel = MC_PICK(ntm_addressing_fwd);
  parallel(a.B, cost(a), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return weights;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const OptionalTensor& grad, const OptionalTensor& kept, Inputs x) {
  AddressingArgs a = x.arguments();
  const auto& [key, memory, strength, gate, shift, gamma, previous] = x;
  const bool shared = memory.dim() == 2;
  Tensor g = dense_or_zero(grad, previous, {a.B, a.H, a.N});
  // A shared memory's gradient is the sum of the elements' own.
  Tensor dmemory = shared ? make(memory, {a.B, a.N, a.W}) : make_like(memory);
  Tensor dkey = make_like(key), dstrength = make_like(strength), dgate = make_like(gate), dshift = make_like(shift);
  Tensor dgamma = make_like(gamma), dprevious = make_like(previous);
  a.kept = kept_of(kept, memory, a.H);
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

Tensor ntm_addressing_fwd(Tensor key, Tensor memory, Tensor strength, Tensor gate, Tensor shift, Tensor gamma, Tensor previous) {
  return forward({key, memory, strength, gate, shift, gamma, previous}, nullptr);
}
std::tuple<Tensor, Tensor> ntm_addressing_kept_fwd(
    Tensor key, Tensor memory, Tensor strength, Tensor gate, Tensor shift, Tensor gamma, Tensor previous) {
  OptionalTensor kept;
  const Tensor weights = forward({key, memory, strength, gate, shift, gamma, previous}, &kept);
  return {weights, *kept};
}
Gradients ntm_addressing_bwd(
    OptionalTensor grad, Tensor key, Tensor memory, Tensor strength, Tensor gate, Tensor shift, Tensor gamma, Tensor previous) {
  return backward(grad, std::nullopt, {key, memory, strength, gate, shift, gamma, previous});
}
Gradients ntm_addressing_kept_bwd(
    OptionalTensor grad, Tensor kept, Tensor key, Tensor memory, Tensor strength, Tensor gate, Tensor shift, Tensor gamma, Tensor previous) {
  return backward(grad, kept, {key, memory, strength, gate, shift, gamma, previous});
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("ntm_addressing_fwd", TORCH_BOX(&memcore::ntm_addressing_fwd));
  m.impl("ntm_addressing_bwd", TORCH_BOX(&memcore::ntm_addressing_bwd));
  m.impl("ntm_addressing_kept_fwd", TORCH_BOX(&memcore::ntm_addressing_kept_fwd));
  m.impl("ntm_addressing_kept_bwd", TORCH_BOX(&memcore::ntm_addressing_kept_bwd));
}
