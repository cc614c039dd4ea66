#include "circular_shift.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

// The usual range, of one slot to either side, is computed from rows in place; others from unrolled copies.
template <class C> MC_INLINE bool in_place(int64_t N, int64_t R) { return R == 1 && N >= Lanes<C>::n + 2; }

// out_i = s_0 w_{i+1} + s_1 w_i + s_2 w_{i-1}, N > L + 1. Vectors may overlap: each slot gets the same sum from any of them. `also` is called with
// the first slot of each vector of the slots in between, the last of which may be shorter.
template <class C, class F> MC_INLINE void shift_in_place(C* out, const C* w, C s0, C s1, C s2, int64_t N, F also) {
  constexpr int L = Lanes<C>::n;
  const Vec<C> v0 = splat(s0), v1 = splat(s1), v2 = splat(s2);
  const auto at = [&](int64_t n) MC_INLINED {
    Vec<C> v = v0 * load(w + n + 1);
    v += v1 * load(w + n);
    v += v2 * load(w + n - 1);
    store(out + n, v);
  };
  out[0] = s0 * w[1] + s1 * w[0] + s2 * w[N - 1];
  int64_t n = 1;
  for (; n + L < N; n += L) at(n), also(n, L);
  if (n < N - 1) at(N - 1 - L), also(n, (int)(N - 1 - n));
  out[N - 1] = s0 * w[0] + s1 * w[N - 1] + s2 * w[N - 2];
}
// dw_i = s_2 d_{i+1} + s_1 d_i + s_0 d_{i-1}; ds_j = sum over i of d_i w_{i + 1 - j}
template <class C> MC_INLINE void shift_backward_in_place(C* dw, C* ds, const C* d, const C* w, const C* s, int64_t N) {
  constexpr int L = Lanes<C>::n;
  Totals<C, 3> t;
  shift_in_place(dw, d, s[2], s[1], s[0], N, [&](int64_t n, int count) MC_INLINED {
    const auto part = [&](const C* p) MC_INLINED { return count < L ? load_part(p, count) : load(p); };
    const Vec<C> g = part(d + n), x[3] = {g * part(w + n + 1), g * part(w + n), g * part(w + n - 1)};
    t.add(x);
  });
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
      shift_in_place(to, row, s[0], s[1], s[2], a.N, [](int64_t, int) {});
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
        shift_backward_in_place(to, ds, grad, row, s, a.N);
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
