#pragma once

#include <stdint.h>

namespace memcore {
namespace cuda {

struct ContentArgs {
  int64_t dtype, device, B, H, N, W, cosine;
  int64_t memory_stride;  // elements from one batch element's memory to the next; 0 if shared
  const void *key, *memory;
  const void* strength;  // null: 1
  const void* mask;      // bool; null: all usable
  void* weights;
  // backward
  const void* grad;
  void *dkey, *dmemory, *dstrength;
  void* workspace;  // as many bytes as content_addressing_*_workspace says
};

}  // namespace cuda
}  // namespace memcore

extern "C" {
int64_t mc_content_addressing_fwd_workspace(const memcore::cuda::ContentArgs* a);
int64_t mc_content_addressing_bwd_workspace(const memcore::cuda::ContentArgs* a);
int64_t mc_content_addressing_fwd(const memcore::cuda::ContentArgs* a, void* stream);
int64_t mc_content_addressing_bwd(const memcore::cuda::ContentArgs* a, void* stream);
}
