// What searches and their gradients share: candidates, distances by difference.
#pragma once

#include "addressing.h"
#include "knn_search.h"

namespace memcore {
namespace MC_ISA {

// Candidates ---------------------------------------------------------------------------------------------------------

// A candidate is one integer whose order is that of (score, row): no ties, so that every selection has one outcome.
template <class C> struct PackOf { typedef uint64_t type; };
template <> struct PackOf<double> { typedef unsigned __int128 type; };
template <class C> using Pack = typename PackOf<C>::type;

MC_INLINE uint64_t pack(float score, uint32_t row) {
  score += 0.0f;  // -0 is 0
  uint32_t u;
  std::memcpy(&u, &score, 4);
  return (uint64_t)(u ^ ((uint32_t)((int32_t)u >> 31) | 0x80000000u)) << 32 | row;
}
MC_INLINE unsigned __int128 pack(double score, uint32_t row) {
  score += 0.0;
  uint64_t u;
  std::memcpy(&u, &score, 8);
  return (unsigned __int128)(u ^ ((uint64_t)((int64_t)u >> 63) | 0x8000000000000000u)) << 32 | row;
}
MC_INLINE float score_of(uint64_t p) {
  const uint32_t o = (uint32_t)(p >> 32), u = o & 0x80000000u ? o ^ 0x80000000u : ~o;
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
MC_INLINE double score_of(unsigned __int128 p) {
  const uint64_t o = (uint64_t)(p >> 32), u = o & 0x8000000000000000u ? o ^ 0x8000000000000000u : ~o;
  double x;
  std::memcpy(&x, &u, 8);
  return x;
}
template <class P> MC_INLINE uint32_t row_of(P p) { return (uint32_t)p; }

template <class P> MC_INLINE void swap(P& x, P& y) {
  const P t = x;
  x = y, y = t;
}
template <class P> MC_INLINE void insertion_sort(P* a, int64_t n) {
  for (int64_t i = 1; i < n; i++) {
    const P x = a[i];
    int64_t j = i;
    for (; j > 0 && x < a[j - 1]; j--) a[j] = a[j - 1];
    a[j] = x;
  }
}
// Puts a pivot where it belongs, the smaller ones before it; returns its place. No branch depends on the data.
template <class P> MC_INLINE int64_t partition(P* a, int64_t n) {
  P &x = a[0], &y = a[n / 2], &z = a[n - 1];
  if (y < x) swap(x, y);
  if (z < y) swap(y, z);
  if (y < x) swap(x, y);
  const P pivot = y;
  swap(y, z);
  int64_t s = 0;
  for (int64_t i = 0; i < n - 1; i++) {
    const P v = a[i];
    a[i] = a[s], a[s] = v;
    s += v < pivot;
  }
  swap(a[s], a[n - 1]);
  return s;
}
// The m smallest come first, the greatest of them last; 0 < m <= n.
template <class P> inline void select(P* a, int64_t n, int64_t m) {
  while (n > 12) {
    const int64_t s = partition(a, n);
    if (s == m - 1) return;
    if (s > m - 1) n = s;
    else a += s + 1, n -= s + 1, m -= s + 1;
  }
  insertion_sort(a, n);
}
template <class P> inline void sort(P* a, int64_t n) {
  while (n > 16) {
    const int64_t s = partition(a, n);
    if (s < n - s) sort(a, s), a += s + 1, n -= s + 1;
    else sort(a + s + 1, n - s - 1), n = s;
  }
  insertion_sort(a, n);
}

// Distances ----------------------------------------------------------------------------------------------------------

// Sixteen sums in double whatever the instruction set: the same neighbours everywhere. Eight of them, in vectors of the machine's own width:
// GCC takes wider ones apart through memory.
struct Eight {
  static constexpr int L = Lanes<double>::n, kParts = 8 / L;
  Vec<double> part[kParts];

  template <class F> static MC_INLINE Eight of(F f) {
    Eight x;
#pragma GCC unroll 4
    for (int i = 0; i < kParts; i++) x.part[i] = f(i);
    return x;
  }
};
MC_INLINE Eight operator+(const Eight& a, const Eight& b) {
  return Eight::of([&](int i) MC_INLINED { return a.part[i] + b.part[i]; });
}
MC_INLINE Eight operator-(const Eight& a, const Eight& b) {
  return Eight::of([&](int i) MC_INLINED { return a.part[i] - b.part[i]; });
}
MC_INLINE Eight operator*(const Eight& a, const Eight& b) {
  return Eight::of([&](int i) MC_INLINED { return a.part[i] * b.part[i]; });
}
MC_INLINE void operator+=(Eight& a, const Eight& b) { a = a + b; }
MC_INLINE void operator*=(Eight& a, double x) {
  a = Eight::of([&](int i) MC_INLINED { return a.part[i] * x; });
}
MC_INLINE void load8(const double* p, Eight& to) {
  to = Eight::of([&](int i) MC_INLINED { return load(p + i * Eight::L); });
}
MC_INLINE void load8(const float* p, Eight& to) {
  to = Eight::of([&](int i) MC_INLINED {
#if defined(__AVX512F__)
    return (Vec<double>)_mm512_cvtps_pd(_mm256_loadu_ps(p + i * Eight::L));
#elif defined(__AVX2__)
    return (Vec<double>)_mm256_cvtps_pd(_mm_loadu_ps(p + i * Eight::L));
#else
    return Vec<double>{p[i * Eight::L], p[i * Eight::L + 1]};
#endif
  });
}
MC_INLINE double total(Eight x) {  // of halves: numbers four, two and one apart
  double lane[Eight::L];
  for (int n = Eight::kParts / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) x.part[i] += x.part[i + n];
#pragma GCC unroll 8
  for (int i = 0; i < Eight::L; i++) lane[i] = x.part[0][i];
#pragma GCC unroll 3
  for (int n = Eight::L / 2; n > 0; n /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) lane[i] += lane[i + n];
  return lane[0];
}

// What f(sum, q_d, k_d) adds up over d: f gets vectors, and numbers in the tail.
template <class C, class F> MC_INLINE double sum_pairs(const double* q, const C* k, int64_t D, F f) {
  Eight s{}, r{};  // two, so that a sum need not wait for the one before
  int64_t d = 0;
  const auto step = [&](Eight& to, int64_t at) MC_INLINED {
    Eight x, y;
    load8(q + at, x), load8(k + at, y);
    f(to, x, y);
  };
  for (; d + 16 <= D; d += 16) step(s, d), step(r, d + 8);
  if (d + 8 <= D) step(s, d), d += 8;
  double t = total(s + r);
  for (; d < D; d++) {
    double y = (double)k[d];
    f(t, q[d], y);
  }
  return t;
}
#define MC_SUM(...) [&](auto& s, const auto& x, auto& y) MC_INLINED { (void)x, __VA_ARGS__; }

// |x| of a query or key, as cosine takes it.
struct Norm {
  double inverse;  // 1 / max(|x|, eps)
  double square;   // of the vector divided by that
  bool zero, small;
};
template <class C> MC_INLINE Norm norm_of(double n2) {
  const bool zero = (C)n2 == 0, small = n2 < kEps * kEps;
  return Norm{small ? 1 / kEps : 1 / __builtin_sqrt(n2), small ? n2 / (kEps * kEps) : 1 + (n2 - n2), zero, small};
}

// The distance of one query from rows, rounded to C; what is not finite is +inf. `q` is padded by nothing and may be overwritten by
// cosine with its unit vector.
template <class C> struct Distance {
  int metric;
  int64_t D;
  const double* q;
  Norm own;

  MC_INLINE void start(int metric_, int64_t D_, double* q_, double n2) {
    metric = metric_, D = D_, q = q_;
    if (metric != kCosine) return;
    own = norm_of<C>(n2);
    for (int64_t d = 0; d < D; d++) q_[d] *= own.inverse;
  }
  MC_INLINE double exact(const C* k) const {
    if (metric == kL2) return sum_pairs(q, k, D, MC_SUM(s += (x - y) * (x - y)));
    if (metric == kIp) return -sum_pairs(q, k, D, MC_SUM(s += x * y));
    const double n2 = squared(k);
    const Norm n = norm_of<C>(n2);
    if (n2 - n2 != 0) return n2 - n2;
    if (own.zero || n.zero) return 1;
    const double i = n.inverse;
    const double sum = sum_pairs(q, k, D, [&](auto& s, const auto& x, auto& y) MC_INLINED {
      y *= i;
      __asm__("" : "+m"(y));  // rounded as the query's unit vector was: no fused multiply-add
      s += (x - y) * (x - y);
    });
    const double half = 0.5 * sum + (1 - 0.5 * (own.square + n.square));
    return half < 1e-30 ? 0 : half;  // rounding of parallel vectors
  }
  MC_INLINE double squared(const C* k) const {
    return sum_pairs(q, k, D, MC_SUM(s += y * y));
  }
  MC_INLINE C operator()(const C* k) const {
    const C d = (C)exact(k);
    return d - d == 0 ? d : infinity<C>();
  }
};

// Row `n` in the accumulation type: itself, or a copy in `to`.
template <class T> MC_INLINE const Acc<T>* wide_row(const T* keys, int64_t n, int64_t D, Acc<T>* to) {
  if constexpr (__is_same(T, Acc<T>)) return keys + n * D;
  widen(to, keys + n * D, D);
  return to;
}
// A query in double and its squared norm; false if any of it is not finite.
template <class T> MC_INLINE bool wide_query(const T* from, int64_t D, double* to, double* n2) {
  double bad = 0;
  for (int64_t d = 0; d < D; d++) {
    to[d] = (double)wide(from[d]);
    bad += to[d] - to[d];
  }
  *n2 = sum_pairs(to, to, D, MC_SUM(s += y * y));  // in the order of Distance::squared
  return bad == 0;
}

}  // namespace MC_ISA
}  // namespace memcore
