// Kernels over rows of weights: a block takes 1 to 8 rows, with 8 to 1 warps each.
#pragma once

#include "addressing.h"
#include "weights.h"

namespace memcore {
namespace cuda {

struct WeightLaunch {
  WeightArgs a;
  Plan plan;
  int per_block, arrays;  // rows of a block; float arrays [N] of a row
};

inline int rows_per_block(int64_t N) { return N <= 128 ? 8 : N <= 512 ? 4 : N <= 1024 ? 2 : 1; }

template <bool SPILL> struct WeightBlock {
  Team team;
  int64_t row;
  int count;     // N, 0 for a team without a row
  float* array;  // the team's

  __device__ WeightBlock(char* shared, const WeightLaunch& launch) : WeightBlock(launch, arena_of<SPILL>(shared, launch.plan, launch.a.workspace)) {}
  __device__ float* take(int i) const { return array + (int64_t)i * N_; }

 private:
  int N_;
  __device__ WeightBlock(const WeightLaunch& launch, Arena<SPILL> arena)
      : team(launch.per_block, arena.template take<float>(kSlots)), N_((int)launch.a.N) {
    const int64_t size = (int64_t)launch.arrays * N_;
    array = arena.template take<float>(launch.per_block * size) + team.index * size;
    row = (int64_t)blockIdx.x * launch.per_block + team.index;
    count = row < launch.a.rows ? N_ : 0;
  }
};

inline WeightLaunch weight_launch(const WeightArgs& a, int arrays) {
  const int per_block = rows_per_block(a.N);
  const Plan p = plan_of(mc_shared_limit(a.device), [&](auto& arena, bool) {
    arena.template take<float>(kSlots);
    arena.template take<float>(per_block * arrays * a.N);
  });
  return {a, p, per_block, arrays};
}
inline int64_t weight_blocks(const WeightLaunch& l) { return (l.a.rows + l.per_block - 1) / l.per_block; }
inline int64_t weight_workspace(const WeightArgs& a, int arrays) {
  const WeightLaunch l = weight_launch(a, arrays);
  return weight_blocks(l) * l.plan.workspace;
}
// `ARRAYS` is what the kernel takes for a row; the two forms of it.
template <int ARRAYS> inline int64_t launch_weights(void (*kernel)(WeightLaunch), void (*spilling)(WeightLaunch), const WeightArgs& a, void* stream) {
  const WeightLaunch l = weight_launch(a, ARRAYS);
  return mc_launch(l.plan.spill ? spilling : kernel, weight_blocks(l), kThreads, l.plan.shared, a.device, stream, l);
}

// The launchers of operator `op` with kernels op_fwd_kernel and op_bwd_kernel, which take FWD and BWD arrays a row.
#define MC_WEIGHT_LAUNCHERS(op, FWD, BWD)                                                                                      \
  int64_t mc_##op##_fwd_workspace(const WeightArgs* a) { return weight_workspace(*a, FWD); }                                   \
  int64_t mc_##op##_bwd_workspace(const WeightArgs* a) { return weight_workspace(*a, BWD); }                                   \
  int64_t mc_##op##_fwd(const WeightArgs* a, void* stream) {                                                                   \
    return with_type(a->dtype, [&](auto t) {                                                                                   \
      return launch_weights<FWD>(op##_fwd_kernel<decltype(t), false>, op##_fwd_kernel<decltype(t), true>, *a, stream);         \
    });                                                                                                                        \
  }                                                                                                                            \
  int64_t mc_##op##_bwd(const WeightArgs* a, void* stream) {                                                                   \
    return with_type(a->dtype, [&](auto t) {                                                                                   \
      return launch_weights<BWD>(op##_bwd_kernel<decltype(t), false>, op##_bwd_kernel<decltype(t), true>, *a, stream);         \
    });                                                                                                                        \
  }

}  // namespace cuda
}  // namespace memcore
