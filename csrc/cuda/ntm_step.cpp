#include "ntm_step.h"

#include <stdlib.h>

#include "glue.h"

namespace memcore {
namespace cuda {
namespace {

const char kName[] = "ntm_step";

int64_t way() {
  const char* asked = getenv("MEMCORE_NTM_STEP");
  const std::string name = asked ? asked : "";
  if (name.empty()) return kAutomatic;
  if (name == "block") return kBlock;
  if (name == "once") return kOnce;
  if (name == "tiles") return kTiles;
  fail("memcore.ntm_step: MEMCORE_NTM_STEP must be 'block', 'once' or 'tiles', got '" + name + "'");
}

StepArgs arguments(
    const OnDevice& on, const Tensor& memory, const Tensor& interface, const Tensor& previous, int64_t R, int64_t Hw, int64_t range,
    bool write_first) {
  StepArgs a{};
  a.dtype = (int64_t)stored(memory, kName), a.device = on.index();
  a.B = memory.size(0), a.N = memory.size(1), a.W = memory.size(2);
  a.R = R, a.Hw = Hw, a.S = 2 * range + 1, a.write_first = write_first, a.way = way();
  small(kName, {a.N, a.W, a.R, a.Hw, a.S});
  a.memory = in(memory), a.interface = in(interface), a.previous = in(previous);
  return a;
}

std::tuple<Tensor, Tensor, Tensor> fwd(
    Tensor memory, Tensor interface, Tensor previous, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first) {
  const OnDevice on(memory);
  memory = dense(memory), interface = dense(interface), previous = dense(previous);
  StepArgs a = arguments(on, memory, interface, previous, read_heads, write_heads, shift_range, write_first);
  Tensor written = make_like(memory), reads = make(memory, {a.B, a.R, a.W}), weights = make_like(previous);
  a.written = out(written), a.reads = out(reads), a.weights = out(weights);
  const Workspace workspace(memory, mc_ntm_step_fwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_ntm_step_fwd(&a, on.stream()));
  return {written, reads, weights};
}

std::tuple<Tensor, Tensor, Tensor> bwd(
    OptionalTensor grad_written, OptionalTensor grad_reads, OptionalTensor grad_weights, Tensor memory, Tensor interface, Tensor previous,
    int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first) {
  const OnDevice on(memory);
  memory = dense(memory), interface = dense(interface), previous = dense(previous);
  grad_written = dense(grad_written), grad_reads = dense(grad_reads), grad_weights = dense(grad_weights);
  StepArgs a = arguments(on, memory, interface, previous, read_heads, write_heads, shift_range, write_first);
  Tensor dmemory = make_like(memory), dinterface = make_like(interface), dprevious = make_like(previous);
  a.grad_written = in(grad_written), a.grad_reads = in(grad_reads), a.grad_weights = in(grad_weights);
  a.dmemory = out(dmemory), a.dinterface = out(dinterface), a.dprevious = out(dprevious);
  const Workspace workspace(memory, mc_ntm_step_bwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_ntm_step_bwd(&a, on.stream()));
  return {dmemory, dinterface, dprevious};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_ntm_step_fwd_cuda", TORCH_BOX(&memcore::cuda::fwd));
  m.impl("_ntm_step_bwd_cuda", TORCH_BOX(&memcore::cuda::bwd));
}
