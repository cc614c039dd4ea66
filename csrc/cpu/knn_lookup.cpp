#include "knn_lookup.h"

#include <algorithm>

#include "knn_glue.h"

namespace memcore {
namespace {

KnnRead reading(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& indices, int64_t metric, int64_t kernel, double delta) {
  KnnRead a = knn_reading(query, keys, indices, metric);
  a.kernel = (int)kernel, a.delta = delta, a.V = values.size(values.dim() - 1), a.values = in(values);
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> knn_lookup_fwd(
    Tensor query, Tensor keys, Tensor values, OptionalTensor count, OptionalTensor norms, OptionalTensor mirror, OptionalTensor rounding, int64_t k,
    int64_t metric, int64_t kernel, double delta) {
  knn_check(query, keys, &values, count, norms, mirror, rounding, k, metric);
  query = dense(query), keys = dense(keys), values = dense(values);
  const Found found = knn_find(query, keys, count, norms, mirror, rounding, k, metric);
  KnnRead a = reading(query, keys, values, found.indices, metric, kernel, delta);
  Tensor kept = make_like(found.indices);
  std::copy_n((const int64_t*)in(found.indices), found.indices.numel(), (int64_t*)out(kept));
  Tensor distances = make(keys, found.indices.sizes()), weights = make(keys, found.indices.sizes());
  Tensor output = keys.dim() == 3 ? make(keys, {a.A, a.Q, a.V}) : make(keys, {a.Q, a.V});
  a.found = in(found.distances), a.distances = out(distances), a.weights = out(weights), a.output = out(output);
  auto* read = MC_PICK(knn_read);
  parallel(a.A * a.Q, a.k * (a.V + 32), [&](int64_t b, int64_t e) { read(a, b, e); });
  return {output, weights, found.indices, distances, kept};
}

Gradients gradients(OptionalTensor grad_output, OptionalTensor grad_weights, OptionalTensor grad_distances, Tensor indices, Tensor query, Tensor keys,
                    Tensor values, int64_t metric, int64_t kernel, double delta, bool sparse) {
  query = dense(query), keys = dense(keys), values = dense(values), indices = dense(indices);
  grad_output = dense(grad_output), grad_weights = dense(grad_weights), grad_distances = dense(grad_distances);
  KnnRead a = reading(query, keys, values, indices, metric, kernel, delta);
  a.grad_output = in(grad_output), a.grad_weights = in(grad_weights), a.grad_distances = in(grad_distances);
  return knn_gradients(a, query, keys, values, sparse);
}

std::tuple<Tensor, Tensor, Tensor> knn_lookup_bwd(
    OptionalTensor grad_output, OptionalTensor grad_weights, OptionalTensor, OptionalTensor grad_distances, Tensor indices, Tensor query, Tensor keys,
    Tensor values, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, int64_t, int64_t metric, int64_t kernel, double delta) {
  const Gradients g = gradients(grad_output, grad_weights, grad_distances, indices, query, keys, values, metric, kernel, delta, false);
  return {g.dquery, g.dkeys, g.dvalues};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> knn_lookup_rows(
    OptionalTensor grad_output, OptionalTensor grad_weights, OptionalTensor grad_distances, Tensor indices, Tensor query, Tensor keys, Tensor values,
    int64_t metric, int64_t kernel, double delta) {
  const Gradients g = gradients(grad_output, grad_weights, grad_distances, indices, query, keys, values, metric, kernel, delta, true);
  return {g.dquery, g.rows, g.dkeys, g.dvalues};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("knn_lookup_fwd", TORCH_BOX(&memcore::knn_lookup_fwd));
  m.impl("knn_lookup_bwd", TORCH_BOX(&memcore::knn_lookup_bwd));
  m.impl("knn_lookup_rows", TORCH_BOX(&memcore::knn_lookup_rows));
}
