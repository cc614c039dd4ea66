#include "sharpen.h"

#include "common.h"

namespace memcore {
namespace {

Tensor sharpen_fwd(Tensor weights, Tensor gamma) {
  weights = dense(weights), gamma = dense(gamma);
  WeightArgs a{};
  a.dtype = dtype_of(weights), a.rows = weights.size(0) * weights.size(1), a.N = weights.size(2);
  Tensor result = make_like(weights);
  a.first = in(weights), a.parameter = in(gamma), a.result = out(result);
  auto* kernel = MC_PICK(sharpen_fwd);
  parallel(a.rows, 16 * a.N, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return result;
}

std::tuple<Tensor, Tensor> sharpen_bwd(OptionalTensor grad, Tensor weights, Tensor gamma) {
  weights = dense(weights), gamma = dense(gamma);
  WeightArgs a{};
  a.dtype = dtype_of(weights), a.rows = weights.size(0) * weights.size(1), a.N = weights.size(2);
  Tensor g = dense_or_zero(grad, weights, {weights.size(0), weights.size(1), a.N});
  Tensor dweights = make_like(weights), dgamma = make_like(gamma);
  a.first = in(weights), a.parameter = in(gamma), a.grad = in(g), a.dfirst = out(dweights), a.dparameter = out(dgamma);
  auto* kernel = MC_PICK(sharpen_bwd);
  parallel(a.rows, 24 * a.N, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {dweights, dgamma};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("sharpen_fwd", TORCH_BOX(&memcore::sharpen_fwd));
  m.impl("sharpen_bwd", TORCH_BOX(&memcore::sharpen_bwd));
}
