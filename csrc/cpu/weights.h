// Arguments of the operators that turn [B, H, N] weights into [B, H, N] weights.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

struct WeightArgs {
  DType dtype;
  int64_t rows, N, S;          // rows: the B * H heads
  const void *first, *second;  // the weights; interpolate: content and previous
  const void* parameter;       // gate, shift [S] or gamma of each row
  void* result;
  // backward
  const void* grad;
  void *dfirst, *dsecond, *dparameter;
};

}  // namespace memcore
