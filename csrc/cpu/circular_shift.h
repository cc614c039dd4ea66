#pragma once

#include "weights.h"

namespace memcore {

MC_DECLARE(void circular_shift_fwd(const WeightArgs& a, int64_t begin, int64_t end);
           void circular_shift_bwd(const WeightArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
