// Rows of an LSTM layer: the cell's forward and backward from the layer's sums, gates in the order input, forget, output, candidate.
#pragma once

#include "vec.h"

namespace memcore {
namespace MC_ISA {

// tanh to a few units in the last place: Moshier's odd polynomial (Cephes) near 0, (1 - e^-2|x|) / (1 + e^-2|x|) beyond.
MC_INLINE Vec<float> hyperbolic_tangent(Vec<float> x) {
  const Vec<float> size = x < 0 ? -x : x, e = exp_negative(-2 * size), far = (1 - e) * reciprocal(1 + e), z = x * x;
  const Vec<float> p = (((-5.70498872745e-3f * z + 2.06390887954e-2f) * z - 5.37397155531e-2f) * z + 1.33314422036e-1f) * z - 3.33332819422e-1f;
  return size < 0.625f ? x + x * z * p : x < 0 ? -far : far;
}
MC_INLINE Vec<double> hyperbolic_tangent(Vec<double> x) {
  for (int i = 0; i < Lanes<double>::n; i++) x[i] = __builtin_tanh(x[i]);
  return x;
}

// Sums z [4K] become the gates' values; the cell c and the output h from the cell before. In passes whose turns do not wait for each other.
template <class C> MC_INLINE void lstm_forward(C* z, const C* last, C* c, C* h, int64_t K) {
  constexpr int L = Lanes<C>::n;
  C *keep = z + K, *out = z + 2 * K, *now = z + 3 * K;
  for (int64_t k = 0; k < 3 * K; k += L) {
    const int n = 3 * K - k < L ? (int)(3 * K - k) : L;
    store_n(z + k, sigmoid(load_n(z + k, n)), n);
  }
  for (int64_t k = 0; k < K; k += L) {
    const int n = K - k < L ? (int)(K - k) : L;
    const Vec<C> x = hyperbolic_tangent(load_n(now + k, n));
    store_n(now + k, x, n);
    store_n(c + k, load_n(keep + k, n) * load_n(last + k, n) + load_n(z + k, n) * x, n);
  }
  for (int64_t k = 0; k < K; k += L) {
    const int n = K - k < L ? (int)(K - k) : L;
    store_n(h + k, load_n(out + k, n) * hyperbolic_tangent(load_n(c + k, n)), n);
  }
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
