// What the kernels of whole recurrences share: their flat parameters, memory that is laid out twice, gradients of the parameters by panels.
// `A` is the arguments' struct, with sizes D(layer), G(), I(), K, F(), O.
#pragma once

#include "weight_gradient.h"

namespace memcore {
namespace MC_ISA {

// The flat parameters: for each layer weight [D, G] and bias [G]; interface weight [I, K] and bias; output weight [O, K + F] and bias.
template <class P, int kLayers> struct Parameters {
  P *weight[kLayers], *bias[kLayers], *interface, *interface_bias, *output, *output_bias;
  template <class A> Parameters(const A& a, P* at) {
    const auto take = [&](int64_t n) {
      P* begin = at;
      at += n;
      return begin;
    };
    for (int64_t l = 0; l < a.layers; l++) weight[l] = take(a.D(l) * a.G()), bias[l] = take(a.G());
    interface = take(a.I() * a.K), interface_bias = take(a.I());
    output = take(a.O * (a.K + a.F())), output_bias = take(a.O);
  }
};

// Lays arrays over memory that is there already.
struct Cursor {
  char* at;
  int64_t used = 0;
  template <class C> void take(C*& p, int64_t n) {
    p = (C*)(at + used);
    used += round_up((n > 0 ? n : 1) * (int64_t)sizeof(C), 64);
  }
};

// A bias, padded to whole vectors.
template <class C> MC_INLINE void pad(C* to, const C* from, int64_t n, int64_t all) {
  copy(to, from, n);
  fill(to + n, all - n, (C)0);
}

template <class F> MC_INLINE void with_wide(DType dtype, F f) {
  if (dtype == DType::f64) f(double{});
  else f(float{});
}

// Weights<C>, packed for the products of one direction: their size, and themselves in a.packed.
template <template <class> class Weights, class A> int64_t packed_numbers(const A& a, bool backward) {
  int64_t numbers = 0;
  with_wide(a.dtype, [&](auto c) {
    Cursor at{nullptr};
    Weights<decltype(c)>().layout(at, a, backward);
    numbers = at.used / (int64_t)sizeof c;
  });
  return numbers;
}
template <template <class> class Weights, class A> void pack(const A& a, bool backward) {
  with_wide(a.dtype, [&](auto c) {
    Cursor at{(char*)a.packed};
    Weights<decltype(c)> weights;
    weights.layout(at, a, backward);
    weights.fill_in(a, backward);
  });
}

// Gradients of the weights that multiply one vector: of the blocks of their rows or, if they are stored the other way round, of their columns.
template <class C> struct Gradient {
  static constexpr int kSources = 3;
  Source<C> source[kSources];
  C* bias;
  const C* deltas;
  int64_t N, ldd;
  bool transposed;

  int64_t panels() const { return (padded<C>(N) + Packed<C>::P - 1) / Packed<C>::P; }
};

// gradients(f) calls f(Gradient<C>) for all parameters; how many panels that is, and the work on one of them.
template <class C, class G> int64_t count_panels(G gradients) {
  int64_t count = 0;
  gradients([&](const Gradient<C>& g) { count += g.panels(); });
  return count;
}
template <class C, class G> void panel_of(G gradients, int64_t panel, int64_t rows) {
  gradients([&](const Gradient<C>& g) {
    if (panel >= 0 && panel < g.panels()) weight_gradient(g.source, g.kSources, g.bias, g.deltas, g.ldd, g.N, panel * Packed<C>::P, rows, g.transposed);
    panel -= g.panels();
  });
}

}  // namespace MC_ISA
}  // namespace memcore
