#include "circular_shift.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

// The usual range, of one slot to either side, is computed from rows in place; others from unrolled copies.
template <class C> MC_INLINE bool in_place(int64_t N, int64_t R) { return R == 1 && N >= Lanes<C>::n + 2; }

// out_i = s_0 w_{i+1} + s_1 w_i + s_2 w_{i-1}, N > L + 1. Vectors may overlap: each slot gets the same sum from any of them.
template <class C> MC_INLINE void shift_in_place(C* out, const C* w, C s0, C s1, C s2, int64_t N) {
  constexpr int L = Lanes<C>::n;
  const Vec<C> v0 = splat(s0), v1 = splat(s1), v2 = splat(s2);
  const auto at = [&](int64_t n) __attribute__((always_inline)) {
    Vec<C> v = v0 * load(w + n + 1);
    v += v1 * load(w + n);
    v += v2 * load(w + n - 1);
    store(out + n, v);
  };
  out[0] = s0 * w[1] + s1 * w[0] + s2 * w[N - 1];
  at(1);
  for (int64_t n = L; n + L < N; n += L) at(n);
  at(N - 1 - L);
  out[N - 1] = s0 * w[0] + s1 * w[N - 1] + s2 * w[N - 2];
}
// ds_j = sum over i of d_i w_{i + 1 - j}
template <class C> MC_INLINE void slopes_in_place(C* ds, const C* d, const C* w, int64_t N) {
  constexpr int L = Lanes<C>::n;
  Totals<C, 3> t;
  int64_t n = 1;
  for (; n + L < N; n += L) {
    const Vec<C> g = load(d + n), x[3] = {g * load(w + n + 1), g * load(w + n), g * load(w + n - 1)};
    t.add(x);
  }
  if (const int part = (int)(N - 1 - n); part > 0) {
    const Vec<C> g = load_part(d + n, part), x[3] = {g * load_part(w + n + 1, part), g * load_part(w + n, part), g * load_part(w + n - 1, part)};
    t.add(x);
  }
  for (int j = 0; j < 3; j++) ds[j] = t.value(j) + (d[0] * w[j == 2 ? N - 1 : 1 - j] + d[N - 1] * w[j == 0 ? 0 : N - j]);
}

template <class T> void forward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  if (a.N == 0) return;
  const int64_t Np = padded<C>(a.N), R = a.S / 2;
  C *w, *s, *ring;
  Arena arena([&](Arena& x) { x.take(w, Np), x.take(s, a.S), x.take(ring, ring_size<C>(Np, R)); });
  for (int64_t r = begin; r < end; r++) {
    widen(s, (const T*)a.parameter + r * a.S, a.S);
    const C* row = widened((const T*)a.first + r * a.N, a.N, w);
    if (in_place<C>(a.N, R)) {
      C* to = ring;
      if constexpr (__is_same(T, C)) to = (T*)a.result + r * a.N;
      shift_in_place(to, row, s[0], s[1], s[2], a.N);
      if constexpr (!__is_same(T, C)) narrow((T*)a.result + r * a.N, to, a.N);
    } else {
      unroll(ring, row, a.N, Np, R);
      shift_row(w, ring, s, a.N, Np, R);
      narrow((T*)a.result + r * a.N, w, a.N);
    }
  }
}

template <class T> void backward(const WeightArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N), R = a.S / 2;
  C *w, *d, *s, *ds, *ring, *dring;
  Arena arena([&](Arena& x) {
    x.take(w, Np), x.take(d, Np), x.take(s, a.S), x.take(ds, a.S), x.take(ring, ring_size<C>(Np, R)), x.take(dring, ring_size<C>(Np, R));
  });
  for (int64_t r = begin; r < end; r++) {
    fill(ds, a.S, (C)0);
    if (a.N > 0) {
      widen(s, (const T*)a.parameter + r * a.S, a.S);
      const C* row = widened((const T*)a.first + r * a.N, a.N, w);
      const C* grad = widened((const T*)a.grad + r * a.N, a.N, d);
      if (in_place<C>(a.N, R)) {
        C* to = ring;
        if constexpr (__is_same(T, C)) to = (T*)a.dfirst + r * a.N;
        shift_in_place(to, grad, s[2], s[1], s[0], a.N);  // the other way round
        slopes_in_place(ds, grad, row, a.N);
        if constexpr (!__is_same(T, C)) narrow((T*)a.dfirst + r * a.N, to, a.N);
      } else {
        unroll(ring, row, a.N, Np, R);
        unroll(dring, grad, a.N, Np, R);
        shift_backward(w, ds, dring, ring, s, a.N, Np, R);
        narrow((T*)a.dfirst + r * a.N, w, a.N);
      }
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
