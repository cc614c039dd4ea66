#include "lrua_write.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

// The least-used slot: lowest index on a tie, NaN counts as most used.
template <class T> int64_t least(const T* usage, int64_t N) {
  int64_t at = 0;
  Acc<T> best = N > 0 ? wide(usage[0]) : 0;
  for (int64_t n = 1; n < N; n++) {
    const Acc<T> u = wide(usage[n]);
    if (u < best || (best != best && u == u)) best = u, at = n;
  }
  return at;
}

template <class T> struct Write {
  typedef Acc<T> C;
  static constexpr int L = Lanes<C>::n;

  const LruaArgs& a;
  const RowSource<T> source;
  const RowSink<T> sink;
  int64_t Np, Wp, step;
  C *word, *weights, *previous, *dweights, *dword, *block, *next;

  explicit Write(const LruaArgs& args) : a(args), source(args.B * args.N * args.W), sink(args.B * args.N * args.W), Np(padded<C>(args.N)), Wp(padded<C>(args.W)), step(block_rows<C>(args.W)) {}
  void layout(Arena& arena) {
    arena.take(word, a.H * Wp), arena.take(weights, a.H * Np), arena.take(previous, a.H * Np);
    arena.take(dweights, a.H * Np), arena.take(dword, a.H * Wp), arena.take(block, step * a.W), arena.take(next, step * (a.W > a.H ? a.W : a.H));
  }
  C gate(int64_t b, int64_t h) const { return wide(((const T*)a.gate)[b * a.H + h]); }

  int64_t address(int64_t b) {
    const int64_t at = least((const T*)a.usage + b * a.N, a.N);
    widen_rows(word, (const T*)a.word + b * a.H * a.W, a.H, a.W, Wp);
    widen_rows(previous, (const T*)a.previous + b * a.H * a.N, a.H, a.N, Np);
    for (int64_t h = 0; h < a.H && a.N > 0; h++) {
      const C g = gate(b, h), keep = 1 - g;
      // The slots that are not the least used get keep * 0 too: a gate that is not finite shows.
      for (int64_t n = 0; n < Np; n += L) store(weights + h * Np + n, g * load(previous + h * Np + n) + keep * 0);
      weights[h * Np + at] = g * previous[h * Np + at] + keep;
    }
    return at;
  }

  void forward(int64_t b) {
    const int64_t at = address(b);
    narrow_rows((T*)a.weights + b * a.H * a.N, weights, a.H, a.N, Np);
    for (int64_t n = 0; n < a.N; n += step) {
      const int64_t rows = a.N - n < step ? a.N - n : step;
      const C* m = source.take((const T*)a.memory + (b * a.N + n) * a.W, rows * a.W, block);
      T* to = (T*)a.written + (b * a.N + n) * a.W;
      if constexpr (__is_same(T, C))
        if (a.H > 0 && a.H <= kFewHeads && sink.streams(to, a.W)) {
          const auto write = [&](int64_t from, int64_t until, bool zero) MC_INLINED {
            if (from < until) scatter_stream(to + from * a.W, zero ? nullptr : m + from * a.W, until - from, a.W, weights + n + from, Np, a.H, word, Wp);
          };
          const int64_t zeroed = a.zero && at >= n && at < n + rows ? at - n : rows;  // whose old row counts as zeros
          write(0, zeroed, false);
          if (zeroed < rows) write(zeroed, zeroed + 1, true), write(zeroed + 1, rows, false);
          continue;
        }
      C* out = sink.place(to, next);
      scatter(out, a.W, m, a.W, rows, a.W, weights + n, Np, a.H, word, Wp);
      if (a.zero && at >= n && at < n + rows) scatter(out + (at - n) * a.W, a.W, (const C*)nullptr, a.W, 1, a.W, weights + at, Np, a.H, word, Wp);
      sink.finish(to, out, rows * a.W);
    }
  }

  void backward(int64_t b) {
    const int64_t at = address(b);
    if (a.grad_weights) widen_rows(dweights, (const T*)a.grad_weights + b * a.H * a.N, a.H, a.N, Np);
    else fill(dweights, a.H * Np, (C)0);
    fill(dword, a.H * Wp, (C)0);
    T* dmemory = (T*)a.dmemory + b * a.N * a.W;
    for (int64_t n = 0; n < a.N; n += step) {
      const int64_t rows = a.N - n < step ? a.N - n : step;
      if (!a.grad_written) {
        clear(dmemory + n * a.W, rows * a.W);
        continue;
      }
      const T* from = (const T*)a.grad_written + (b * a.N + n) * a.W;
      const C* g = source.take(from, rows * a.W, block);
      dots(g, a.W, rows, a.W, word, Wp, a.H, next, rows, (C*)nullptr);
      for (int64_t h = 0; h < a.H; h++)
        for (int64_t i = 0; i < rows; i++) dweights[h * Np + n + i] += next[h * rows + i];
      gather(g, a.W, rows, a.W, weights + n, Np, a.H, dword, Wp);
      copy(dmemory + n * a.W, from, rows * a.W);
      if (a.zero && at >= n && at < n + rows) clear(dmemory + at * a.W, a.W);
    }
    narrow_rows((T*)a.dword + b * a.H * a.W, dword, a.H, a.W, Wp);
    for (int64_t h = 0; h < a.H; h++) {
      const C g = gate(b, h);
      const C chosen = a.N > 0 ? dweights[h * Np + at] : 0;
      Total<C> t;
      for (int64_t n = 0; n < Np; n += L) {
        const Vec<C> d = load(dweights + h * Np + n);
        t.add(d * load(previous + h * Np + n));
        store(dweights + h * Np + n, g * d);
      }
      put((T*)a.dgate + b * a.H + h, t.value() - chosen);
    }
    narrow_rows((T*)a.dprevious + b * a.H * a.N, dweights, a.H, a.N, Np);
  }
};

}  // namespace

void lrua_write_fwd(const LruaArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    Write<decltype(t)> w(a);
    Arena arena([&](Arena& x) { w.layout(x); });
    for (int64_t b = begin; b < end; b++) w.forward(b);
  });
}
void lrua_write_bwd(const LruaArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    Write<decltype(t)> w(a);
    Arena arena([&](Arena& x) { w.layout(x); });
    for (int64_t b = begin; b < end; b++) w.backward(b);
  });
}

}  // namespace MC_ISA
}  // namespace memcore
