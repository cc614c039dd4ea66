// Small matrix products for controllers: few rows (a group of the batch) times weights packed once a call.
#pragma once

#include "addressing.h"
#include "transpose.h"

namespace memcore {
namespace MC_ISA {

// Register tiles: kTileRows rows by kTileVectors vectors.
constexpr int kTileRows = kBytes == 64 ? 8 : 4, kTileVectors = 3;

// A matrix [K, N] as panels of kTileVectors vectors of columns, each panel contiguous; columns padded with zeros.
template <class C> struct Packed {
  static constexpr int L = Lanes<C>::n, P = kTileVectors * L;
  int64_t K, N, Np;
  C* data;

  template <class A> void layout(A& a, int64_t K_, int64_t N_) {
    K = K_, N = N_, Np = padded<C>(N_);
    a.take(data, K * Np);
  }
  // Columns of the panel that begins at column n, and where it lies.
  MC_INLINE int64_t width(int64_t n) const { return Np - n < P ? Np - n : P; }
  MC_INLINE C* panel(int64_t n) const { return data + n * K; }
  // From [K, N].
  void pack(const C* from) {
    for (int64_t n = 0; n < Np; n += P) {
      const int64_t w = width(n), real = N - n < w ? N - n : w;
      C* to = panel(n);
      for (int64_t k = 0; k < K; k++, to += w) {
        copy(to, from + k * N + n, real);
        for (int64_t i = real; i < w; i++) to[i] = 0;
      }
    }
  }
  // The transpose of [N, K].
  void pack_transposed(const C* from) {
    for (int64_t n = 0; n < Np; n += P) {
      for (int64_t i = 0; i < width(n); i += L) columns_to_vectors(panel(n) + i, width(n), from + (n + i) * K, K, N - n - i, K);
    }
  }
};

// c [R, NV vectors] = start + a [R, K] b, `start` being one row for all (null: zero), or c itself with ADD. Few rows go U steps of k at
// a time in sums of their own, which hides the latency of the adders.
template <int R, int NV, int U, bool ADD, class C>
MC_INLINE void tile_product(C* c, int64_t ldc, const C* start, const C* a, int64_t lda, const C* b, int64_t K) {
  constexpr int L = Lanes<C>::n;
  Vec<C> acc[U][R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      acc[0][r][j] = ADD ? load(c + r * ldc + j * L) : start ? load(start + j * L) : Vec<C>{};
#pragma GCC unroll 4
      for (int u = 1; u < U; u++) acc[u][r][j] = Vec<C>{};
    }
  const auto step = [&](int64_t k, Vec<C>(*to)[NV]) MC_INLINED {
    Vec<C> row[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) row[j] = load(b + (k * NV + j) * L);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<C> x = splat(a[r * lda + k]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) to[r][j] += x * row[j];
    }
  };
  int64_t k = 0;
  for (; k + U <= K; k += U)
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) step(k + u, acc[u]);
  for (; k < K; k++) step(k, acc[0]);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      Vec<C> v = acc[0][r][j];
#pragma GCC unroll 4
      for (int u = 1; u < U; u++) v += acc[u][r][j];
      store(c + r * ldc + j * L, v);
    }
}

// Rows of one panel of columns; each row count has its own order of sums.
template <int R, bool ADD, class C>
MC_INLINE void panel_product(C* c, int64_t ldc, const C* start, const C* a, int64_t lda, const C* b, int64_t K, int vectors) {
  constexpr int U = R <= 2 ? 4 : R <= 4 && kBytes == 64 ? 2 : 1;
  if (vectors == 3) tile_product<R, 3, U, ADD>(c, ldc, start, a, lda, b, K);
  else if (vectors == 2) tile_product<R, 2, U, ADD>(c, ldc, start, a, lda, b, K);
  else tile_product<R, 1, U, ADD>(c, ldc, start, a, lda, b, K);
}

// c [rows, b.Np] = start + a [rows, b.K] b, or with ADD c += a b; writes whole vectors, so rows of c are padded. A row's sums depend on
// `rows` in their order, not on its place. A panel of b, this one from column n on, stays in the first cache for all rows.
template <bool ADD, class C>
inline void product_panel(C* c, int64_t ldc, const C* start, const C* a, int64_t lda, int64_t rows, const Packed<C>& b, int64_t n) {
  constexpr int T = kTileRows;
  const C *s = start ? start + n : nullptr, *p = b.panel(n), *x = a;
  const int v = (int)(b.width(n) / Lanes<C>::n);
  C* y = c + n;
  int64_t left = rows;
  for (; left >= T; left -= T, x += T * lda, y += T * ldc) panel_product<T, ADD>(y, ldc, s, x, lda, p, b.K, v);
  switch (left) {
    case 1: panel_product<1, ADD>(y, ldc, s, x, lda, p, b.K, v); break;
    case 2: panel_product<2, ADD>(y, ldc, s, x, lda, p, b.K, v); break;
    case 3: panel_product<3, ADD>(y, ldc, s, x, lda, p, b.K, v); break;
    case 4: panel_product<4 < T ? 4 : 1, ADD>(y, ldc, s, x, lda, p, b.K, v); break;
    case 5: panel_product<5 < T ? 5 : 1, ADD>(y, ldc, s, x, lda, p, b.K, v); break;
    case 6: panel_product<6 < T ? 6 : 1, ADD>(y, ldc, s, x, lda, p, b.K, v); break;
    case 7: panel_product<7 < T ? 7 : 1, ADD>(y, ldc, s, x, lda, p, b.K, v); break;
    default: break;
  }
}
template <bool ADD, class C> inline void product(C* c, int64_t ldc, const C* start, const C* a, int64_t lda, int64_t rows, const Packed<C>& b) {
  for (int64_t n = 0; n < b.Np; n += b.P) product_panel<ADD>(c, ldc, start, a, lda, rows, b, n);
}

}  // namespace MC_ISA
}  // namespace memcore
