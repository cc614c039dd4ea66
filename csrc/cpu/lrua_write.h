#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

struct LruaArgs {
  DType dtype;
  int64_t B, H, N, W;
  bool zero;
  const void *memory, *word, *previous, *usage, *gate;
  void *written, *weights;
  // backward; a null gradient is zero
  const void *grad_written, *grad_weights;
  void *dmemory, *dword, *dprevious, *dgate;
};

MC_DECLARE(void lrua_write_fwd(const LruaArgs& a, int64_t begin, int64_t end);
           void lrua_write_bwd(const LruaArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
