// The kernels of rows.h by rows, R at a time and all their columns, into rows that go past the caches: what is read is a stream to the processor then,
// and what is written needs no scratch. W is in whole vectors, `out` aligned to them. Sums over the rows of a block stand in `sums` meanwhile, laid out as
// what they are added to. All results are those of the forms there bit for bit.
#pragma once

#include "rows.h"

namespace memcore {
namespace MC_ISA {

constexpr int kStreamHeads = 5;
constexpr int kStreamRows = 2;

// f(first of the rows, how many, whether they are the block's first) over a block of at least one.
template <class F> MC_INLINE void by_rows(int64_t rows, F f) {
  if (rows < kStreamRows) return f(0, Number<1>{}, Number<1>{});
  f(0, Number<kStreamRows>{}, Number<1>{});
  int64_t n = kStreamRows;
  for (; n + kStreamRows <= rows; n += kStreamRows) f(n, Number<kStreamRows>{}, Number<0>{});
  if (n < rows) f(n, Number<1>{}, Number<0>{});
}
template <class C> MC_INLINE void add_sums(C* to, const C* sums, int64_t n) {
  for (int64_t i = 0; i < n; i += Lanes<C>::n) store(to + i, load(to + i) + load(sums + i));
}
template <int R, int HB, class C> MC_INLINE void splat_rows(Vec<C> (*x)[R], const C* c, int64_t ldc) {
#pragma GCC unroll 8
  for (int h = 0; h < HB; h++)
#pragma GCC unroll 2
    for (int i = 0; i < R; i++) x[h][i] = splat(c[h * ldc + i]);
}

// scatter and erase_add of 1 to kFewHeads heads.
template <int R, int HB, bool ERASE, bool BASE, class C>
MC_INLINE void scatter_rows(C* out, const C* base, int64_t W, const C* c, int64_t ldc, const C* e, const C* a, int64_t lda) {
  Vec<C> x[HB][R];
  splat_rows<R, HB>(x, c, ldc);
  for (int64_t w = 0; w < W; w += Lanes<C>::n) {
    Vec<C> v[R];
#pragma GCC unroll 2
    for (int i = 0; i < R; i++) v[i] = BASE ? load(base + i * W + w) : Vec<C>{};
    if (ERASE)
#pragma GCC unroll 8
      for (int h = 0; h < HB; h++) {
        const Vec<C> ev = load(e + h * lda + w);
#pragma GCC unroll 2
        for (int i = 0; i < R; i++) v[i] *= 1 - x[h][i] * ev;
      }
#pragma GCC unroll 8
    for (int h = 0; h < HB; h++) {
      const Vec<C> av = load(a + h * lda + w);
#pragma GCC unroll 2
      for (int i = 0; i < R; i++) v[i] += x[h][i] * av;
    }
#pragma GCC unroll 2
    for (int i = 0; i < R; i++) stream_store(out + i * W + w, v[i]);
  }
}
template <int HB, bool ERASE, bool BASE, class C>
MC_INLINE void scatter_stream_heads(C* out, const C* base, int64_t rows, int64_t W, const C* c, int64_t ldc, const C* e, const C* a, int64_t lda) {
  by_rows(rows, [&](int64_t n, auto count, auto) MC_INLINED {
    scatter_rows<count.value, HB, ERASE, BASE>(out + n * W, BASE ? base + n * W : base, W, c + n, ldc, e, a, lda);
  });
}
template <bool ERASE, bool BASE, class C>
MC_INLINE void scatter_stream_any(C* out, const C* base, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* e, const C* a, int64_t lda) {
  if (H == 1) scatter_stream_heads<1, ERASE, BASE>(out, base, rows, W, c, ldc, e, a, lda);
  else if (H == 2) scatter_stream_heads<2, ERASE, BASE>(out, base, rows, W, c, ldc, e, a, lda);
  else if (H == 3) scatter_stream_heads<3, ERASE, BASE>(out, base, rows, W, c, ldc, e, a, lda);
  else scatter_stream_heads<4, ERASE, BASE>(out, base, rows, W, c, ldc, e, a, lda);
}
// base may be null (zero).
template <class C>
inline void scatter_stream(C* out, const C* base, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* a, int64_t lda) {
  if (base) scatter_stream_any<false, true>(out, base, rows, W, c, ldc, H, a, a, lda);
  else scatter_stream_any<false, false>(out, base, rows, W, c, ldc, H, a, a, lda);
}
template <class C>
inline void erase_add_stream(C* out, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* e, const C* a, int64_t lda) {
  scatter_stream_any<true, true>(out, m, rows, W, c, ldc, H, e, a, lda);
}

// write_read.
template <int R, int RH, bool FIRST, class C>
MC_INLINE void write_read_rows(
    C* out, const C* m, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, C* sums, int64_t ldr) {
  Vec<C> x[1][R], y[RH][R];
  splat_rows<R, 1>(x, c, 0), splat_rows<R, RH>(y, k, ldk);
  for (int64_t w = 0; w < W; w += Lanes<C>::n) {
    const Vec<C> ev = load(e + w), av = load(a + w);
    Vec<C> v[R];
#pragma GCC unroll 2
    for (int i = 0; i < R; i++) {
      v[i] = load(m + i * W + w);
      v[i] = v[i] * (1 - x[0][i] * ev) + x[0][i] * av;
      stream_store(out + i * W + w, v[i]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < RH; h++) {
      Vec<C> sum = FIRST ? Vec<C>{} : load(sums + h * ldr + w);
#pragma GCC unroll 2
      for (int i = 0; i < R; i++) sum += y[h][i] * v[i];
      store(sums + h * ldr + w, sum);
    }
  }
}
template <int RH, class C>
MC_INLINE void write_read_stream_heads(
    C* out, const C* m, int64_t rows, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, C* r, int64_t ldr, C* sums) {
  by_rows(rows, [&](int64_t n, auto count, auto first) MC_INLINED {
    write_read_rows<count.value, RH, first.value == 1>(out + n * W, m + n * W, W, c + n, e, a, k + n, ldk, sums, ldr);
  });
  add_sums(r, sums, RH * ldr);
}
template <class C>
inline void write_read_stream(
    C* out, const C* m, int64_t rows, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, int64_t R, C* r, int64_t ldr, C* sums) {
  if (R == 1) write_read_stream_heads<1>(out, m, rows, W, c, e, a, k, ldk, r, ldr, sums);
  else if (R == 2) write_read_stream_heads<2>(out, m, rows, W, c, e, a, k, ldk, r, ldr, sums);
  else if (R == 3) write_read_stream_heads<3>(out, m, rows, W, c, e, a, k, ldk, r, ldr, sums);
  else write_read_stream_heads<4>(out, m, rows, W, c, e, a, k, ldk, r, ldr, sums);
}

// pull_push of 1 to kStreamHeads heads.
template <int R, int HB, bool BASE, bool FIRST, class C>
MC_INLINE void pull_push_rows(C* out, const C* base, const C* m, int64_t W, const C* c, int64_t ldc, const C* key, C* sums, int64_t ldk, const C* own) {
  Vec<C> x[HB][R], s[1][R];
  splat_rows<R, HB>(x, c, ldc), splat_rows<R, 1>(s, own, 0);
  for (int64_t w = 0; w < W; w += Lanes<C>::n) {
    Vec<C> row[R], v[R];
#pragma GCC unroll 2
    for (int i = 0; i < R; i++) row[i] = load(m + i * W + w), v[i] = (BASE ? load(base + i * W + w) : Vec<C>{}) - s[0][i] * row[i];
#pragma GCC unroll 8
    for (int h = 0; h < HB; h++) {
      const Vec<C> k = load(key + h * ldk + w);
      Vec<C> sum = FIRST ? Vec<C>{} : load(sums + h * ldk + w);
#pragma GCC unroll 2
      for (int i = 0; i < R; i++) v[i] += x[h][i] * k, sum += x[h][i] * row[i];
      store(sums + h * ldk + w, sum);
    }
#pragma GCC unroll 2
    for (int i = 0; i < R; i++) stream_store(out + i * W + w, v[i]);
  }
}
template <int HB, bool BASE, class C>
MC_INLINE void pull_push_stream_heads(
    C* out, const C* base, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, const C* key, C* dkey, int64_t ldk, const C* own, C* sums) {
  by_rows(rows, [&](int64_t n, auto count, auto first) MC_INLINED {
    pull_push_rows<count.value, HB, BASE, first.value == 1>(
        out + n * W, BASE ? base + n * W : base, m + n * W, W, c + n, ldc, key, sums, ldk, own + n);
  });
  add_sums(dkey, sums, HB * ldk);
}
template <bool BASE, class C>
MC_INLINE void pull_push_stream_any(
    C* out, const C* base, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* key, C* dkey, int64_t ldk, const C* own, C* sums) {
  if (H == 1) pull_push_stream_heads<1, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own, sums);
  else if (H == 2) pull_push_stream_heads<2, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own, sums);
  else if (H == 3) pull_push_stream_heads<3, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own, sums);
  else if (H == 4) pull_push_stream_heads<4, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own, sums);
  else pull_push_stream_heads<5, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own, sums);
}
// base may be null (zero).
template <class C>
inline void pull_push_stream(
    C* out, const C* base, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* key, C* dkey, int64_t ldk, const C* own, C* sums) {
  if (base) pull_push_stream_any<true>(out, base, m, rows, W, c, ldc, H, key, dkey, ldk, own, sums);
  else pull_push_stream_any<false>(out, base, m, rows, W, c, ldc, H, key, dkey, ldk, own, sums);
}

}  // namespace MC_ISA
}  // namespace memcore
