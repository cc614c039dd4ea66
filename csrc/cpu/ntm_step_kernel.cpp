#include "ntm_step.h"

#include "interface.h"

namespace memcore {
namespace MC_ISA {
namespace {

// One batch element's step. The backward has the forward's inputs and, where they are few beside the memory, its similarities: it computes the rest
// of the addressing again.
template <class T> struct Step {
  typedef Acc<T> C;
  static constexpr int L = Lanes<C>::n;

  const StepArgs& a;
  const RowSink<T> sink;
  const Passes<T> passes;
  InterfaceLayout l;
  Addressing<C> s;
  Pieces<C> p, d;
  int64_t H, I, Np, Wp, step;
  bool fused;
  const bool asks = !reads_ahead();  // for rows and what they are written to
  C *x, *dx, *reads, *block, *next;
  C *dw, *dprevious, *own, *key_own, *dreads, *grad, *found, *drows, *scratch;

  explicit Step(const StepArgs& args) : a(args), sink(args.B * args.N * args.W), passes(args.B, args.N, args.W, block_rows<C>(args.W), args.kept && args.dmemory), l{args.R, args.Hw, args.W, args.range} {
    H = l.heads(), I = l.size();
    s.sizes(H, a.N, a.W, a.range);
    Np = s.similar.Np, Wp = s.similar.Wp, step = passes.step;
    fused = a.write_first && a.Hw == 1 && a.R > 0 && a.R <= kFusedReads;
  }
  void layout(Arena& arena, bool backward) {
    s.layout(arena);
    p.layout(arena, l);
    p.key = s.similar.key, p.strength = s.beta, p.gate = s.gate, p.shift = s.shift, p.gamma = s.gamma;
    arena.take(x, I), arena.take(reads, a.R * Wp), arena.take(block, step * a.W), arena.take(next, step * a.W);
    if (!backward) return;
    d.layout(arena, l);
    arena.take(dx, I), arena.take(dw, H * Np), arena.take(dprevious, H * Np), arena.take(own, Np), arena.take(key_own, H);
    arena.take(dreads, a.R * Wp), arena.take(grad, step * a.W), arena.take(found, a.R * step);
    arena.take(drows, sink.direct() ? 0 : a.N * a.W), arena.take(scratch, (2 * a.Hw + 1) * L);
  }

  const T* memory(int64_t b) const { return (const T*)a.memory + b * a.N * a.W; }

  template <bool BACKWARD> void address(int64_t b) {
    widen(x, (const T*)a.interface + b * I, I);
    activate(p, x, l);
    widen_rows(s.previous, (const T*)a.previous + b * H * a.N, H, a.N, Np);
    s.template forward<BACKWARD>(memory(b), block, a.kept ? (C*)a.kept + b * similar_numbers(H, a.N) : nullptr);
  }

  void forward(int64_t b) {
    address<false>(b);
    narrow_rows((T*)a.weights + b * H * a.N, s.weights, H, a.N, Np);
    fill(reads, a.R * Wp, (C)0);
    for (int64_t i = 0; i < a.N; i += step) {
      const int64_t n = passes.second(i);
      const int64_t rows = a.N - n < step ? a.N - n : step;
      if (asks) passes.ask_next(a.memory, b, n, rows);
      const C* m = widened(memory(b) + n * a.W, rows * a.W, block);
      T* to = (T*)a.written + (b * a.N + n) * a.W;
      if constexpr (__is_same(T, C))
        if (fused && sink.streams(to, a.W)) {  // `next` holds sums of kFusedReads heads: a block has as many rows
          write_read_stream(to, m, rows, a.W, s.weights + a.R * Np + n, p.erase, p.add, s.weights + n, Np, a.R, reads, Wp, next);
          continue;
        }
      C* out = sink.place(to, next);
      if (asks && sink.direct() && passes.after(n) >= 0) prefetch<true>(to + (passes.after(n) - n) * a.W, step * a.W * (int64_t)sizeof(T));
      if (fused) {
        write_read(out, m, rows, a.W, s.weights + a.R * Np + n, p.erase, p.add, s.weights + n, Np, a.R, reads, Wp);
        sink.finish(to, out, rows * a.W);
        continue;
      }
      if (!a.write_first) gather(m, a.W, rows, a.W, s.weights + n, Np, a.R, reads, Wp);
      erase_add(out, a.W, m, a.W, rows, a.W, s.weights + a.R * Np + n, Np, a.Hw, p.erase, p.add, Wp);
      if (a.write_first) gather(out, a.W, rows, a.W, s.weights + n, Np, a.R, reads, Wp);
      sink.finish(to, out, rows * a.W);
    }
    narrow_rows((T*)a.reads + b * a.R * a.W, reads, a.R, a.W, Wp);
  }

  void backward(int64_t b) {
    if (asks && passes.ahead && a.grad_written) fetch((const T*)a.grad_written + b * a.N * a.W, a.N * a.W * (int64_t)sizeof(T));
    address<true>(b);
    if (a.grad_weights) widen_rows(dw, (const T*)a.grad_weights + b * H * a.N, H, a.N, Np);
    else fill(dw, H * Np, (C)0);
    const bool reading = a.grad_reads && a.R > 0;
    if (reading) widen_rows(dreads, (const T*)a.grad_reads + b * a.R * a.W, a.R, a.W, Wp);
    fill(d.erase, a.Hw * Wp, (C)0), fill(d.add, a.Hw * Wp, (C)0), fill(d.key, H * Wp, (C)0);
    T* dmemory = (T*)a.dmemory + b * a.N * a.W;
    const C *wr = s.weights, *ww = s.weights + a.R * Np;
    C *dwr = dw, *dww = dw + a.R * Np;
    C* grown = sink.place(dmemory, drows);  // the memory's gradient grows over two passes

    // Write and reads: dmemory leaves this pass without the addressing's share.
    for (int64_t i = 0; i < a.N; i += step) {
      const int64_t n = passes.second(i);
      const int64_t rows = a.N - n < step ? a.N - n : step;
      const C* m = widened(memory(b) + n * a.W, rows * a.W, block);
      passes.ask_after(a.memory, b, n);
      C* dm = grown + n * a.W;
      if (asks && passes.after(n) >= 0) prefetch<true>(grown + passes.after(n) * a.W, step * a.W * (int64_t)sizeof(C));
      const C* g = nullptr;
      if (asks && a.grad_written && passes.after(n) >= 0)
        prefetch<false>((const T*)a.grad_written + (b * a.N + passes.after(n)) * a.W, step * a.W * (int64_t)sizeof(T));
      if (a.grad_written) g = widened((const T*)a.grad_written + (b * a.N + n) * a.W, rows * a.W, grad);
      if (fused && reading && g) {
        write_read_backward(
            dm, g, m, rows, a.W, ww + n, p.erase, p.add, wr + n, Np, a.R, dreads, Wp, dwr + n, dww + n, d.erase, d.add);
        continue;
      }
      if (reading) {
        const C* seen = m;
        if (a.write_first && a.Hw > 0) {
          erase_add(next, a.W, m, a.W, rows, a.W, ww + n, Np, a.Hw, p.erase, p.add, Wp);
          seen = next;
        }
        dots(seen, a.W, rows, a.W, dreads, Wp, a.R, found, step, (C*)nullptr);
        for (int64_t r = 0; r < a.R; r++)
          for (int64_t i = 0; i < rows; i++) dwr[r * Np + n + i] += found[r * step + i];
        if (a.write_first) {
          scatter(dm, a.W, g, a.W, rows, a.W, wr + n, Np, a.R, dreads, Wp);
          g = dm;
        }
      }
      if (!g) {
        fill(dm, rows * a.W, (C)0);
        g = dm;
      }
      if (a.Hw > 0)
        erase_add_backward(
            dm, g, m, rows, a.W, ww + n, Np, a.Hw, p.erase, p.add, Wp, dww + n, Np, d.erase, d.add, scratch);
      else if (g != dm) copy(dm, g, rows * a.W);
      if (reading && !a.write_first) scatter(dm, a.W, dm, a.W, rows, a.W, wr + n, Np, a.R, dreads, Wp);
    }

    s.backward(dw, d.strength, d.gate, d.shift, d.gamma, dprevious);
    s.similar.backward(dw, own, key_own);
    for (int64_t i = 0; i < a.N; i += step) {
      const int64_t n = passes.third(i), rows = a.N - n < step ? a.N - n : step;
      const C* m = widened(memory(b) + n * a.W, rows * a.W, block);
      if (asks) passes.ask_next(a.memory, b, n, rows);
      if (asks && a.grad_written) passes.ask_next(a.grad_written, b, n, rows);
      similarity_rows_to<T>(sink, dmemory + n * a.W, s.similar, m, n, rows, grown + n * a.W, dw, own, d.key, next);
    }
    for (int64_t h = 0; h < H; h++)
      for (int64_t w = 0; w < a.W; w++) d.key[h * Wp + w] -= key_own[h] * p.key[h * Wp + w];
    activate_backward(dx, x, p, d, l);
    narrow((T*)a.dinterface + b * I, dx, I);
    narrow_rows((T*)a.dprevious + b * H * a.N, dprevious, H, a.N, Np);
  }
};

}  // namespace

void ntm_step_fwd(const StepArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    Step<decltype(t)> s(a);
    Arena arena([&](Arena& x) { s.layout(x, false); });
    for (int64_t b = begin; b < end; b++) s.forward(b);
  });
}
void ntm_step_bwd(const StepArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    Step<decltype(t)> s(a);
    Arena arena([&](Arena& x) { s.layout(x, true); });
    for (int64_t b = begin; b < end; b++) s.backward(b);
  });
}

}  // namespace MC_ISA
}  // namespace memcore
