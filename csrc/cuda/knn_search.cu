// Exact search. Scan: blocks over tiles of queries and shards of rows compare in float32 (l2 by difference, else by products) and keep for each
// query and shard the candidates of lowest score. Finish, a block for each query: the lowest of all shards, their distances by difference, and a
// certificate that no other row can be among the K nearest; a query that cannot be certified (many ties, overflow) is compared with every row.
#include "knn_search.h"

#include "knn.h"

namespace memcore {
namespace cuda {

constexpr int kChunk = 32, kStride = kChunk + 4;  // columns of a tile at a time; its rows lie apart, so that four columns of each lie in different banks

// How a search is cut up.
struct KnnPlan {
  int64_t keep, capacity, tiles, shards, room;  // candidates of a list; places in it (a power of two); the finish's
  bool many;                                    // 32 queries by 128 rows, else 4 by 256
  bool direct;                                  // no more rows than are kept: nothing to scan
};
struct KnnLaunch {
  KnnArgs a;
  KnnPlan plan;
  uint64_t* lists;  // [A, Q, keep, shards], ascending along keep
};

constexpr int kManyQueries = 32, kManyRows = 128, kFewQueries = 4, kFewRows = 256;
constexpr int64_t kBlocks = 264;  // two for each multiprocessor of an H100, at the most: one more would run alone

inline int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by; }
inline int64_t power(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}
inline KnnPlan knn_plan(const KnnArgs& a) {
  KnnPlan p{};
  p.keep = a.K + (a.K > 128 ? a.K / 4 : 32);
  p.many = a.Q > kFewQueries && power(p.keep + kManyRows) <= 256;
  const int64_t rows = p.many ? kManyRows : kFewRows;
  p.capacity = power(p.keep + rows), p.room = power(p.keep + kThreads);
  p.tiles = up(a.Q, p.many ? kManyQueries : kFewQueries);
  const int64_t worth = up(a.N, 4 * p.keep > rows ? 4 * p.keep : rows), lists = a.A * p.tiles;
  p.shards = least(worth, lists > 0 && lists < kBlocks ? kBlocks / lists : 1);
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

struct Warp {
  int rank, size = 32;
  __device__ Warp() : rank(threadIdx.x & 31) {}
  __device__ void sync() const { __syncwarp(); }
  // Lists that are shared out.
  __device__ int first() const { return threadIdx.x >> 5; }
  __device__ int step() const { return kWarps; }
};
struct Block {
  int rank, size = kThreads;
  __device__ Block() : rank(threadIdx.x) {}
  __device__ void sync() const { __syncthreads(); }
  __device__ int first() const { return 0; }
  __device__ int step() const { return 1; }
};

// Leaves the `keep` least of a list's `size` candidates, in order, and nobody behind them in its first `keep` places; `capacity` is a power of two.
template <class Team> __device__ inline void select(const Team& team, uint64_t* list, int size, int capacity) {
  for (int i = size + team.rank; i < capacity; i += team.size) list[i] = kNobody;
  team.sync();
  for (int run = 2; run <= capacity; run *= 2)
    for (int apart = run / 2; apart; apart /= 2) {
      for (int i = team.rank; i < capacity / 2; i += team.size) {
        const int low = 2 * i - (i & (apart - 1)), high = low + apart;
        const uint64_t x = list[low], y = list[high];
        const bool ascending = (low & run) == 0;
        if (ascending == (y < x)) list[low] = y, list[high] = x;
      }
      team.sync();
    }
}

// ---- the scan ----

template <int QUERIES, int ROWS> struct ScanBlock {
  float *rows, *queries;
  double* scale;
  uint64_t *theta, *lists;
  int* size;

  template <class A> __host__ __device__ ScanBlock(A& arena, int64_t capacity) {
    rows = arena.template take<float>(ROWS * kStride), queries = arena.template take<float>(QUERIES * kStride);
    scale = arena.template take<double>(QUERIES), size = arena.template take<int>(QUERIES);
    theta = arena.template take<uint64_t>(QUERIES), lists = arena.template take<uint64_t>(QUERIES * capacity);
  }
};

// What float32 sums of D products may be wrong by, relative to the lengths; twice what is needed.
__host__ __device__ inline double relative_error(int64_t D) { return (double)(2 * D + 16) / 16777216; }

// The number whose least are wanted: of l2 the distance, of cosine -cos, of ip a lower bound of the distance over |q|. +inf: never a neighbour
// at a finite distance; -inf: not to be told in float32.
__device__ inline float score(int64_t metric, float sum, float n2, float error) {
  float s = sum;
  if (metric != kL2) {
    const float norm = sqrtf(n2);
    s = metric == kCosine ? -sum / fmaxf(norm, kEps) : -sum - error * (norm + 1e-18f);
    if (n2 > 1e37f) return -infinity();
  }
  return is_finite(s) ? s : infinity();
}

struct alignas(16) Four {
  float v[4];
};

// A thread has 4 queries and ROWS / (256 / COLUMNS) rows of the tile; a list is sorted by a warp, few of them by the whole block.
template <class T, int COLUMNS, int ROWS, class Lists> __device__ void knn_scan(const KnnLaunch& launch) {
  constexpr int RQ = 4, QUERIES = COLUMNS * RQ, STEP = kThreads / COLUMNS, RR = ROWS / STEP;
  MC_DYN_SHARED(shared);
  const KnnArgs& a = launch.a;
  const KnnPlan& p = launch.plan;
  Arena<false> arena(shared, 0, nullptr);
  const ScanBlock<QUERIES, ROWS> block(arena, p.capacity);
  const int64_t shard = blockIdx.x / p.tiles % p.shards, b = blockIdx.x / p.tiles / p.shards, q0 = blockIdx.x % p.tiles * QUERIES;
  const int64_t rows = rows_of(a, b), begin = rows * shard / p.shards, end = rows * (shard + 1) / p.shards;
  const T* keys = (const T*)a.keys + b * a.N * a.D;
  const int warp = threadIdx.x / 32, keep = (int)p.keep, capacity = (int)p.capacity;
  const float error = (float)relative_error(a.D);
  const Warp team;
  const Lists lists;

  for (int q = warp; q < QUERIES; q += kWarps) {
    double n2 = 0;
    const bool there = q0 + q < a.Q;
    const T* query = query_of<T>(a, b, q0 + q);
    for (int64_t d = team.rank; there && d < a.D; d += 32) n2 += (double)wide(query[d]) * wide(query[d]);
    n2 = group_total(n2, 32);
    if (team.rank == 0) {
      const double norm = sqrt(n2);
      block.scale[q] = a.metric == kL2 ? 1 : a.metric == kCosine ? 1 / fmax(norm, 1e-8) : norm > 0 ? 1 / norm : 0;
      block.theta[q] = there && n2 - n2 == 0 ? kNobody : 0;  // 0: takes nobody
      block.size[q] = 0;
    }
  }
  for (int64_t r0 = begin; r0 < end; r0 += ROWS) {
    float sum[RR][RQ] = {}, n2[RR] = {};
    for (int64_t d0 = 0; d0 == 0 || d0 < a.D; d0 += kChunk) {
      __syncthreads();
      for (int i = threadIdx.x; i < ROWS * kChunk; i += kThreads) {
        const int r = i / kChunk, d = i % kChunk;
        const bool on = r0 + r < end && d0 + d < a.D;
        block.rows[r * kStride + d] = on ? wide(keys[(r0 + r) * a.D + d0 + d]) : 0;
      }
      for (int i = threadIdx.x; i < QUERIES * kChunk; i += kThreads) {
        const int q = i / kChunk, d = i % kChunk;
        const bool on = q0 + q < a.Q && d0 + d < a.D;
        block.queries[q * kStride + d] = on ? (float)(block.scale[q] * wide(query_of<T>(a, b, q0 + q)[d0 + d])) : 0;
      }
      __syncthreads();
      const float *row = block.rows + threadIdx.x / COLUMNS * kStride, *query = block.queries + threadIdx.x % COLUMNS * kStride;
#pragma unroll 2
      for (int d = 0; d < kChunk; d += 4) {
        Four x[RQ], k[RR];
#pragma unroll
        for (int j = 0; j < RQ; j++) x[j] = *(const Four*)(query + j * COLUMNS * kStride + d);
#pragma unroll
        for (int i = 0; i < RR; i++) k[i] = *(const Four*)(row + i * STEP * kStride + d);
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
    for (int i = 0; i < RR; i++) {
      const int64_t r = r0 + threadIdx.x / COLUMNS + i * STEP;
#pragma unroll
      for (int j = 0; j < RQ; j++) {
        const int q = threadIdx.x % COLUMNS + j * COLUMNS;
        const uint64_t candidate = r < end ? pack(score(a.metric, sum[i][j], n2[i], error), r) : kNobody;
        if (candidate < block.theta[q]) block.lists[(int64_t)q * capacity + atomicAdd(block.size + q, 1)] = candidate;  // in any order: it will be sorted
      }
    }
    __syncthreads();
    for (int q = lists.first(); q < QUERIES; q += lists.step()) {
      const int size = block.size[q];
      if (size > capacity - ROWS) {
        uint64_t* list = block.lists + (int64_t)q * capacity;
        select(lists, list, size, capacity);
        if (lists.rank == 0) block.size[q] = least(size, keep), block.theta[q] = list[keep - 1];
      }
    }
  }
  __syncthreads();
  for (int q = lists.first(); q < QUERIES; q += lists.step()) {
    if (q0 + q >= a.Q) continue;
    uint64_t* list = block.lists + (int64_t)q * capacity;
    select(lists, list, block.size[q], capacity);
    uint64_t* to = launch.lists + ((b * a.Q + q0 + q) * keep) * p.shards + shard;
    for (int i = lists.rank; i < keep; i += lists.size) to[i * p.shards] = list[i];
  }
}
template <class T> MC_KERNEL knn_scan_few_kernel(KnnLaunch launch) { knn_scan<T, 1, kFewRows, Block>(launch); }
template <class T> MC_KERNEL knn_scan_many_kernel(KnnLaunch launch) { knn_scan<T, 8, kManyRows, Warp>(launch); }

// ---- the finish ----

// The block's one list: `offer` what it has not got, then `settle` all together.
struct Best {
  uint64_t *list, *theta;
  int *size, keep, capacity;

  template <class A> __host__ __device__ Best(A& arena, const KnnPlan& p) : keep((int)p.keep), capacity((int)p.room) {
    list = arena.template take<uint64_t>(p.room), theta = arena.template take<uint64_t>(1), size = arena.template take<int>(1);
  }
  __device__ void start() {
    if (threadIdx.x == 0) *size = 0, *theta = kNobody;
    __syncthreads();
  }
  // At most kThreads between two settlings.
  __device__ bool offer(uint64_t candidate) {
    const bool taken = candidate < *theta;
    if (taken) list[atomicAdd(size, 1)] = candidate;
    return taken;
  }
  // Whether any was taken.
  __device__ bool settle(bool taken) {
    const bool any = __syncthreads_or(taken);
    const int n = *size;
    __syncthreads();
    if (n > capacity - kThreads) cut(n);
    return any;
  }
  __device__ int cut(int n) {
    select(Block(), list, n, capacity);
    n = least(n, keep);
    if (threadIdx.x == 0) *size = n, *theta = list[keep - 1];
    __syncthreads();
    return n;
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
  Best best(arena, p);
  const int64_t item = blockIdx.x, b = item / a.Q, rows = rows_of(a, b);
  const T *query = query_of<T>(a, b, item % a.Q), *keys = (const T*)a.keys + b * a.N * a.D;
  const bool nowhere = lost(query, a.D);
  int n = 0;
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
    best.start();
    if (p.direct) {
      n = (int)rows;
      exact(rows, [](int64_t i) { return i; }, [&](int64_t i, uint64_t x) { best.list[i] = x; });
      n = best.cut(n);
    } else {
      const uint64_t* lists = launch.lists + item * p.keep * p.shards;
      int64_t quiet = 0;  // candidates in a row that nobody took: a shard's are ascending
      for (int64_t i0 = 0; i0 < p.keep * p.shards && quiet < p.shards; i0 += kThreads) {
        const int64_t i = i0 + threadIdx.x;
        const uint64_t candidate = i < p.keep * p.shards ? lists[i] : kNobody;
        quiet = best.settle(best.offer(candidate)) ? 0 : quiet + kThreads;
      }
      n = best.cut(*best.size);
      const float others = score_of(best.list[best.keep - 1]);
      __syncthreads();
      exact(n, [&](int64_t i) { return i < n ? candidate_row(best.list[i]) : 0; }, [&](int64_t i, uint64_t x) { best.list[i] = x; });
      n = best.cut(n);
      const float last = score_of(best.list[a.K - 1]);
      if (rows > n && !(last < lower_bound(a, others, sqrt(distance.own.n2)))) {
        best.start();
        const int64_t step = distance.step();
        for (int64_t r0 = 0; r0 < rows; r0 += step) {
          bool taken = false;
          exact(least(step, rows - r0), [&](int64_t i) { return r0 + i; }, [&](int64_t, uint64_t x) { taken = best.offer(x); });
          best.settle(taken);
        }
        n = best.cut(*best.size);
      }
    }
  }
  const float nan = __int_as_float(0x7fc00000);
  for (int64_t k = threadIdx.x; k < a.K; k += kThreads) {
    const bool on = k < n;
    const uint64_t x = on ? best.list[k] : 0;
    const float d = nowhere ? nan : on ? score_of(x) : infinity();
    const int64_t to = item * a.K + k, row = on ? candidate_row(x) : -1;
    a.indices[to] = row, a.kept[to] = row;
    ((T*)a.distances)[to] = narrow<T>(d);
    if (a.found) a.found[to] = d;
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
  const auto many = [&](auto& arena) { ScanBlock<kManyQueries, kManyRows>(arena, p.capacity); };
  const auto few = [&](auto& arena) { ScanBlock<kFewQueries, kFewRows>(arena, p.capacity); };
  if (!p.direct) {
    const int64_t blocks = a.A * p.tiles * p.shards;
    const int64_t error = p.many ? mc_launch(knn_scan_many_kernel<T>, blocks, kThreads, bytes_of(many), a.device, stream, launch)
                                 : mc_launch(knn_scan_few_kernel<T>, blocks, kThreads, bytes_of(few), a.device, stream, launch);
    if (error) return error;
  }
  return mc_launch(knn_finish_kernel<T>, queries, kThreads, bytes_of([&](auto& arena) { Best(arena, p); }), a.device, stream, launch);
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
