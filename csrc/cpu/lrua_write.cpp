#include "lrua_write.h"

#include "common.h"

namespace memcore {
namespace {

LruaArgs arguments(const Tensor& memory, const Tensor& word, const Tensor& previous, const Tensor& usage, const Tensor& gate, bool zero) {
  LruaArgs a{};
  a.dtype = dtype_of(memory);
  a.B = memory.size(0), a.H = word.size(1), a.N = memory.size(1), a.W = memory.size(2);
  a.zero = zero;
  a.memory = in(memory), a.word = in(word), a.previous = in(previous), a.usage = in(usage), a.gate = in(gate);
  return a;
}

std::tuple<Tensor, Tensor> lrua_write_fwd(Tensor memory, Tensor word, Tensor previous, Tensor usage, Tensor gate, bool zero) {
  memory = dense(memory), word = dense(word), previous = dense(previous), usage = dense(usage), gate = dense(gate);
  LruaArgs a = arguments(memory, word, previous, usage, gate, zero);
  Tensor written = make_like(memory), weights = make_like(previous);
  a.written = out(written), a.weights = out(weights);
  auto* kernel = MC_PICK(lrua_write_fwd);
  parallel(a.B, a.N * (a.H + 1) * (a.W + 8), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {written, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lrua_write_bwd(
    OptionalTensor grad_written, OptionalTensor grad_weights, Tensor memory, Tensor word, Tensor previous, Tensor usage, Tensor gate, bool zero) {
  memory = dense(memory), word = dense(word), previous = dense(previous), usage = dense(usage), gate = dense(gate);
  grad_written = dense(grad_written), grad_weights = dense(grad_weights);
  LruaArgs a = arguments(memory, word, previous, usage, gate, zero);
  Tensor dmemory = make_like(memory), dword = make_like(word), dprevious = make_like(previous), dgate = make_like(gate);
  a.grad_written = in(grad_written), a.grad_weights = in(grad_weights);
  a.dmemory = out(dmemory), a.dword = out(dword), a.dprevious = out(dprevious), a.dgate = out(dgate);
  auto* kernel = MC_PICK(lrua_write_bwd);
  parallel(a.B, a.N * (2 * a.H + 1) * (a.W + 8), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {dmemory, dword, dprevious, dgate};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("lrua_write_fwd", TORCH_BOX(&memcore::lrua_write_fwd));
  m.impl("lrua_write_bwd", TORCH_BOX(&memcore::lrua_write_bwd));
}
