// Blocks of a matrix turned over in registers.
#pragma once

#include <utility>

#include "vec.h"

namespace memcore {
namespace MC_ISA {

// The lanes of a with bit `s` change places with those of b without it.
template <class C, int... l> MC_INLINE void exchange(Vec<C>& a, Vec<C>& b, int s, std::integer_sequence<int, l...>) {
  const IVec<C> low{((l & s) ? (int)sizeof...(l) + l - s : l)...}, high{((l & s) ? (int)sizeof...(l) + l : l + s)...};
#if defined(__clang__)
  Vec<C> x, y;
  for (int i = 0; i < (int)sizeof...(l); i++) {
    x[i] = low[i] < (int)sizeof...(l) ? a[low[i]] : b[low[i] - (int)sizeof...(l)];
    y[i] = high[i] < (int)sizeof...(l) ? a[high[i]] : b[high[i] - (int)sizeof...(l)];
  }
#else
  const Vec<C> x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
#endif
  a = x, b = y;
}

// As many vectors as they have lanes.
template <class C> MC_INLINE void transpose(Vec<C> (&v)[Lanes<C>::n]) {
  constexpr int L = Lanes<C>::n;
#pragma GCC unroll 4
  for (int s = 1; s < L; s *= 2)
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (!(i & s)) exchange<C>(v[i], v[i + s], s, std::make_integer_sequence<int, L>());
}

// to[w ldt + i] = from[i ldf + w] for w < W and i < rows, 0 for the lanes i behind.
template <class C> inline void columns_to_vectors(C* to, int64_t ldt, const C* from, int64_t ldf, int64_t rows, int64_t W) {
  constexpr int L = Lanes<C>::n;
  for (int64_t w = 0; w < W; w += L) {
    const int n = W - w < L ? (int)(W - w) : L;
    Vec<C> v[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) v[i] = i >= rows ? Vec<C>{} : n == L ? load(from + i * ldf + w) : load_n(from + i * ldf + w, n);
    transpose<C>(v);
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (i < n) store(to + (w + i) * ldt, v[i]);
  }
}
// The way back: from[i ldf + w] = to[w ldt + i]; PAST the caches, where whole vectors are stored to aligned places.
template <bool PAST, class C> inline void vectors_to_columns(C* from, int64_t ldf, const C* to, int64_t ldt, int64_t rows, int64_t W) {
  constexpr int L = Lanes<C>::n;
  for (int64_t w = 0; w < W; w += L) {
    const int n = W - w < L ? (int)(W - w) : L;
    Vec<C> v[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; i++) v[i] = i < n ? load(to + (w + i) * ldt) : Vec<C>{};
    transpose<C>(v);
#pragma GCC unroll 16
    for (int i = 0; i < L; i++)
      if (i < rows) {
        if (PAST) stream_store(from + i * ldf + w, v[i]);
        else if (n == L) store(from + i * ldf + w, v[i]);
        else store_n(from + i * ldf + w, v[i], n);
      }
  }
}

}  // namespace MC_ISA
}  // namespace memcore
