#include "least_used.h"

#include "common.h"

namespace memcore {
namespace {

Tensor least_used_fwd(Tensor usage, int64_t n) {
  usage = dense(usage);
  LeastArgs a{};
  a.dtype = dtype_of(usage), a.B = usage.size(0), a.N = usage.size(1), a.n = n < a.N ? n : a.N;
  const int64_t shape[] = {a.B, a.n};
  Tensor indices = make(usage, Sizes(shape, 2), torch::headeronly::ScalarType::Long);
  a.usage = in(usage), a.indices = (int64_t*)out(indices);
  if (a.n == 0) return indices;
  auto* kernel = MC_PICK(least_used_fwd);
  parallel(a.B, 4 * a.N, [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return indices;
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) { m.impl("least_used_fwd", TORCH_BOX(&memcore::least_used_fwd)); }
