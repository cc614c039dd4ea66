#pragma once

#include <stdint.h>

namespace memcore {
namespace cuda {

struct ReadArgs {
  int64_t dtype, device, B, H, N, W;
  int64_t memory_stride;  // elements from one batch element's memory to the next; 0 if shared
  const void *memory, *weights;
  void* result;
  // backward
  const void* grad;
  void *dmemory, *dweights;
  void* workspace;
};

}  // namespace cuda
}  // namespace memcore

extern "C" {
int64_t mc_read_fwd_workspace(const memcore::cuda::ReadArgs* a);
int64_t mc_read_bwd_workspace(const memcore::cuda::ReadArgs* a);
int64_t mc_read_fwd(const memcore::cuda::ReadArgs* a, void* stream);
int64_t mc_read_bwd(const memcore::cuda::ReadArgs* a, void* stream);
}
