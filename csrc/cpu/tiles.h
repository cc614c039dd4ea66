// Memory with slots across lanes: tile t holds slots tL .. tL + L - 1 as W vectors, one a column, at (t W + w) L. Sums over a slot's numbers then
// need no horizontal addition, and a width that is no multiple of a vector wastes nothing. The slots that pad the last tile are zeros, and
// their weights must be.
//
// Names are those of rows.h. Key, erase, add and read vectors lie [heads, ld]; weights and other numbers of slots lie [heads, ldc], padded.
#pragma once

#include "transpose.h"

namespace memcore {
namespace MC_ISA {

// Rows of a tile lie too far apart for a processor to take them for a stream: those of the tile after the next are asked for.
template <class C> inline void to_tiles(C* tiles, const C* rows, int64_t N, int64_t W) {
  constexpr int L = Lanes<C>::n;
  for (int64_t n = 0; n < N; n += L, tiles += W * L, rows += W * L) {
    if (n + 3 * L <= N) fetch(rows + 2 * W * L, W * kBytes);
    columns_to_vectors(tiles, L, rows, W, N - n, W);
  }
}
// With `past` past the caches, if rows are whole vectors and aligned to them.
template <class C> inline void from_tiles(C* rows, const C* tiles, int64_t N, int64_t W, bool past) {
  constexpr int L = Lanes<C>::n;
  past = past && W % L == 0 && (uintptr_t)rows % kBytes == 0;
  for (int64_t n = 0; n < N; n += L, tiles += W * L, rows += W * L)
    if (past) vectors_to_columns<true>(rows, W, tiles, L, N - n, W);
    else vectors_to_columns<false>(rows, W, tiles, L, N - n, W);
  if (past) stream_fence();
}

// f(Number<n>) for 0 <= n <= 5, so that n is known at compile time.
template <class F> MC_INLINE void with_count(int64_t n, F f) {
  switch (n) {
    case 0: return f(Number<0>{});
    case 1: return f(Number<1>{});
    case 2: return f(Number<2>{});
    case 3: return f(Number<3>{});
    case 4: return f(Number<4>{});
    default: return f(Number<5>{});
  }
}
constexpr int64_t kMostHeads = 5;  // that one sweep takes

// Sums down the slots: memories are swept in the order they lie in, some tiles at a time, and the sums of every column wait in `scratch`, kMostHeads
// (two for a write head) vectors a column. To keep a few columns' sums in registers instead would read lines a tile apart, most of which fall on the same
// sets of the first cache when a tile is a page.
template <class C> MC_INLINE int64_t tile_scratch(int64_t W) { return kMostHeads * W * Lanes<C>::n; }

// sweep(first tile, Number<how many>) over all tiles, B at a time; `sums` holds n vectors a column, whose sums put(column, n numbers) gets.
template <int n, int B, class C, class F, class P> MC_INLINE void in_order(int64_t tiles, int64_t W, C* sums, F sweep, P put) {
  constexpr int L = Lanes<C>::n;
  for (int64_t i = 0; i < n * W; i++) store(sums + i * L, Vec<C>{});
  int64_t t = 0;
  for (; t + B <= tiles; t += B) sweep(t, Number<B>{});
  if constexpr (B > 1)
    for (; t < tiles; t++) sweep(t, Number<1>{});
  for (int64_t w = 0; w < W; w++) {
    Vec<C> v[n];
    C found[n + 4];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) v[i] = load(sums + (w * n + i) * L);
    sum_all<n>(v, found);
    put(w, found);
  }
}

// out[h][n] = sum over w of k[h][w] m[n][w]; norm2[n] too unless it is null.
template <int HB, bool NORM, int TB, class C>
MC_INLINE void tile_dots_of(const C* m, int64_t W, const C* k, int64_t ldk, C* out, int64_t ldo, C* norm2) {
  constexpr int L = Lanes<C>::n, A = HB + NORM;
  Vec<C> acc[A > 0 ? A : 1][TB];
#pragma GCC unroll 8
  for (int h = 0; h < A; h++)
#pragma GCC unroll 4
    for (int t = 0; t < TB; t++) acc[h][t] = Vec<C>{};
  for (int64_t w = 0; w < W; w++) {
    Vec<C> v[TB];
#pragma GCC unroll 4
    for (int t = 0; t < TB; t++) v[t] = load(m + (t * W + w) * L);
#pragma GCC unroll 8
    for (int h = 0; h < HB; h++) {
      const Vec<C> key = splat(k[h * ldk + w]);
#pragma GCC unroll 4
      for (int t = 0; t < TB; t++) acc[h][t] += key * v[t];
    }
    if (NORM)
#pragma GCC unroll 4
      for (int t = 0; t < TB; t++) acc[HB][t] += v[t] * v[t];
  }
#pragma GCC unroll 4
  for (int t = 0; t < TB; t++) {
#pragma GCC unroll 8
    for (int h = 0; h < HB; h++) store(out + h * ldo + t * L, acc[h][t]);
    if (NORM) store(norm2 + t * L, acc[HB][t]);
  }
}
template <int HB, bool NORM, class C>
MC_INLINE void tile_dots_heads(const C* m, int64_t tiles, int64_t W, const C* k, int64_t ldk, C* out, int64_t ldo, C* norm2) {
  constexpr int L = Lanes<C>::n, TB = HB + NORM <= 3 && kBytes == 64 ? 4 : 2;
  int64_t t = 0;
  for (; t + TB <= tiles; t += TB) tile_dots_of<HB, NORM, TB>(m + t * W * L, W, k, ldk, out + t * L, ldo, NORM ? norm2 + t * L : norm2);
  for (; t < tiles; t++) tile_dots_of<HB, NORM, 1>(m + t * W * L, W, k, ldk, out + t * L, ldo, NORM ? norm2 + t * L : norm2);
}
template <class C> inline void tile_dots(const C* m, int64_t tiles, int64_t W, const C* k, int64_t ldk, int64_t H, C* out, int64_t ldo, C* norm2) {
  for (int64_t h = 0; h < H || norm2; h += kMostHeads, norm2 = nullptr)
    with_count(H - h < kMostHeads ? H - h : kMostHeads, [&](auto heads) MC_INLINED {
      if (norm2) tile_dots_heads<heads.value, true>(m, tiles, W, k + h * ldk, ldk, out + h * ldo, ldo, norm2);
      else tile_dots_heads<heads.value, false>(m, tiles, W, k + h * ldk, ldk, out + h * ldo, ldo, norm2);
    });
}

// r[h][w] += sum over n of c[h][n] m[n][w].
template <class C> inline void tile_gather(const C* m, int64_t tiles, int64_t W, const C* c, int64_t ldc, int64_t H, C* r, int64_t ldr, C* scratch) {
  constexpr int L = Lanes<C>::n;
  for (int64_t h = 0; h < H; h += kMostHeads)
    with_count(H - h < kMostHeads ? H - h : kMostHeads, [&](auto heads) MC_INLINED {
      constexpr int HB = heads.value > 0 ? heads.value : 1;
      const auto sweep = [&](int64_t t0, auto count) MC_INLINED {
        constexpr int B = count.value;
        for (int64_t w = 0; w < W; w++) {
          Vec<C> v[B];
#pragma GCC unroll 4
          for (int t = 0; t < B; t++) v[t] = load(m + ((t0 + t) * W + w) * L);
#pragma GCC unroll 8
          for (int i = 0; i < HB; i++) {
            C* to = scratch + (w * HB + i) * L;
            Vec<C> acc = load(to);
#pragma GCC unroll 4
            for (int t = 0; t < B; t++) acc += load(c + (h + i) * ldc + (t0 + t) * L) * v[t];
            store(to, acc);
          }
        }
      };
      in_order<HB, 4>(tiles, W, scratch, sweep, [&](int64_t w, const C* found) MC_INLINED {
        for (int i = 0; i < HB; i++) r[(h + i) * ldr + w] += found[i];
      });
    });
}

// m[n][w] += sum over h of c[h][n] a[h][w].
template <class C> inline void tile_scatter(C* m, int64_t tiles, int64_t W, const C* c, int64_t ldc, int64_t H, const C* a, int64_t lda) {
  constexpr int L = Lanes<C>::n;
  for (int64_t h = 0; h < H; h += kMostHeads)
    with_count(H - h < kMostHeads ? H - h : kMostHeads, [&](auto heads) MC_INLINED {
      constexpr int HB = heads.value > 0 ? heads.value : 1;
      for (int64_t t = 0; t < tiles; t++) {
        Vec<C> x[HB];
#pragma GCC unroll 8
        for (int i = 0; i < HB; i++) x[i] = load(c + (h + i) * ldc + t * L);
        for (int64_t w = 0; w < W; w++) {
          Vec<C> v = load(m + (t * W + w) * L);
#pragma GCC unroll 8
          for (int i = 0; i < HB; i++) v += x[i] * splat(a[(h + i) * lda + w]);
          store(m + (t * W + w) * L, v);
        }
      }
    });
}

// out[n][w] = m[n][w] prod over h of (1 - c[h][n] e[h][w]) + sum over h of c[h][n] a[h][w]; out may be m itself.
template <class C>
inline void tile_erase_add(C* out, const C* m, int64_t tiles, int64_t W, const C* c, int64_t ldc, int64_t H, const C* e, const C* a, int64_t lda) {
  constexpr int L = Lanes<C>::n;
  for (int64_t t = 0; t < tiles; t++) {
    const C* mt = m + t * W * L;
    C* to = out + t * W * L;
    if (H == 1) {
      const Vec<C> x = load(c + t * L);
#pragma GCC unroll 4
      for (int64_t w = 0; w < W; w++) store(to + w * L, load(mt + w * L) * (1 - x * splat(e[w])) + x * splat(a[w]));
      continue;
    }
    for (int64_t w = 0; w < W; w++) {
      Vec<C> v = load(mt + w * L);
      for (int64_t h = 0; h < H; h++) v *= 1 - load(c + h * ldc + t * L) * splat(e[h * lda + w]);
      for (int64_t h = 0; h < H; h++) v += load(c + h * ldc + t * L) * splat(a[h * lda + w]);
      store(to + w * L, v);
    }
  }
}

// One write head and R <= kMostHeads reads of what it writes, in one pass: m = m (1 - c e) + c a, r[h][w] += sum over n of k[h][n] m[n][w].
template <int R, class C>
MC_INLINE void tile_write_read_of(
    C* m, int64_t tiles, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, C* r, int64_t ldr, C* scratch) {
  constexpr int L = Lanes<C>::n;
  const auto sweep = [&](int64_t t0, auto count) MC_INLINED {
    constexpr int B = count.value;
    C* mt = m + t0 * W * L;
    Vec<C> x[B];
#pragma GCC unroll 4
    for (int t = 0; t < B; t++) x[t] = load(c + (t0 + t) * L);
    for (int64_t w = 0; w < W; w++) {
      const Vec<C> ev = splat(e[w]), av = splat(a[w]);
      Vec<C> v[B];
#pragma GCC unroll 4
      for (int t = 0; t < B; t++) {
        C* at = mt + (t * W + w) * L;
        v[t] = load(at) * (1 - x[t] * ev) + x[t] * av;
        store(at, v[t]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        C* to = scratch + (w * R + i) * L;
        Vec<C> acc = load(to);
#pragma GCC unroll 4
        for (int t = 0; t < B; t++) acc += load(k + i * ldk + (t0 + t) * L) * v[t];
        store(to, acc);
      }
    }
  };
  in_order<R, 4>(tiles, W, scratch, sweep, [&](int64_t w, const C* found) MC_INLINED {
    for (int i = 0; i < R; i++) r[i * ldr + w] += found[i];
  });
}
template <class C>
inline void tile_write_read(
    C* m, int64_t tiles, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, int64_t R, C* r, int64_t ldr, C* scratch) {
  with_count(R, [&](auto reads) MC_INLINED { tile_write_read_of<(reads.value > 0 ? reads.value : 1)>(m, tiles, W, c, e, a, k, ldk, r, ldr, scratch); });
}

// Backward of tile_write_read, R = 0 being a write alone. dr: gradients of the read vectors; g: of the memory written, in place that of m.
//   dk[h] += dr_h . written        G = g + sum over h of k_h dr_h        g = G (1 - c e)
//   dc += sum over w of G (a - e m)        de -= sum over n of c G m        da += sum over n of c G
template <int R, class C>
MC_INLINE void tile_write_read_backward_of(
    C* g, const C* m, int64_t tiles, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, const C* dr, int64_t ldr, C* dk,
    C* dc, C* de, C* da, C* scratch) {
  constexpr int L = Lanes<C>::n;
  const auto sweep = [&](int64_t t0, auto count) MC_INLINED {
    constexpr int B = count.value;
    Vec<C> x[B], dx[B], y[R > 0 ? R : 1][B], dy[R > 0 ? R : 1][B];
#pragma GCC unroll 2
    for (int t = 0; t < B; t++) {
      x[t] = load(c + (t0 + t) * L), dx[t] = load(dc + (t0 + t) * L);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) y[i][t] = load(k + i * ldk + (t0 + t) * L), dy[i][t] = load(dk + i * ldk + (t0 + t) * L);
    }
    for (int64_t w = 0; w < W; w++) {
      C* to = scratch + 2 * w * L;
      const Vec<C> ev = splat(e[w]), av = splat(a[w]);
      Vec<C> v[B], gv[B], f[B], mv[B], de_sum = load(to), da_sum = load(to + L);
#pragma GCC unroll 2
      for (int t = 0; t < B; t++) {
        const int64_t at = ((t0 + t) * W + w) * L;
        mv[t] = load(m + at), f[t] = 1 - x[t] * ev, v[t] = mv[t] * f[t] + x[t] * av, gv[t] = load(g + at);
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) {
        const Vec<C> d = splat(dr[i * ldr + w]);
#pragma GCC unroll 2
        for (int t = 0; t < B; t++) dy[i][t] += d * v[t], gv[t] += y[i][t] * d;
      }
#pragma GCC unroll 2
      for (int t = 0; t < B; t++) {
        const Vec<C> xg = x[t] * gv[t];
        dx[t] += gv[t] * (av - ev * mv[t]);
        de_sum -= xg * mv[t];
        da_sum += xg;
        store(g + ((t0 + t) * W + w) * L, gv[t] * f[t]);
      }
      store(to, de_sum), store(to + L, da_sum);
    }
#pragma GCC unroll 2
    for (int t = 0; t < B; t++) {
      store(dc + (t0 + t) * L, dx[t]);
#pragma GCC unroll 8
      for (int i = 0; i < R; i++) store(dk + i * ldk + (t0 + t) * L, dy[i][t]);
    }
  };
  in_order<2, kBytes == 64 ? 2 : 1>(tiles, W, scratch, sweep, [&](int64_t w, const C* found) MC_INLINED { de[w] += found[0], da[w] += found[1]; });
}
template <class C>
inline void tile_write_read_backward(
    C* g, const C* m, int64_t tiles, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, int64_t R, const C* dr, int64_t ldr,
    C* dk, C* dc, C* de, C* da, C* scratch) {
  with_count(R, [&](auto reads) MC_INLINED { tile_write_read_backward_of<reads.value>(g, m, tiles, W, c, e, a, k, ldk, dr, ldr, dk, dc, de, da, scratch); });
}

// Backward of tile_erase_add for any number of heads; formulas at rows.h's erase_add_backward. `scratch` holds (2 W + 1) H vectors.
template <class C>
inline void tile_erase_add_backward(
    C* g, const C* m, int64_t tiles, int64_t W, const C* c, int64_t ldc, int64_t H, const C* e, const C* a, int64_t lda, C* dc, C* de, C* da,
    C* scratch) {
  if (H == 0) return;
  if (H == 1) return tile_write_read_backward(g, m, tiles, W, c, e, a, c, ldc, 0, a, lda, dc, dc, de, da, scratch);
  constexpr int L = Lanes<C>::n;
  C *before = scratch, *sums = scratch + H * L;  // products of the factors before head h; (de, da) of every head and column
  for (int64_t i = 0; i < 2 * W * H; i++) store(sums + i * L, Vec<C>{});
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t w = 0; w < W; w++) {
      const int64_t at = (t * W + w) * L;
      const Vec<C> gv = load(g + at), q = gv * load(m + at);
      Vec<C> p = splat((C)1);
      for (int64_t h = 0; h < H; h++) {
        store(before + h * L, p);
        p *= 1 - load(c + h * ldc + t * L) * splat(e[h * lda + w]);
      }
      store(g + at, gv * p);
      Vec<C> after = splat((C)1);
      for (int64_t h = H - 1; h >= 0; h--) {
        const Vec<C> x = load(c + h * ldc + t * L), ev = splat(e[h * lda + w]), qh = q * load(before + h * L) * after;
        C *d = dc + h * ldc + t * L, *s = sums + 2 * (h * W + w) * L;
        store(d, load(d) + splat(a[h * lda + w]) * gv - ev * qh);
        store(s, load(s) - x * qh);
        store(s + L, load(s + L) + x * gv);
        after *= 1 - x * ev;
      }
    }
  for (int64_t h = 0; h < H; h++)
    for (int64_t w = 0; w < W; w++) {
      const C* s = sums + 2 * (h * W + w) * L;
      de[h * lda + w] += sum<C>(load(s)), da[h * lda + w] += sum<C>(load(s + L));
    }
}

// The rows' part of a similarity's backward: g += sum over h of c[h] key_h - own m, dkey[h][w] += sum over n of c[h][n] m[n][w].
template <int HB, bool OWN, class C>
MC_INLINE void tile_pull_push_of(
    C* g, const C* m, int64_t tiles, int64_t W, const C* c, int64_t ldc, const C* key, C* dkey, int64_t ldk, const C* own, C* scratch) {
  constexpr int L = Lanes<C>::n;
  const auto sweep = [&](int64_t t0, auto count) MC_INLINED {
    constexpr int B = count.value;
    Vec<C> x[HB][B];
#pragma GCC unroll 8
    for (int i = 0; i < HB; i++)
#pragma GCC unroll 4
      for (int t = 0; t < B; t++) x[i][t] = load(c + i * ldc + (t0 + t) * L);
    for (int64_t w = 0; w < W; w++) {
      Vec<C> mv[B], gv[B];
#pragma GCC unroll 4
      for (int t = 0; t < B; t++) {
        const int64_t at = ((t0 + t) * W + w) * L;
        mv[t] = load(m + at), gv[t] = load(g + at);
        if (OWN) gv[t] -= load(own + (t0 + t) * L) * mv[t];
      }
#pragma GCC unroll 8
      for (int i = 0; i < HB; i++) {
        C* to = scratch + (w * HB + i) * L;
        const Vec<C> kv = splat(key[i * ldk + w]);
        Vec<C> acc = load(to);
#pragma GCC unroll 4
        for (int t = 0; t < B; t++) gv[t] += x[i][t] * kv, acc += x[i][t] * mv[t];
        store(to, acc);
      }
#pragma GCC unroll 4
      for (int t = 0; t < B; t++) store(g + ((t0 + t) * W + w) * L, gv[t]);
    }
  };
  in_order<HB, kBytes == 64 ? 4 : 2>(tiles, W, scratch, sweep, [&](int64_t w, const C* found) MC_INLINED {
    for (int i = 0; i < HB; i++) dkey[i * ldk + w] += found[i];
  });
}
template <class C>
inline void tile_pull_push(
    C* g, const C* m, int64_t tiles, int64_t W, const C* c, int64_t ldc, int64_t H, const C* key, C* dkey, int64_t ldk, const C* own, C* scratch) {
  for (int64_t h = 0; h < H; h += kMostHeads)
    with_count(H - h < kMostHeads ? H - h : kMostHeads, [&](auto heads) MC_INLINED {
      constexpr int HB = heads.value > 0 ? heads.value : 1;
      if (h == 0) tile_pull_push_of<HB, true>(g, m, tiles, W, c + h * ldc, ldc, key + h * ldk, dkey + h * ldk, ldk, own, scratch);
      else tile_pull_push_of<HB, false>(g, m, tiles, W, c + h * ldc, ldc, key + h * ldk, dkey + h * ldk, ldk, own, scratch);
    });
}

}  // namespace MC_ISA
}  // namespace memcore
