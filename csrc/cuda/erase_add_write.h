#pragma once

#include <stdint.h>

namespace memcore {
namespace cuda {

struct EraseAddArgs {
  int64_t dtype, device, B, H, N, W;
  const void *memory, *weights, *erase, *add;
  void* written;
  // backward
  const void* grad;
  void *dmemory, *dweights, *derase, *dadd;
  void* workspace;
};

}  // namespace cuda
}  // namespace memcore

extern "C" {
int64_t mc_erase_add_write_bwd_workspace(const memcore::cuda::EraseAddArgs* a);
int64_t mc_erase_add_write_fwd(const memcore::cuda::EraseAddArgs* a, void* stream);
int64_t mc_erase_add_write_bwd(const memcore::cuda::EraseAddArgs* a, void* stream);
}
