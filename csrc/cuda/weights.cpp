// Interpolation, circular shift, sharpening.
#include "weights.h"

#include "glue.h"

namespace memcore {
namespace cuda {
namespace {

using Launcher = int64_t (*)(const WeightArgs*, void*);
using Size = int64_t (*)(const WeightArgs*);

WeightArgs arguments(const char* name, const OnDevice& on, const Tensor& first, const Tensor& parameter) {
  WeightArgs a{};
  a.dtype = (int64_t)stored(first, name), a.device = on.index();
  a.rows = first.size(0) * first.size(1), a.N = first.size(2), a.S = parameter.dim() == 3 ? parameter.size(2) : 1;
  small(name, {a.N, a.S});
  a.first = in(first), a.parameter = in(parameter);
  return a;
}
void launch(const char* name, const OnDevice& on, WeightArgs& a, const Tensor& like, Size size, Launcher launcher) {
  const Workspace workspace(like, size(&a));
  a.workspace = workspace.data();
  on.check(name, launcher(&a, on.stream()));
}

Tensor forward(const char* name, Size size, Launcher launcher, const Tensor& first_, const Tensor* second_, const Tensor& parameter_) {
  const OnDevice on(first_);
  const Tensor first = dense(first_), parameter = dense(parameter_);
  const OptionalTensor second = second_ ? OptionalTensor(dense(*second_)) : std::nullopt;
  WeightArgs a = arguments(name, on, first, parameter);
  Tensor result = make_like(first);
  a.second = in(second), a.result = out(result);
  launch(name, on, a, first, size, launcher);
  return result;
}

struct Gradients {
  Tensor first, second, parameter;  // second: first where there is none
};
Gradients backward(
    const char* name, Size size, Launcher launcher, const OptionalTensor& grad, const Tensor& first_, const Tensor* second_,
    const Tensor& parameter_) {
  const OnDevice on(first_);
  const Tensor first = dense(first_), parameter = dense(parameter_);
  const OptionalTensor second = second_ ? OptionalTensor(dense(*second_)) : std::nullopt;
  WeightArgs a = arguments(name, on, first, parameter);
  const Tensor g = dense_or_zero(grad, first, {first.size(0), first.size(1), a.N});
  Tensor dfirst = make_like(first), dsecond = second ? make_like(*second) : dfirst, dparameter = make_like(parameter);
  a.second = in(second), a.grad = in(g), a.dfirst = out(dfirst), a.dsecond = out(dsecond), a.dparameter = out(dparameter);
  launch(name, on, a, first, size, launcher);
  return {dfirst, dsecond, dparameter};
}

Tensor interpolate_fwd(Tensor content, Tensor previous, Tensor gate) {
  return forward("interpolate", mc_interpolate_fwd_workspace, mc_interpolate_fwd, content, &previous, gate);
}
std::tuple<Tensor, Tensor, Tensor> interpolate_bwd(OptionalTensor grad, Tensor content, Tensor previous, Tensor gate) {
  const Gradients d = backward("interpolate", mc_interpolate_bwd_workspace, mc_interpolate_bwd, grad, content, &previous, gate);
  return {d.first, d.second, d.parameter};
}
Tensor circular_shift_fwd(Tensor weights, Tensor shift) {
  return forward("circular_shift", mc_circular_shift_fwd_workspace, mc_circular_shift_fwd, weights, nullptr, shift);
}
std::tuple<Tensor, Tensor> circular_shift_bwd(OptionalTensor grad, Tensor weights, Tensor shift) {
  const Gradients d = backward("circular_shift", mc_circular_shift_bwd_workspace, mc_circular_shift_bwd, grad, weights, nullptr, shift);
  return {d.first, d.parameter};
}
Tensor sharpen_fwd(Tensor weights, Tensor gamma) {
  return forward("sharpen", mc_sharpen_fwd_workspace, mc_sharpen_fwd, weights, nullptr, gamma);
}
std::tuple<Tensor, Tensor> sharpen_bwd(OptionalTensor grad, Tensor weights, Tensor gamma) {
  const Gradients d = backward("sharpen", mc_sharpen_bwd_workspace, mc_sharpen_bwd, grad, weights, nullptr, gamma);
  return {d.first, d.parameter};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_interpolate_fwd_cuda", TORCH_BOX(&memcore::cuda::interpolate_fwd));
  m.impl("_interpolate_bwd_cuda", TORCH_BOX(&memcore::cuda::interpolate_bwd));
  m.impl("_circular_shift_fwd_cuda", TORCH_BOX(&memcore::cuda::circular_shift_fwd));
  m.impl("_circular_shift_bwd_cuda", TORCH_BOX(&memcore::cuda::circular_shift_bwd));
  m.impl("_sharpen_fwd_cuda", TORCH_BOX(&memcore::cuda::sharpen_fwd));
  m.impl("_sharpen_bwd_cuda", TORCH_BOX(&memcore::cuda::sharpen_bwd));
}
