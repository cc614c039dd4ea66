#include "interpolate.h"

#include "common.h"

namespace memcore {
namespace {

WeightArgs arguments(const Tensor& content, const Tensor& previous, const Tensor& gate) {
  WeightArgs a{};
  a.dtype = dtype_of(content), a.rows = content.size(0) * content.size(1), a.N = content.size(2);
  a.first = in(content), a.second = in(previous), a.parameter = in(gate);
  return a;
}

Tensor interpolate_fwd(Tensor content, Tensor previous, Tensor gate) {
  content = dense(content), previous = dense(previous), gate = dense(gate);
  WeightArgs a = arguments(content, previous, gate);
  Tensor result = make_like(content);
  a.result = out(result);
  auto* kernel = MC_PICK(interpolate_fwd);
  parallel(a.rows, a.N, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> interpolate_bwd(OptionalTensor grad, Tensor content, Tensor previous, Tensor gate) {
  content = dense(content), previous = dense(previous), gate = dense(gate);
  WeightArgs a = arguments(content, previous, gate);
  Tensor g = dense_or_zero(grad, content, {content.size(0), content.size(1), a.N});
  Tensor dcontent = make_like(content), dprevious = make_like(previous), dgate = make_like(gate);
  a.grad = in(g), a.dfirst = out(dcontent), a.dsecond = out(dprevious), a.dparameter = out(dgate);
  auto* kernel = MC_PICK(interpolate_bwd);
  parallel(a.rows, 2 * a.N, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {dcontent, dprevious, dgate};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("interpolate_fwd", TORCH_BOX(&memcore::interpolate_fwd));
  m.impl("interpolate_bwd", TORCH_BOX(&memcore::interpolate_bwd));
}
