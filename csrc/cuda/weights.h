// Arguments of the operators that turn [B, H, N] weights into [B, H, N] weights: rows of N, each with a parameter of its own.
#pragma once

#include <stdint.h>

namespace memcore {
namespace cuda {

struct WeightArgs {
  int64_t dtype, device, rows, N, S;  // rows: the B * H heads
  const void *first, *second;         // the weights; interpolate: content and previous
  const void* parameter;              // gate, shift [S] or gamma of each row
  void* result;
  // backward
  const void* grad;
  void *dfirst, *dsecond, *dparameter;
  void* workspace;
};

}  // namespace cuda
}  // namespace memcore

#define MC_WEIGHTS(op)                                                           \
  extern "C" {                                                                   \
  int64_t mc_##op##_fwd_workspace(const memcore::cuda::WeightArgs* a);           \
  int64_t mc_##op##_bwd_workspace(const memcore::cuda::WeightArgs* a);           \
  int64_t mc_##op##_fwd(const memcore::cuda::WeightArgs* a, void* stream);       \
  int64_t mc_##op##_bwd(const memcore::cuda::WeightArgs* a, void* stream);       \
  }
MC_WEIGHTS(interpolate)
MC_WEIGHTS(circular_shift)
MC_WEIGHTS(sharpen)
