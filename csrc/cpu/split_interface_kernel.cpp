#include "split_interface.h"

#include "interface.h"

namespace memcore {
namespace MC_ISA {
namespace {

// Calls f(index, pointer, rows, n, padded n) for each of the seven pieces.
template <class C, class F> MC_INLINE void each(const Pieces<C>& p, const InterfaceLayout& l, F f) {
  const int64_t H = l.heads(), S = l.shifts(), Wp = padded<C>(l.W);
  f(0, p.key, H, l.W, Wp), f(1, p.strength, 1, H, H), f(2, p.gate, 1, H, H), f(3, p.shift, H, S, S);
  f(4, p.gamma, 1, H, H), f(5, p.erase, l.Hw, l.W, Wp), f(6, p.add, l.Hw, l.W, Wp);
}

template <class T> void forward(const InterfaceArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const InterfaceLayout l{a.R, a.Hw, a.W, a.range};
  Pieces<C> p;
  C* x;
  Arena arena([&](Arena& m) { p.layout(m, l), m.take(x, l.size()); });
  for (int64_t b = begin; b < end; b++) {
    widen(x, (const T*)a.interface + b * l.size(), l.size());
    activate(p, x, l);
    each(p, l, [&](int i, C* from, int64_t rows, int64_t n, int64_t np) {
      narrow_rows((T*)a.pieces[i] + b * rows * n, from, rows, n, np);
    });
  }
}

template <class T> void backward(const InterfaceArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const InterfaceLayout l{a.R, a.Hw, a.W, a.range};
  Pieces<C> p, d;
  C *x, *dx;
  Arena arena([&](Arena& m) { p.layout(m, l), d.layout(m, l), m.take(x, l.size()), m.take(dx, l.size()); });
  for (int64_t b = begin; b < end; b++) {
    widen(x, (const T*)a.interface + b * l.size(), l.size());
    activate(p, x, l);
    each(d, l, [&](int i, C* to, int64_t rows, int64_t n, int64_t np) {
      if (a.grads[i]) widen_rows(to, (const T*)a.grads[i] + b * rows * n, rows, n, np);
      else fill(to, rows * np, (C)0);
    });
    activate_backward(dx, x, p, d, l);
    narrow((T*)a.dinterface + b * l.size(), dx, l.size());
  }
}

}  // namespace

void split_interface_fwd(const InterfaceArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}
void split_interface_bwd(const InterfaceArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
