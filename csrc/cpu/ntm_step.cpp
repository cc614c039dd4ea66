#include "ntm_step.h"

#include "common.h"

namespace memcore {
namespace {

StepArgs arguments(const Tensor& memory, const Tensor& interface, const Tensor& previous, int64_t R, int64_t Hw, int64_t range, bool write_first) {
  StepArgs a{};
  a.dtype = dtype_of(memory);
  a.B = memory.size(0), a.N = memory.size(1), a.W = memory.size(2);
  a.R = R, a.Hw = Hw, a.range = range, a.write_first = write_first;
  a.memory = in(memory), a.interface = in(interface), a.previous = in(previous);
  return a;
}

int64_t cost(const StepArgs& a) { return (a.R + a.Hw + 2) * a.N * (a.W + 32); }

std::tuple<Tensor, Tensor, Tensor> forward(
    Tensor memory, Tensor interface, Tensor previous, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first,
    OptionalTensor* kept) {
  memory = dense(memory), interface = dense(interface), previous = dense(previous);
  StepArgs a = arguments(memory, interface, previous, read_heads, write_heads, shift_range, write_first);
  Tensor written = make_like(memory), reads = make(memory, {a.B, a.R, a.W}), weights = make_like(previous);
  a.written = out(written), a.reads = out(reads), a.weights = out(weights);
  if (kept) a.kept = out(kept->emplace(make_kept(memory, a.R + a.Hw)));
  auto* kernel = MC_PICK(ntm_step_fwd);
  parallel(a.B, cost(a), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {written, reads, weights};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    OptionalTensor grad_written, OptionalTensor grad_reads, OptionalTensor grad_weights, const OptionalTensor& kept, Tensor memory,
    Tensor interface, Tensor previous, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first) {
  memory = dense(memory), interface = dense(interface), previous = dense(previous);
  grad_written = dense(grad_written), grad_reads = dense(grad_reads), grad_weights = dense(grad_weights);
  StepArgs a = arguments(memory, interface, previous, read_heads, write_heads, shift_range, write_first);
  Tensor dmemory = make_like(memory), dinterface = make_like(interface), dprevious = make_like(previous);
  a.kept = kept_of(kept, memory, a.R + a.Hw);
  a.grad_written = in(grad_written), a.grad_reads = in(grad_reads), a.grad_weights = in(grad_weights);
  a.dmemory = out(dmemory), a.dinterface = out(dinterface), a.dprevious = out(dprevious);
  auto* kernel = MC_PICK(ntm_step_bwd);
  parallel(a.B, 3 * cost(a), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {dmemory, dinterface, dprevious};
}

std::tuple<Tensor, Tensor, Tensor> ntm_step_fwd(
    Tensor memory, Tensor interface, Tensor previous, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first) {
  return forward(memory, interface, previous, read_heads, write_heads, shift_range, write_first, nullptr);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> ntm_step_kept_fwd(
    Tensor memory, Tensor interface, Tensor previous, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first) {
  OptionalTensor kept;
  const auto [written, reads, weights] = forward(memory, interface, previous, read_heads, write_heads, shift_range, write_first, &kept);
  return {written, reads, weights, *kept};
}
std::tuple<Tensor, Tensor, Tensor> ntm_step_bwd(
    OptionalTensor grad_written, OptionalTensor grad_reads, OptionalTensor grad_weights, Tensor memory, Tensor interface, Tensor previous,
    int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first) {
  return backward(
      grad_written, grad_reads, grad_weights, std::nullopt, memory, interface, previous, read_heads, write_heads, shift_range, write_first);
}
std::tuple<Tensor, Tensor, Tensor> ntm_step_kept_bwd(
    OptionalTensor grad_written, OptionalTensor grad_reads, OptionalTensor grad_weights, Tensor kept, Tensor memory, Tensor interface,
    Tensor previous, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first) {
  return backward(
      grad_written, grad_reads, grad_weights, kept, memory, interface, previous, read_heads, write_heads, shift_range, write_first);
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("ntm_step_fwd", TORCH_BOX(&memcore::ntm_step_fwd));
  m.impl("ntm_step_bwd", TORCH_BOX(&memcore::ntm_step_bwd));
  m.impl("ntm_step_kept_fwd", TORCH_BOX(&memcore::ntm_step_kept_fwd));
  m.impl("ntm_step_kept_bwd", TORCH_BOX(&memcore::ntm_step_kept_bwd));
}
