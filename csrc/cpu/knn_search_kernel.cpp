#include "knn.h"

namespace memcore {
namespace MC_ISA {
namespace {

constexpr int kMaxVectors = 3;                         // of queries in a register tile
constexpr int kAlongTile = kBytes == 64 ? 16 : 8;      // rows times queries of a tile along the rows
constexpr int64_t kBlockBytes = 96 * 1024;             // of rows that all queries see before the next
constexpr int64_t kBlockRows = 48;                     // a block is a multiple of it, and so of every tile's rows
constexpr int64_t kFewRows = 64;                       // distances by difference are as quick then

template <class C> constexpr double kUnit = sizeof(C) == 4 ? 0x1p-24 : 0x1p-53;
template <class C> constexpr double kTiny = sizeof(C) == 4 ? 0x1p-126 : 0x1p-1022;
template <class C> constexpr double kHugeSquare = sizeof(C) == 4 ? 0x1p100 : 0x1p900;

// Relative error of a sum of D products in the accumulation type, norms included, with room to spare.
template <class C> MC_INLINE double relative_error(int64_t D) { return (double)(2 * D + 16) * kUnit<C>; }

#if defined(__AVX512F__)
MC_INLINE uint32_t below(Vec<float> x, Vec<float> t) { return _mm512_cmp_ps_mask((__m512)x, (__m512)t, _CMP_LT_OQ); }
MC_INLINE uint32_t below(Vec<double> x, Vec<double> t) { return _mm512_cmp_pd_mask((__m512d)x, (__m512d)t, _CMP_LT_OQ); }
#elif defined(__AVX2__)
MC_INLINE uint32_t below(Vec<float> x, Vec<float> t) { return (uint32_t)_mm256_movemask_ps((__m256)(x < t)); }
MC_INLINE uint32_t below(Vec<double> x, Vec<double> t) { return (uint32_t)_mm256_movemask_pd((__m256d)(x < t)); }
#elif defined(__SSE2__)
MC_INLINE uint32_t below(Vec<float> x, Vec<float> t) { return (uint32_t)_mm_movemask_ps((__m128)(x < t)); }
MC_INLINE uint32_t below(Vec<double> x, Vec<double> t) { return (uint32_t)_mm_movemask_pd((__m128d)(x < t)); }
#else
template <class V> MC_INLINE uint32_t below(V x, V t) {
  uint32_t bits = 0;
  for (int i = 0; i < (int)(sizeof(V) / sizeof(x[0])); i++) bits |= (uint32_t)(x[i] < t[i]) << i;
  return bits;
}
#endif

// Each query's best candidates so far: all rows whose score is below `theta`, and some more.
template <class C> struct Lists {
  C* theta;
  int32_t* size;
  Pack<C>* data;
  int64_t capacity, keep;

  MC_INLINE void push(int64_t q, C score, int64_t row) {
    if (!(score < theta[q])) return;
    data[q * capacity + size[q]] = pack(score, (uint32_t)row);
    if (__builtin_expect(++size[q] == capacity, 0)) shrink(q);
  }
  __attribute__((noinline)) void shrink(int64_t q) {
    Pack<C>* list = data + q * capacity;
    select(list, size[q], keep);
    theta[q] = score_of(list[keep - 1]);
    size[q] = (int32_t)keep;
  }
};

enum State : uint8_t { kFine, kLost, kHuge };  // kLost: NaN or Inf in the query; kHuge: its products may overflow

// A job's arrays in the scratch.
template <class C> struct Job {
  int64_t lanes, bytes = 0;  // queries, padded to whole vectors
  C *packed, *theta, *slack, *thetas;
  uint8_t* state;
  int32_t* sizes;
  Pack<C>* lists;

  Job(const KnnArgs& a, char* base) : lanes(padded<C>(a.chunk)) {
    take(base, packed, lanes * padded<C>(a.D));
    take(base, theta, lanes), take(base, slack, lanes), take(base, state, lanes);
    take(base, thetas, a.shards * lanes), take(base, sizes, a.shards * lanes), take(base, lists, a.shards * lanes * a.capacity);
  }
  template <class X> void take(char* base, X*& to, int64_t n) {
    to = (X*)(base + bytes);
    bytes += round_up(n * (int64_t)sizeof(X), 64);
  }
  Lists<C> shard(const KnnArgs& a, int64_t s) const {
    return Lists<C>{thetas + s * lanes, sizes + s * lanes, lists + s * lanes * a.capacity, a.capacity, a.keep};
  }
};
template <class C> MC_INLINE Job<C> job_of(const KnnArgs& a, int64_t job) { return Job<C>(a, a.scratch + (job - a.first) * a.scratch_size); }

struct Queries {
  int64_t a, first, n;
};
MC_INLINE Queries queries_of(const KnnArgs& a, int64_t job) {
  const int64_t first = job % a.chunks * a.chunk;
  return Queries{job / a.chunks, first, a.Q - first < a.chunk ? a.Q - first : a.chunk};
}
template <class T> MC_INLINE const T* query_of(const KnnArgs& a, int64_t dictionary, int64_t q) {
  return (const T*)a.query + dictionary * a.query_stride + q * a.D;
}

// Vectors of queries in panel p of the job, and the first of them.
MC_INLINE int64_t panels_of(int64_t vectors) { return (vectors + kMaxVectors - 1) / kMaxVectors; }
MC_INLINE int64_t panel_start(int64_t vectors, int64_t p) { return vectors * p / panels_of(vectors); }

// Queries as the scan wants them ----------------------------------------------------------------------------------------

template <class T> void prepare(const KnnArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  constexpr int L = Lanes<C>::n;
  double* wide_q;
  Arena arena([&](Arena& x) { x.take(wide_q, a.D); });
  for (int64_t i = begin; i < end; i++) {
    const Job<C> job = job_of<C>(a, i);
    const Queries mine = queries_of(a, i);
    const int64_t vectors = job.lanes / L, Dp = padded<C>(a.D);
    clear(job.packed, job.lanes * Dp);
    for (int64_t q = 0; q < job.lanes; q++) {
      job.theta[q] = -infinity<C>(), job.slack[q] = 0, job.state[q] = kLost;
      if (q >= mine.n) continue;
      double n2;
      if (!wide_query(query_of<T>(a, mine.a, mine.first + q), a.D, wide_q, &n2)) continue;
      job.state[q] = kHuge;
      if (!(n2 < kHugeSquare<C>)) continue;
      job.state[q] = kFine, job.theta[q] = infinity<C>();
      job.slack[q] = (C)(2.1 * relative_error<C>(a.D) * __builtin_sqrt(n2));
      const double factor = a.metric == kCosine ? -norm_of<C>(n2).inverse : a.metric == kIp ? -1 : a.lanes ? -2 : 1;
      if (a.lanes) {
        const int64_t v = q / L;
        int64_t p = v * panels_of(vectors) / vectors;
        while (panel_start(vectors, p + 1) <= v) p++;
        const int64_t start = panel_start(vectors, p), width = (panel_start(vectors, p + 1) - start) * L;
        C* to = job.packed + start * L * a.D + (q - start * L);
        for (int64_t d = 0; d < a.D; d++) to[d * width] = (C)(factor * wide_q[d]);
      } else {
        for (int64_t d = 0; d < a.D; d++) job.packed[q * Dp + d] = (C)(factor * wide_q[d]);
      }
    }
  }
}

// The scan ---------------------------------------------------------------------------------------------------------------
// Scores, of which the smallest are wanted: |k|^2 - 2 q.k or |q - k|^2 (l2), -q.k / (|q| |k|) (cosine), a lower bound of -q.k (ip).

// A block of rows with what their scores need: squared norms (l2), inverse norms (cosine), norms (ip); NaN keeps a row out.
template <class C> struct Block {
  const C *rows, *info;
  int64_t first, n;
};

template <class C> __attribute__((noinline)) void emit(Lists<C>& lists, int64_t q, Vec<C> scores, uint32_t hits, int64_t row) {
  C x[Lanes<C>::n];
  store(x, scores);
  for (; hits; hits &= hits - 1) {
    const int lane = __builtin_ctz(hits);
    lists.push(q + lane, x[lane], row);
  }
}

// R rows by NV vectors of queries.
template <int R, int NV, class C>
MC_INLINE void across_tile(const KnnArgs& a, Lists<C>& lists, const C* rows, const C* info, const C* b, const C* slack, int64_t q, int64_t row) {
  constexpr int L = Lanes<C>::n;
  Vec<C> s[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) s[r][j] = a.metric == kL2 ? splat(info[r]) : Vec<C>{};
  for (int64_t d = 0; d < a.D; d++) {
    Vec<C> x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) x[j] = load(b + (d * NV + j) * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vec<C> k = splat(rows[r * a.D + d]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) s[r][j] += k * x[j];
    }
  }
  if (a.metric == kCosine) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) s[r][j] *= splat(info[r]);
  } else if (a.metric == kIp) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) s[r][j] -= splat(info[r]) * load(slack + j * L);
  }
#pragma GCC unroll 4
  for (int j = 0; j < NV; j++) {
    const Vec<C> theta = load(lists.theta + q + j * L);
    Vec<C> least = theta;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) least = running_min(least, s[r][j]);
    if (!below(least, theta)) continue;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      if (const uint32_t hits = below(s[r][j], theta)) emit<C>(lists, q + j * L, s[r][j], hits, row + r);
  }
}

template <int NV, class C> MC_INLINE void across_panel(const KnnArgs& a, Lists<C>& lists, const Block<C>& block, const C* b, const C* slack, int64_t q, bool fetch) {
  constexpr int R = kBytes == 64 ? (NV == 3 ? 8 : NV == 2 ? 12 : 16) : (NV == 3 ? 4 : NV == 2 ? 6 : 8);
  int64_t r = 0;
  for (; r + R <= block.n; r += R) {
    const C* rows = block.rows + r * a.D;
    if (fetch)
      for (int64_t i = 0; i < R * a.D; i += 64 / (int64_t)sizeof(C)) __builtin_prefetch(rows + 2 * R * a.D + i, 0, 2);
    across_tile<R, NV>(a, lists, rows, block.info + r, b, slack, q, block.first + r);
  }
  for (; r < block.n; r++) across_tile<1, NV>(a, lists, block.rows + r * a.D, block.info + r, b, slack, q, block.first + r);
}

template <class C> void across(const KnnArgs& a, const Job<C>& job, Lists<C>& lists, const Block<C>& block) {
  constexpr int L = Lanes<C>::n;
  const int64_t vectors = job.lanes / L;
  for (int64_t p = 0; p < panels_of(vectors); p++) {
    const int64_t start = panel_start(vectors, p), q = start * L;
    const C *b = job.packed + q * a.D, *slack = job.slack + q;
    switch (panel_start(vectors, p + 1) - start) {
      case 3: across_panel<3>(a, lists, block, b, slack, q, p == 0); break;
      case 2: across_panel<2>(a, lists, block, b, slack, q, p == 0); break;
      default: across_panel<1>(a, lists, block, b, slack, q, p == 0);
    }
  }
}

// R rows by QR queries along the rows; out [QR][R] has room for 4 more.
template <int R, int QR, bool L2, class C> MC_INLINE void along_sums(int64_t D, const C* rows, const C* queries, int64_t Dp, C* out) {
  constexpr int L = Lanes<C>::n;
  Vec<C> s[QR * R];
#pragma GCC unroll 16
  for (int i = 0; i < QR * R; i++) s[i] = Vec<C>{};
  const auto step = [&](int64_t d, auto get) __attribute__((always_inline)) {
    Vec<C> x[QR];
#pragma GCC unroll 4
    for (int j = 0; j < QR; j++) x[j] = load(queries + j * Dp + d);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const Vec<C> k = get(rows + r * D + d);
#pragma GCC unroll 4
      for (int j = 0; j < QR; j++) {
        if (L2) {
          const Vec<C> y = k - x[j];
          s[j * R + r] += y * y;
        } else {
          s[j * R + r] += k * x[j];
        }
      }
    }
  };
  int64_t d = 0;
  for (; d + L <= D; d += L) step(d, [](const C* p) __attribute__((always_inline)) { return load(p); });
  if (d < D) step(d, [&](const C* p) __attribute__((always_inline)) { return load_part(p, (int)(D - d)); });
  sum_all<QR * R>(s, out);
}

template <int R, int QR, class C> MC_INLINE void along_tile(const KnnArgs& a, const Job<C>& job, Lists<C>& lists, const Block<C>& block, int64_t r, int64_t q) {
  constexpr int L = Lanes<C>::n, n = R * QR;
  const int64_t Dp = padded<C>(a.D);
  const C *rows = block.rows + r * a.D, *queries = job.packed + q * Dp;
  alignas(64) C out[n + 4 < L ? L : n + 4], limit[n < L ? L : n];
  if (a.metric == kL2) along_sums<R, QR, true>(a.D, rows, queries, Dp, out);
  else along_sums<R, QR, false>(a.D, rows, queries, Dp, out);
#pragma GCC unroll 4
  for (int j = 0; j < QR; j++) {
    const C theta = lists.theta[q + j], slack = job.slack[q + j];
    for (int i = 0; i < R; i++) {
      limit[j * R + i] = theta;
      if (a.metric == kCosine) out[j * R + i] *= block.info[r + i];
      else if (a.metric == kIp) out[j * R + i] -= block.info[r + i] * slack;
    }
  }
  if constexpr (n % L == 0) {
    for (int v = 0; v < n; v += L)
      for (uint32_t hits = below(load(out + v), load(limit + v)); hits; hits &= hits - 1) {
        const int i = v + __builtin_ctz(hits);
        lists.push(q + i / R, out[i], block.first + r + i % R);
      }
  } else {
    for (int i = 0; i < n; i++) lists.push(q + i / R, out[i], block.first + r + i % R);
  }
}

template <int QR, class C> MC_INLINE void along_panel(const KnnArgs& a, const Job<C>& job, Lists<C>& lists, const Block<C>& block, int64_t q) {
  constexpr int R = kAlongTile / QR;
  int64_t r = 0;
  for (; r + R <= block.n; r += R) {
    for (int64_t i = 0; i < R * a.D; i += 64 / (int64_t)sizeof(C)) __builtin_prefetch(block.rows + (r + 2 * R) * a.D + i, 0, 2);
    along_tile<R, QR>(a, job, lists, block, r, q);
  }
  for (; r < block.n; r++) along_tile<1, QR>(a, job, lists, block, r, q);
}

template <class C> void along(const KnnArgs& a, const Job<C>& job, int64_t queries, Lists<C>& lists, const Block<C>& block) {
  int64_t q = 0;
  for (; q + 4 <= queries; q += 4) along_panel<4>(a, job, lists, block, q);
  if (q + 2 <= queries) along_panel<2>(a, job, lists, block, q), q += 2;
  if (q < queries) along_panel<1>(a, job, lists, block, q);
}

template <class C> MC_INLINE C squared_norm(const C* row, int64_t D) {
  constexpr int L = Lanes<C>::n;
  Vec<C> s{};
  int64_t d = 0;
  for (; d + L <= D; d += L) s += load(row + d) * load(row + d);
  if (d < D) {
    const Vec<C> x = load_part(row + d, (int)(D - d));
    s += x * x;
  }
  return sum<C>(s);
}

// A block's `info`. A finite row whose products may overflow is everybody's candidate.
template <class C> MC_INLINE void describe(const KnnArgs& a, const C* rows, const C* norms, int64_t first, int64_t n, C* info, const Job<C>& job, int64_t queries, Lists<C>& lists) {
  for (int64_t r = 0; r < n; r++) {
    const C n2 = norms ? norms[first + r] : squared_norm(rows + r * a.D, a.D);
    info[r] = n2;
    if (a.metric == kL2) continue;
    if (n2 < (C)kHugeSquare<C>) {
      const C norm = root(n2);
      info[r] = a.metric == kIp ? norm : norm < (C)kEps ? (C)(1 / kEps) : 1 / norm;
      continue;
    }
    info[r] = (C)__builtin_nan("");
    C bad = 0;
    for (int64_t d = 0; d < a.D; d++) bad += rows[r * a.D + d] - rows[r * a.D + d];
    if (bad != 0) continue;
    for (int64_t q = 0; q < queries; q++)
      if (job.state[q] == kFine) lists.push(q, -infinity<C>(), first + r);
  }
}

// Blocks are visited in leaps: keys that come nearer and nearer in their order would all be candidates for a while.
MC_INLINE int64_t leap(int64_t blocks) {
  int64_t step = (int64_t)((double)blocks * 0.618);
  for (step = step < 1 ? 1 : step;; step++) {
    int64_t x = blocks, y = step;
    while (y) {
      const int64_t t = x % y;
      x = y, y = t;
    }
    if (x == 1) return step;
  }
}

template <class T> void scan(const KnnArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  int64_t size = kBlockBytes / (int64_t)sizeof(C) / (a.D > 0 ? a.D : 1) / kBlockRows * kBlockRows;
  size = size < kBlockRows ? kBlockRows : size > 4080 ? 4080 : size;
  C *widened, *info;
  Arena arena([&](Arena& x) { x.take(widened, __is_same(T, C) ? 0 : size * a.D), x.take(info, size); });
  for (int64_t i = begin; i < end; i++) {
    const Job<C> job = job_of<C>(a, i / a.shards);
    const Queries mine = queries_of(a, i / a.shards);
    Lists<C> lists = job.shard(a, i % a.shards);
    copy(lists.theta, job.theta, job.lanes);
    clear(lists.size, job.lanes);
    const int64_t n = a.rows(mine.a), s = i % a.shards;
    if (n <= kFewRows) continue;
    const T* keys = (const T*)a.keys + mine.a * a.N * a.D;
    const C* norms = a.norms ? (const C*)a.norms + mine.a * a.N : nullptr;
    const int64_t lo = n * s / a.shards, hi = n * (s + 1) / a.shards;
    const int64_t blocks = (hi - lo + size - 1) / size, step = blocks > 0 ? leap(blocks) : 0;
    for (int64_t j = 0, at = 0; j < blocks; j++, at = (at + step) % blocks) {
      Block<C> block{nullptr, info, lo + at * size, 0};
      block.n = hi - block.first < size ? hi - block.first : size;
      if constexpr (__is_same(T, C)) {
        block.rows = keys + block.first * a.D;
      } else {
        widen(widened, keys + block.first * a.D, block.n * a.D);
        block.rows = widened;
      }
      if (a.lanes || a.metric != kL2) describe(a, block.rows, norms, block.first, block.n, info, job, mine.n, lists);
      if (a.lanes) across(a, job, lists, block);
      else along(a, job, mine.n, lists, block);
    }
  }
}

// From candidates to neighbours ------------------------------------------------------------------------------------------

// The greatest score that a key at distance `t` or less can have; `q` is the query's norm.
template <class C> MC_INLINE double highest_score(const KnnArgs& a, double t, double q) {
  const double wide_error = (double)(2 * a.D + 32) * kUnit<double>, e = relative_error<C>(a.D), flushed = (double)(4 * a.D + 8) * kTiny<C>;
  t += __builtin_fabs(t) * (4 * kUnit<C> + wide_error) + kTiny<C>;  // what rounds to the same distance counts, too
  if (a.metric == kIp) return t + flushed * (1 + q);
  if (a.metric == kCosine) return t + wide_error - 1 + 2 * e + flushed;
  if (!a.lanes) return t + e * t + flushed * (1 + __builtin_sqrt(t));
  const double k = q + __builtin_sqrt(t);  // the longest such key
  if (!(k * k < kHugeSquare<C>)) return infinity<double>();
  return t - q * q + 1.1 * e * (k * k + 2 * q * k) + flushed * (1 + q + k);
}

template <class T> struct Finish {
  typedef Acc<T> C;
  const KnnArgs& a;
  double* q;
  C* row;
  Pack<C>*merged, *found;
  Distance<C> distance;

  int64_t list_size() const { return a.k + (a.k > 256 ? a.k : 256); }

  void write(int64_t item, int64_t n) {
    C* d = (C*)a.distances + item * a.k;
    int64_t* i = a.indices + item * a.k;
    for (int64_t j = 0; j < n; j++) d[j] = score_of(found[j]), i[j] = row_of(found[j]);
    for (int64_t j = n; j < a.k; j++) d[j] = infinity<C>(), i[j] = -1;
  }
  void lost(int64_t item) {
    for (int64_t j = item * a.k; j < (item + 1) * a.k; j++) ((C*)a.distances)[j] = (C)__builtin_nan(""), a.indices[j] = -1;
  }

  // Every distance by difference.
  void by_difference(const T* keys, int64_t n, int64_t k) {
    const int64_t capacity = list_size();
    Pack<C> worst = ~(Pack<C>)0;
    int64_t m = 0;
    for (int64_t i = 0; i < n; i++) {
      const Pack<C> p = pack(distance(wide_row(keys, i, a.D, row)), (uint32_t)i);
      if (!(p < worst)) continue;
      found[m++] = p;
      if (m < capacity) continue;
      select(found, m, k);
      m = k, worst = found[k - 1];
    }
    if (m > k) select(found, m, k);
    sort(found, k);
  }

  // The candidates' distances by difference; false if a neighbour may be missing among them.
  bool by_candidates(const Job<C>& job, const T* keys, int64_t slot, int64_t k, double norm) {
    C theta = infinity<C>();
    int64_t n = 0;
    for (int64_t s = 0; s < a.shards; s++) {
      const Lists<C> lists = job.shard(a, s);
      copy(merged + n, lists.data + slot * a.capacity, lists.size[slot]);
      n += lists.size[slot];
      theta = lists.theta[slot] < theta ? lists.theta[slot] : theta;
    }
    if (n < k) return false;
    if (n > k) select(merged, n, k);
    C furthest = -infinity<C>();
    for (int64_t i = 0; i < k; i++) {
      ask(keys, i + 4, k);
      const uint32_t r = row_of(merged[i]);
      const C d = distance(wide_row(keys, r, a.D, row));
      furthest = d > furthest ? d : furthest;
      found[i] = pack(d, r);
    }
    if (!(furthest < infinity<C>())) return false;
    const double limit = highest_score<C>(a, (double)furthest, norm);
    if (!(limit < (double)theta)) return false;
    int64_t m = k;
    for (int64_t i = k; i < n; i++)
      if ((double)score_of(merged[i]) <= limit) merged[m++] = merged[i];
    const int64_t all = m;
    m = k;
    const int64_t capacity = list_size();
    for (int64_t i = k; i < all; i++) {
      ask(keys, i + 4, all);
      const uint32_t r = row_of(merged[i]);
      const C d = distance(wide_row(keys, r, a.D, row));
      if (d > furthest) continue;
      found[m++] = pack(d, r);
      if (m == capacity) select(found, m, k), m = k;
    }
    if (m > k) select(found, m, k);
    sort(found, k);
    return true;
  }
  void ask(const T* keys, int64_t i, int64_t n) const {
    if (i < n) prefetch<false>(keys + (int64_t)row_of(merged[i]) * a.D, a.D * (int64_t)sizeof(T));
  }
};

template <class T> void finish(const KnnArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  Finish<T> f{a, nullptr, nullptr, nullptr, nullptr, {}};
  Arena arena([&](Arena& x) {
    x.take(f.q, a.D), x.take(f.row, a.D), x.take(f.merged, a.shards * a.capacity), x.take(f.found, f.list_size());
  });
  for (int64_t i = begin; i < end; i++) {
    const int64_t slot = i % a.chunk;
    const Queries mine = queries_of(a, i / a.chunk);
    if (slot >= mine.n) continue;
    const Job<C> job = job_of<C>(a, i / a.chunk);
    const int64_t item = mine.a * a.Q + mine.first + slot, n = a.rows(mine.a), k = a.k < n ? a.k : n;
    if (job.state[slot] == kLost) {
      f.lost(item);
      continue;
    }
    if (k > 0) {
      const T* keys = (const T*)a.keys + mine.a * a.N * a.D;
      double n2;
      wide_query(query_of<T>(a, mine.a, mine.first + slot), a.D, f.q, &n2);
      f.distance.start(a.metric, a.D, f.q, n2);
      if (n <= kFewRows || job.state[slot] == kHuge || !f.by_candidates(job, keys, slot, k, __builtin_sqrt(n2))) f.by_difference(keys, n, k);
    }
    f.write(item, k);
  }
}

}  // namespace

int64_t knn_scratch(const KnnArgs& a) {
  int64_t bytes = 0;
  with_type(a.dtype, [&](auto t) { bytes = Job<Acc<decltype(t)>>(a, nullptr).bytes; });
  return bytes;
}
bool knn_lanes(const KnnArgs& a) { return a.chunk >= 8; }
void knn_prepare(const KnnArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { prepare<decltype(t)>(a, begin, end); });
}
void knn_scan(const KnnArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { scan<decltype(t)>(a, begin, end); });
}
void knn_finish(const KnnArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto t) { finish<decltype(t)>(a, begin, end); });
}

}  // namespace MC_ISA
}  // namespace memcore
