#include "knn_glue.h"

namespace memcore {
namespace cuda {
namespace {

const char kName[] = "knn_lookup";

KnnArgs arguments(
    const OnDevice& on, const Tensor& query, const Tensor& keys, const Tensor& values, int64_t k, int64_t metric, int64_t kernel, double delta) {
  KnnArgs a = knn_arguments(kName, on, query, keys, k, metric);
  a.V = values.size(values.dim() - 1), a.kernel = kernel, a.delta = delta, a.values = in(values);
  small(kName, {a.V});
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fwd(
    Tensor query, Tensor keys, Tensor values, OptionalTensor count, OptionalTensor, OptionalTensor, OptionalTensor, int64_t k, int64_t metric,
    int64_t kernel, double delta) {
  const OnDevice on(query);
  query = dense(query), keys = dense(keys), values = dense(values), count = dense(count);
  KnnArgs a = arguments(on, query, keys, values, k, metric, kernel, delta);
  a.count = (const int64_t*)in(count);
  Tensor output = of_queries(keys, a, a.V), weights = of_queries(keys, a, k), indices = integers_of_queries(keys, a);
  Tensor distances = of_queries(keys, a, k), kept = integers_of_queries(keys, a);
  a.output = out(output), a.weights = out(weights), a.indices = (int64_t*)out(indices), a.distances = out(distances), a.kept = (int64_t*)out(kept);
  const Workspace workspace(keys, mc_knn_lookup_fwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_knn_lookup_fwd(&a, on.stream()));
  return {output, weights, indices, distances, kept};
}

Gradients gradients(
    const OptionalTensor& grad_output, const OptionalTensor& grad_weights, const OptionalTensor& grad_distances, Tensor indices, Tensor query,
    Tensor keys, Tensor values, int64_t metric, int64_t kernel, double delta, bool sparse) {
  const OnDevice on(query);
  query = dense(query), keys = dense(keys), values = dense(values), indices = dense(indices);
  const OptionalTensor of_output = dense(grad_output), of_weights = dense(grad_weights), of_distances = dense(grad_distances);
  KnnArgs a = arguments(on, query, keys, values, indices.size(indices.dim() - 1), metric, kernel, delta);
  const Gradients found(a, query, keys, values, sparse);
  a.grad_output = in(of_output), a.grad_weights = in(of_weights), a.grad_distances = in(of_distances);
  const Sorted sorted(a, indices);
  const Workspace workspace(keys, mc_knn_lookup_bwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_knn_lookup_bwd(&a, on.stream()));
  return found;
}

std::tuple<Tensor, Tensor, Tensor> bwd(
    OptionalTensor grad_output, OptionalTensor grad_weights, OptionalTensor, OptionalTensor grad_distances, Tensor indices, Tensor query, Tensor keys,
    Tensor values, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, int64_t, int64_t metric, int64_t kernel, double delta) {
  const Gradients g = gradients(grad_output, grad_weights, grad_distances, indices, query, keys, values, metric, kernel, delta, false);
  return {g.dquery, g.dkeys, g.dvalues};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rows(
    OptionalTensor grad_output, OptionalTensor grad_weights, OptionalTensor grad_distances, Tensor indices, Tensor query, Tensor keys, Tensor values,
    int64_t metric, int64_t kernel, double delta) {
  const Gradients g = gradients(grad_output, grad_weights, grad_distances, indices, query, keys, values, metric, kernel, delta, true);
  return {g.dquery, g.rows, g.dkeys, g.dvalues};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_knn_lookup_fwd_cuda", TORCH_BOX(&memcore::cuda::fwd));
  m.impl("_knn_lookup_bwd_cuda", TORCH_BOX(&memcore::cuda::bwd));
  m.impl("_knn_lookup_rows_cuda", TORCH_BOX(&memcore::cuda::rows));
}
