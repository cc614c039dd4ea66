// Rows of an LSTM layer: the cell's forward and backward from the layer's sums, gates in the order input, forget, output, candidate.
#pragma once

#include "vec.h"

namespace memcore {
namespace MC_ISA {

// tanh to a few units in the last place: Moshier's odd polynomial (Cephes) near 0, (1 - e^-2|x|) / (1 + e^-2|x|) beyond.
template <int n> MC_INLINE void hyperbolic_tangents(Vec<float>* x) {
  Vec<float> size[n], e[n], z[n], p[n];
  each_of<n>([&](int i) MC_INLINED { size[i] = x[i] < 0 ? -x[i] : x[i]; });
  each_of<n>([&](int i) MC_INLINED { e[i] = -2 * size[i]; });
  exp_negatives<n>(e);
  each_of<n>([&](int i) MC_INLINED { e[i] = (1 - e[i]) * reciprocal(1 + e[i]); });
  each_of<n>([&](int i) MC_INLINED { z[i] = x[i] * x[i]; });
  each_of<n>([&](int i) MC_INLINED { p[i] = -5.70498872745e-3f * z[i] + 2.06390887954e-2f; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] * z[i] - 5.37397155531e-2f; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] * z[i] + 1.33314422036e-1f; });
  each_of<n>([&](int i) MC_INLINED { p[i] = p[i] * z[i] - 3.33332819422e-1f; });
  each_of<n>([&](int i) MC_INLINED { x[i] = size[i] < 0.625f ? x[i] + x[i] * z[i] * p[i] : x[i] < 0 ? -e[i] : e[i]; });
}
template <int n> MC_INLINE void hyperbolic_tangents(Vec<double>* x) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < Lanes<double>::n; j++) x[i][j] = __builtin_tanh(x[i][j]);
}
template <class V> MC_INLINE V hyperbolic_tangent(V x) {
  hyperbolic_tangents<1>(&x);
  return x;
}

// f(first, Number<how many vectors>, lanes of the last one) over the K numbers of a row.
template <class C, class F> MC_INLINE void over_row(int64_t K, F f) {
  constexpr int L = Lanes<C>::n;
  abreast<C>(K, [&](int64_t k, auto count) MC_INLINED { f(k, count, L); });
  if (K % L > 0) f(K / L * L, Number<1>{}, (int)(K % L));
}

// Sums z [4K] become the gates' values; the cell c and the output h from the cell before. 
template <class C> MC_INLINE void lstm_forward(C* z, const C* last, C* c, C* h, int64_t K) {
  constexpr int L = Lanes<C>::n;
  C *keep = z + K, *out = z + 2 * K, *now = z + 3 * K;
  over_row<C>(3 * K, [&](int64_t k, auto count, int n) MC_INLINED {
    constexpr int B = count.value;
    Vec<C> x[B];
    each_of<B>([&](int i) MC_INLINED { x[i] = load_n(z + k + i * L, n); });
    sigmoids<B>(x);
    each_of<B>([&](int i) MC_INLINED { store_n(z + k + i * L, x[i], n); });
  });
  over_row<C>(K, [&](int64_t k, auto count, int n) MC_INLINED {
    constexpr int B = count.value;
    Vec<C> x[B];
    each_of<B>([&](int i) MC_INLINED { x[i] = load_n(now + k + i * L, n); });
    hyperbolic_tangents<B>(x);
    each_of<B>([&](int i) MC_INLINED {
      const int64_t j = k + i * L;
      store_n(now + j, x[i], n);
      x[i] = load_n(keep + j, n) * load_n(last + j, n) + load_n(z + j, n) * x[i];
      store_n(c + j, x[i], n);
    });
    hyperbolic_tangents<B>(x);
    each_of<B>([&](int i) MC_INLINED { store_n(h + k + i * L, load_n(out + k + i * L, n) * x[i], n); });
  });
}

// Gradient dz of the sums from those of h and c; dc becomes that of the cell before. z: the gates' values.
template <class C> MC_INLINE void lstm_backward(C* dz, const C* z, const C* last, const C* c, const C* dh, C* dc, int64_t K) {
  constexpr int L = Lanes<C>::n;
  for (int64_t k = 0; k < K; k += L) {
    const int n = K - k < L ? (int)(K - k) : L;
    const Vec<C> g = load_n(dh + k, n);
    const Vec<C> enter = load_n(z + k, n), keep = load_n(z + K + k, n), out = load_n(z + 2 * K + k, n), now = load_n(z + 3 * K + k, n);
    const Vec<C> y = hyperbolic_tangent(load_n(c + k, n)), gc = load_n(dc + k, n) + g * out * (1 - y * y);
    store_n(dz + k, gc * now * enter * (1 - enter), n);
    store_n(dz + K + k, gc * load_n(last + k, n) * keep * (1 - keep), n);
    store_n(dz + 2 * K + k, g * y * out * (1 - out), n);
    store_n(dz + 3 * K + k, gc * enter * (1 - now * now), n);
    store_n(dc + k, gc * keep, n);
  }
}

}  // namespace MC_ISA
}  // namespace memcore
