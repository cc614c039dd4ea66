#pragma once

#include "weights.h"

namespace memcore {

MC_DECLARE(void sharpen_fwd(const WeightArgs& a, int64_t begin, int64_t end);
           void sharpen_bwd(const WeightArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
