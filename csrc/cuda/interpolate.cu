// Interpolation: every number read once, written once.
#include "weights_launch.h"

namespace memcore {
namespace cuda {

template <class T, bool SPILL> MC_KERNEL interpolate_fwd_kernel(WeightLaunch launch) {
  MC_DYN_SHARED(shared);
  const WeightArgs& a = launch.a;
  const WeightBlock<SPILL> b(shared, launch);
  const int64_t at = b.row * a.N;
  const float g = b.count ? wide(((const T*)a.parameter)[b.row]) : 0;
  for (int n = b.team.rank; n < b.count; n += b.team.threads)
    ((T*)a.result)[at + n] = narrow<T>(g * wide(((const T*)a.first)[at + n]) + (1 - g) * wide(((const T*)a.second)[at + n]));
}

template <class T, bool SPILL> MC_KERNEL interpolate_bwd_kernel(WeightLaunch launch) {
  MC_DYN_SHARED(shared);
  const WeightArgs& a = launch.a;
  WeightBlock<SPILL> b(shared, launch);
  const int64_t at = b.row * a.N;
  const float g = b.count ? wide(((const T*)a.parameter)[b.row]) : 0;
  Sum dgate;
  for (int n = b.team.rank; n < b.count; n += b.team.threads) {
    const float d = wide(((const T*)a.grad)[at + n]);
    dgate.add(d * (wide(((const T*)a.first)[at + n]) - wide(((const T*)a.second)[at + n])));
    ((T*)a.dfirst)[at + n] = narrow<T>(g * d);
    ((T*)a.dsecond)[at + n] = narrow<T>((1 - g) * d);
  }
  const float total = b.team.sum(dgate.total);
  if (b.team.rank == 0 && b.row < a.rows) ((T*)a.dparameter)[b.row] = narrow<T>(total);
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

MC_WEIGHT_LAUNCHERS(interpolate, 0, 0)
