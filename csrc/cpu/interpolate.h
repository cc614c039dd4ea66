#pragma once

#include "weights.h"

namespace memcore {

MC_DECLARE(void interpolate_fwd(const WeightArgs& a, int64_t begin, int64_t end);
           void interpolate_bwd(const WeightArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
