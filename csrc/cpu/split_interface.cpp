#include "split_interface.h"

#include "common.h"

namespace memcore {
namespace {

InterfaceArgs arguments(const Tensor& interface, int64_t R, int64_t Hw, int64_t range) {
  InterfaceArgs a{};
  a.dtype = dtype_of(interface), a.B = interface.size(0), a.R = R, a.Hw = Hw, a.range = range;
  a.W = (interface.size(1) - (R + Hw) * (4 + 2 * range)) / (R + 3 * Hw);
  a.interface = in(interface);
  return a;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> split_interface_fwd(
    Tensor interface, int64_t read_heads, int64_t write_heads, int64_t shift_range) {
  interface = dense(interface);
  InterfaceArgs a = arguments(interface, read_heads, write_heads, shift_range);
  const int64_t B = a.B, H = a.R + a.Hw, S = 2 * a.range + 1;
  Tensor key = make(interface, {B, H, a.W}), strength = make(interface, {B, H}), gate = make(interface, {B, H});
  Tensor shift = make(interface, {B, H, S}), gamma = make(interface, {B, H});
  Tensor erase = make(interface, {B, a.Hw, a.W}), add = make(interface, {B, a.Hw, a.W});
  const Tensor* all[] = {&key, &strength, &gate, &shift, &gamma, &erase, &add};
  for (int i = 0; i < 7; i++) a.pieces[i] = out(*all[i]);
  auto* kernel = MC_PICK(split_interface_fwd);
  parallel(B, 4 * interface.size(1), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return {key, strength, gate, shift, gamma, erase, add};
}

Tensor split_interface_bwd(
    OptionalTensor key, OptionalTensor strength, OptionalTensor gate, OptionalTensor shift, OptionalTensor gamma, OptionalTensor erase,
    OptionalTensor add, Tensor interface, int64_t read_heads, int64_t write_heads, int64_t shift_range) {
  interface = dense(interface);
  InterfaceArgs a = arguments(interface, read_heads, write_heads, shift_range);
  OptionalTensor* all[] = {&key, &strength, &gate, &shift, &gamma, &erase, &add};
  for (int i = 0; i < 7; i++) *all[i] = dense(*all[i]), a.grads[i] = in(*all[i]);
  Tensor dinterface = make_like(interface);
  a.dinterface = out(dinterface);
  auto* kernel = MC_PICK(split_interface_bwd);
  parallel(a.B, 4 * interface.size(1), [&](int64_t b, int64_t e) { kernel(a, b, e); });
  return dinterface;
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("split_interface_fwd", TORCH_BOX(&memcore::split_interface_fwd));
  m.impl("split_interface_bwd", TORCH_BOX(&memcore::split_interface_bwd));
}
