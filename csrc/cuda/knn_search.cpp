#include "knn_glue.h"

namespace memcore {
namespace cuda {
namespace {

const char kName[] = "knn_search";

std::tuple<Tensor, Tensor, Tensor> fwd(
    Tensor query, Tensor keys, OptionalTensor count, OptionalTensor, OptionalTensor, OptionalTensor, int64_t k, int64_t metric) {
  const OnDevice on(query);
  query = dense(query), keys = dense(keys), count = dense(count);
  KnnArgs a = knn_arguments(kName, on, query, keys, k, metric);
  a.count = (const int64_t*)in(count);
  Tensor distances = of_queries(keys, a, k), indices = integers_of_queries(keys, a), kept = integers_of_queries(keys, a);
  a.distances = out(distances), a.indices = (int64_t*)out(indices), a.kept = (int64_t*)out(kept);
  const Workspace workspace(keys, mc_knn_search_fwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_knn_search_fwd(&a, on.stream()));
  return {distances, indices, kept};
}

Gradients gradients(const OptionalTensor& grad, Tensor indices, Tensor query, Tensor keys, int64_t metric, bool sparse) {
  const OnDevice on(query);
  query = dense(query), keys = dense(keys), indices = dense(indices);
  const OptionalTensor g = dense(grad);
  KnnArgs a = knn_arguments(kName, on, query, keys, indices.size(indices.dim() - 1), metric);
  const Gradients found(a, query, keys, std::nullopt, sparse);
  a.grad_distances = in(g);
  const Sorted sorted(a, indices);
  const Workspace workspace(keys, mc_knn_search_bwd_workspace(&a));
  a.workspace = workspace.data();
  on.check(kName, mc_knn_search_bwd(&a, on.stream()));
  return found;
}

std::tuple<Tensor, Tensor> bwd(
    OptionalTensor grad, OptionalTensor, Tensor indices, Tensor query, Tensor keys, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor,
    int64_t, int64_t metric) {
  const Gradients found = gradients(grad, indices, query, keys, metric, false);
  return {found.dquery, found.dkeys};
}

std::tuple<Tensor, Tensor, Tensor> rows(OptionalTensor grad, Tensor indices, Tensor query, Tensor keys, int64_t metric) {
  const Gradients found = gradients(grad, indices, query, keys, metric, true);
  return {found.dquery, found.rows, found.dkeys};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_knn_search_fwd_cuda", TORCH_BOX(&memcore::cuda::fwd));
  m.impl("_knn_search_bwd_cuda", TORCH_BOX(&memcore::cuda::bwd));
  m.impl("_knn_search_rows_cuda", TORCH_BOX(&memcore::cuda::rows));
}
