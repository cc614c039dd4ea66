#include "sharpen.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

template <class T> void forward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N);
  C *w, *p;
  Arena arena([&](Arena& x) { x.take(w, Np), x.take(p, Np); });
  for (int64_t r = begin; r < end; r++) {
    widen_rows(w, (const T*)a.first + r * a.N, 1, a.N, Np);
    sharpen_row<C, false>(p, nullptr, w, (C)wide(((const T*)a.parameter)[r]), a.N, Np);
    narrow((T*)a.result + r * a.N, p, a.N);
  }
}

template <class T> void backward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N);
  C *w, *p, *l, *grad;
  Arena arena([&](Arena& x) { x.take(w, Np), x.take(p, Np), x.take(l, Np), x.take(grad, Np); });
  for (int64_t r = begin; r < end; r++) {
    widen_rows(w, (const T*)a.first + r * a.N, 1, a.N, Np);
    widen_rows(grad, (const T*)a.grad + r * a.N, 1, a.N, Np);
    const C gamma = wide(((const T*)a.parameter)[r]);
    sharpen_row<C, true>(p, l, w, gamma, a.N, Np);
    put((T*)a.dparameter + r, sharpen_backward(grad, p, l, w, gamma, Np));
    narrow((T*)a.dfirst + r * a.N, grad, a.N);
  }
}

}  // namespace

void sharpen_fwd(const WeightArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}
void sharpen_bwd(const WeightArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
