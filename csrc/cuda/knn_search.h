#pragma once

#include <stdint.h>

namespace memcore {
namespace cuda {

enum KnnMetric : int64_t { kL2 = 0, kCosine = 1, kIp = 2 };
enum KnnKernel : int64_t { kInverseDistance = 0, kSoftmax = 1, kUniform = 2, kSearchAlone = 3 };

constexpr int64_t kMostNeighbours = 1024;  // kept by a block in shared memory

// A search, NEC's read of what it found, and the gradients of both.
struct KnnArgs {
  int64_t dtype, device, A, Q, N, D, V, K, metric, kernel;
  double delta;
  int64_t query_stride;  // elements from one dictionary's queries to the next; 0 if shared
  const void *query, *keys, *values;
  const int64_t* count;  // [A], null: N
  int64_t* indices;      // backward: an input
  // forward
  int64_t* kept;  // the indices again
  void *distances, *weights, *output;
  float* found;  // distances before they are rounded to their type; null: nobody asks
  // backward
  const void *grad_distances, *grad_weights, *grad_output;  // null: zero
  const int64_t *sorted, *places;                           // [A, Q * K]: a dictionary's indices in order, and where each was
  void *dquery, *dkeys, *dvalues;                           // those of keys and values hold zeros, but with `rows`
  // [2 or 1, A * Q * K], dictionary (if stacked) and row of each row of dkeys and dvalues, which are [A * Q * K, ..] then: the sum of a row's
  // neighbours at one of them, zeros at the others, so that no size depends on what was found; null: dkeys and dvalues have their tensors' shapes
  int64_t* rows;
  int64_t stacked;
  // of each neighbour, [A, Q, K]: dkey = to_query * query - to_key * key (l2: to_query * (query - key)), dvalue = weight * grad_output
  float *to_query, *to_key, *weight;
  void* workspace;
};

int64_t knn_find(const KnnArgs& a, void* stream);  // knn_search.cu
int64_t knn_find_workspace(const KnnArgs& a);
int64_t knn_gradients(const KnnArgs& a, void* stream);  // knn_lookup.cu
int64_t knn_gradients_workspace(const KnnArgs& a);

}  // namespace cuda
}  // namespace memcore

extern "C" {
int64_t mc_knn_search_fwd_workspace(const memcore::cuda::KnnArgs* a);
int64_t mc_knn_search_bwd_workspace(const memcore::cuda::KnnArgs* a);
int64_t mc_knn_search_fwd(const memcore::cuda::KnnArgs* a, void* stream);
int64_t mc_knn_search_bwd(const memcore::cuda::KnnArgs* a, void* stream);
int64_t mc_knn_lookup_fwd_workspace(const memcore::cuda::KnnArgs* a);
int64_t mc_knn_lookup_bwd_workspace(const memcore::cuda::KnnArgs* a);
int64_t mc_knn_lookup_fwd(const memcore::cuda::KnnArgs* a, void* stream);
int64_t mc_knn_lookup_bwd(const memcore::cuda::KnnArgs* a, void* stream);
}
