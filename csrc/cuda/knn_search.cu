// Exact search. Scan: blocks over tiles of queries and shards of rows compare in float32 (l2 by difference, else by products) and keep for each
// query and shard the candidates of lowest score. Finish, a block for each query: the lowest of all shards, their distances by difference, and a
// certificate that no other row can be among the K nearest; a query that cannot be certified (many ties, overflow) is compared with every row.
#include "knn_search.h"

#include "knn.h"

namespace memcore {
namespace cuda {

constexpr int kChunk = 32, kPad = 4;  // columns of a tile at a time; its rows lie apart, so that four columns of each lie in different banks
constexpr int kMostColumns = 128;     // queries of up to so many stay in shared memory, others come by chunks with the rows

// How a search is cut up.
struct KnnPlan {
  int64_t keep, most, capacity;    // candidates of a list; those that a cut may leave; places of a list in the scan
  int64_t columns, tiles, shards;  // columns of the queries in shared memory
  int64_t queries, rows;           // of a tile: 1 or 4 by 256, or 32 by 128
  bool direct;                     // no more rows than are kept: nothing to scan
};
struct KnnLaunch {
  KnnArgs a;
  KnnPlan plan;
  uint64_t* lists;  // [A, Q, shards, keep], in any order
};

constexpr int kManyQueries = 32, kManyRows = 128, kFewQueries = 4, kFewRows = 256;  // or one query, as few
// Places of a list for each thread of its team, at the most; of a warp's list (a little less, for 99 KiB in all), of a block's.
constexpr int kShare = 8, kManyPlaces = 31 * kShare, kPlaces = kThreads * kShare;

inline int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline KnnPlan knn_plan(const KnnArgs& a) {
  KnnPlan p{};
  p.keep = a.K + (a.K > 128 ? a.K / 4 : 32), p.most = p.keep + 16;
  const bool many = a.Q > kFewQueries && p.most <= kManyPlaces * 3 / 4;
  p.queries = many ? kManyQueries : a.Q > 1 ? kFewQueries : 1, p.rows = many ? kManyRows : kFewRows;
  p.capacity = many ? kManyPlaces : p.keep + 512;
  p.columns = 0 < a.D && a.D <= kMostColumns ? up(a.D, kChunk) * kChunk : kChunk;
  p.tiles = up(a.Q, p.queries);
  // Two blocks for each multiprocessor, at the most: one more would run alone. And rows for a tile each, of which a third or more is left out.
  const int64_t blocks = 2 * mc_processors(a.device), lists = a.A * p.tiles, worth = p.keep * 3 / 2;
  p.shards = least(up(a.N, worth > p.rows ? worth : p.rows), lists > 0 && lists < blocks ? blocks / lists : 1);
  p.direct = a.N <= p.keep;
  return p;
}

// ---- candidates ----

// A candidate is one integer whose order is that of (score, row): no ties, so that every selection has one outcome.
constexpr uint64_t kNobody = ~(uint64_t)0;
__device__ inline uint64_t pack(float score, int64_t row) {
  const uint32_t u = (uint32_t)__float_as_int(score + 0.f);  // -0 is 0
  return (uint64_t)(u ^ ((u & 0x80000000u) != 0 ? 0xffffffffu : 0x80000000u)) << 32 | (uint32_t)row;
}
__device__ inline float score_of(uint64_t p) {
  const uint32_t u = (uint32_t)(p >> 32);
  return __int_as_float((int)((u & 0x80000000u) != 0 ? u ^ 0x80000000u : ~u));
}
__device__ inline int64_t candidate_row(uint64_t p) { return (int64_t)(uint32_t)p; }

// Who cuts a list, a warp or the block: `reduce` gives all of them op over all.
struct Warp {
  int rank;
  static constexpr int size = 32;
  __device__ explicit Warp(uint32_t*) : rank(threadIdx.x & 31) {}
  __device__ void sync() const { __syncwarp(); }
  template <class Op> __device__ uint32_t reduce(uint32_t v, Op op) {
    for (int x = 16; x; x >>= 1) v = op(v, __shfl_xor_sync(kFull, v, x));
    return v;
  }
  // Lists that are shared out.
  __device__ int first() const { return threadIdx.x >> 5; }
  __device__ int step() const { return kWarps; }
};
struct Block {
  uint32_t* slots;  // kSlots; reductions take turns, so that one barrier each is enough
  int rank, turn = 0;
  static constexpr int size = kThreads;
  __device__ explicit Block(uint32_t* slots) : slots(slots), rank(threadIdx.x) {}
  __device__ void sync() const { __syncthreads(); }
  template <class Op> __device__ uint32_t reduce(uint32_t v, Op op) {
    v = Warp(nullptr).reduce(v, op);
    uint32_t* of_warps = slots + turn;
    turn ^= kWarps;
    if ((threadIdx.x & 31) == 0) of_warps[threadIdx.x >> 5] = v;
    __syncthreads();
    v = of_warps[0];
    for (int i = 1; i < kWarps; i++) v = op(v, of_warps[i]);
    return v;
  }
  __device__ int first() const { return 0; }
  __device__ int step() const { return 1; }
};
__device__ inline uint32_t lower(uint32_t a, uint32_t b) { return least(a, b); }
__device__ inline uint32_t higher(uint32_t a, uint32_t b) { return a < b ? b : a; }
__device__ inline uint32_t added(uint32_t a, uint32_t b) { return a + b; }

// Candidates in any order: what it holds never depends on theirs.
struct List {
  uint64_t *places, *theta;  // takes what is less than theta
  int *size, capacity;       // more than the capacity: somebody waits

  // False: it is full, to be offered again after a cut.
  __device__ bool offer(uint64_t candidate) const {
    if (candidate >= *theta) return true;
    const int at = atomicAdd(size, 1);
    if (at < capacity) places[at] = candidate;
    return at < capacity;
  }
};

// Of more than `most` candidates leaves the `keep` least, and of the others so few that they are not more than `most`: all up to a bound, found by
// halving, that is theta from now on. No two are equal, so that there is one for every number.
template <class Team> __device__ inline void cut(Team& team, const List& list, int keep, int most) {
  const int n = least(*list.size, list.capacity);
  if (n <= most) return;
  uint64_t x[kShare];
  uint32_t low = ~0u, high = 0, mine;
#pragma unroll
  for (int j = 0; j < kShare; j++) {
    const int i = team.rank + j * team.size;
    x[j] = kNobody;
    if (i < n) x[j] = list.places[i], low = lower(low, x[j] >> 32), high = higher(high, x[j] >> 32);
  }
  uint64_t from = (uint64_t)team.reduce(low, lower) << 32, to = (uint64_t)team.reduce(high, higher) << 32 | 0xffffffffu, bound;
  int all;
  do {
    bound = from + (to - from) / 2, mine = 0;
#pragma unroll
    for (int j = 0; j < kShare; j++) mine += x[j] <= bound;
    all = (int)team.reduce(mine, added);
    if (all < keep) from = bound + 1;
    if (all > most) to = bound;
  } while (all < keep || all > most);
  team.sync();
  if (team.rank == 0) *list.size = 0, *list.theta = bound;
  team.sync();
  int at = atomicAdd(list.size, (int)mine);
#pragma unroll
  for (int j = 0; j < kShare; j++)
    if (x[j] <= bound) list.places[at++] = x[j];
  team.sync();
}

// ---- the scan ----

// Four columns of which `left` exist, zeros behind them.
template <class T> __device__ inline Packed<T> four(const T* from, int left, bool aligned) {
  Packed<T> x{};
  if (aligned && left >= 4) return *(const Packed<T>*)from;
#pragma unroll
  for (int e = 0; e < 4; e++)
    if (e < left) x.v[e] = from[e];
  return x;
}

struct ScanBlock {
  float *rows, *queries;
  double* scale;
  uint64_t *theta, *places;
  int* size;
  uint32_t* slots;

  template <class A> __host__ __device__ ScanBlock(A& arena, const KnnPlan& p) {
    rows = arena.template take<float>(p.rows * (kChunk + kPad)), queries = arena.template take<float>(p.queries * (p.columns + kPad));
    scale = arena.template take<double>(p.queries), size = arena.template take<int>(p.queries), theta = arena.template take<uint64_t>(p.queries);
    places = arena.template take<uint64_t>(p.queries * p.capacity), slots = arena.template take<uint32_t>(kSlots);
  }
};

// What float32 sums of D products may be wrong by, relative to the lengths; twice what is needed.
__host__ __device__ inline double relative_error(int64_t D) { return (double)(2 * D + 16) / 16777216; }

// The number whose least are wanted: of l2 the distance, of cosine -cos, of ip a lower bound of the distance over |q|. -inf: not to be told
// in float32.
template <int N> __device__ inline void to_scores(float (&sum)[N], int64_t metric, float n2, float error) {
  if (metric == kL2) return;
  const float norm = sqrtf(n2), factor = metric == kCosine ? 1 / fmaxf(norm, kEps) : 1, less = metric == kCosine ? 0 : error * (norm + 1e-18f);
#pragma unroll
  for (int j = 0; j < N; j++) sum[j] = n2 > 1e37f ? -infinity() : -sum[j] * factor - less;
}

// A thread has RQ queries and ROWS / (256 / COLUMNS) rows of the tile, and its part of the next rows on the way. Lists are cut by a warp each, few of
// them by the whole block.
template <class T, int COLUMNS, int RQ, int ROWS, class Lists> __device__ void knn_scan(const KnnLaunch& launch) {
  constexpr int QUERIES = COLUMNS * RQ, STEP = kThreads / COLUMNS, RR = ROWS / STEP;
  constexpr int STRIDE = kChunk + kPad, FOURS = kChunk / 4, LINES = kThreads / FOURS, LOADS = ROWS / LINES;
  MC_DYN_SHARED(shared);
  const KnnArgs& a = launch.a;
  const KnnPlan& p = launch.plan;
  Arena<false> arena(shared, 0, nullptr);
  const ScanBlock block(arena, p);
  const int64_t shard = blockIdx.x / p.tiles % p.shards, b = blockIdx.x / p.tiles / p.shards, q0 = blockIdx.x % p.tiles * QUERIES;
  const int64_t rows = rows_of(a, b), begin = rows * shard / p.shards, end = rows * (shard + 1) / p.shards;
  const T* keys = (const T*)a.keys + b * a.N * a.D;
  const bool aligned = a.D % 4 == 0 && ((uintptr_t)a.keys | (uintptr_t)a.query) % sizeof(Packed<T>) == 0, resident = a.D <= kMostColumns;
  const int D = (int)a.D, keep = (int)p.keep, most = (int)p.most, stride = (int)p.columns + kPad;
  const int line = threadIdx.x / FOURS, column = threadIdx.x % FOURS * 4;  // what a thread brings
  const int first = threadIdx.x / COLUMNS;                                 // the first of its rows
  const float error = (float)relative_error(a.D);
  Lists team(block.slots);
  const auto list = [&](int q) { return List{block.places + q * p.capacity, block.theta + q, block.size + q, (int)p.capacity}; };

  Packed<T> next[LOADS];
  const auto fetch = [&](int64_t r0, int d) {
    const T* from = keys + (r0 + line) * D + d;
    const int there = (int)least<int64_t>(end - r0, ROWS) - line;  // of the rows from the thread's first on
#pragma unroll
    for (int i = 0; i < LOADS; i++) next[i] = four(from + (int64_t)(i * LINES) * D, i * LINES < there ? D - d : 0, aligned);
  };
  fetch(begin, column);
  for (int q = threadIdx.x / 8; q / 4 * 4 < QUERIES; q += kThreads / 8) {  // 8 threads each; a warp goes along as a whole
    double n2 = 0;
    const bool there = q < QUERIES && q0 + q < a.Q;
    const T* query = query_of<T>(a, b, q0 + q);
    for (int d = threadIdx.x % 8; there && d < D; d += 8) n2 += (double)wide(query[d]) * wide(query[d]);
    n2 = group_total(n2, 8);
    if (threadIdx.x % 8 == 0 && q < QUERIES) {
      const double norm = sqrt(n2);
      block.scale[q] = a.metric == kL2 ? 1 : a.metric == kCosine ? 1 / fmax(norm, 1e-8) : norm > 0 ? 1 / norm : 0;
      block.theta[q] = there && n2 - n2 == 0 ? kNobody : pack(-infinity(), 0);  // takes all or nobody
      block.size[q] = 0;
    }
  }
  __syncthreads();
  for (int64_t r0 = begin; r0 < end; r0 += ROWS) {
    float sum[RR][RQ] = {}, n2[RR] = {};
    for (int d0 = 0; d0 == 0 || d0 < D; d0 += kChunk) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        Numbers x;
#pragma unroll
        for (int e = 0; e < 4; e++) x.v[e] = wide(next[i].v[e]);
        *(Numbers*)(block.rows + (line + i * LINES) * STRIDE + column) = x;
      }
      float* queries = block.queries + (resident ? d0 : 0);
      if (r0 == begin || !resident)
        for (int q = line; q < QUERIES; q += LINES) {
          const int d = d0 + column;
          const Packed<T> x = four(query_of<T>(a, b, q0 + q) + d, q0 + q < a.Q ? D - d : 0, aligned);
#pragma unroll
          for (int e = 0; e < 4; e++) queries[q * stride + column + e] = (float)(block.scale[q] * wide(x.v[e]));
        }
      __syncthreads();
      const bool done = d0 + kChunk >= D;
      fetch(done ? r0 + ROWS : r0, done ? column : d0 + kChunk + column);
      const float *row = block.rows + first * STRIDE, *query = queries + threadIdx.x % COLUMNS * stride;
#pragma unroll 2
      for (int d = 0; d < kChunk; d += 4) {
        Numbers x[RQ], k[RR];
#pragma unroll
        for (int j = 0; j < RQ; j++) x[j] = *(const Numbers*)(query + j * COLUMNS * stride + d);
#pragma unroll
        for (int i = 0; i < RR; i++) k[i] = *(const Numbers*)(row + i * STEP * STRIDE + d);
        if (a.metric == kL2) {
#pragma unroll
          for (int e = 0; e < 4; e++)
#pragma unroll
            for (int i = 0; i < RR; i++)
#pragma unroll
              for (int j = 0; j < RQ; j++) sum[i][j] += (x[j].v[e] - k[i].v[e]) * (x[j].v[e] - k[i].v[e]);
        } else {
#pragma unroll
          for (int e = 0; e < 4; e++)
#pragma unroll
            for (int i = 0; i < RR; i++) {
              n2[i] += k[i].v[e] * k[i].v[e];
#pragma unroll
              for (int j = 0; j < RQ; j++) sum[i][j] += x[j].v[e] * k[i].v[e];
            }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < RR; i++) to_scores(sum[i], a.metric, n2[i], error);
    uint32_t waiting = 0;  // a bit for each of the thread's pairs of row and query
#pragma unroll
    for (int j = 0; j < RQ; j++) {
      const float bound = score_of(block.theta[threadIdx.x % COLUMNS + j * COLUMNS]);
#pragma unroll
      for (int i = 0; i < RR; i++)
        if (!(sum[i][j] > bound) && r0 + first + i * STEP < end) waiting |= 1u << (i * RQ + j);
    }
    bool full;
    do {
#pragma unroll
      for (int i = 0; i < RR; i++)
#pragma unroll
        for (int j = 0; j < RQ; j++) {
          const uint32_t bit = 1u << (i * RQ + j);
          // What is no number is +inf: never a neighbour at a finite distance.
          const float score = fminf(sum[i][j], infinity());
          if ((waiting & bit) != 0 && list(threadIdx.x % COLUMNS + j * COLUMNS).offer(pack(score, r0 + first + i * STEP))) waiting -= bit;
        }
      const bool some = waiting != 0;
      full = __syncthreads_or(some);
      for (int q = team.first(); full && q < QUERIES; q += team.step())
        if (block.size[q] > (most + p.capacity) / 2) cut(team, list(q), keep, most);
      if (full) __syncthreads();
    } while (full);
  }
  for (int q = team.first(); q < QUERIES && q0 + q < a.Q; q += team.step()) {
    cut(team, list(q), keep, keep);
    uint64_t* to = launch.lists + ((b * a.Q + q0 + q) * p.shards + shard) * keep;
    for (int i = team.rank; i < keep; i += team.size) to[i] = i < block.size[q] ? block.places[q * p.capacity + i] : kNobody;
  }
}
template <class T> MC_KERNEL_TWO knn_scan_one_kernel(KnnLaunch launch) { knn_scan<T, 1, 1, kFewRows, Block>(launch); }
template <class T> MC_KERNEL_TWO knn_scan_few_kernel(KnnLaunch launch) { knn_scan<T, 1, kFewQueries, kFewRows, Block>(launch); }
template <class T> MC_KERNEL_TWO knn_scan_many_kernel(KnnLaunch launch) { knn_scan<T, 8, kManyQueries / 8, kManyRows, Warp>(launch); }

// ---- the finish ----

struct FinishBlock {
  List list;
  uint32_t* slots;

  template <class A> __host__ __device__ explicit FinishBlock(A& arena) {
    list.places = arena.template take<uint64_t>(kPlaces), list.theta = arena.template take<uint64_t>(1), list.size = arena.template take<int>(1);
    list.capacity = kPlaces, slots = arena.template take<uint32_t>(kSlots);
  }
};

// What the distance of a row with a score of at least `least_score` is at least.
__device__ inline float lower_bound(const KnnArgs& a, float least_score, double query_norm) {
  const double s = least_score, error = relative_error(a.D);
  if (a.metric == kL2) return (float)((s < 3.4e38 ? s : 3.4e38) * (1 - error) - (double)a.D * 1e-44);
  return (float)(a.metric == kCosine ? 1 + s - error - 1e-7 : query_norm * s);
}

template <class T> MC_KERNEL knn_finish_kernel(KnnLaunch launch) {
  MC_DYN_SHARED(shared);
  const KnnArgs& a = launch.a;
  const KnnPlan& p = launch.plan;
  Arena<false> arena(shared, 0, nullptr);
  const FinishBlock block(arena);
  const List& list = block.list;
  Block team(block.slots);
  const int64_t item = blockIdx.x, b = item / a.Q, rows = rows_of(a, b);
  const int keep = (int)p.keep, K = (int)a.K;
  const T *query = query_of<T>(a, b, item % a.Q), *keys = (const T*)a.keys + b * a.N * a.D;
  const bool nowhere = lost(query, a.D);
  const auto start = [&] {
    if (threadIdx.x == 0) *list.size = 0, *list.theta = kNobody;
    __syncthreads();
  };
  const auto settle = [&](uint64_t* candidates, int count) {
    bool full;
    do {
      bool waiting = false;
#pragma unroll
      for (int j = 0; j < count; j++)
        if (list.offer(candidates[j])) candidates[j] = kNobody;
        else waiting = true;
      full = __syncthreads_or(waiting);
      if (full) cut(team, list, keep, (int)p.most);
    } while (full);
  };
  // Leaves the `count` least; the highest score of them.
  const auto last_of = [&](int count) {
    cut(team, list, count, count);
    uint32_t last = 0;
    for (int i = threadIdx.x; i < *list.size; i += kThreads) last = higher(last, list.places[i] >> 32);
    return score_of((uint64_t)team.reduce(last, higher) << 32);
  };
  start();
  if (!nowhere) {
    const Distance<T> distance(a, query);
    Norm norm;
    const auto exact = [&](int64_t count, auto row, auto put) {
      for (int64_t first = distance.first(); first < count; first += distance.step()) {
        const int64_t i = first + (threadIdx.x & 31) / distance.lanes;
        const bool on = i < count;
        const int64_t r = row(i);  // beyond `count`: any, nothing is read
        const float d = distance(keys + r * a.D, on, norm);
        __syncwarp();  // `put` may write what `row` reads
        if (distance.lane == 0 && on) put(i, pack(d, r));
      }
    };
    bool certain = false;
    if (!p.direct) {
      const uint64_t* lists = launch.lists + item * p.shards * keep;
      const int64_t all = p.shards * keep;
      for (int64_t i0 = 0; i0 < all; i0 += kPlaces) {
        uint64_t x[kShare];
#pragma unroll
        for (int j = 0; j < kShare; j++) {
          const int64_t i = i0 + j * kThreads + threadIdx.x;
          x[j] = i < all ? lists[i] : kNobody;
        }
        settle(x, kShare);
      }
      const float others = last_of(keep);
      const int n = *list.size;
      exact(n, [&](int64_t i) { return i < n ? candidate_row(list.places[i]) : 0; }, [&](int64_t i, uint64_t x) { list.places[i] = x; });
      __syncthreads();
      certain = last_of(K) < lower_bound(a, others, sqrt(distance.own.n2)) || rows <= n;
    }
    if (!certain) {
      start();
      const int64_t step = distance.step();
      for (int64_t r0 = 0; r0 < rows; r0 += step) {
        uint64_t x = kNobody;
        exact(least(step, rows - r0), [&](int64_t i) { return r0 + i; }, [&](int64_t, uint64_t found) { x = found; });
        settle(&x, 1);
      }
      cut(team, list, K, K);
    }
  }
  const int n = *list.size;
  const auto put = [&](int k, int64_t row, float d) {
    const int64_t to = item * a.K + k;
    a.indices[to] = row, a.kept[to] = row;
    ((T*)a.distances)[to] = narrow<T>(d);
    if (a.found) a.found[to] = d;
  };
  for (int i = threadIdx.x; i < K; i += kThreads) {
    if (i < n) {
      const uint64_t x = list.places[i];
      int before = 0;
      for (int k = 0; k < n; k++) before += list.places[k] < x;
      put(before, candidate_row(x), score_of(x));
    } else {
      put(i, -1, nowhere ? __int_as_float(0x7fc00000) : infinity());
    }
  }
}

template <class F> int64_t bytes_of(F layout) {
  Arena<false> arena(nullptr, 0, nullptr);
  layout(arena);
  return arena.used;
}

template <class T> int64_t find(const KnnArgs& a, void* stream) {
  const int64_t queries = a.A * a.Q;
  if (queries == 0 || a.K == 0) return 0;
  const KnnPlan p = knn_plan(a);
  const KnnLaunch launch{a, p, (uint64_t*)a.workspace};
  if (!p.direct) {
    const int64_t shared = bytes_of([&](auto& arena) { ScanBlock(arena, p); });
    const auto kernel = p.queries == 1 ? knn_scan_one_kernel<T> : p.queries == kFewQueries ? knn_scan_few_kernel<T> : knn_scan_many_kernel<T>;
    const int64_t error = mc_launch(kernel, a.A * p.tiles * p.shards, kThreads, shared, a.device, stream, launch);
    if (error) return error;
  }
  return mc_launch(knn_finish_kernel<T>, queries, kThreads, bytes_of([&](auto& arena) { FinishBlock finish(arena); }), a.device, stream, launch);
}

int64_t knn_find(const KnnArgs& a, void* stream) {
  return with_type(a.dtype, [&](auto t) { return find<decltype(t)>(a, stream); });
}
int64_t knn_find_workspace(const KnnArgs& a) {
  const KnnPlan p = knn_plan(a);
  return p.direct ? 0 : a.A * a.Q * p.keep * p.shards * (int64_t)sizeof(uint64_t);
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

int64_t mc_knn_search_fwd_workspace(const KnnArgs* a) { return knn_find_workspace(*a); }
int64_t mc_knn_search_bwd_workspace(const KnnArgs* a) { return knn_gradients_workspace(*a); }
int64_t mc_knn_search_fwd(const KnnArgs* a, void* stream) { return knn_find(*a, stream); }
int64_t mc_knn_search_bwd(const KnnArgs* a, void* stream) { return knn_gradients(*a, stream); }
