// Sharpening: a row is read once, into shared memory.
#include "weights_launch.h"

namespace memcore {
namespace cuda {

template <class T, bool SPILL> MC_KERNEL sharpen_fwd_kernel(WeightLaunch launch) {
  MC_DYN_SHARED(shared);
  const WeightArgs& a = launch.a;
  WeightBlock<SPILL> b(shared, launch);
  const int64_t at = b.row * a.N;
  const float gamma = b.count ? wide(((const T*)a.parameter)[b.row]) : 1;
  float* w = b.take(0);
  for (int n = b.team.rank; n < b.count; n += b.team.threads) w[n] = wide(((const T*)a.first)[at + n]);
  const Scores p = sharpen(b.team, b.count, gamma, [&](int n) { return w[n]; }, [&](int n, float e) { w[n] = e; });
  for (int n = b.team.rank; n < b.count; n += b.team.threads) ((T*)a.result)[at + n] = narrow<T>(w[n] * p.inverse);
}

template <class T, bool SPILL> MC_KERNEL sharpen_bwd_kernel(WeightLaunch launch) {
  MC_DYN_SHARED(shared);
  const WeightArgs& a = launch.a;
  WeightBlock<SPILL> b(shared, launch);
  const int64_t at = b.row * a.N;
  const float gamma = b.count ? wide(((const T*)a.parameter)[b.row]) : 1;
  float *w = b.take(0), *e = b.take(1), *d = b.take(2);
  for (int n = b.team.rank; n < b.count; n += b.team.threads) {
    w[n] = wide(((const T*)a.first)[at + n]);
    d[n] = wide(((const T*)a.grad)[at + n]);
  }
  const Scores p = sharpen(b.team, b.count, gamma, [&](int n) { return w[n]; }, [&](int n, float x) { e[n] = x; });
  const float part = sharpen_backward(
      b.team, b.count, gamma, p.extreme, [&](int n) { return e[n] * p.inverse; }, [&](int n) { return d[n]; }, [&](int n) { return w[n]; },
      [&](int n, float x) { ((T*)a.dfirst)[at + n] = narrow<T>(x); });
  const float dgamma = b.team.sum(part);
  if (b.team.rank == 0 && b.row < a.rows) ((T*)a.dparameter)[b.row] = narrow<T>(dgamma);
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

MC_WEIGHT_LAUNCHERS(sharpen, 1, 3)
