#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

enum KnnMetric : int { kL2 = 0, kCosine = 1, kIp = 2 };

struct KnnArgs {
  DType dtype;
  int64_t A, Q, N, D, k;
  int metric;
  int64_t query_stride;  // elements from one dictionary's queries to the next; 0 if shared
  const void *query, *keys;
  const int64_t* count;   // valid rows of each dictionary; null: N
  const void* norms;      // squared norms in the accumulation type; null: made on the way
  const void* mirror;     // float32 keys in bfloat16, which are scanned instead; null: none
  const float* rounding;  // max |mirror - key| / |key| of each dictionary; null: 2^-8
  uint8_t* uncertain;     // [A, Q] or null: queries whose neighbours the scan does not prove, to be searched without the mirror, if there is one
  void* distances;        // in the accumulation type
  int64_t* indices;

  // How the search is cut: jobs of `chunk` queries of one dictionary, each over `shards` of the rows. A query keeps its best `keep`
  // candidates of every shard in a list of `capacity`.
  int64_t chunk, chunks, shards, keep, capacity;
  bool lanes;  // queries lie across the lanes of a vector, or, if there are few, rows do along it
  bool halves;  // with a mirror: products of bfloat16, else it is widened
  bool pairs;   // by AVX512-BF16, else by AMX
  char* scratch;
  int64_t scratch_size;  // of a job
  int64_t first;         // job that `scratch` begins with

  int64_t rows(int64_t a) const { return !count ? N : count[a] < 0 ? 0 : count[a] < N ? count[a] : N; }
  double rounded(int64_t a) const { return !mirror ? 0 : rounding ? rounding[a] : 0x1p-8; }
};

MC_DECLARE(int64_t knn_scratch(const KnnArgs& a);                              // bytes of a job
           bool knn_lanes(const KnnArgs& a);                                   // the better layout for `chunk` queries
           void knn_prepare(const KnnArgs& a, int64_t begin, int64_t end);     // jobs
           void knn_scan(const KnnArgs& a, int64_t begin, int64_t end);        // jobs * shards
           void knn_finish(const KnnArgs& a, int64_t begin, int64_t end);)     // jobs * chunk

}  // namespace memcore
