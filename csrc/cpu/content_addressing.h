#pragma once

#include "dtype.h"
#include "isa.h"
#include "kept.h"

namespace memcore {

struct ContentArgs {
  DType dtype;
  int64_t B, H, N, W;
  bool cosine;
  const void *key, *memory;
  int64_t memory_stride;  // elements from one batch element's memory to the next; 0 if shared
  const void* strength;   // null: 1
  const bool* mask;       // null: all usable
  void* weights;
  void* kept;  // [B, similar_numbers] in the accumulation type: written by the forward, read by the backward; null: computed again
  // backward
  const void* grad;
  void *dkey, *dmemory, *dstrength;
  void* coefficients;  // shared memory only: [B, H * Np + Np + H * Wp] in the accumulation type, filled by the first pass

  int64_t coefficient_size() const { return H * (N + 16) + (N + 16) + H * (W + 16); }
};

MC_DECLARE(void content_addressing_fwd(const ContentArgs& a, int64_t begin, int64_t end);
           void content_addressing_bwd(const ContentArgs& a, int64_t begin, int64_t end);
           void content_addressing_bwd_shared(const ContentArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
