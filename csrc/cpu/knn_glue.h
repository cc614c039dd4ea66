// Glue that knn_search and knn_lookup share.
#pragma once

#include "common.h"
#include "knn_lookup.h"
#include "knn_search.h"

namespace memcore {

// The neighbours of contiguous tensors: indices [.., Q, K], and distances in the accumulation type.
struct Found {
  Tensor indices, distances;
};
// Throws if these do not fit each other; `values` may be null.
void knn_check(const Tensor& query, const Tensor& keys, const Tensor* values, const OptionalTensor& count, const OptionalTensor& norms,
               const OptionalTensor& mirror, const OptionalTensor& rounding, int64_t k, int64_t metric);
Found knn_find(const Tensor& query, const Tensor& keys, const OptionalTensor& count, const OptionalTensor& norms, const OptionalTensor& mirror,
               const OptionalTensor& rounding, int64_t k, int64_t metric);

// The rows that neighbours use, ascending, and which neighbours use each.
struct Rows {
  std::vector<int64_t> starts, places, targets;
  explicit Rows(const KnnRead& a);
  int64_t size() const { return (int64_t)targets.size(); }
  Tensor indices(const Tensor& keys) const;  // [2 or 1, U] for a sparse tensor
};

KnnRead knn_reading(const Tensor& query, const Tensor& keys, const Tensor& indices, int64_t metric);

// Gradients from a.grad_*; those of keys and values are [U, ..], or go into zeros of their shape.
struct Gradients {
  Tensor dquery, rows, dkeys, dvalues;
};
Gradients knn_gradients(KnnRead& a, const Tensor& query, const Tensor& keys, const OptionalTensor& values, bool sparse);

}  // namespace memcore
