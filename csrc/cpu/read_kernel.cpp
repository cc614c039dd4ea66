#include "read.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

template <class T> void forward(const ReadArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N), Wp = padded<C>(a.W), step = block_rows<C>(a.W);
  C *w, *r, *block;
  Arena arena([&](Arena& x) { x.take(w, a.H * Np), x.take(r, a.H * Wp), x.take(block, step * a.W); });
  const RowSource<T> source((a.memory_stride == 0 ? 1 : a.B) * a.N * a.W);
  for (int64_t b = begin; b < end; b++) {
    widen_rows(w, (const T*)a.weights + b * a.H * a.N, a.H, a.N, Np);
    fill(r, a.H * Wp, (C)0);
    for (int64_t n = 0; n < a.N; n += step) {
      const int64_t rows = a.N - n < step ? a.N - n : step;
      gather(source.take((const T*)a.memory + b * a.memory_stride + n * a.W, rows * a.W, block), a.W, rows, a.W, w + n, Np, a.H, r, Wp);
    }
    narrow_rows((T*)a.reads + b * a.H * a.W, r, a.H, a.W, Wp);
  }
}

template <class T> void backward(const ReadArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N), Wp = padded<C>(a.W), step = block_rows<C>(a.W);
  C *w, *dw, *g, *block, *next;
  Arena arena([&](Arena& x) {
    x.take(w, a.H * Np), x.take(dw, a.H * Np), x.take(g, a.H * Wp), x.take(block, step * a.W), x.take(next, step * a.W);
  });
  const RowSink<T> sink(a.B * a.N * a.W);
  for (int64_t b = begin; b < end; b++) {
    widen_rows(w, (const T*)a.weights + b * a.H * a.N, a.H, a.N, Np);
    widen_rows(g, (const T*)a.grad + b * a.H * a.W, a.H, a.W, Wp);
    for (int64_t n = 0; n < a.N; n += step) {
      const int64_t rows = a.N - n < step ? a.N - n : step;
      const C* m = widened((const T*)a.memory + b * a.memory_stride + n * a.W, rows * a.W, block);
      dots(m, a.W, rows, a.W, g, Wp, a.H, dw + n, Np, (C*)nullptr);
      if (a.memory_stride == 0) continue;
      T* to = (T*)a.dmemory + (b * a.N + n) * a.W;
      if constexpr (__is_same(T, C))
        if (a.H > 0 && a.H <= kFewHeads && sink.streams(to, a.W)) {
          scatter_stream(to, (const C*)nullptr, rows, a.W, w + n, Np, a.H, g, Wp);
          continue;
        }
      C* dm = sink.place(to, next);
      scatter(dm, a.W, (const C*)nullptr, a.W, rows, a.W, w + n, Np, a.H, g, Wp);
      sink.finish(to, dm, rows * a.W);
    }
    narrow_rows((T*)a.dweights + b * a.H * a.N, dw, a.H, a.N, Np);
  }
}

// Rows begin..end of the shared memory's gradient: a sum over the batch in order.
template <class T> void backward_shared(const ReadArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Wp = padded<C>(a.W), step = block_rows<C>(a.W);
  C *w, *g, *dm;
  Arena arena([&](Arena& x) { x.take(w, a.H * step), x.take(g, a.H * Wp), x.take(dm, step * a.W); });
  for (int64_t n = begin; n < end; n += step) {
    const int64_t rows = end - n < step ? end - n : step;
    fill(dm, rows * a.W, (C)0);
    for (int64_t b = 0; b < a.B; b++) {
      for (int64_t h = 0; h < a.H; h++) widen(w + h * step, (const T*)a.weights + (b * a.H + h) * a.N + n, rows);
      widen_rows(g, (const T*)a.grad + b * a.H * a.W, a.H, a.W, Wp);
      scatter(dm, a.W, dm, a.W, rows, a.W, w, step, a.H, g, Wp);
    }
    narrow((T*)a.dmemory + n * a.W, dm, rows * a.W);
  }
}

}  // namespace

void read_fwd(const ReadArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}
void read_bwd(const ReadArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}
void read_bwd_shared(const ReadArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward_shared<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
