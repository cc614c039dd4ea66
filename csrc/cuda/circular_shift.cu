// Circular shift: a row is read once, into shared memory.
#include "weights_launch.h"

namespace memcore {
namespace cuda {

// Taps are read where they are: they are few, and the caches keep them.
template <class T> struct Taps {
  const T* s;
  __device__ float operator[](int j) const { return wide(s[j]); }
};

template <class T, bool SPILL> MC_KERNEL circular_shift_fwd_kernel(WeightLaunch launch) {
  MC_DYN_SHARED(shared);
  const WeightArgs& a = launch.a;
  const WeightBlock<SPILL> b(shared, launch);
  const int64_t at = b.row * a.N;
  const int N = (int)a.N, S = (int)a.S;
  float* x = b.take(0);
  for (int n = b.team.rank; n < b.count; n += b.team.threads) x[n] = wide(((const T*)a.first)[at + n]);
  b.team.sync();
  const Taps<T> taps{(const T*)a.parameter + b.row * S};
  for (int n = b.team.rank; n < b.count; n += b.team.threads) ((T*)a.result)[at + n] = narrow<T>(shift_forward(x, taps, S, N, n));
}

template <class T, bool SPILL> MC_KERNEL circular_shift_bwd_kernel(WeightLaunch launch) {
  MC_DYN_SHARED(shared);
  const WeightArgs& a = launch.a;
  WeightBlock<SPILL> b(shared, launch);
  const int64_t at = b.row * a.N;
  const int N = (int)a.N, S = (int)a.S;
  float *x = b.take(0), *d = b.take(1);
  for (int n = b.team.rank; n < b.count; n += b.team.threads) {
    x[n] = wide(((const T*)a.first)[at + n]);
    d[n] = wide(((const T*)a.grad)[at + n]);
  }
  b.team.sync();
  const Taps<T> taps{(const T*)a.parameter + b.row * S};
  for (int n = b.team.rank; n < b.count; n += b.team.threads) ((T*)a.dfirst)[at + n] = narrow<T>(shift_backward(d, taps, S, N, n));
  for (int j0 = 0; j0 < S; j0 += kSpan) {
    const Numbers taps = shift_backward_taps(b.team, b.count, d, x, S, N, j0);
#pragma unroll
    for (int j = 0; j < kSpan; j++) {
      if (j0 + j >= S) break;
      const float v = b.team.sum(taps.v[j]);
      if (b.team.rank == 0 && b.row < a.rows) ((T*)a.dparameter)[b.row * S + j0 + j] = narrow<T>(v);
    }
  }
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

MC_WEIGHT_LAUNCHERS(circular_shift, 1, 2)
