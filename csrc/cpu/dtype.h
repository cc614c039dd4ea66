// Storage types by number, for both sides of the line between glue and kernels.
#pragma once

#include <cstdint>

namespace memcore {

enum class DType : int { f32, f64, bf16, f16 };

}  // namespace memcore
