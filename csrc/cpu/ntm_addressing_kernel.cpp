#include "ntm_addressing.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

template <class T> struct Heads {
  typedef Acc<T> C;
  const AddressingArgs& a;
  const RowSink<T> sink;
  Addressing<C> s;
  int64_t Np, Wp, step;
  C *block, *dw, *dprevious, *own, *key_own, *dkey, *dbeta, *dgate, *dshift, *dgamma, *drows;

  explicit Heads(const AddressingArgs& args) : a(args), sink(args.B * args.N * args.W) {
    s.sizes(a.H, a.N, a.W, a.S / 2);
    Np = s.similar.Np, Wp = s.similar.Wp, step = block_rows<C>(a.W);
  }
  void layout(Arena& x, bool backward) {
    s.layout(x);
    x.take(block, step * a.W);
    if (!backward) return;
    x.take(dw, a.H * Np), x.take(dprevious, a.H * Np), x.take(own, Np), x.take(key_own, a.H), x.take(dkey, a.H * Wp);
    x.take(dbeta, a.H), x.take(dgate, a.H), x.take(dshift, a.H * a.S), x.take(dgamma, a.H), x.take(drows, step * a.W);
  }
  const T* memory(int64_t b) const { return (const T*)a.memory + b * a.memory_stride; }

  template <bool BACKWARD> void address(int64_t b) {
    const int64_t H = a.H;
    widen_rows(s.similar.key, (const T*)a.key + b * H * a.W, H, a.W, Wp);
    widen(s.beta, (const T*)a.strength + b * H, H), widen(s.gate, (const T*)a.gate + b * H, H);
    widen(s.gamma, (const T*)a.gamma + b * H, H), widen(s.shift, (const T*)a.shift + b * H * a.S, H * a.S);
    widen_rows(s.previous, (const T*)a.previous + b * H * a.N, H, a.N, Np);
    s.template forward<BACKWARD>(memory(b), block, a.kept ? (C*)a.kept + b * similar_numbers(H, a.N) : nullptr);
  }

  void forward(int64_t b) {
    address<false>(b);
    narrow_rows((T*)a.weights + b * a.H * a.N, s.weights, a.H, a.N, Np);
  }

  void backward(int64_t b) {
    const int64_t H = a.H;
    address<true>(b);
    widen_rows(dw, (const T*)a.grad + b * H * a.N, H, a.N, Np);
    s.backward(dw, dbeta, dgate, dshift, dgamma, dprevious);
    s.similar.backward(dw, own, key_own);
    fill(dkey, H * Wp, (C)0);
    const Passes<T> passes(a.memory_stride == 0 ? 1 : a.B, a.N, a.W, step, a.kept);
    for (int64_t i = 0; i < a.N; i += step) {
      const int64_t n = passes.second(i), rows = a.N - n < step ? a.N - n : step;
      passes.ask_next(a.memory, b, n, rows);
      passes.ask_after(a.memory, b, n);
      const C* m = widened(memory(b) + n * a.W, rows * a.W, block);
      T* to = (T*)a.dmemory + (b * a.N + n) * a.W;
      similarity_rows_to<T>(sink, to, s.similar, m, n, rows, nullptr, dw, own, dkey, drows);
    }
    for (int64_t h = 0; h < H; h++)
      for (int64_t w = 0; w < a.W; w++) dkey[h * Wp + w] -= key_own[h] * s.similar.key[h * Wp + w];
    narrow_rows((T*)a.dkey + b * H * a.W, dkey, H, a.W, Wp);
    narrow((T*)a.dstrength + b * H, dbeta, H), narrow((T*)a.dgate + b * H, dgate, H), narrow((T*)a.dgamma + b * H, dgamma, H);
    narrow((T*)a.dshift + b * H * a.S, dshift, H * a.S);
    narrow_rows((T*)a.dprevious + b * H * a.N, dprevious, H, a.N, Np);
  }
};

}  // namespace

void ntm_addressing_fwd(const AddressingArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    Heads<decltype(t)> h(a);
    Arena arena([&](Arena& x) { h.layout(x, false); });
    for (int64_t b = begin; b < end; b++) h.forward(b);
  });
}
void ntm_addressing_bwd(const AddressingArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    Heads<decltype(t)> h(a);
    Arena arena([&](Arena& x) { h.layout(x, true); });
    for (int64_t b = begin; b < end; b++) h.backward(b);
  });
}

}  // namespace MC_ISA
}  // namespace memcore
