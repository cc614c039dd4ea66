#include "addressing.h"
#include "content_addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

template <class T> struct Element {
  typedef Acc<T> C;
  const ContentArgs& a;
  Similarity<C> s;
  C *block, *weights, *dweights, *own, *key_own, *dkey, *drows;

  Element(const ContentArgs& args) : a(args) { s.sizes(a.H, a.N, a.W, a.cosine); }
  void layout(Arena& arena, bool backward) {
    s.layout(arena);
    const int64_t rows = block_rows<C>(a.W) * a.W;
    arena.take(block, rows), arena.take(weights, a.H * s.Np);
    if (!backward) return;
    arena.take(dweights, a.H * s.Np), arena.take(own, s.Np), arena.take(key_own, a.H), arena.take(dkey, a.H * s.Wp);
    arena.take(drows, rows);
  }
  const T* memory(int64_t b) const { return (const T*)a.memory + b * a.memory_stride; }
  const bool* mask(int64_t b) const { return a.mask ? a.mask + b * a.N : nullptr; }
  C strength(int64_t b, int64_t h) const { return a.strength ? (C)wide(((const T*)a.strength)[b * a.H + h]) : (C)1; }

  // No usable slot: weights and gradients are 0 whatever key and strength hold.
  bool unusable(int64_t b) const {
    const bool* m = mask(b);
    for (int64_t n = 0; m && n < a.N; n++)
      if (m[n]) return false;
    return m != nullptr;
  }

  void similar(int64_t b, bool backward) {
    widen_rows(s.key, (const T*)a.key + b * a.H * a.W, a.H, a.W, s.Wp);
    if (unusable(b)) fill(s.key, a.H * s.Wp, (C)0);
    C* kept = a.kept ? (C*)a.kept + b * similar_numbers(a.H, a.N) : nullptr;
    if (backward) s.resume(memory(b), mask(b), block, kept);
    else s.forward_kept(memory(b), mask(b), block, kept);
  }
};

template <class T> void forward(const ContentArgs& a, int64_t begin, int64_t end) {
  Element<T> e(a);
  Arena arena([&](Arena& x) { e.layout(x, false); });
  for (int64_t b = begin; b < end; b++) {
    e.similar(b, false);
    for (int64_t h = 0; h < a.H; h++)
      softmax<Acc<T>>(e.weights + h * e.s.Np, e.s.sim + h * e.s.Np, a.N, e.s.Np, e.strength(b, h), e.mask(b));
    narrow_rows((T*)a.weights + b * a.H * a.N, e.weights, a.H, a.N, e.s.Np);
  }
}

template <class T> void backward(const ContentArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  Element<T> e(a);
  Arena arena([&](Arena& x) { e.layout(x, true); });
  const int64_t Np = e.s.Np, Wp = e.s.Wp, step = block_rows<C>(a.W);
  const RowSink<T> sink(a.B * a.N * a.W);
  const Passes<T> passes(a.memory_stride == 0 ? 1 : a.B, a.N, a.W, step, a.kept);
  for (int64_t b = begin; b < end; b++) {
    e.similar(b, true);
    const bool none = e.unusable(b);
    widen_rows(e.dweights, (const T*)a.grad + b * a.H * a.N, a.H, a.N, Np);
    for (int64_t h = 0; h < a.H; h++) {
      const C* sim = e.s.sim + h * Np;
      const C beta = none ? 0 : e.strength(b, h), extreme = softmax<C>(e.weights + h * Np, sim, a.N, Np, beta, e.mask(b));
      const C d = softmax_backward<C>(e.dweights + h * Np, e.weights + h * Np, sim, extreme, Np, beta);
      if (a.strength) put((T*)a.dstrength + b * a.H + h, d);
    }
    e.s.backward(e.dweights, e.own, e.key_own);
    fill(e.dkey, a.H * Wp, (C)0);
    const bool shared = a.coefficients != nullptr;
    for (int64_t i = 0; i < a.N; i += step) {
      const int64_t n = passes.second(i), rows = a.N - n < step ? a.N - n : step;
      passes.ask_next(a.memory, b, n, rows);
      passes.ask_after(a.memory, b, n);
      const C* m = block_of(e.memory(b), n, rows, a.W, e.mask(b), e.block);
      if (shared) {
        similarity_rows<T>(e.s, m, n, rows, nullptr, nullptr, e.dweights, e.own, e.dkey);
        continue;
      }
      T* to = (T*)a.dmemory + (b * a.N + n) * a.W;
      similarity_rows_to<T>(sink, to, e.s, m, n, rows, nullptr, e.dweights, e.own, e.dkey, e.drows);
    }
    for (int64_t h = 0; h < a.H; h++)
      for (int64_t w = 0; w < a.W; w++) e.dkey[h * Wp + w] -= e.key_own[h] * e.s.key[h * Wp + w];
    narrow_rows((T*)a.dkey + b * a.H * a.W, e.dkey, a.H, a.W, Wp);
    if (shared) {
      C* to = (C*)a.coefficients + b * a.coefficient_size();
      std::memcpy(to, e.dweights, (size_t)(a.H * Np) * sizeof(C));
      std::memcpy(to + a.H * Np, e.own, (size_t)Np * sizeof(C));
      std::memcpy(to + (a.H + 1) * Np, e.s.key, (size_t)(a.H * Wp) * sizeof(C));
    }
  }
}

// Rows begin..end of the shared memory's gradient: a sum over the batch in order.
template <class T> void backward_shared(const ContentArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  Similarity<C> s;
  s.sizes(a.H, a.N, a.W, a.cosine);
  const int64_t Np = s.Np, step = block_rows<C>(a.W);
  C *block, *dm;
  Arena arena([&](Arena& x) { x.take(block, step * a.W), x.take(dm, step * a.W); });
  for (int64_t n = begin; n < end; n += step) {
    const int64_t rows = end - n < step ? end - n : step;
    fill(dm, rows * a.W, (C)0);
    for (int64_t b = 0; b < a.B; b++) {
      C* c = (C*)a.coefficients + b * a.coefficient_size();
      s.key = c + (a.H + 1) * Np;
      const C* m = block_of((const T*)a.memory, n, rows, a.W, a.mask ? a.mask + b * a.N : nullptr, block);
      similarity_rows<T>(s, m, n, rows, dm, dm, c, c + a.H * Np, nullptr);
    }
    narrow((T*)a.dmemory + n * a.W, dm, rows * a.W);
  }
}

}  // namespace

void content_addressing_fwd(const ContentArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}
void content_addressing_bwd(const ContentArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}
void content_addressing_bwd_shared(const ContentArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward_shared<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
