#pragma once

#include "dtype.h"
#include "isa.h"
#include "kept.h"

namespace memcore {

struct AddressingArgs {
  DType dtype;
  int64_t B, H, N, W, S, memory_stride;  // stride 0: one memory for the batch
  const void *key, *memory, *strength, *gate, *shift, *gamma, *previous;
  void* weights;
  void* kept;  // as of content_addressing
  // backward
  const void* grad;
  void *dkey, *dmemory, *dstrength, *dgate, *dshift, *dgamma, *dprevious;
};

MC_DECLARE(void ntm_addressing_fwd(const AddressingArgs& a, int64_t begin, int64_t end);
           void ntm_addressing_bwd(const AddressingArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
