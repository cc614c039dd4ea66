#include "circular_shift.h"

#include "common.h"

namespace memcore {
namespace {

Tensor circular_shift_fwd(Tensor weights, Tensor shift) {
  weights = dense(weights), shift = dense(shift);
  WeightArgs a{};
  a.dtype = dtype_of(weights), a.rows = weights.size(0) * weights.size(1), a.N = weights.size(2);
  a.S = shift.size(2);
  Tensor result = make_like(weights);
  a.first = in(weights), a.parameter = in(shift), a.result = out(result);
  auto* kernel = MC_PICK(circular_shift_fwd);
  parallel(a.rows, a.N * a.S, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return result;
}

std::tuple<Tensor, Tensor> circular_shift_bwd(OptionalTensor grad, Tensor weights, Tensor shift) {
  weights = dense(weights), shift = dense(shift);
  WeightArgs a{};
  a.dtype = dtype_of(weights), a.rows = weights.size(0) * weights.size(1), a.N = weights.size(2);
  a.S = shift.size(2);
  Tensor g = dense_or_zero(grad, weights, {weights.size(0), weights.size(1), a.N});
  Tensor dweights = make_like(weights), dshift = make_like(shift);
  a.first = in(weights), a.parameter = in(shift), a.grad = in(g), a.dfirst = out(dweights), a.dparameter = out(dshift);
  auto* kernel = MC_PICK(circular_shift_bwd);
  parallel(a.rows, 2 * a.N * a.S, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {dweights, dshift};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("circular_shift_fwd", TORCH_BOX(&memcore::circular_shift_fwd));
  m.impl("circular_shift_bwd", TORCH_BOX(&memcore::circular_shift_bwd));
}
