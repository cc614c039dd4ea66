#include "erase_add_write.h"

#include "addressing.h"

namespace memcore {
namespace MC_ISA {
namespace {

template <class T> void forward(const WriteArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N), Wp = padded<C>(a.W), step = block_rows<C>(a.W);
  C *w, *e, *v, *block;
  Arena arena([&](Arena& x) { x.take(w, a.H * Np), x.take(e, a.H * Wp), x.take(v, a.H * Wp), x.take(block, step * a.W); });
  const RowSource<T> source(a.B * a.N * a.W);
  const RowSink<T> sink(a.B * a.N * a.W);
  for (int64_t b = begin; b < end; b++) {
    widen_rows(w, (const T*)a.weights + b * a.H * a.N, a.H, a.N, Np);
    widen_rows(e, (const T*)a.erase + b * a.H * a.W, a.H, a.W, Wp);
    widen_rows(v, (const T*)a.add + b * a.H * a.W, a.H, a.W, Wp);
    for (int64_t n = 0; n < a.N; n += step) {
      const int64_t rows = a.N - n < step ? a.N - n : step;
      const C* m = source.take((const T*)a.memory + (b * a.N + n) * a.W, rows * a.W, block);
      T* to = (T*)a.written + (b * a.N + n) * a.W;
      if constexpr (__is_same(T, C))
        if (a.H > 0 && a.H <= kFewHeads && sink.streams(to, a.W)) {
          erase_add_stream(to, m, rows, a.W, w + n, Np, a.H, e, v, Wp);
          continue;
        }
      C* out = sink.place(to, block);
      erase_add(out, a.W, m, a.W, rows, a.W, w + n, Np, a.H, e, v, Wp);
      sink.finish(to, out, rows * a.W);
    }
  }
}

template <class T> void backward(const WriteArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t Np = padded<C>(a.N), Wp = padded<C>(a.W), step = block_rows<C>(a.W);
  C *w, *e, *v, *dw, *de, *dv, *block, *grad, *scratch;
  Arena arena([&](Arena& x) {
    x.take(w, a.H * Np), x.take(e, a.H * Wp), x.take(v, a.H * Wp);
    x.take(dw, a.H * Np), x.take(de, a.H * Wp), x.take(dv, a.H * Wp);
    x.take(block, step * a.W), x.take(grad, step * a.W), x.take(scratch, (2 * a.H + 1) * Lanes<C>::n);
  });
  const RowSink<T> sink(a.B * a.N * a.W);
  for (int64_t b = begin; b < end; b++) {
    widen_rows(w, (const T*)a.weights + b * a.H * a.N, a.H, a.N, Np);
    widen_rows(e, (const T*)a.erase + b * a.H * a.W, a.H, a.W, Wp);
    widen_rows(v, (const T*)a.add + b * a.H * a.W, a.H, a.W, Wp);
    fill(dw, a.H * Np, (C)0), fill(de, a.H * Wp, (C)0), fill(dv, a.H * Wp, (C)0);
    for (int64_t n = 0; n < a.N; n += step) {
      const int64_t rows = a.N - n < step ? a.N - n : step;
      const C* m = widened((const T*)a.memory + (b * a.N + n) * a.W, rows * a.W, block);
      const C* g = widened((const T*)a.grad + (b * a.N + n) * a.W, rows * a.W, grad);
      T* to = (T*)a.dmemory + (b * a.N + n) * a.W;
      if constexpr (__is_same(T, C))
        if (a.H > 0 && a.H <= kFewHeads && sink.streams(to, a.W)) {
          erase_add_backward_few<true>(to, g, m, rows, a.W, w + n, Np, a.H, e, v, Wp, dw + n, Np, de, dv);
          continue;
        }
      C* dm = sink.place(to, grad);
      if (a.H == 0) scatter(dm, a.W, g, a.W, rows, a.W, w, Np, 0, v, Wp);
      else erase_add_backward(dm, g, m, rows, a.W, w + n, Np, a.H, e, v, Wp, dw + n, Np, de, dv, scratch);
      sink.finish(to, dm, rows * a.W);
    }
    narrow_rows((T*)a.dweights + b * a.H * a.N, dw, a.H, a.N, Np);
    narrow_rows((T*)a.derase + b * a.H * a.W, de, a.H, a.W, Wp);
    narrow_rows((T*)a.dadd + b * a.H * a.W, dv, a.H, a.W, Wp);
  }
}

}  // namespace

void erase_add_write_fwd(const WriteArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { forward<decltype(t)>(a, begin, end); });
}
void erase_add_write_bwd(const WriteArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { backward<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
