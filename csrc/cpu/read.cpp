#include "read.h"

#include "common.h"

namespace memcore {
namespace {

ReadArgs arguments(const Tensor& memory, const Tensor& weights) {
  ReadArgs a{};
  a.dtype = dtype_of(memory);
  a.B = weights.size(0), a.H = weights.size(1), a.N = weights.size(2), a.W = memory.size(memory.dim() - 1);
  a.memory_stride = memory.dim() == 2 ? 0 : a.N * a.W;
  a.memory = in(memory), a.weights = in(weights);
  return a;
}

Tensor read_fwd(Tensor memory, Tensor weights) {
  memory = dense(memory), weights = dense(weights);
  ReadArgs a = arguments(memory, weights);
  Tensor reads = make(memory, {a.B, a.H, a.W});
  a.reads = out(reads);
  auto* kernel = MC_PICK(read_fwd);
  parallel(a.B, a.H * a.N * a.W, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return reads;
}

std::tuple<Tensor, Tensor> read_bwd(OptionalTensor grad, Tensor memory, Tensor weights) {
  memory = dense(memory), weights = dense(weights);
  ReadArgs a = arguments(memory, weights);
  Tensor g = dense_or_zero(grad, memory, {a.B, a.H, a.W});
  Tensor dmemory = make_like(memory), dweights = make_like(weights);
  a.grad = in(g), a.dmemory = out(dmemory), a.dweights = out(dweights);
  auto* kernel = MC_PICK(read_bwd);
  parallel(a.B, 2 * a.H * a.N * a.W, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  if (memory.dim() == 2) {
    auto* rows = MC_PICK(read_bwd_shared);
    parallel(a.N, a.B * a.H * a.W, [&](int64_t n, int64_t e) { rows(a, n, e); });
  }
  return {dmemory, dweights};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("read_fwd", TORCH_BOX(&memcore::read_fwd));
  m.impl("read_bwd", TORCH_BOX(&memcore::read_bwd));
}
