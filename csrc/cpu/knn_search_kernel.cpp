#include "knn_bf16.h"

namespace memcore {
namespace MC_ISA {
namespace {

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
    clear(job.packed, job.packed_rows(a) * Dp);
    for (int64_t q = 0; q < job.lanes; q++) {
      job.theta[q] = -infinity<C>(), job.slack[q] = 0, job.error[q] = 0, job.state[q] = kLost;
      if (q >= mine.n) continue;
      double n2;
      if (!wide_query(query_of<T>(a, mine.a, mine.first + q), a.D, wide_q, &n2)) continue;
      job.state[q] = kHuge;
      if (!(n2 < kHugeSquare<C>)) continue;
      job.state[q] = kFine, job.theta[q] = infinity<C>();
      const double factor = a.metric == kCosine ? -norm_of<C>(n2).inverse : a.metric == kIp ? -1 : a.lanes ? -2 : 1;
      double lost = 0;  // by rounding, squared
      if (a.halves) {
        lost = pack_query(a, (bf16*)job.packed, q, wide_q, factor);
      } else if (a.lanes) {
        const int64_t v = q / L;
        int64_t p = v * panels_of(vectors) / vectors;
        while (panel_start(vectors, p + 1) <= v) p++;
        const int64_t start = panel_start(vectors, p), width = (panel_start(vectors, p + 1) - start) * L;
        C* to = job.packed + start * L * a.D + (q - start * L);
        for (int64_t d = 0; d < a.D; d++) to[d * width] = (C)(factor * wide_q[d]);
      } else {
        for (int64_t d = 0; d < a.D; d++) job.packed[q * Dp + d] = (C)(factor * wide_q[d]);
      }
      const double norm = __builtin_sqrt(n2), keys = a.rounded(mine.a);
      job.error[q] = 1.001 * (__builtin_fabs(factor) * norm * keys + __builtin_sqrt(lost) * (1 + keys));
      job.slack[q] = (C)(2.1 * relative_error<C>(a.D) * norm + job.error[q]);
    }
  }
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

// A row's `info` from its squared norm, but for l2, where that is it; NaN where its products may overflow.
template <class C> MC_INLINE C inform(bool ip, C n2) {
  if (!(n2 < (C)kHugeSquare<C>)) return (C)__builtin_nan("");
  const C norm = root(n2);
  return ip ? norm : norm < (C)kEps ? (C)(1 / kEps) : 1 / norm;
}

// A block's `info`. A finite row whose products may overflow is everybody's candidate.
template <class C> MC_INLINE void describe(const KnnArgs& a, const C* rows, const C* norms, int64_t first, int64_t n, C* info, const Job<C>& job, int64_t queries, Lists<C>& lists) {
  if (norms) copy(info, norms + first, n);
  else
    for (int64_t r = 0; r < n; r++) info[r] = squared_norm(rows + r * a.D, a.D);
  if (a.metric == kL2) return;
  const bool ip = a.metric == kIp;
  bool huge = false;
  for (int64_t r = 0; r < n; r++) {
    huge |= !(info[r] < (C)kHugeSquare<C>);
    info[r] = inform(ip, info[r]);
  }
  if (!huge) return;
  for (int64_t r = 0; r < n; r++) {
    if (info[r] == info[r]) continue;
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

template <class T> struct Scan {
  typedef Acc<T> C;
  const KnnArgs& a;
  int64_t size;           // rows of a block
  C *widened, *info;      // of a block; info and kGroup more
  bf16 *copied, *copies;  // of a block; of a group
  Job<C> job;
  Queries mine;
  Lists<C> lists;

  // Rows in the accumulation type, or in the mirror's.
  template <class S> MC_INLINE void pass(Lists<C>& to, const S* rows, int64_t first, int64_t n) {
    const Block<C, S> block{rows, info, first, n};
    fill(info + n, kGroup, (C)__builtin_nan(""));
    if constexpr (__is_same(S, bf16) && __is_same(C, float)) {
      if (a.lanes) products(a, job, to, block, copies);
      else along(a, job, mine.n, to, block);
    } else if constexpr (__is_same(S, C)) {
      if (a.lanes) across(a, job, to, block);
      else along(a, job, mine.n, to, block);
    }
  }

  // Thresholds from a sample, one of every kSampled rows: the m-th best score of it, where m is so many that a neighbour lies beyond it for
  // one query in a million, which the certificate tells. Without them the first rows would all be candidates.
  void seed(const T* keys, const C* norms, const bf16* mirror, int64_t lo, int64_t hi) {
    const int64_t rows = (hi - lo) / kSampled;
    if (!a.lanes || mine.n < 8 || rows < 2 * kGroup) return;
    const double share = 0.5 * (double)(a.k + a.keep) / (double)kSampled;
    Lists<C> sample = lists;
    sample.keep = (int64_t)(share + 4 * __builtin_sqrt(share)) + 4, sample.capacity = 4 * sample.keep;
    for (int64_t first = 0; first < rows; first += size) {
      const int64_t n = rows - first < size ? rows - first : size;
      for (int64_t i = 0; i < n; i++) {
        const int64_t row = lo + (first + i) * kSampled + (uint32_t)((uint32_t)(first + i) * 2654435761u) / (uint32_t)(0x100000000 / kSampled);
        C* wide = mirror ? widened : widened + i * a.D;
        if (!mirror || !norms) widen(wide, keys + row * a.D, a.D);
        if (mirror) copy(copied + i * a.D, mirror + row * a.D, a.D);
        const C n2 = norms ? norms[row] : squared_norm<C>(wide, a.D);
        info[i] = a.metric == kL2 ? n2 : inform(a.metric == kIp, n2);
      }
      if (mirror) pass(sample, copied, 0, n);
      else pass(sample, widened, 0, n);
    }
    for (int64_t q = 0; q < mine.n; q++)
      if (sample.size[q] >= sample.keep) sample.shrink(q);
    clear(lists.size, job.lanes);
  }

  void shard(int64_t s) {
    copy(lists.theta, job.theta, job.lanes);
    clear(lists.size, job.lanes);
    const int64_t n = a.rows(mine.a);
    if (n <= kFewRows) return;
    const T* keys = (const T*)a.keys + mine.a * a.N * a.D;
    const C* norms = a.norms ? (const C*)a.norms + mine.a * a.N : nullptr;
    const bf16* mirror = a.mirror ? (const bf16*)a.mirror + mine.a * a.N * a.D : nullptr;
    const int64_t lo = n * s / a.shards, hi = n * (s + 1) / a.shards;
    const int64_t blocks = (hi - lo + size - 1) / size, step = blocks > 0 ? leap(blocks) : 0;
    seed(keys, norms, mirror, lo, hi);
    // Every other time the other way round: the blocks seen last are still in the cache.
    static thread_local bool back = false;
    back = !back;
    for (int64_t j = 0; j < blocks; j++) {
      const int64_t at = (back ? blocks - 1 - j : j) * step % blocks;
      const int64_t first = lo + at * size, m = hi - first < size ? hi - first : size;
      const C* rows = nullptr;
      if constexpr (__is_same(T, C)) {
        rows = keys + first * a.D;
      } else {
        widen(widened, keys + first * a.D, m * a.D);
        rows = widened;
      }
      if (a.lanes || a.metric != kL2) describe(a, rows, norms, first, m, info, job, mine.n, lists);
      if (mirror) pass(lists, mirror + first * a.D, first, m);
      else pass(lists, rows, first, m);
    }
  }
};

template <class T> void scan(const KnnArgs& a, int64_t begin, int64_t end) {
  typedef Acc<T> C;
  const int64_t element = a.mirror ? (int64_t)sizeof(bf16) : (int64_t)sizeof(C), unit = a.halves ? 3 * kGroup : kBlockRows;
  const bool once = a.halves ? a.chunk <= 16 * kPanel : !a.lanes;  // all queries see a row before the next
  const int64_t bytes = once ? 8 * kBlockBytes : kBlockBytes;
  int64_t size = bytes / element / (a.D > 0 ? a.D : 1) / unit * unit;
  size = size < unit ? unit : size > 4032 ? 4032 : size;
  C *widened, *info;
  bf16 *copied, *copies;
  const int64_t group = a.halves ? kGroup * packed_width(a) : 0;
  Arena arena([&](Arena& x) {
    const int64_t copied_rows = a.mirror ? 1 : a.lanes || !__is_same(T, C) ? size : 0;
    x.take(widened, copied_rows * a.D), x.take(info, size + kGroup), x.take(copied, a.mirror ? size * a.D : 0), x.take(copies, group);
  });
  clear(copies, group);
  const Tiles tiles(a);
  for (int64_t i = begin; i < end; i++) {
    const Job<C> job = job_of<C>(a, i / a.shards);
    Scan<T>{a, size, widened, info, copied, copies, job, queries_of(a, i / a.shards), job.shard(a, i % a.shards)}.shard(i % a.shards);
  }
}

// From candidates to neighbours ------------------------------------------------------------------------------------------

// The greatest score that a key at distance `t` or less can have; `q` is the query's norm, `keys` the relative error of their copies,
// `error` what bfloat16 adds to that of products. Derived in kernels/knn_search/README.md.
template <class C> MC_INLINE double highest_score(const KnnArgs& a, double t, double q, double keys, double error) {
  const double wide_error = (double)(2 * a.D + 32) * kUnit<double>, e = relative_error<C>(a.D), flushed = (double)(4 * a.D + 8) * kTiny<C>;
  t += __builtin_fabs(t) * (4 * kUnit<C> + wide_error) + kTiny<C>;  // what rounds to the same distance counts, too
  if (a.metric == kIp) return t + flushed * (1 + q);
  if (a.metric == kCosine) return t + wide_error - 1 + 2 * e + error + flushed;
  const double k = q + __builtin_sqrt(t);  // the longest such key
  if (!a.lanes) {
    const double root = __builtin_sqrt(t) + 1.001 * keys * k;
    return (1 + e) * root * root + flushed * (1 + root);
  }
  if (!(k * k < kHugeSquare<C>)) return infinity<double>();
  return t - q * q + 1.1 * e * (k * k + 2 * q * k) + error * k + flushed * (1 + q + k);
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
  bool by_candidates(const Job<C>& job, const T* keys, int64_t slot, int64_t k, double norm, double rounded) {
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
    const double limit = highest_score<C>(a, (double)furthest, norm, rounded, job.error[slot]);
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
      const bool scanned = n > kFewRows && job.state[slot] == kFine;
      if (!scanned || !f.by_candidates(job, keys, slot, k, __builtin_sqrt(n2), a.rounded(mine.a))) {
        if (scanned && a.uncertain) a.uncertain[item] = 1;
        if (scanned && a.mirror) continue;
        f.by_difference(keys, n, k);
      }
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
