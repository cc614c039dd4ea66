#include "interpolate.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

template <class T> void forward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N);
  C *content, *previous;
  Arena arena([&](Arena& x) { x.take(content, Np), x.take(previous, Np); });
  for (int64_t r = begin; r < end; r++) {
    widen_rows(content, (const T*)a.first + r * a.N, 1, a.N, Np);
    widen_rows(previous, (const T*)a.second + r * a.N, 1, a.N, Np);
    interpolate_row(content, content, previous, (C)wide(((const T*)a.parameter)[r]), Np);
    narrow((T*)a.result + r * a.N, content, a.N);
  }
}

template <class T> void backward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  constexpr int L = Lanes<C>::n;
  const int64_t Np = padded<C>(a.N);
  C *content, *previous, *grad;
  Arena arena([&](Arena& x) { x.take(content, Np), x.take(previous, Np), x.take(grad, Np); });
  for (int64_t r = begin; r < end; r++) {
    widen_rows(content, (const T*)a.first + r * a.N, 1, a.N, Np);
    widen_rows(previous, (const T*)a.second + r * a.N, 1, a.N, Np);
    widen_rows(grad, (const T*)a.grad + r * a.N, 1, a.N, Np);
    const C gate = wide(((const T*)a.parameter)[r]);
    Total<C> t;
    for (int64_t n = 0; n < Np; n += L) {
      const Vec<C> d = load(grad + n);
      t.add(d * (load(content + n) - load(previous + n)));
      store(content + n, gate * d);
      store(previous + n, (1 - gate) * d);
    }
    narrow((T*)a.dfirst + r * a.N, content, a.N);
    narrow((T*)a.dsecond + r * a.N, previous, a.N);
    put((T*)a.dparameter + r, t.value());
  }
}

}  // namespace

void interpolate_fwd(const WeightArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}
void interpolate_bwd(const WeightArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
