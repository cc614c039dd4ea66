#include "circular_shift.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

template <class T> void forward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  if (a.N == 0) return;
  const int64_t Np = padded<C>(a.N), R = a.S / 2;
  C *w, *s, *ring;
  Arena arena([&](Arena& x) { x.take(w, Np), x.take(s, a.S), x.take(ring, ring_size<C>(Np, R)); });
  for (int64_t r = begin; r < end; r++) {
    widen(w, (const T*)a.first + r * a.N, a.N);
    widen(s, (const T*)a.parameter + r * a.S, a.S);
    unroll(ring, w, a.N, Np, R);
    shift_row(w, ring, s, a.N, Np, R);
    narrow((T*)a.result + r * a.N, w, a.N);
  }
}

template <class T> void backward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N), R = a.S / 2;
  C *w, *s, *ds, *ring, *dring;
  Arena arena([&](Arena& x) {
    x.take(w, Np), x.take(s, a.S), x.take(ds, a.S), x.take(ring, ring_size<C>(Np, R)), x.take(dring, ring_size<C>(Np, R));
  });
  for (int64_t r = begin; r < end; r++) {
    fill(ds, a.S, (C)0);
    if (a.N > 0) {
      widen(s, (const T*)a.parameter + r * a.S, a.S);
      widen(w, (const T*)a.first + r * a.N, a.N);
      unroll(ring, w, a.N, Np, R);
      widen(w, (const T*)a.grad + r * a.N, a.N);
      unroll(dring, w, a.N, Np, R);
      shift_backward(w, ds, dring, ring, s, a.N, Np, R);
      narrow((T*)a.dfirst + r * a.N, w, a.N);
    }
    narrow((T*)a.dparameter + r * a.S, ds, a.S);
  }
}

}  // namespace

void circular_shift_fwd(const WeightArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}
void circular_shift_bwd(const WeightArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
