#include "sharpen.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

// A row of whole vectors in the accumulation type: `row` itself, or a padded copy of it.
template <class T> MC_INLINE const Acc<T>* whole(const T* row, Acc<T>* scratch, int64_t N, int64_t Np) {
  if constexpr (__is_same(T, Acc<T>))
    if (N == Np) return row;
  widen_rows(scratch, row, 1, N, Np);
  return scratch;
}
// f(to): where storage is such a row `to` is the result itself.
template <class T, class F> MC_INLINE void into(T* result, Acc<T>* scratch, int64_t N, int64_t Np, F f) {
  if constexpr (__is_same(T, Acc<T>))
    if (N == Np) return f(result);
  f(scratch);
  narrow(result, scratch, N);
}

template <class T> void forward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N);
  C *w, *p;
  Arena arena([&](Arena& x) { x.take(w, Np), x.take(p, Np); });
  for (int64_t r = begin; r < end; r++) {
    const C* row = whole((const T*)a.first + r * a.N, w, a.N, Np);
    const C gamma = wide(((const T*)a.parameter)[r]);
    into((T*)a.result + r * a.N, p, a.N, Np, [&](C* to) MC_INLINED { sharpen_row<C, false>(to, nullptr, row, gamma, a.N, Np); });
  }
}

template <class T> void backward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N);
  C *w, *p, *l, *grad;
  Arena arena([&](Arena& x) { x.take(w, Np), x.take(p, Np), x.take(l, Np), x.take(grad, Np); });
  for (int64_t r = begin; r < end; r++) {
    const C* row = whole((const T*)a.first + r * a.N, w, a.N, Np);
    widen_rows(grad, (const T*)a.grad + r * a.N, 1, a.N, Np);
    const C gamma = wide(((const T*)a.parameter)[r]);
    sharpen_row<C, true>(p, l, row, gamma, a.N, Np);
    put((T*)a.dparameter + r, sharpen_backward(grad, p, l, row, gamma, Np));
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
