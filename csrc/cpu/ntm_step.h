#pragma once

#include "dtype.h"
#include "isa.h"
#include "kept.h"

namespace memcore {

struct StepArgs {
  DType dtype;
  int64_t B, N, W, R, Hw, range;
  bool write_first;
  const void *memory, *interface, *previous;
  void *written, *reads, *weights;
  void* kept;  // as of content_addressing
  // backward; a null gradient is zero
  const void *grad_written, *grad_reads, *grad_weights;
  void *dmemory, *dinterface, *dprevious;
};

MC_DECLARE(void ntm_step_fwd(const StepArgs& a, int64_t begin, int64_t end);
           void ntm_step_bwd(const StepArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
