#include "usage_update.h"

#include "common.h"

namespace memcore {
namespace {

UsageArgs arguments(const Tensor& usage, const Tensor& reads, const Tensor& writes, double decay) {
  UsageArgs a{};
  a.dtype = dtype_of(usage), a.B = usage.size(0), a.N = usage.size(1), a.Hr = reads.size(1), a.Hw = writes.size(1);
  a.decay = decay, a.usage = in(usage), a.reads = in(reads), a.writes = in(writes);
  return a;
}

Tensor usage_update_fwd(Tensor usage, Tensor reads, Tensor writes, double decay) {
  usage = dense(usage), reads = dense(reads), writes = dense(writes);
  UsageArgs a = arguments(usage, reads, writes, decay);
  Tensor result = make_like(usage);
  a.result = out(result);
  auto* kernel = MC_PICK(usage_update_fwd);
  parallel(a.B, a.N * (a.Hr + a.Hw + 1), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return result;
}

std::tuple<Tensor, Tensor, Tensor> usage_update_bwd(OptionalTensor grad, Tensor usage, Tensor reads, Tensor writes, double decay) {
  usage = dense(usage), reads = dense(reads), writes = dense(writes);
  UsageArgs a = arguments(usage, reads, writes, decay);
  Tensor g = dense_or_zero(grad, usage, {a.B, a.N});
  Tensor dusage = make_like(usage), dreads = make_like(reads), dwrites = make_like(writes);
  a.grad = in(g), a.dusage = out(dusage), a.dreads = out(dreads), a.dwrites = out(dwrites);
  auto* kernel = MC_PICK(usage_update_bwd);
  parallel(a.B, a.N * (a.Hr + a.Hw + 1), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {dusage, dreads, dwrites};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("usage_update_fwd", TORCH_BOX(&memcore::usage_update_fwd));
  m.impl("usage_update_bwd", TORCH_BOX(&memcore::usage_update_bwd));
}
