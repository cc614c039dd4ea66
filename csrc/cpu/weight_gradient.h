// Gradients of weight matrices, summed over all rows of a sequence.
#pragma once

#include "gemm.h"

namespace memcore {
namespace MC_ISA {

// Inputs a [rows, K] whose weights' gradient is c [K, N] = a^T deltas, or its transpose [N, K].
template <class C> struct Source {
  const C* a;
  int64_t lda, K;
  C* c;
  int64_t ldc;
};

// Rows in blocks whose deltas stay in the first cache; the order of the sums depends on nothing else.
constexpr int64_t kGradientRows = 128;

// Columns [n, n + NV vectors) and rows [k, k + R) of c [K, N] += a [rows, K]^T d [rows, N]; fetches the rows of a that come next.
template <int R, int NV, class C> MC_INLINE void gradient_tile(C* sums, const C* a, int64_t lda, const C* d, int64_t rows) {
  constexpr int L = Lanes<C>::n;
  Vec<C> acc[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[r][j] = load(sums + (r * NV + j) * L);
  for (int64_t i = 0; i < rows; i++, a += lda, d += NV * L) {
    Vec<C> row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) row[j] = load(d + j * L);
    __builtin_prefetch(a + 64 / sizeof(C), 0, 3);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<C> x = splat(a[r]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[r][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(sums + (r * NV + j) * L, acc[r][j]);
}

template <int R, class C> MC_INLINE void outer_rows(C* sums, const C* a, int64_t lda, const C* d, int64_t w, int64_t rows) {
  constexpr int L = Lanes<C>::n;
  if (w == 3 * L) gradient_tile<R, 3>(sums, a, lda, d, rows);
  else if (w == 2 * L) gradient_tile<R, 2>(sums, a, lda, d, rows);
  else gradient_tile<R, 1>(sums, a, lda, d, rows);
}

// Columns n .. of the panel that begins there, of every source's gradient, and of `bias`, the sums of the deltas [rows, N], whose rows are
// padded to whole vectors.
template <class C>
inline void weight_gradient(
    const Source<C>* source, int sources, C* bias, const C* deltas, int64_t ldd, int64_t N, int64_t n, int64_t rows, bool transposed) {
  constexpr int L = Lanes<C>::n, T = kTileRows;
  const int64_t real = N - n < Packed<C>::P ? N - n : Packed<C>::P, w = padded<C>(real);
  int64_t all = 0;
  for (int s = 0; s < sources; s++) all += source[s].K;
  C *sums, *total, *block;
  Arena arena([&](Arena& x) { x.take(sums, all * w), x.take(total, w), x.take(block, kGradientRows * w); });
  fill(sums, all * w, (C)0), fill(total, w, (C)0);
  for (int64_t i = 0; i < rows; i += kGradientRows) {
    const int64_t m = rows - i < kGradientRows ? rows - i : kGradientRows;
    for (int64_t j = 0; j < w; j += L) {
      Vec<C> t = load(total + j);
      for (int64_t r = 0; r < m; r++) {
        const Vec<C> v = load(deltas + (i + r) * ldd + n + j);
        t += v;
        store(block + r * w + j, v);
      }
      store(total + j, t);
    }
    C* to = sums;
    for (int s = 0; s < sources; s++) {
      const int64_t K = source[s].K, lda = source[s].lda;
      const C* a = source[s].a + i * lda;
      int64_t k = 0;
      for (; k + T <= K; k += T, to += T * w) outer_rows<T>(to, a + k, lda, block, w, m);
      if (K - k >= 4) outer_rows<4>(to, a + k, lda, block, w, m), k += 4, to += 4 * w;
      for (; k < K; k++, to += w) outer_rows<1>(to, a + k, lda, block, w, m);
    }
  }
  copy(bias + n, total, real);
  const C* from = sums;
  for (int s = 0; s < sources; s++) {
    C* c = source[s].c;
    const int64_t ldc = source[s].ldc;
    for (int64_t k = 0; k < source[s].K; k++, from += w) {
      if (!transposed) copy(c + k * ldc + n, from, real);
      else
        for (int64_t j = 0; j < real; j++) c[(n + j) * ldc + k] = from[j];
    }
  }
}

}  // namespace MC_ISA
}  // namespace memcore
