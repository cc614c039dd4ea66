// Glue that knn_search and knn_lookup share.
#pragma once

#include <array>

#include "glue.h"
#include "knn_search.h"

namespace memcore {
namespace cuda {

inline Tensor integers(const Tensor& like, std::initializer_list<int64_t> shape) {
  const Sizes sizes(shape.begin(), shape.size());
  return make(like, sizes, torch::headeronly::ScalarType::Long);
}

inline KnnArgs knn_arguments(const char* op, const OnDevice& on, const Tensor& query, const Tensor& keys, int64_t k, int64_t metric) {
  KnnArgs a{};
  a.dtype = (int64_t)stored(query, op), a.device = on.index();
  a.A = keys.dim() == 3 ? keys.size(0) : 1, a.Q = query.size(query.dim() - 2);
  a.N = keys.size(keys.dim() - 2), a.D = keys.size(keys.dim() - 1);
  a.K = k, a.metric = metric, a.kernel = kSearchAlone, a.query_stride = query.dim() == 3 ? a.Q * a.D : 0;
  small(op, {a.Q, a.N, a.D});
  if (k > kMostNeighbours)
    fail(std::string("memcore.") + op + ": the CUDA kernels find up to " + std::to_string(kMostNeighbours) + " neighbours, got " + std::to_string(k));
  a.query = in(query), a.keys = in(keys);
  return a;
}

// [A, Q, size], or [Q, size] of one dictionary.
inline Tensor of_queries(const Tensor& keys, const KnnArgs& a, int64_t size) {
  return keys.dim() == 3 ? make(keys, {a.A, a.Q, size}) : make(keys, {a.Q, size});
}
inline Tensor integers_of_queries(const Tensor& keys, const KnnArgs& a) {
  return keys.dim() == 3 ? integers(keys, {a.A, a.Q, a.K}) : integers(keys, {a.Q, a.K});
}

// Where gradients of rows go: tensors of their shapes, or the rows that are used (KnnArgs::rows). Without a dictionary row there is nothing.
struct Gradients {
  Tensor dquery, rows, dkeys, dvalues;

  Gradients(KnnArgs& a, const Tensor& query, const Tensor& keys, const OptionalTensor& values, bool sparse)
      : dquery(make_like(query)), rows(integers(keys, {keys.dim() - 1, sparse && a.N > 0 ? a.A * a.Q * a.K : 0})), dkeys(gradient(keys, sparse)),
        dvalues(values ? gradient(*values, sparse) : make(keys, {0})) {
    a.dquery = out(dquery), a.dkeys = out(dkeys), a.dvalues = out(dvalues);
    a.rows = rows.numel() ? (int64_t*)out(rows) : nullptr, a.stacked = keys.dim() == 3;
  }

 private:
  Tensor gradient(const Tensor& t, bool sparse) const {
    return sparse ? make(t, {rows.size(1), t.size(t.dim() - 1)}) : torch::stable::new_zeros(t, t.sizes());
  }
};

// Each dictionary's indices in order, equal ones in that of the queries, and where each was.
class Sorted {
 public:
  Sorted(KnnArgs& a, const Tensor& indices) : values_(integers(indices, {a.A, a.Q * a.K})), places_(integers(indices, {a.A, a.Q * a.K})) {
    namespace stack = torch::stable::detail;
    a.indices = (int64_t*)indices.mutable_data_ptr(), a.sorted = (const int64_t*)in(values_), a.places = (const int64_t*)in(places_);
    if (values_.numel() == 0) return;
    std::array<StableIValue, 6> s{
        stack::from(torch::stable::view(indices, {a.A, a.Q * a.K})), stack::from(std::optional<bool>(true)), stack::from((int64_t)1),
        stack::from(false), stack::from(values_), stack::from(places_)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "values_stable", s.data(), TORCH_ABI_VERSION));
    stack::to<Tensor>(s[0]), stack::to<Tensor>(s[1]);
  }

 private:
  Tensor values_, places_;
};

}  // namespace cuda
}  // namespace memcore
