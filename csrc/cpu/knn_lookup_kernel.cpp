#include "knn_lookup.h"

#include "knn.h"

namespace memcore {
namespace MC_ISA {
namespace {

MC_INLINE bool finite(double x) { return x - x == 0; }

// Weights of distances d [k], ascending; 0 where they are not finite. The nearest distance is a factor of all kernels, which keeps
// them in range.
template <class C> MC_INLINE void weigh(const KnnRead& a, const C* d, double* w) {
  const double nearest = a.k > 0 ? (double)d[0] : 0;
  const auto each = [&](auto kernel) {
    for (int64_t i = 0; i < a.k; i++) w[i] = finite((double)d[i]) ? kernel((double)d[i]) : 0;
  };
  if (a.kernel == kInverseDistance) each([&](double x) { return (nearest + a.delta) / (x + a.delta); });
  else if (a.kernel == kSoftmax) each([&](double x) { return __builtin_exp((nearest - x) / a.delta); });
  else each([](double) { return 1.0; });
  double sum = 0;
  for (int64_t i = 0; i < a.k; i++) sum += w[i];
  for (int64_t i = 0; i < a.k; i++) w[i] = sum > 0 ? w[i] / sum : 0;
}

// to += x * row
template <class T> MC_INLINE void add_row(Acc<T>* __restrict to, Acc<T> x, const T* row, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += x * wide(row[i]);
}
// to += x * (a - b)
template <class T> MC_INLINE void add_difference(Acc<T>* __restrict to, Acc<T> x, const T* a, const T* b, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] += x * (wide(a[i]) - wide(b[i]));
}
template <class T> MC_INLINE void put_row(T* to, const Acc<T>* from, int64_t n) {
  for (int64_t i = 0; i < n; i++) put(to + i, from[i]);
}

template <class T> void read(const KnnRead& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  double* w;
  C* sum;
  Arena arena([&](Arena& x) { x.take(w, a.k), x.take(sum, a.V); });
  for (int64_t i = begin; i < end; i++) {
    const C* d = (const C*)a.found + i * a.k;
    const int64_t* rows = a.indices + i * a.k;
    T *distances = (T*)a.distances + i * a.k, *weights = (T*)a.weights + i * a.k, *output = (T*)a.output + i * a.V;
    const bool lost = a.k > 0 && d[0] != d[0];
    weigh(a, d, w);
    fill(sum, a.V, lost ? (C)__builtin_nan("") : (C)0);
    for (int64_t j = 0; j < a.k; j++) {
      put(distances + j, d[j]), put(weights + j, lost ? d[j] : (C)w[j]);
      if (finite((double)d[j])) add_row(sum, (C)w[j], (const T*)a.values + (i / a.Q * a.N + rows[j]) * a.V, a.V);
    }
    put_row(output, sum, a.V);
  }
}

// Asks for the key and value of a neighbour, [A, Q, K], in the dictionary whose first row is `first`.
template <class T> MC_INLINE void fetch(const KnnRead& a, int64_t first, int64_t place) {
  if (a.indices[place] < 0) return;
  const int64_t row = first + a.indices[place];
  const auto lines = [](const T* p, int64_t n) {
    for (int64_t i = 0; i < n; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(p + i, 0, 3);
  };
  lines((const T*)a.keys + row * a.D, a.D);
  if (a.kernel != kSearchAlone) lines((const T*)a.values + row * a.V, a.V);
}

// One query and one dictionary: slopes of its neighbours, and its gradient, added to dq.
template <class T> struct Slopes {
  typedef Acc<T> C;
  const KnnRead& a;
  double *q, *w, *dw, *slope;
  C *row, *d, *dq;
  Distance<C> distance;

  void neighbours(int64_t i, const T* query) {
    const int64_t* rows = a.indices + i * a.k;
    const int64_t first = i / a.Q * a.N;
    C *to_query = (C*)a.to_query + i * a.k, *to_key = (C*)a.to_key + i * a.k, *weight = (C*)a.weight + i * a.k;
    double n2;
    const bool lost = !wide_query(query, a.D, q, &n2);
    distance.start(a.metric, a.D, q, n2);
    for (int64_t j = 0; j < a.k; j++) {
      to_query[j] = to_key[j] = weight[j] = 0;
      d[j] = lost || rows[j] < 0 ? infinity<C>() : distance(wide_row((const T*)a.keys, first + rows[j], a.D, row));
      slope[j] = a.grad_distances && finite((double)d[j]) ? (double)wide(((const T*)a.grad_distances)[i * a.k + j]) : 0;
    }
    if (a.kernel != kSearchAlone) through_weights(i, first, weight);
    for (int64_t j = 0; j < a.k; j++) {
      if (slope[j] == 0 || !finite((double)d[j])) continue;
      const T* key = (const T*)a.keys + (first + rows[j]) * a.D;
      if (a.metric == kL2) {
        to_query[j] = to_key[j] = (C)(-2 * slope[j]);
        add_difference(dq, (C)(2 * slope[j]), query, key, a.D);
      } else if (a.metric == kIp) {
        to_query[j] = (C)-slope[j];
        add_row(dq, (C)-slope[j], key, a.D);
      } else {
        const Norm &u = distance.own, v = norm_of<C>(distance.squared(wide_row(key, 0, a.D, row)));
        if (u.zero || v.zero || d[j] == 0) continue;
        const double cosine = 1 - (double)d[j], both = slope[j] * u.inverse * v.inverse;
        to_query[j] = (C)-both;
        to_key[j] = v.small ? 0 : (C)(-slope[j] * cosine * v.inverse * v.inverse);
        const C own = u.small ? 0 : (C)(slope[j] * cosine * u.inverse * u.inverse);
        for (int64_t x = 0; x < a.D; x++) dq[x] += own * wide(query[x]) - (C)both * wide(key[x]);
      }
    }
  }

  // Asks for the neighbours of an item.
  void ask(int64_t i) const {
    for (int64_t j = 0; j < a.k; j++) fetch<T>(a, i / a.Q * a.N, i * a.k + j);
  }

  // Adds what output and weights say to the slopes.
  void through_weights(int64_t i, int64_t first, C* weight) {
    weigh(a, d, w);
    const T* g = (const T*)a.grad_output + i * a.V;
    double mean = 0;
    for (int64_t j = 0; j < a.k; j++) {
      weight[j] = (C)w[j], dw[j] = 0;
      if (!finite((double)d[j])) continue;
      if (a.grad_weights) dw[j] += (double)wide(((const T*)a.grad_weights)[i * a.k + j]);
      if (a.grad_output) {
        const T* v = (const T*)a.values + (first + a.indices[i * a.k + j]) * a.V;
        double dot = 0;
        for (int64_t x = 0; x < a.V; x++) dot += (double)wide(g[x]) * (double)wide(v[x]);
        dw[j] += dot;
      }
      mean += w[j] * dw[j];
    }
    if (a.kernel == kUniform) return;
    const double of_distance = a.kernel == kInverseDistance ? 1 : 0;
    for (int64_t j = 0; j < a.k; j++) slope[j] -= w[j] != 0 ? w[j] * (dw[j] - mean) / (of_distance * (double)d[j] + a.delta) : 0;
  }
};

template <class T> void slopes(const KnnRead& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  Slopes<T> s{a, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, {}};
  Arena arena([&](Arena& x) {
    x.take(s.q, a.D), x.take(s.w, a.k), x.take(s.dw, a.k), x.take(s.slope, a.k), x.take(s.row, a.D), x.take(s.d, a.k), x.take(s.dq, a.D);
  });
  const int64_t each = a.query_stride ? 1 : a.A;  // dictionaries that a query asks
  const auto item = [&](int64_t x) { return a.query_stride ? x : x % each * a.Q + x / each; };
  if (begin * each < end * each) s.ask(item(begin * each));
  for (int64_t i = begin; i < end; i++) {
    const T* query = (const T*)a.query + i * a.D;
    fill(s.dq, a.D, (C)0);
    for (int64_t x = i * each; x < (i + 1) * each; x++) {
      if (x + 1 < end * each) s.ask(item(x + 1));
      s.neighbours(item(x), query);
    }
    put_row((T*)a.dquery + i * a.D, s.dq, a.D);
  }
}

template <class T> void scatter(const KnnRead& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  constexpr bool same = __is_same(T, C);
  const auto first_of = [&](int64_t i) { return a.A == 1 ? 0 : i / a.Q * a.N; };
  C *dk, *dv;
  Arena arena([&](Arena& x) { x.take(dk, a.D), x.take(dv, a.V); });
  for (int64_t u = begin; u < end; u++) {
    if (u + 8 < end) fetch<T>(a, first_of(a.places[a.starts[u + 8]] / a.k), a.places[a.starts[u + 8]]);
    const int64_t to = a.targets ? a.targets[u] : u;
    T *keys_to = (T*)a.dkeys + to * a.D, *values_to = (T*)a.dvalues + to * a.V;
    if constexpr (same) dk = keys_to, dv = values_to;
    fill(dk, a.D, (C)0);
    if (a.kernel != kSearchAlone) fill(dv, a.V, (C)0);
    for (int64_t p = a.starts[u]; p < a.starts[u + 1]; p++) {
      const int64_t place = a.places[p], i = place / a.k;
      const T* query = (const T*)a.query + (a.query_stride ? i : i % a.Q) * a.D;
      const T* key = (const T*)a.keys + (first_of(i) + a.indices[place]) * a.D;
      const C x = ((const C*)a.to_query)[place], y = ((const C*)a.to_key)[place], w = ((const C*)a.weight)[place];
      if (a.metric == kL2 && x != 0) {
        add_difference(dk, x, query, key, a.D);
      } else if (x != 0) {
        add_row(dk, x, query, a.D);
        if (y != 0) add_row(dk, -y, key, a.D);
      }
      if (a.grad_output && w != 0) add_row(dv, w, (const T*)a.grad_output + i * a.V, a.V);
    }
    if constexpr (!same) {
      put_row(keys_to, dk, a.D);
      if (a.kernel != kSearchAlone) put_row(values_to, dv, a.V);
    }
  }
}

}  // namespace

void knn_round(const KnnRead& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) {
    typedef decltype(t) T;
    put_row((T*)a.distances + begin * a.k, (const Acc<T>*)a.found + begin * a.k, (end - begin) * a.k);
  });
}
void knn_read(const KnnRead& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { read<decltype(t)>(a, begin, end); });
}
void knn_slopes(const KnnRead& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { slopes<decltype(t)>(a, begin, end); });
}
void knn_scatter(const KnnRead& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { scatter<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
