#pragma once

#include <stdint.h>

namespace memcore {
namespace cuda {

// Numbers of a memory up to which one block does a whole step. Measured on an H200, forward and backward in a CUDA graph, block against tiles:
// 92 and 96 us at (B, heads, N, W) = (64, 2, 128, 64), 277 and 123 at (16, 5, 256, 64), 554 and 227 at (64, 5, 512, 64), 8370 and 865 at (32, 5, 4096, 64).
constexpr int64_t kWhole = 8192;

// How a step is shared out: one block an element; its tiles' blocks meeting in one launch (forward only); its tiles in several launches.
enum Way : int64_t { kAutomatic, kBlock, kOnce, kTiles };

struct StepArgs {
  int64_t dtype, device, B, N, W, R, Hw, S, write_first;
  int64_t way;  // what MEMCORE_NTM_STEP says, as far as the device can do it
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
