#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

enum KnnKernel : int { kInverseDistance = 0, kSoftmax = 1, kUniform = 2, kSearchAlone = 3 };

// Neighbours found: weights and output, and all gradients.
struct KnnRead {
  DType dtype;
  int64_t A, Q, N, D, V, k;
  int metric, kernel;
  double delta;
  int64_t query_stride;  // elements from one dictionary's queries to the next; 0 if shared
  const void *query, *keys, *values;
  const int64_t* indices;
  // forward
  const void* found;  // distances in the accumulation type
  void *distances, *weights, *output;
  // backward
  const void *grad_distances, *grad_weights, *grad_output;  // null: zero
  void* dquery;
  // of each neighbour, [A, Q, K] in the accumulation type: dkey = to_query * query - to_key * key, dvalue = weight * grad_output
  void *to_query, *to_key, *weight;
  // rows that are used: row u is that of neighbours places[starts[u]] .. places[starts[u + 1] - 1]; it goes to targets[u], without them to u
  const int64_t *starts, *places, *targets;
  void *dkeys, *dvalues;
};

MC_DECLARE(void knn_round(const KnnRead& a, int64_t begin, int64_t end);      // queries of all dictionaries: distances to their dtype
           void knn_read(const KnnRead& a, int64_t begin, int64_t end);       // queries of all dictionaries: distances, weights, output
           void knn_slopes(const KnnRead& a, int64_t begin, int64_t end);     // queries (shared: one for all dictionaries)
           void knn_scatter(const KnnRead& a, int64_t begin, int64_t end);)   // rows that are used

}  // namespace memcore
