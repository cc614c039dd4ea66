// The interface vector of one batch element: where each head's numbers lie, their activations and derivatives.
#pragma once

#include "addressing.h"

namespace memcore {
namespace MC_ISA {

struct InterfaceLayout {
  int64_t R, Hw, W, range;  // read heads, write heads, slot width, shift range
  int64_t heads() const { return R + Hw; }
  int64_t shifts() const { return 2 * range + 1; }
  int64_t head_size() const { return W + 3 + shifts(); }
  int64_t size() const { return heads() * head_size() + 2 * Hw * W; }
  // Offset of head h: key, strength, gate, shift, gamma; write heads go on with erase, add.
  int64_t head(int64_t h) const { return h < R ? h * head_size() : R * head_size() + (h - R) * (head_size() + 2 * W); }
  int64_t strength(int64_t h) const { return head(h) + W; }
  int64_t gate(int64_t h) const { return head(h) + W + 1; }
  int64_t shift(int64_t h) const { return head(h) + W + 2; }
  int64_t gamma(int64_t h) const { return head(h) + W + 2 + shifts(); }
  int64_t erase(int64_t i) const { return head(R + i) + head_size(); }
  int64_t add(int64_t i) const { return erase(i) + W; }
};

// The activated pieces: key [H, Wp], strength, gate, gamma [H], shift [H, S], erase, add [Hw, Wp]. Padding is 0.
template <class C> struct Pieces {
  C *key, *strength, *gate, *shift, *gamma, *erase, *add;
  C *scalars, *exponential, *logistic;  // of strengths, gammas, gates and shifts, on their way

  void layout(Arena& a, const InterfaceLayout& l) {
    const int64_t H = l.heads(), Wp = padded<C>(l.W);
    a.take(key, H * Wp), a.take(strength, H), a.take(gate, H), a.take(gamma, H), a.take(shift, H * l.shifts());
    a.take(erase, l.Hw * Wp), a.take(add, l.Hw * Wp);
    const int64_t count = padded<C>((3 + l.shifts()) * H);
    a.take(scalars, count), a.take(exponential, count), a.take(logistic, count);
  }
};

// put(i, f(get(i))) for n scalars from anywhere, a vector of them at a time.
template <class C, class G, class F, class P> MC_INLINE void map_scalars(int64_t n, G get, F f, P put) {
  constexpr int L = Lanes<C>::n;
  for (int64_t first = 0; first < n; first += L) {
    const int64_t k = n - first < L ? n - first : L;
    C t[L] = {};
    for (int64_t i = 0; i < k; i++) t[i] = get(first + i);
    store(t, f(load(t)));
    for (int64_t i = 0; i < k; i++) put(first + i, t[i]);
  }
}

// x [I] in C.
template <class C> inline void activate(const Pieces<C>& p, const C* x, const InterfaceLayout& l) {
  constexpr int L = Lanes<C>::n;
  const int64_t S = l.shifts(), W = l.W, Wp = padded<C>(W), H = l.heads();
  // Strengths, gammas, gates and shifts share their exponentials.
  const int64_t count = (3 + S) * H;
  for (int64_t h = 0; h < H; h++) {
    C *key = p.key + h * Wp, *e = p.scalars + 3 * H + h * S;
    copy(key, x + l.head(h), W);
    fill(key + W, Wp - W, (C)0);
    p.scalars[h] = x[l.strength(h)], p.scalars[H + h] = x[l.gamma(h)], p.scalars[2 * H + h] = x[l.gate(h)];
    const C* s = x + l.shift(h);
    C top = s[0];
    for (int64_t j = 1; j < S; j++) top = s[j] > top || s[j] != s[j] ? s[j] : top;
    for (int64_t j = 0; j < S; j++) e[j] = s[j] - top;
  }
  fill(p.scalars + count, padded<C>(count) - count, (C)0);
  for (int64_t i = 0; i < count; i += L) {
    const Vec<C> v = load(p.scalars + i), e = exp_negative(v < 0 ? v : -v), s = reciprocal(1 + e);
    store(p.exponential + i, e);
    if (i < 3 * H) store(p.logistic + i, v < 0 ? e * s : s);
    if (i < 2 * H) store(p.scalars + i, (v < 0 ? Vec<C>{} : v) + log1p_unit(e));
  }
  for (int64_t h = 0; h < H; h++) {
    p.strength[h] = p.scalars[h], p.gamma[h] = 1 + p.scalars[H + h], p.gate[h] = p.logistic[2 * H + h];
    const C* e = p.exponential + 3 * H + h * S;
    C total = 0;
    for (int64_t j = 0; j < S; j++) total += e[j];
    total = 1 / total;
    for (int64_t j = 0; j < S; j++) p.shift[h * S + j] = e[j] * total;
  }
  for (int64_t i = 0; i < l.Hw; i++) {
    for (int64_t w = 0; w < Wp; w += L) {
      const int part = W - w < L ? (int)(W - w) : L;
      const Vec<C> e = sigmoid(load_n(x + l.erase(i) + w, part));
      store(p.erase + i * Wp + w, first<C>(e, part));
      store(p.add + i * Wp + w, load_n(x + l.add(i) + w, part));
    }
  }
}

// dx [I] from the gradients of the pieces, which lie like the pieces.
template <class C> inline void activate_backward(C* dx, const C* x, const Pieces<C>& p, const Pieces<C>& d, const InterfaceLayout& l) {
  const int64_t S = l.shifts(), W = l.W, Wp = padded<C>(W), H = l.heads();
  const auto at = [&](int64_t i) { return i < H ? l.strength(i) : l.gamma(i - H); };
  map_scalars<C>(  // the derivative of softplus
      2 * H, [&](int64_t i) { return x[at(i)]; }, [](Vec<C> v) { return sigmoid(v); },
      [&](int64_t i, C y) { dx[at(i)] = y * (i < H ? d.strength[i] : d.gamma[i - H]); });
  for (int64_t h = 0; h < H; h++) {
    std::memcpy(dx + l.head(h), d.key + h * Wp, (size_t)W * sizeof(C));
    dx[l.gate(h)] = d.gate[h] * p.gate[h] * (1 - p.gate[h]);
    C mean = 0;
    for (int64_t j = 0; j < S; j++) mean += p.shift[h * S + j] * d.shift[h * S + j];
    for (int64_t j = 0; j < S; j++) dx[l.shift(h) + j] = p.shift[h * S + j] * (d.shift[h * S + j] - mean);
  }
  for (int64_t i = 0; i < l.Hw; i++)
    for (int64_t w = 0; w < W; w++) {
      const C e = p.erase[i * Wp + w];
      dx[l.erase(i) + w] = d.erase[i * Wp + w] * e * (1 - e);
      dx[l.add(i) + w] = d.add[i * Wp + w];
    }
}

}  // namespace MC_ISA
}  // namespace memcore
