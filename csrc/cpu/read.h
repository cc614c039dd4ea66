#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

struct ReadArgs {
  DType dtype;
  int64_t B, H, N, W, memory_stride;  // stride 0: one memory for the batch
  const void *memory, *weights;
  void* reads;
  // backward
  const void* grad;
  void *dmemory, *dweights;
};

MC_DECLARE(void read_fwd(const ReadArgs& a, int64_t begin, int64_t end);
           void read_bwd(const ReadArgs& a, int64_t begin, int64_t end);
           void read_bwd_shared(const ReadArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
