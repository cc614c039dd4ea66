#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

struct InterfaceArgs {
  DType dtype;
  int64_t B, R, Hw, W, range;
  const void* interface;
  void* pieces[7];  // key, strength, gate, shift, gamma, erase, add
  // backward; a null gradient is zero
  const void* grads[7];
  void* dinterface;
};

MC_DECLARE(void split_interface_fwd(const InterfaceArgs& a, int64_t begin, int64_t end);
           void split_interface_bwd(const InterfaceArgs& a, int64_t begin, int64_t end);)

}  // namespace memcore
