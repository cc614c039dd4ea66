#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

struct WriteArgs {
  DType dtype;
  int64_t B, H, N, W;
  const void *memory, *weights, *erase, *add;
  void* written;  // may be the memory itself
  // backward
  const void* grad;
  void *dmemory, *dweights, *derase, *dadd;
};

MC_DECLARE(void erase_add_write_fwd(const WriteArgs& a, int64_t begin, int64_t end);
           void erase_add_write_bwd(const WriteArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
