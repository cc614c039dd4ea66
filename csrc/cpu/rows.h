// The row kernels everything is made of. A block is `rows` memory rows of W numbers, `ld` apart, in the accumulation
// type C, small enough to stay in the first cache; keys, erase and add vectors are padded to whole vectors with zeros.
//
//   dots        out[h][n] = sum over w of k[h][w] m[n][w]           (and the squared norms of the rows)
//   gather      r[h][w]  += sum over n of c[h][n] m[n][w]
//   scatter     out[n][w] = base[n][w] + sum over h of c[h][n] a[h][w]
//   erase_add   out[n][w] = m[n][w] prod over h of (1 - c[h][n] e[h][w]) + sum over h of c[h][n] a[h][w]
//   erase_add_backward
//   write_read, write_read_backward, pull_push: several of these in one pass
// rows_stream.h has the same for rows that go past the caches.
#pragma once

#include "isa.h"
#include "vec.h"

namespace memcore {
namespace MC_ISA {

constexpr int64_t kBlockBytes = 4096;
// Rows of a block: a multiple of 4.
template <class C> MC_INLINE int64_t block_rows(int64_t W) {
  const int64_t n = kBlockBytes / (int64_t)sizeof(C) / (W > 0 ? W : 1) / 4 * 4;
  return n < 4 ? 4 : n > 128 ? 128 : n;
}

// Rows as the accumulation type: where storage is that already, the rows themselves.
template <class T> MC_INLINE const Acc<T>* widened(const T* rows, int64_t count, Acc<T>* scratch) {
  if constexpr (__is_same(T, Acc<T>)) {
    return rows;
  } else {
    widen(scratch, rows, count);
    return scratch;
  }
}

// Where a kernel takes memory rows from, as the accumulation type. What it does with some rows goes over them several times by columns, which a
// processor does not take for a stream: from a megabyte on, too much to be in the caches still, the rows behind them are asked for meanwhile.
constexpr int64_t kAskBytes = 1 << 20;
template <class T> class RowSource {
 public:
  typedef Acc<T> C;
  explicit RowSource(int64_t elements) : ask_(elements * (int64_t)sizeof(T) >= kAskBytes && !reads_ahead()) {}

  MC_INLINE const C* take(const T* rows, int64_t count, C* scratch) const {
    const int64_t size = count * (int64_t)sizeof(T), most = size < 2 * kBlockBytes ? size : 2 * kBlockBytes;
    if (ask_)  // not as what is read only once, which some processors keep out of the third cache
      for (int64_t i = 0; i < most; i += 64) __builtin_prefetch((const char*)(rows + count) + i, 0, 3);
    return widened(rows, count, scratch);
  }

 private:
  bool ask_;
};

// Where a kernel puts finished memory rows: into the tensor itself; through scratch where storage is narrower; or, for tensors that outgrow the caches,
// past them, which saves reading every line before it is written: by itself where it `streams`, else through scratch.
constexpr int64_t kStreamBytes = 4 << 20;
template <class T> class RowSink {
 public:
  typedef Acc<T> C;
  explicit RowSink(int64_t elements) : stream_(elements * (int64_t)sizeof(T) >= kStreamBytes) {}
  ~RowSink() {
    if (stream_) stream_fence();
  }
  RowSink(const RowSink&) = delete;
  RowSink& operator=(const RowSink&) = delete;

  MC_INLINE bool direct() const { return __is_same(T, C) && !stream_; }
  MC_INLINE C* place(T* to, C* scratch) const {
    if constexpr (__is_same(T, C))
      if (!stream_) return to;
    return scratch;
  }
  // Whether a kernel may store rows of W numbers at `to` past the caches itself: whole vectors.
  MC_INLINE bool streams(const T* to, int64_t W) const {
    return __is_same(T, C) && stream_ && W % Lanes<C>::n == 0 && (uintptr_t)to % kBytes == 0;
  }
  MC_INLINE void finish(T* to, const C* from, int64_t n) const {
    if constexpr (!__is_same(T, C)) {
      narrow(to, from, n);
    } else {
      if (stream_) stream_copy(to, from, n);
    }
  }

 private:
  bool stream_;
};

// ---- dots ----

// R rows by HB keys (and the rows with themselves) in registers. Every row is summed in the same order whatever its position.
template <int R, int HB, bool NORM, class C>
MC_INLINE void dots_tile(const C* const* m, int64_t W, const C* k, int64_t ldk, C* const* out, int64_t at, int64_t valid) {
  constexpr int L = Lanes<C>::n, A = HB + NORM;
  Vec<C> acc[A > 0 ? A : 1][R];
#pragma GCC unroll 8
  for (int h = 0; h < A; h++)
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) acc[h][r] = Vec<C>{};
  const auto chunk = [&](int64_t w, auto get) MC_INLINED {
    Vec<C> row[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) row[r] = get(m[r] + w);
#pragma GCC unroll 8
    for (int h = 0; h < HB; h++) {
      const Vec<C> key = load(k + h * ldk + w);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[h][r] += key * row[r];
    }
    if (NORM)
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) acc[HB][r] += row[r] * row[r];
  };
  int64_t w = 0;
  for (; w + L <= W; w += L) chunk(w, [](const C* p) { return load(p); });
  if (w < W) {
    const int part = (int)(W - w);
    chunk(w, [part](const C* p) { return load_part(p, part); });
  }
  C x[A * R + 4];
  sum_all<A * R>(&acc[0][0], x);
  for (int h = 0; h < A; h++)
    if (valid == R) std::memcpy(out[h] + at, x + h * R, R * sizeof(C));
    else
      for (int64_t r = 0; r < valid; r++) out[h][at + r] = x[h * R + r];
}

template <int R, int HB, bool NORM, class C>
MC_INLINE void dots_rows(const C* m, int64_t ld, int64_t rows, int64_t W, const C* k, int64_t ldk, C* out, int64_t ldo, C* norm2) {
  C* to[HB + 1];
  for (int h = 0; h < HB; h++) to[h] = out + h * ldo;
  to[HB] = norm2;
  for (int64_t n = 0; n < rows; n += R) {
    const int64_t valid = rows - n < R ? rows - n : R;
    const C* p[R];
    for (int r = 0; r < R; r++) p[r] = m + (n + (r < valid ? r : valid - 1)) * ld;
    dots_tile<R, HB, NORM>(p, W, k, ldk, to, n, valid);
  }
}

// out[h][n] for all heads; norm2[n] too unless it is null. Tiles fit sixteen registers.
template <class C>
inline void dots(const C* m, int64_t ld, int64_t rows, int64_t W, const C* k, int64_t ldk, int64_t H, C* out, int64_t ldo, C* norm2) {
  int64_t h = 0;
  if (norm2) {
    if (H == 0) return dots_rows<4, 0, true>(m, ld, rows, W, k, ldk, out, ldo, norm2);
    if (H == 1) return dots_rows<4, 1, true>(m, ld, rows, W, k, ldk, out, ldo, norm2);
    if (H == 2) return dots_rows<4, 2, true>(m, ld, rows, W, k, ldk, out, ldo, norm2);
    if (H == 3) return dots_rows<2, 3, true>(m, ld, rows, W, k, ldk, out, ldo, norm2);
    if (H == 4) return dots_rows<2, 4, true>(m, ld, rows, W, k, ldk, out, ldo, norm2);
    dots_rows<2, 5, true>(m, ld, rows, W, k, ldk, out, ldo, norm2);
    h = 5;
  }
  for (; H - h >= 4; h += 4) dots_rows<2, 4, false>(m, ld, rows, W, k + h * ldk, ldk, out + h * ldo, ldo, norm2);
  k += h * ldk, out += h * ldo;
  if (H - h == 3) dots_rows<4, 3, false>(m, ld, rows, W, k, ldk, out, ldo, norm2);
  else if (H - h == 2) dots_rows<4, 2, false>(m, ld, rows, W, k, ldk, out, ldo, norm2);
  else if (H - h == 1) dots_rows<4, 1, false>(m, ld, rows, W, k, ldk, out, ldo, norm2);
}

// ---- gather ----

template <int HB, int NC, class C>
MC_INLINE void gather_tile(const C* m, int64_t ld, int64_t rows, int last, const C* const* c, C* const* r) {
  constexpr int L = Lanes<C>::n;
  Vec<C> acc[HB][NC];
  for (int h = 0; h < HB; h++)
    for (int j = 0; j < NC; j++) acc[h][j] = Vec<C>{};
  if (last == L) {
    for (int64_t n = 0; n < rows; n++) {
      Vec<C> row[NC];
      for (int j = 0; j < NC; j++) row[j] = load(m + n * ld + j * L);
      for (int h = 0; h < HB; h++) {
        const Vec<C> x = splat(c[h][n]);
        for (int j = 0; j < NC; j++) acc[h][j] += x * row[j];
      }
    }
  } else {
    for (int64_t n = 0; n < rows; n++) {
      Vec<C> row[NC];
      for (int j = 0; j + 1 < NC; j++) row[j] = load(m + n * ld + j * L);
      row[NC - 1] = load_part(m + n * ld + (NC - 1) * L, last);
      for (int h = 0; h < HB; h++) {
        const Vec<C> x = splat(c[h][n]);
        for (int j = 0; j < NC; j++) acc[h][j] += x * row[j];
      }
    }
  }
  for (int h = 0; h < HB; h++)
    for (int j = 0; j < NC; j++) store(r[h] + j * L, load(r[h] + j * L) + acc[h][j]);
}

template <int HB, class C>
MC_INLINE void gather_heads(const C* m, int64_t ld, int64_t rows, int64_t W, const C* c, int64_t ldc, C* r, int64_t ldr) {
  constexpr int L = Lanes<C>::n;
  const C* cp[HB];
  for (int h = 0; h < HB; h++) cp[h] = c + h * ldc;
  for (int64_t w = 0; w < W;) {
    const int64_t left = W - w;
    C* rp[HB];
    for (int h = 0; h < HB; h++) rp[h] = r + h * ldr + w;
    constexpr int NC = HB == 1 ? 4 : 2;
    if (NC == 4 && left > 3 * L) {
      gather_tile<HB, NC == 4 ? 4 : 1>(m + w, ld, rows, left >= 4 * L ? L : (int)(left - 3 * L), cp, rp);
      w += 4 * L;
    } else if (NC == 4 && left > 2 * L) {
      gather_tile<HB, NC == 4 ? 3 : 1>(m + w, ld, rows, left >= 3 * L ? L : (int)(left - 2 * L), cp, rp);
      w += 3 * L;
    } else if (left > L) {
      gather_tile<HB, 2>(m + w, ld, rows, left >= 2 * L ? L : (int)(left - L), cp, rp);
      w += 2 * L;
    } else {
      gather_tile<HB, 1>(m + w, ld, rows, left >= L ? L : (int)left, cp, rp);
      w += L;
    }
  }
}

template <class C>
inline void gather(const C* m, int64_t ld, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, C* r, int64_t ldr) {
  int64_t h = 0;
  for (; h + 4 <= H; h += 4) gather_heads<4>(m, ld, rows, W, c + h * ldc, ldc, r + h * ldr, ldr);
  if (H - h == 3) gather_heads<3>(m, ld, rows, W, c + h * ldc, ldc, r + h * ldr, ldr);
  else if (H - h == 2) gather_heads<2>(m, ld, rows, W, c + h * ldc, ldc, r + h * ldr, ldr);
  else if (H - h == 1) gather_heads<1>(m, ld, rows, W, c + h * ldc, ldc, r + h * ldr, ldr);
}

// ---- scatter and erase_add ----

constexpr int kFewHeads = 4;  // whose writes one sweep makes

// Vectors of NC chunks of columns for HB heads stay in registers (those of three heads and more that erase, in the first cache where registers are
// few) while the rows go by; of the last chunk only `part` lanes are
// there. OWN subtracts own[n] times the row of `self` as well.
template <int HB, int NC, bool ERASE, bool OWN, bool FULL, class C>
MC_INLINE void scatter_tile(
    C* out, int64_t ldo, const C* base, int64_t ldb, int64_t rows, int part, const C* c, int64_t ldc, const C* e, const C* a, int64_t lda,
    const C* own, const C* self, int64_t lds) {
  constexpr int L = Lanes<C>::n, HA = HB > 0 ? HB : 1;
  Vec<C> av[HA][NC], ev[HA][NC];
  const C* x[HA];
#pragma GCC unroll 8
  for (int h = 0; h < HB; h++) {
    x[h] = c + h * ldc;
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) {
      av[h][j] = load(a + h * lda + j * L);
      if (ERASE) ev[h][j] = load(e + h * lda + j * L);
    }
  }
  const auto get = [part](const C* p, int j) MC_INLINED { return FULL || j + 1 < NC ? load(p + j * L) : load_part(p + j * L, part); };
  for (int64_t n = 0; n < rows; n++) {
    Vec<C> v[NC];
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) v[j] = base ? get(base + n * ldb, j) : Vec<C>{};
#pragma GCC unroll 8
    for (int h = 0; h < HB; h++) {
      const Vec<C> s = splat(x[h][n]);
      if (ERASE)
#pragma GCC unroll 4
        for (int j = 0; j < NC; j++) v[j] *= 1 - s * ev[h][j];
      if (!ERASE || HB == 1)
#pragma GCC unroll 4
        for (int j = 0; j < NC; j++) v[j] += s * av[h][j];
    }
    if (ERASE && HB > 1)  // all erasures, then all additions
#pragma GCC unroll 8
      for (int h = 0; h < HB; h++) {
        const Vec<C> s = splat(x[h][n]);
#pragma GCC unroll 4
        for (int j = 0; j < NC; j++) v[j] += s * av[h][j];
      }
    if (OWN) {
      const Vec<C> s = splat(own[n]);
#pragma GCC unroll 4
      for (int j = 0; j < NC; j++) v[j] -= s * get(self + n * lds, j);
    }
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++)
      if (FULL || j + 1 < NC) store(out + n * ldo + j * L, v[j]);
      else store_part(out + n * ldo + j * L, v[j], part);
  }
}

template <int HB, bool ERASE, bool OWN, class C>
MC_INLINE void scatter_heads(
    C* out, int64_t ldo, const C* base, int64_t ldb, int64_t rows, int64_t W, const C* c, int64_t ldc, const C* e, const C* a, int64_t lda,
    const C* own = nullptr, const C* self = nullptr, int64_t lds = 0) {
  constexpr int L = Lanes<C>::n;
  int64_t w = 0;
  for (; w + 2 * L <= W; w += 2 * L)
    scatter_tile<HB, 2, ERASE, OWN, true>(out + w, ldo, base ? base + w : base, ldb, rows, L, c, ldc, e + w, a + w, lda, own, self + w, lds);
  const int64_t left = W - w;
  if (left > L)
    scatter_tile<HB, 2, ERASE, OWN, false>(
        out + w, ldo, base ? base + w : base, ldb, rows, (int)(left - L), c, ldc, e + w, a + w, lda, own, self + w, lds);
  else if (left == L)
    scatter_tile<HB, 1, ERASE, OWN, true>(out + w, ldo, base ? base + w : base, ldb, rows, L, c, ldc, e + w, a + w, lda, own, self + w, lds);
  else if (left > 0)
    scatter_tile<HB, 1, ERASE, OWN, false>(
        out + w, ldo, base ? base + w : base, ldb, rows, (int)left, c, ldc, e + w, a + w, lda, own, self + w, lds);
}

// base may be null (zero) and may be out itself.
template <class C>
inline void scatter(C* out, int64_t ldo, const C* base, int64_t ldb, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* a, int64_t lda) {
  if (H == 0 && out != base) {
    for (int64_t n = 0; n < rows; n++)
      if (base) copy(out + n * ldo, base + n * ldb, W);
      else clear(out + n * ldo, W);
  }
  for (int64_t h = 0; h < H;) {
    const int64_t left = H - h;
    const C* ch = c + h * ldc;
    const C* ah = a + h * lda;
    if (left >= 4) scatter_heads<4, false, false>(out, ldo, base, ldb, rows, W, ch, ldc, ah, ah, lda), h += 4;
    else if (left == 3) scatter_heads<3, false, false>(out, ldo, base, ldb, rows, W, ch, ldc, ah, ah, lda), h += 3;
    else if (left == 2) scatter_heads<2, false, false>(out, ldo, base, ldb, rows, W, ch, ldc, ah, ah, lda), h += 2;
    else scatter_heads<1, false, false>(out, ldo, base, ldb, rows, W, ch, ldc, ah, ah, lda), h += 1;
    base = out, ldb = ldo;
  }
}

// scatter, minus own[n] times row n of `self`.
template <class C>
inline void scatter_own(
    C* out, int64_t ldo, const C* base, int64_t ldb, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* a, int64_t lda,
    const C* own, const C* self, int64_t lds) {
  const int64_t last = H < 6 ? H : (H - 1) % 5 + 1, before = H - last;  // the heads of the last sweep
  if (before > 0) {
    scatter(out, ldo, base, ldb, rows, W, c, ldc, before, a, lda);
    base = out, ldb = ldo;
  }
  c += before * ldc, a += before * lda;
  if (last == 5) scatter_heads<5, false, true>(out, ldo, base, ldb, rows, W, c, ldc, a, a, lda, own, self, lds);
  else if (last == 4) scatter_heads<4, false, true>(out, ldo, base, ldb, rows, W, c, ldc, a, a, lda, own, self, lds);
  else if (last == 3) scatter_heads<3, false, true>(out, ldo, base, ldb, rows, W, c, ldc, a, a, lda, own, self, lds);
  else if (last == 2) scatter_heads<2, false, true>(out, ldo, base, ldb, rows, W, c, ldc, a, a, lda, own, self, lds);
  else if (last == 1) scatter_heads<1, false, true>(out, ldo, base, ldb, rows, W, c, ldc, a, a, lda, own, self, lds);
  else scatter_heads<0, false, true>(out, ldo, base, ldb, rows, W, c, ldc, a, a, lda, own, self, lds);
}

template <class C>
inline void erase_add(
    C* out, int64_t ldo, const C* m, int64_t ldm, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* e, const C* a, int64_t lda) {
  if (H == 1) return scatter_heads<1, true, false>(out, ldo, m, ldm, rows, W, c, ldc, e, a, lda);
  if (H == 2) return scatter_heads<2, true, false>(out, ldo, m, ldm, rows, W, c, ldc, e, a, lda);
  if (H == 3) return scatter_heads<3, true, false>(out, ldo, m, ldm, rows, W, c, ldc, e, a, lda);
  if (H == 4) return scatter_heads<4, true, false>(out, ldo, m, ldm, rows, W, c, ldc, e, a, lda);
  // All erasures, then all additions.
  constexpr int L = Lanes<C>::n;
  for (int64_t n = 0; H > 0 && n < rows; n++)
    for (int64_t w = 0; w < W; w += L) {
      const int part = W - w < L ? (int)(W - w) : L;
      Vec<C> v = load_n(m + n * ldm + w, part);
      for (int64_t h = 0; h < H; h++) v *= 1 - splat(c[h * ldc + n]) * load(e + h * lda + w);
      store_n(out + n * ldo + w, v, part);
    }
  if (H > 0) m = out, ldm = ldo;
  scatter(out, ldo, m, ldm, rows, W, c, ldc, H, a, lda);
}

// ---- fused passes of a step with one write head ----

constexpr int kFusedReads = 4;  // read heads whose sums stay in registers

// Read vectors from the rows as they are written: out = m (1 - c e) + c a, r[h][w] += sum over n of k[h][n] out[n][w].
template <int RH, int NC, bool FULL, class C>
MC_INLINE void write_read_tile(
    C* out, const C* m, int64_t ld, int64_t rows, int part, const C* c, const C* e, const C* a, const C* k, int64_t ldk, C* r, int64_t ldr) {
  constexpr int L = Lanes<C>::n;
  Vec<C> acc[RH][NC], ev[NC], av[NC];
#pragma GCC unroll 4
  for (int j = 0; j < NC; j++) {
    ev[j] = load(e + j * L), av[j] = load(a + j * L);
#pragma GCC unroll 4
    for (int h = 0; h < RH; h++) acc[h][j] = Vec<C>{};
  }
  for (int64_t n = 0; n < rows; n++) {
    const Vec<C> x = splat(c[n]);
    Vec<C> v[NC];
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) {
      const bool whole = FULL || j + 1 < NC;
      v[j] = whole ? load(m + n * ld + j * L) : load_part(m + n * ld + j * L, part);
      v[j] = v[j] * (1 - x * ev[j]) + x * av[j];
      if (whole) store(out + n * ld + j * L, v[j]);
      else store_part(out + n * ld + j * L, v[j], part);
    }
#pragma GCC unroll 4
    for (int h = 0; h < RH; h++) {
      const Vec<C> y = splat(k[h * ldk + n]);
#pragma GCC unroll 4
      for (int j = 0; j < NC; j++) acc[h][j] += y * v[j];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < RH; h++)
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) store(r + h * ldr + j * L, load(r + h * ldr + j * L) + acc[h][j]);
}

template <int RH, class C>
MC_INLINE void write_read_heads(
    C* out, const C* m, int64_t rows, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, C* r, int64_t ldr) {
  constexpr int L = Lanes<C>::n;
  int64_t w = 0;
  for (; w + 2 * L <= W; w += 2 * L) write_read_tile<RH, 2, true>(out + w, m + w, W, rows, L, c, e + w, a + w, k, ldk, r + w, ldr);
  const int64_t left = W - w;
  if (left > L) write_read_tile<RH, 2, false>(out + w, m + w, W, rows, (int)(left - L), c, e + w, a + w, k, ldk, r + w, ldr);
  else if (left == L) write_read_tile<RH, 1, true>(out + w, m + w, W, rows, L, c, e + w, a + w, k, ldk, r + w, ldr);
  else if (left > 0) write_read_tile<RH, 1, false>(out + w, m + w, W, rows, (int)left, c, e + w, a + w, k, ldk, r + w, ldr);
}

// 1 <= R <= kFusedReads.
template <class C>
inline void write_read(
    C* out, const C* m, int64_t rows, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, int64_t R, C* r, int64_t ldr) {
  if (R == 1) write_read_heads<1>(out, m, rows, W, c, e, a, k, ldk, r, ldr);
  else if (R == 2) write_read_heads<2>(out, m, rows, W, c, e, a, k, ldk, r, ldr);
  else if (R == 3) write_read_heads<3>(out, m, rows, W, c, e, a, k, ldk, r, ldr);
  else write_read_heads<4>(out, m, rows, W, c, e, a, k, ldk, r, ldr);
}

// chunk(w, get, put) over the vectors of a row, of the last one perhaps a part.
template <bool STREAM, class C, class F> MC_INLINE void over_columns(int64_t W, F chunk) {
  constexpr int L = Lanes<C>::n;
  int64_t w = 0;
  for (; w + L <= W; w += L)
    chunk(w, [](const C* p) { return load(p); }, [](C* p, Vec<C> v) { STREAM ? stream_store(p, v) : store(p, v); });
  if (w < W) {
    const int part = (int)(W - w);
    chunk(w, [part](const C* p) { return load_part(p, part); }, [part](C* p, Vec<C> v) { store_part(p, v, part); });
  }
}

// Backward of write_read, R rows at a time. dr: gradients of the read vectors, g: of the rows written. With f = 1 - c e and out as above:
//   dk[h] += dr_h . out        G = g + sum over h of k_h dr_h        dm = G f
//   dc += sum over w of G (a - e m)        de -= c G m        da += c G
template <int RH, int R, bool STREAM, class C>
MC_INLINE void write_read_backward_rows(
    C* dm, const C* g, const C* m, int64_t ld, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, const C* dr,
    int64_t ldr, C* dk, C* dc, C* de, C* da) {
  Vec<C> x[R], sums[(RH + 1) * R];  // of row i: dr_h . out at h R + i, dc at RH R + i
#pragma GCC unroll 8
  for (int i = 0; i < R; i++) x[i] = splat(c[i]);
#pragma GCC unroll 16
  for (int i = 0; i < (RH + 1) * R; i++) sums[i] = Vec<C>{};
  const auto chunk = [&](int64_t w, auto get, auto put) MC_INLINED {
    const Vec<C> ev = load(e + w), av = load(a + w);
    Vec<C> dev = load(de + w), dav = load(da + w);
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      const Vec<C> mv = get(m + i * ld + w), f = 1 - x[i] * ev, v = mv * f + x[i] * av;
      Vec<C> gv = get(g + i * ld + w);
#pragma GCC unroll 4
      for (int h = 0; h < RH; h++) {
        const Vec<C> drv = load(dr + h * ldr + w);
        sums[h * R + i] += drv * v;
        gv += splat(k[h * ldk + i]) * drv;
      }
      const Vec<C> y = x[i] * gv;
      sums[RH * R + i] += gv * (av - ev * mv);
      dev -= y * mv;
      dav += y;
      put(dm + i * ld + w, gv * f);
    }
    store(de + w, dev);
    store(da + w, dav);
  };
  over_columns<STREAM, C>(W, chunk);
  C t[(RH + 1) * R + 4];
  sum_all<(RH + 1) * R>(sums, t);
  for (int i = 0; i < R; i++) {
    for (int h = 0; h < RH; h++) dk[h * ldk + i] += t[h * R + i];
    dc[i] += t[RH * R + i];
  }
}

template <int RH, bool STREAM = false, class C>
MC_INLINE void write_read_backward_heads(
    C* dm, const C* g, const C* m, int64_t rows, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, const C* dr,
    int64_t ldr, C* dk, C* dc, C* de, C* da) {
  constexpr int R = RH <= 2 ? 4 : 2;
  int64_t n = 0;
  for (; n + R <= rows; n += R)
    write_read_backward_rows<RH, R, STREAM>(
        dm + n * W, g + n * W, m + n * W, W, W, c + n, e, a, k + n, ldk, dr, ldr, dk + n, dc + n, de, da);
  for (; n < rows; n++)
    write_read_backward_rows<RH, 1, STREAM>(
        dm + n * W, g + n * W, m + n * W, W, W, c + n, e, a, k + n, ldk, dr, ldr, dk + n, dc + n, de, da);
}

// 1 <= R <= kFusedReads; dm may be g itself; dk lies like k.
template <class C>
inline void write_read_backward(
    C* dm, const C* g, const C* m, int64_t rows, int64_t W, const C* c, const C* e, const C* a, const C* k, int64_t ldk, int64_t R,
    const C* dr, int64_t ldr, C* dk, C* dc, C* de, C* da) {
  if (R == 1) write_read_backward_heads<1>(dm, g, m, rows, W, c, e, a, k, ldk, dr, ldr, dk, dc, de, da);
  else if (R == 2) write_read_backward_heads<2>(dm, g, m, rows, W, c, e, a, k, ldk, dr, ldr, dk, dc, de, da);
  else if (R == 3) write_read_backward_heads<3>(dm, g, m, rows, W, c, e, a, k, ldk, dr, ldr, dk, dc, de, da);
  else write_read_backward_heads<4>(dm, g, m, rows, W, c, e, a, k, ldk, dr, ldr, dk, dc, de, da);
}

// Backward of erase_add on a block. With f_h = 1 - c_h e_h, P = prod f_h, q_h = g m prod over h' != h of f_h':
//   dm = g P        dc[h][n] += sum over w of (a_h g - e_h q_h)        de[h] -= sum over n of c_h q_h        da[h] += sum over n of c_h g
// dm may be g itself.
template <int HB, bool STREAM, class C>
MC_INLINE void erase_add_backward_heads(
    C* dm, const C* g, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, const C* e, const C* a, int64_t lda, C* dc, int64_t lddc, C* de, C* da) {
  for (int64_t n = 0; n < rows; n++) {
    Vec<C> x[HB], sums[HB];
#pragma GCC unroll 4
    for (int h = 0; h < HB; h++) x[h] = splat(c[h * ldc + n]), sums[h] = Vec<C>{};
    const auto chunk = [&](int64_t w, auto get, auto put) MC_INLINED {
      const Vec<C> gv = get(g + n * W + w), q = gv * get(m + n * W + w);
      Vec<C> ev[HB], f[HB], before[HB], p = splat((C)1), after = p;
#pragma GCC unroll 4
      for (int h = 0; h < HB; h++) ev[h] = load(e + h * lda + w), f[h] = 1 - x[h] * ev[h], before[h] = p, p *= f[h];
      put(dm + n * W + w, gv * p);
#pragma GCC unroll 4
      for (int h = HB - 1; h >= 0; h--) {
        const Vec<C> qh = q * before[h] * after;
        sums[h] += load(a + h * lda + w) * gv;
        sums[h] -= ev[h] * qh;
        store(de + h * lda + w, load(de + h * lda + w) - x[h] * qh);
        store(da + h * lda + w, load(da + h * lda + w) + x[h] * gv);
        after *= f[h];
      }
    };
    over_columns<STREAM, C>(W, chunk);
    C t[HB + 4];
    sum_all<HB>(sums, t);
    for (int h = 0; h < HB; h++) dc[h * lddc + n] += t[h];
  }
}
// Of 1 to kFewHeads heads; with STREAM W is in whole vectors, dm aligned to them.
template <bool STREAM, class C>
inline void erase_add_backward_few(
    C* dm, const C* g, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* e, const C* a, int64_t lda, C* dc, int64_t lddc, C* de,
    C* da) {
  if (H == 1) write_read_backward_heads<0, STREAM>(dm, g, m, rows, W, c, e, a, c, 0, a, 0, dc, dc, de, da);
  else if (H == 2) erase_add_backward_heads<2, STREAM>(dm, g, m, rows, W, c, ldc, e, a, lda, dc, lddc, de, da);
  else if (H == 3) erase_add_backward_heads<3, STREAM>(dm, g, m, rows, W, c, ldc, e, a, lda, dc, lddc, de, da);
  else erase_add_backward_heads<4, STREAM>(dm, g, m, rows, W, c, ldc, e, a, lda, dc, lddc, de, da);
}
// H > 0; `scratch` holds (2 H + 1) vectors.
template <class C>
inline void erase_add_backward(
    C* dm, const C* g, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H,
    const C* e, const C* a, int64_t lda, C* dc, int64_t lddc, C* de, C* da, C* scratch) {
  if (H <= kFewHeads) return erase_add_backward_few<false>(dm, g, m, rows, W, c, ldc, H, e, a, lda, dc, lddc, de, da);
  constexpr int L = Lanes<C>::n;
  C *before = scratch, *s = scratch + (H + 1) * L;  // products of the factors before head h; row sums
  for (int64_t n = 0; n < rows; n++) {
    for (int64_t h = 0; h < H; h++) store(s + h * L, Vec<C>{});
    for (int64_t w = 0; w < W; w += L) {
      const int part = W - w < L ? (int)(W - w) : L;
      const Vec<C> gv = load_n(g + n * W + w, part), q = gv * load_n(m + n * W + w, part);
      Vec<C> p = splat((C)1);
      for (int64_t h = 0; h < H; h++) {
        store(before + h * L, p);
        p *= 1 - splat(c[h * ldc + n]) * load(e + h * lda + w);
      }
      store_n(dm + n * W + w, gv * p, part);
      Vec<C> after = splat((C)1);
      for (int64_t h = H - 1; h >= 0; h--) {
        const Vec<C> x = splat(c[h * ldc + n]), ev = load(e + h * lda + w), qh = q * load(before + h * L) * after;
        store(s + h * L, load(s + h * L) + load(a + h * lda + w) * gv - ev * qh);
        store(de + h * lda + w, load(de + h * lda + w) - x * qh);
        store(da + h * lda + w, load(da + h * lda + w) + x * gv);
        after *= 1 - x * ev;
      }
    }
    for (int64_t h = 0; h < H; h++) dc[h * lddc + n] += sum<C>(load(s + h * L));
  }
}

// gather and scatter_own in one pass: out = base + sum over h of c_h key_h - own m, dkey[h] += sum over n of c[h][n] m[n].
template <int HB, int NC, bool FULL, bool BASE, class C>
MC_INLINE void pull_push_tile(
    C* out, const C* base, const C* m, int64_t ld, int64_t rows, int part, const C* c, int64_t ldc, const C* key, C* dkey, int64_t ldk,
    const C* own) {
  constexpr int L = Lanes<C>::n;
  Vec<C> acc[HB][NC], kv[HB][NC];
#pragma GCC unroll 8
  for (int h = 0; h < HB; h++)
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) kv[h][j] = load(key + h * ldk + j * L), acc[h][j] = Vec<C>{};
  const auto get = [part](const C* p, int j) MC_INLINED { return FULL || j + 1 < NC ? load(p + j * L) : load_part(p + j * L, part); };
  for (int64_t n = 0; n < rows; n++) {
    const Vec<C> s = splat(own[n]);
    Vec<C> row[NC], v[NC];
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) row[j] = get(m + n * ld, j), v[j] = (BASE ? get(base + n * ld, j) : Vec<C>{}) - s * row[j];
#pragma GCC unroll 8
    for (int h = 0; h < HB; h++) {
      const Vec<C> x = splat(c[h * ldc + n]);
#pragma GCC unroll 4
      for (int j = 0; j < NC; j++) v[j] += x * kv[h][j], acc[h][j] += x * row[j];
    }
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++)
      if (FULL || j + 1 < NC) store(out + n * ld + j * L, v[j]);
      else store_part(out + n * ld + j * L, v[j], part);
  }
#pragma GCC unroll 8
  for (int h = 0; h < HB; h++)
#pragma GCC unroll 4
    for (int j = 0; j < NC; j++) store(dkey + h * ldk + j * L, load(dkey + h * ldk + j * L) + acc[h][j]);
}

template <int HB, bool BASE, class C>
MC_INLINE void pull_push_heads(
    C* out, const C* base, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, const C* key, C* dkey, int64_t ldk, const C* own) {
  constexpr int L = Lanes<C>::n, NC = kBytes == 64 || HB <= 2 ? 2 : 1;
  int64_t w = 0;
  for (; w + NC * L <= W; w += NC * L)
    pull_push_tile<HB, NC, true, BASE>(out + w, BASE ? base + w : base, m + w, W, rows, L, c, ldc, key + w, dkey + w, ldk, own);
  const int64_t left = W - w;
  if (NC == 2 && left > L)
    pull_push_tile<HB, 2, false, BASE>(out + w, BASE ? base + w : base, m + w, W, rows, (int)(left - L), c, ldc, key + w, dkey + w, ldk, own);
  else if (left == L) pull_push_tile<HB, 1, true, BASE>(out + w, BASE ? base + w : base, m + w, W, rows, L, c, ldc, key + w, dkey + w, ldk, own);
  else if (left > 0) pull_push_tile<HB, 1, false, BASE>(out + w, BASE ? base + w : base, m + w, W, rows, (int)left, c, ldc, key + w, dkey + w, ldk, own);
}

// base may be null (zero) and may be out itself.
template <bool BASE, class C>
MC_INLINE void pull_push_any(
    C* out, const C* base, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* key, C* dkey, int64_t ldk,
    const C* own) {
  if (H == 1) pull_push_heads<1, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own);
  else if (H == 2) pull_push_heads<2, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own);
  else if (H == 3) pull_push_heads<3, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own);
  else if (H == 4) pull_push_heads<4, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own);
  else if (H == 5) pull_push_heads<5, BASE>(out, base, m, rows, W, c, ldc, key, dkey, ldk, own);
  else {
    gather(m, W, rows, W, c, ldc, H, dkey, ldk);
    scatter_own(out, W, base, W, rows, W, c, ldc, H, key, ldk, own, m, W);
  }
}
template <class C>
inline void pull_push(
    C* out, const C* base, const C* m, int64_t rows, int64_t W, const C* c, int64_t ldc, int64_t H, const C* key, C* dkey, int64_t ldk,
    const C* own) {
  if (base) pull_push_any<true>(out, base, m, rows, W, c, ldc, H, key, dkey, ldk, own);
  else pull_push_any<false>(out, base, m, rows, W, c, ldc, H, key, dkey, ldk, own);
}

}  // namespace MC_ISA
}  // namespace memcore
