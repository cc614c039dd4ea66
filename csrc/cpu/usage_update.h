#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

struct UsageArgs {
  DType dtype;
  int64_t B, N, Hr, Hw;
  double decay;
  const void *usage, *reads, *writes;
  void* result;
  // backward
  const void* grad;
  void *dusage, *dreads, *dwrites;
};

MC_DECLARE(void usage_update_fwd(const UsageArgs& a, int64_t begin, int64_t end);
           void usage_update_bwd(const UsageArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
