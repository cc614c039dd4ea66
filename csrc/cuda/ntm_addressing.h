#pragma once

#include <stdint.h>

namespace memcore {
namespace cuda {

struct NtmAddressingArgs {
  int64_t dtype, device, B, H, N, W, S;
  int64_t memory_stride;  // elements from one batch element's memory to the next; 0 if shared
  const void *key, *memory, *strength, *gate, *shift, *gamma, *previous;
  void* weights;
  // backward
  const void* grad;
  void *dkey, *dmemory, *dstrength, *dgate, *dshift, *dgamma, *dprevious;
  void* workspace;
};

}  // namespace cuda
}  // namespace memcore

extern "C" {
int64_t mc_ntm_addressing_fwd_workspace(const memcore::cuda::NtmAddressingArgs* a);
int64_t mc_ntm_addressing_bwd_workspace(const memcore::cuda::NtmAddressingArgs* a);
int64_t mc_ntm_addressing_fwd(const memcore::cuda::NtmAddressingArgs* a, void* stream);
int64_t mc_ntm_addressing_bwd(const memcore::cuda::NtmAddressingArgs* a, void* stream);
}
