#pragma once

#include <stdint.h>

namespace memcore {
namespace cuda {

struct LruaArgs {
  int64_t dtype, device, B, H, N, W, zero;
  const void *memory, *word, *previous, *usage, *gate;
  void *written, *weights;
  // backward; a null gradient is zero
  const void *grad_written, *grad_weights;
  void *dmemory, *dword, *dprevious, *dgate;
  void* workspace;
};

}  // namespace cuda
}  // namespace memcore

extern "C" {
int64_t mc_lrua_write_fwd_workspace(const memcore::cuda::LruaArgs* a);
int64_t mc_lrua_write_bwd_workspace(const memcore::cuda::LruaArgs* a);
int64_t mc_lrua_write_fwd(const memcore::cuda::LruaArgs* a, void* stream);
int64_t mc_lrua_write_bwd(const memcore::cuda::LruaArgs* a, void* stream);
}
