// Exact distances, in double and rounded once to float32 as on every backend, and the block's sums.
#pragma once

#include "block.h"
#include "knn_search.h"

namespace memcore {
namespace cuda {

__device__ inline bool is_finite(float x) { return x - x == 0; }
__device__ inline float infinity() { return __int_as_float(0x7f800000); }

__device__ inline double group_total(double v, int lanes) {
  for (int x = lanes >> 1; x; x >>= 1) v += __shfl_xor_sync(kFull, v, x);
  return v;
}
// On all threads; slots: kWarps doubles, free again after the next barrier.
__device__ inline double block_total(double v, double* slots) {
  v = group_total(v, 32);
  if ((threadIdx.x & 31) == 0) slots[threadIdx.x >> 5] = v;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kWarps; i++) total += slots[i];
  return total;
}

// |x| of a query or key, as cosine takes it.
struct Norm {
  double n2 = 0;
  double inverse = 0;  // 1 / max(|x|, eps)
  double square = 0;   // of the vector divided by that
  bool zero = true, small = true;

  Norm() = default;
  __device__ explicit Norm(double n2) : n2(n2) {
    constexpr double eps = 1e-8;
    zero = (float)n2 == 0, small = n2 < eps * eps;
    inverse = small ? 1 / eps : 1 / sqrt(n2);
    square = small ? n2 / (eps * eps) : 1 + (n2 - n2);
  }
};

// A query's distances from rows, each by a group of threads; all of a warp take part.
template <class T> struct Distance {
  const T* q;
  int D, metric, lanes, lane;
  Norm own;  // but under l2

  __device__ Distance(const KnnArgs& a, const T* q) : q(q), D((int)a.D), metric((int)a.metric), lanes(dot_lanes((int)a.D)) {
    lane = threadIdx.x & (lanes - 1);
    if (metric != kL2) own = Norm(squared(q, true));
  }
  __device__ int step() const { return kThreads / lanes; }
  __device__ int first() const { return (int)(threadIdx.x & ~31u) / lanes; }  // the warp's
  __device__ int row(int first) const { return first + (int)(threadIdx.x & 31) / lanes; }

  __device__ double squared(const T* k, bool on) const {
    double sum = 0;
    for (int d = lane; on && d < D; d += lanes) sum += (double)wide(k[d]) * wide(k[d]);
    return group_total(sum, lanes);
  }
  // From row k, +inf where that is not finite; `norm` is the row's under cosine. k is not read unless `on`.
  __device__ float operator()(const T* k, bool on, Norm& norm) const {
    double sum = 0;
    if (metric == kCosine) {
      norm = Norm(squared(k, on));
      for (int d = lane; on && d < D; d += lanes) {
        // Rounded products, so that equal vectors differ by nothing.
        const double x = __dmul_rn(wide(q[d]), own.inverse), y = __dmul_rn(wide(k[d]), norm.inverse);
        sum += (x - y) * (x - y);
      }
    } else if (metric == kL2) {
      for (int d = lane; on && d < D; d += lanes) {
        const double x = (double)wide(q[d]) - wide(k[d]);
        sum += x * x;
      }
    } else {
      for (int d = lane; on && d < D; d += lanes) sum -= (double)wide(q[d]) * wide(k[d]);
    }
    sum = group_total(sum, lanes);
    if (metric == kCosine) {
      const double half = 0.5 * sum + (1 - 0.5 * (own.square + norm.square));
      sum = is_finite((float)norm.square) && (own.zero || norm.zero) ? 1 : half < 1e-30 ? 0 : half;  // rounding of parallel vectors
    }
    const float d = (float)sum;
    return is_finite(d) ? d : infinity();
  }
};

// Valid rows of dictionary b.
__device__ inline int64_t rows_of(const KnnArgs& a, int64_t b) {
  if (!a.count) return a.N;
  const int64_t n = a.count[b];
  return n < 0 ? 0 : least(n, a.N);
}
template <class T> __device__ inline const T* query_of(const KnnArgs& a, int64_t b, int64_t q) {
  return (const T*)a.query + b * a.query_stride + q * a.D;
}
template <class T> __device__ inline bool lost(const T* query, int64_t D) {
  bool bad = false;
  for (int64_t d = threadIdx.x; d < D; d += kThreads) bad |= !is_finite(wide(query[d]));
  return __syncthreads_or(bad);
}

}  // namespace cuda
}  // namespace memcore
