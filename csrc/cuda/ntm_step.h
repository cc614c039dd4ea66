#pragma once

#include <stdint.h>

namespace memcore {
namespace cuda {

struct StepArgs {
  int64_t dtype, device, B, N, W, R, Hw, S, write_first;
  const void *memory, *interface, *previous;
  void *written, *reads, *weights;
  // backward; a null gradient is zero
  const void *grad_written, *grad_reads, *grad_weights;
  void *dmemory, *dinterface, *dprevious;
  void* workspace;
};

// ntm_step_tiles.cu
bool step_by_tiles(const StepArgs& a, bool backward);
int64_t step_tiles_workspace(const StepArgs& a, bool backward);
int64_t step_tiles(const StepArgs& a, bool backward, void* stream);

}  // namespace cuda
}  // namespace memcore

extern "C" {
int64_t mc_ntm_step_fwd_workspace(const memcore::cuda::StepArgs* a);
int64_t mc_ntm_step_bwd_workspace(const memcore::cuda::StepArgs* a);
int64_t mc_ntm_step_fwd(const memcore::cuda::StepArgs* a, void* stream);
int64_t mc_ntm_step_bwd(const memcore::cuda::StepArgs* a, void* stream);
}
