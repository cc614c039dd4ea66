#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

struct LeastArgs {
  DType dtype;
  int64_t B, N, n;
  const void* usage;
  int64_t* indices;  // [B, n]
};

MC_DECLARE(void least_used_fwd(const LeastArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
