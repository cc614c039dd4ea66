// NEC's read of the neighbours that the search found, and the gradients of both: a block for each query, then a warp for each neighbour, of which
// the first of a row adds up what all of them say, in the order of the queries.
#include "knn.h"

namespace memcore {
namespace cuda {

// Kernels of ascending distances d(k) in w [K], over their sum; 0 where there is no finite distance. The nearest distance is a factor of all, which
// keeps them in range.
template <class D> __device__ inline void weigh(const KnnArgs& a, D d, double* w, double* slots) {
  double sum = 0;
  const double nearest = a.K > 0 ? d(0) : 0;
  for (int k = threadIdx.x; k < a.K; k += kThreads) {
    const float x = d(k);
    const double of = a.kernel == kInverseDistance ? (nearest + a.delta) / (x + a.delta)
                      : a.kernel == kSoftmax       ? expf((float)((nearest - x) / a.delta))
                                                   : 1;
    w[k] = is_finite(x) ? of : 0;
    sum += w[k];
  }
  sum = block_total(sum, slots);
  for (int k = threadIdx.x; k < a.K; k += kThreads) w[k] = sum > 0 ? w[k] / sum : 0;
}

// ---- forward ----

struct ReadBlock {
  double *slots, *w;
  float* scratch;
  template <class A> __host__ __device__ ReadBlock(A& arena, const KnnArgs& a) {
    slots = arena.template take<double>(kWarps), w = arena.template take<double>(a.K), scratch = arena.template take<float>(kThreads);
  }
};

template <class T> MC_KERNEL knn_read_kernel(KnnArgs a) {
  MC_DYN_SHARED(shared);
  Arena<false> arena(shared, 0, nullptr);
  const ReadBlock block(arena, a);
  const int64_t item = blockIdx.x, b = item / a.Q;
  const int64_t* rows = a.indices + item * a.K;
  const float *found = a.found + item * a.K, nan = __int_as_float(0x7fc00000);
  const bool nowhere = a.K > 0 && found[0] != found[0];
  weigh(a, [&](int k) { return found[k]; }, block.w, block.slots);
  __syncthreads();
  for (int k = threadIdx.x; k < a.K; k += kThreads) ((T*)a.weights)[item * a.K + k] = narrow<T>(nowhere ? nan : (float)block.w[k]);
  const Columns cols((int)a.V);
  for (int v0 = 0; v0 < a.V; v0 += cols.lanes) {
    const int v = v0 + cols.lane;
    float sum[1] = {};
    for (int k = threadIdx.x / cols.lanes; k < a.K; k += cols.step)
      if (is_finite(found[k]) && v < a.V) sum[0] += (float)block.w[k] * wide(((const T*)a.values)[(b * a.N + rows[k]) * a.V + v]);
    cols.sum(sum, 1, v0, (int)a.V, block.scratch, [&](int, int at, float x) { ((T*)a.output)[item * a.V + at] = narrow<T>(nowhere ? nan : x); });
  }
}

template <class T> int64_t lookup(const KnnArgs& a, void* stream) {
  Arena<false> arena(nullptr, 0, nullptr);
  ReadBlock(arena, a);
  return mc_launch(knn_read_kernel<T>, a.A * a.Q, kThreads, arena.used, a.device, stream, a);
}

// ---- backward ----

struct SlopesBlock {
  double *slots, *w, *towards, *n2;  // of each neighbour: weight, its gradient, |key|^2
  float *d, *scratch;
  template <class A> __host__ __device__ SlopesBlock(A& arena, const KnnArgs& a) {
    slots = arena.template take<double>(2 * kWarps), w = arena.template take<double>(a.K), towards = arena.template take<double>(a.K);
    n2 = arena.template take<double>(a.K), d = arena.template take<float>(a.K), scratch = arena.template take<float>(kThreads);
  }
};

template <class T> MC_KERNEL knn_slopes_kernel(KnnArgs a) {
  MC_DYN_SHARED(shared);
  Arena<false> arena(shared, 0, nullptr);
  const SlopesBlock block(arena, a);
  const int K = (int)a.K;
  const bool one = a.query_stride == 0;  // one query for all dictionaries
  const int64_t q = blockIdx.x % a.Q, first = blockIdx.x / a.Q, last = one ? a.A : first + 1;
  const T* query = query_of<T>(a, first, q);
  const Distance<T> distance(a, query);
  double own = 0;  // cosine: the query's gradient has this much of the query
  for (int64_t b = first; b < last; b++) {
    const int64_t item = b * a.Q + q;
    const int64_t* rows = a.indices + item * K;
    __syncthreads();
    for (int k0 = distance.first(); k0 < K; k0 += distance.step()) {
      const int k = distance.row(k0);
      const int64_t row = k < K ? rows[k] : -1;
      const bool on = row >= 0;
      Norm norm;
      const float d = distance((const T*)a.keys + (b * a.N + row) * a.D, on, norm);
      if (distance.lane == 0 && k < K) block.d[k] = on ? d : infinity(), block.n2[k] = norm.n2;
    }
    __syncthreads();
    double mean = 0;
    if (a.kernel != kSearchAlone) {
      weigh(a, [&](int k) { return block.d[k]; }, block.w, block.slots);
      const int lanes = dot_lanes((int)a.V), lane = threadIdx.x & (lanes - 1);
      for (int k0 = (int)(threadIdx.x & ~31u) / lanes; k0 < K; k0 += kThreads / lanes) {
        const int k = k0 + (int)(threadIdx.x & 31) / lanes;
        const bool on = k < K && is_finite(block.d[k]);
        double sum = 0;
        if (a.grad_output && on)
          for (int v = lane; v < a.V; v += lanes)
            sum += (double)wide(((const T*)a.grad_output)[item * a.V + v]) * wide(((const T*)a.values)[(b * a.N + rows[k]) * a.V + v]);
        sum = group_total(sum, lanes);
        if (a.grad_weights && on) sum += wide(((const T*)a.grad_weights)[item * K + k]);
        if (lane == 0 && k < K) block.towards[k] = sum;
      }
      __syncthreads();
      for (int k = threadIdx.x; k < K; k += kThreads) mean += block.w[k] * block.towards[k];
      mean = block_total(mean, block.slots + kWarps);
    }
    for (int k = threadIdx.x; k < K; k += kThreads) {
      const float d = block.d[k];
      double slope = a.grad_distances && is_finite(d) ? wide(((const T*)a.grad_distances)[item * K + k]) : 0;
      if (a.kernel != kSearchAlone) {
        const double w = block.w[k];
        a.weight[item * K + k] = (float)w;
        if (a.kernel != kUniform && w != 0) slope -= w * (block.towards[k] - mean) / (a.kernel == kInverseDistance ? d + a.delta : a.delta);
      }
      double to_query = a.metric == kL2 ? -2 * slope : -slope, to_key = 0;
      if (a.metric == kCosine) {
        const Norm &u = distance.own, v(block.n2[k]);
        const bool on = !u.zero && !v.zero && d > 0 && is_finite(d);
        const double cosine = 1 - (double)d;
        to_query = on ? -slope * u.inverse * v.inverse : 0;
        to_key = on && !v.small ? -slope * cosine * v.inverse * v.inverse : 0;
        own += on && !u.small ? slope * cosine * u.inverse * u.inverse : 0;
      }
      a.to_query[item * K + k] = (float)to_query, a.to_key[item * K + k] = (float)to_key;
    }
  }
  own = block_total(own, block.slots);  // its barrier: what follows reads to_query of all threads
  const Columns cols((int)a.D);
  for (int d0 = 0; d0 < a.D; d0 += cols.lanes) {
    const int d = d0 + cols.lane;
    float sum[1] = {};
    for (int64_t i = threadIdx.x / cols.lanes; i < (last - first) * K; i += cols.step) {
      const int64_t item = (first + i / K) * a.Q + q, k = item * K + i % K;
      const float x = a.to_query[k];
      if (x == 0 || d >= a.D) continue;
      const float key = wide(((const T*)a.keys)[((first + i / K) * a.N + a.indices[k]) * a.D + d]);
      sum[0] += x * (a.metric == kL2 ? key - wide(query[d]) : key);
    }
    cols.sum(sum, 1, d0, (int)a.D, block.scratch, [&](int, int at, float x) {
      ((T*)a.dquery)[(first * a.Q + q) * a.D + at] = narrow<T>(own != 0 ? x + (float)(own * wide(query[at])) : x);
    });
  }
}

template <class T> MC_KERNEL knn_scatter_kernel(KnnArgs a) {
  const int64_t pairs = a.Q * a.K, at = blockIdx.x * (int64_t)kWarps + threadIdx.x / 32, b = at / pairs, begin = at % pairs;
  if (b >= a.A) return;
  const int64_t *sorted = a.sorted + b * pairs, *places = a.places + b * pairs;
  int64_t row = sorted[begin], end = begin;
  if (row >= 0 && !(begin > 0 && sorted[begin - 1] == row))
    while (end < pairs && sorted[end] == row) end++;
  if (a.rows) {
    if (row < 0) row = sorted[pairs - 1] < 0 ? 0 : sorted[pairs - 1];  // one that is there anyway
    if ((threadIdx.x & 31) == 0) {
      if (a.stacked) a.rows[at] = b;
      a.rows[(a.stacked ? a.A * pairs : 0) + at] = row;
    }
  } else if (begin == end) {
    return;
  }
  const int64_t to = a.rows ? at : b * a.N + row;
  const T* key = (const T*)a.keys + (b * a.N + row) * a.D;
  for (int64_t d = threadIdx.x & 31; d < a.D; d += 32) {
    float sum = 0;
    for (int64_t i = begin; i < end; i++) {
      const int64_t place = places[i];
      const float x = a.to_query[b * pairs + place], y = a.to_key[b * pairs + place];
      if (x == 0) continue;
      const float q = wide(query_of<T>(a, b, place / a.K)[d]), k = wide(key[d]);
      sum += a.metric == kL2 ? x * (q - k) : x * q - y * k;
    }
    ((T*)a.dkeys)[to * a.D + d] = narrow<T>(sum);
  }
  if (a.kernel == kSearchAlone) return;
  for (int64_t v = threadIdx.x & 31; v < a.V; v += 32) {
    float sum = 0;
    for (int64_t i = begin; i < end; i++) {
      const float w = a.weight[b * pairs + places[i]];
      if (a.grad_output && w != 0) sum += w * wide(((const T*)a.grad_output)[(b * a.Q + places[i] / a.K) * a.V + v]);
    }
    ((T*)a.dvalues)[to * a.V + v] = narrow<T>(sum);
  }
}

template <class T> int64_t gradients(const KnnArgs& a, void* stream) {
  Arena<false> arena(nullptr, 0, nullptr);
  SlopesBlock(arena, a);
  const int64_t error = mc_launch(knn_slopes_kernel<T>, a.query_stride ? a.A * a.Q : a.Q, kThreads, arena.used, a.device, stream, a);
  if (error) return error;
  return mc_launch(knn_scatter_kernel<T>, (a.A * a.Q * a.K + kWarps - 1) / kWarps, kThreads, 0, a.device, stream, a);
}

int64_t knn_gradients_workspace(const KnnArgs& a) { return 3 * a.A * a.Q * a.K * (int64_t)sizeof(float); }
int64_t knn_gradients(const KnnArgs& a, void* stream) {
  KnnArgs launch = a;
  launch.to_query = (float*)a.workspace;
  launch.to_key = launch.to_query + a.A * a.Q * a.K, launch.weight = launch.to_key + a.A * a.Q * a.K;
  return with_type(a.dtype, [&](auto t) { return gradients<decltype(t)>(launch, stream); });
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

int64_t mc_knn_lookup_fwd_workspace(const KnnArgs* a) { return knn_find_workspace(*a) + a->A * a->Q * a->K * (int64_t)sizeof(float); }
int64_t mc_knn_lookup_bwd_workspace(const KnnArgs* a) { return knn_gradients_workspace(*a); }
int64_t mc_knn_lookup_fwd(const KnnArgs* a, void* stream) {
  KnnArgs launch = *a;
  launch.found = (float*)((char*)a->workspace + knn_find_workspace(*a));
  const int64_t error = knn_find(launch, stream);
  if (error) return error;
  return with_type(a->dtype, [&](auto t) { return lookup<decltype(t)>(launch, stream); });
}
int64_t mc_knn_lookup_bwd(const KnnArgs* a, void* stream) { return knn_gradients(*a, stream); }
