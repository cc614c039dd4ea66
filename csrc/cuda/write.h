// Erase/add writes and reads on the rows of one batch element, in float32.
#pragma once

#include "block.h"

namespace memcore {
namespace cuda {

// Hw write heads and R read heads over N slots of width W.
struct Writes {
  int N, W, Hw, R;
  const float *erase, *add;      // [Hw, W]
  const float *weights, *reads;  // [Hw, N] of the write heads, [R, N] of the read heads

  __device__ float read(int r, int n) const { return r < R ? reads[r * N + n] : 0; }
};

__device__ inline void erase_from(Numbers& x, float c, const Numbers& erase) {
#pragma unroll
  for (int j = 0; j < kSpan; j++) x.v[j] *= 1 - c * erase.v[j];
}

// What the write heads do to a thread's columns. The first head's vectors are in registers.
struct Written {
  const Writes& a;
  const Span& span;
  Numbers first_erase, first_add;

  __device__ Written(const Writes& a, const Span& span) : a(a), span(span), first_erase{}, first_add{} {
    if (a.Hw > 0) first_erase = span.load(a.erase), first_add = span.load(a.add);
  }
  __device__ Numbers erase(int h) const { return h == 0 ? first_erase : span.load(a.erase + h * a.W); }
  __device__ Numbers add(int h) const { return h == 0 ? first_add : span.load(a.add + h * a.W); }
  __device__ float weight(int h, int n) const { return a.weights[h * a.N + n]; }

  // x times what the write heads other than `but` leave of slot n.
  __device__ Numbers kept(Numbers x, int n, int but = -1) const {
    if (a.Hw > 0 && but != 0) erase_from(x, weight(0, n), first_erase);
    for (int h = 1; h < a.Hw; h++)
      if (h != but) erase_from(x, weight(h, n), erase(h));
    return x;
  }
  __device__ Numbers operator()(const Numbers& m, int n) const {
    Numbers x = kept(m, n);
    if (a.Hw > 0) add_to(x, weight(0, n), first_add);
    for (int h = 1; h < a.Hw; h++) add_to(x, weight(h, n), add(h));
    return x;
  }
};

// What the reads ask of a slot's columns: the sum over the read heads of weight * gradient of the read vector. The first NEAR heads' gradients are
// in registers.
template <int NEAR> struct Asked {
  const Writes& a;
  const Span& span;
  const float* dreads;  // [R, W]
  Numbers near[NEAR];

  __device__ Asked(const Writes& a, const Span& span, const float* dreads) : a(a), span(span), dreads(dreads) {
#pragma unroll
    for (int r = 0; r < NEAR; r++) near[r] = r < a.R ? span.load(dreads + r * a.W) : Numbers{};
  }
  __device__ Numbers far(int r) const { return span.load(dreads + r * a.W); }
  __device__ Numbers operator()(int n) const {
    Numbers x{};
#pragma unroll
    for (int r = 0; r < NEAR; r++) add_to(x, a.read(r, n), near[r]);
    for (int r = NEAR; r < a.R; r++) add_to(x, a.read(r, n), far(r));
    return x;
  }
};

// One walk over memory: to[n, w] = written rows (null: none), read(r, w, x) the read vectors, after the write or before it.
// scratch: 8 * kThreads floats.
template <int HC, class T, class Put>
__device__ inline void write_read_of(const Writes& a, const T* rows, T* to, bool write_first, float* scratch, Put read) {
  for (Span span(a.W, rows, to); span.w0 < a.W; span.w0 += span.width()) {
    const Written written(a, span);
    for (int r0 = 0; r0 == 0 || r0 < a.R; r0 += HC) {
      Numbers acc[HC] = {};
#pragma unroll 2
      for (int first = span.first(); first < a.N; first += span.step) {
        const int n = span.row(first);
        if (n >= a.N) continue;
        Numbers x = span.load(rows + (int64_t)n * a.W);
        if (write_first) x = written(x, n);
        if (to && r0 == 0) span.store(to + (int64_t)n * a.W, write_first ? x : written(x, n));
#pragma unroll
        for (int j = 0; j < HC; j++) add_to(acc[j], a.read(r0 + j, n), x);
      }
      if (a.R > 0) span.sum(acc, least(HC, a.R - r0), scratch, [&](int j, int w, float x) { read(r0 + j, w, x); });
    }
  }
}
template <class T, class Put>
__device__ inline void write_read(const Writes& a, const T* rows, T* to, bool write_first, float* scratch, Put read) {
  if (a.R <= 1) write_read_of<1>(a, rows, to, write_first, scratch, read);
  else if (a.R <= 4) write_read_of<4>(a, rows, to, write_first, scratch, read);
  else write_read_of<8>(a, rows, to, write_first, scratch, read);
}

// Backward of the writes and reads, less the memory's gradient:
//   G = grad + asked if written first              dread[r][n] += sum over w of dreads[r] . what was read
//   q_h = G m * the other heads' factors           dwrite[h][n] += sum over w of add_h G - erase_h q_h
//   erase(h, w, - sum over n of c_h q_h)           add(h, w, sum over n of c_h G)
// span: of all arrays of rows; grad(span, n) is the gradient of the written memory. dwrite [Hw, N] and dread [R, N] are visible before and after.
// put(span, n, x), if PUT, takes the memory's gradient. WC write heads and RC read heads share one look at a row. scratch: 8 * kThreads floats.
template <int WC, int RC, bool PUT, class T, class Grad, class Put, class Erase, class Add>
__device__ inline void write_read_backward_of(
    Span span, const Writes& a, const T* rows, const float* dreads, bool write_first, float* dwrite, float* dread, float* scratch, Grad grad,
    Put put, Erase erase, Add add) {
  constexpr int K = WC + RC <= 2 ? 2 : WC + RC <= 4 ? 4 : 8;
  for (; span.w0 < a.W; span.w0 += span.width()) {
    const Written written(a, span);
    const Asked<RC> asked(a, span, dreads);
    for (int h0 = 0, r0 = 0; r0 == 0 || h0 < a.Hw || r0 < a.R; h0 += WC, r0 += RC) {
      Numbers acc[2 * WC] = {};  // of erase, of add
#pragma unroll 1
      for (int first = span.first(); first < a.N; first += span.step) {
        const int at = span.row(first), n = least(at, a.N - 1);  // all go along, because the sums are the warp's
        const bool on = at < a.N;
        Numbers m = span.load(rows + (int64_t)n * a.W), g = grad(span, n);
        if (write_first || PUT) {
          const Numbers x = asked(n);
          if (write_first) add_to(g, 1, x);
          if (PUT && on && r0 == 0) {
            Numbers dm = written.kept(g, n);
            if (!write_first) add_to(dm, 1, x);
            put(span, n, dm);
          }
        }
        if (!on) m = g = Numbers{};
        Numbers seen = m;
        if (write_first) seen = written(m, n);
        float sums[K] = {};
#pragma unroll
        for (int j = 0; j < WC; j++) {
          const int h = h0 + j;
          if (h >= a.Hw) continue;
          Numbers q = written.kept(m, n, h);
#pragma unroll
          for (int i = 0; i < kSpan; i++) q.v[i] *= g.v[i];
          const float c = written.weight(h, n);
          sums[j] = dot(written.add(h), g) - dot(written.erase(h), q);
          add_to(acc[j], -c, q), add_to(acc[WC + j], c, g);
        }
#pragma unroll
        for (int j = 0; j < RC; j++)
          if (r0 == 0) sums[WC + j] = dot(asked.near[j], seen);
          else if (r0 + j < a.R) sums[WC + j] = dot(asked.far(r0 + j), seen);
        group_sums(sums, span.lanes, [&](int k, float x) {
          if (!on) return;
          if (k < WC && h0 + k < a.Hw) dwrite[(h0 + k) * a.N + n] += x;
          if (k >= WC && k < WC + RC && r0 + k - WC < a.R) dread[(r0 + k - WC) * a.N + n] += x;
        });
      }
      if (h0 < a.Hw)
        span.sum(acc, 2 * WC, scratch, [&](int j, int w, float x) {
          const int h = h0 + j % WC;
          if (h >= a.Hw) return;
          if (j < WC) erase(h, w, x);
          else add(h, w, x);
        });
    }
  }
  __syncthreads();
}
template <bool PUT, class T, class Grad, class Put, class Erase, class Add>
__device__ inline void write_read_backward(
    const Span& span, const Writes& a, const T* rows, const float* dreads, bool write_first, float* dwrite, float* dread, float* scratch, Grad grad,
    Put put, Erase erase, Add add) {
  if (a.Hw <= 1 && a.R <= 1) write_read_backward_of<1, 1, PUT>(span, a, rows, dreads, write_first, dwrite, dread, scratch, grad, put, erase, add);
  else if (a.Hw <= 1) write_read_backward_of<1, 4, PUT>(span, a, rows, dreads, write_first, dwrite, dread, scratch, grad, put, erase, add);
  else write_read_backward_of<3, 4, PUT>(span, a, rows, dreads, write_first, dwrite, dread, scratch, grad, put, erase, add);
}

// What gives, for a row n, the gradient of the memory that the writes and reads leave it: of the written memory's, grad(span, n), what the writes
// keep, and what the reads ask, before or behind them.
template <class Grad> struct MemoryGradient {
  Written written;
  Asked<4> asked;
  bool write_first;
  Grad grad;
  __device__ Numbers operator()(int n) const {
    Numbers x = grad(written.span, n);
    if (write_first) return add_to(x, 1, asked(n)), written.kept(x, n);
    x = written.kept(x, n);
    return add_to(x, 1, asked(n)), x;
  }
};
template <class Grad>
__device__ inline MemoryGradient<Grad> memory_gradient(const Writes& a, const Span& span, const float* dreads, bool write_first, Grad grad) {
  return {Written(a, span), Asked<4>(a, span, dreads), write_first, grad};
}

}  // namespace cuda
}  // namespace memcore
