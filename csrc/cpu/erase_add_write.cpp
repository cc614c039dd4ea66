#include "erase_add_write.h"

#include "common.h"

namespace memcore {
namespace {

WriteArgs arguments(const Tensor& memory, const Tensor& weights, const Tensor& erase, const Tensor& add) {
  WriteArgs a{};
  a.dtype = dtype_of(memory);
  a.B = memory.size(0), a.H = weights.size(1), a.N = memory.size(1), a.W = memory.size(2);
  a.memory = in(memory), a.weights = in(weights), a.erase = in(erase), a.add = in(add);
  return a;
}

void run(const WriteArgs& a) {
  auto* kernel = MC_PICK(erase_add_write_fwd);
  parallel(a.B, a.N * (a.H + 1) * a.W, [&](int64_t b, int64_t e) { kernel(a, b, e); });
}

Tensor erase_add_write_fwd(Tensor memory, Tensor weights, Tensor erase, Tensor add) {
  memory = dense(memory), weights = dense(weights), erase = dense(erase), add = dense(add);
  WriteArgs a = arguments(memory, weights, erase, add);
  Tensor written = make_like(memory);
  a.written = out(written);
  run(a);
  return written;
}

void erase_add_write_(Tensor memory, Tensor weights, Tensor erase, Tensor add) {
  weights = dense(weights), erase = dense(erase), add = dense(add);
  Tensor m = dense(memory);
  WriteArgs a = arguments(m, weights, erase, add);
  a.written = out(m);
  run(a);
  if (!memory.is_contiguous()) torch::stable::copy_(memory, m);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> erase_add_write_bwd(OptionalTensor grad, Tensor memory, Tensor weights, Tensor erase, Tensor add) {
  memory = dense(memory), weights = dense(weights), erase = dense(erase), add = dense(add);
  WriteArgs a = arguments(memory, weights, erase, add);
  Tensor g = dense_or_zero(grad, memory, {a.B, a.N, a.W});
  Tensor dmemory = make_like(memory), dweights = make_like(weights), derase = make_like(erase), dadd = make_like(add);
  a.grad = in(g), a.dmemory = out(dmemory), a.dweights = out(dweights), a.derase = out(derase), a.dadd = out(dadd);
  auto* kernel = MC_PICK(erase_add_write_bwd);
  parallel(a.B, 2 * a.N * (a.H + 1) * a.W, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {dmemory, dweights, derase, dadd};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("erase_add_write_fwd", TORCH_BOX(&memcore::erase_add_write_fwd));
  m.impl("erase_add_write_", TORCH_BOX(&memcore::erase_add_write_));
  m.impl("erase_add_write_bwd", TORCH_BOX(&memcore::erase_add_write_bwd));
}
