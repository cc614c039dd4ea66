// The scan of a search: lists of candidates, and the scores of blocks of rows.
#pragma once

#include "knn.h"

namespace memcore {
namespace MC_ISA {
namespace {

constexpr int kMaxVectors = 3;                         // of queries in a register tile
constexpr int kAlongTile = kBytes == 64 ? 16 : 8;      // rows times queries of a tile along the rows
constexpr int64_t kAhead = 4096;                       // bytes that a scan along the rows asks for ahead
constexpr int64_t kCached = 16 << 20;                  // bytes of keys that the last cache may hold
constexpr int64_t kBlockBytes = 96 * 1024;             // of rows that all queries see before the next
constexpr int64_t kBlockRows = 48;                     // a block is a multiple of it, and so of every tile's rows
constexpr int64_t kSampled = 32;                       // rows of which one is in the sample that thresholds come from
constexpr int64_t kFewRows = 64;                       // distances by difference are as quick then

template <class C> constexpr double kUnit = sizeof(C) == 4 ? 0x1p-24 : 0x1p-53;
template <class C> constexpr double kTiny = sizeof(C) == 4 ? 0x1p-126 : 0x1p-1022;
template <class C> constexpr double kHugeSquare = sizeof(C) == 4 ? 0x1p100 : 0x1p900;

// Relative error of a sum of D products in the accumulation type, norms included, with room to spare.
template <class C> MC_INLINE double relative_error(int64_t D) { return (double)(2 * D + 16) * kUnit<C>; }

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
  double* error;  // of products with a key of norm 1 that bfloat16 adds, in units of `packed`
  uint8_t* state;
  int32_t* sizes;
  Pack<C>* lists;

  Job(const KnnArgs& a, char* base) : lanes(padded<C>(a.chunk)) {
    take(base, packed, packed_rows(a) * padded<C>(a.D));
    take(base, theta, lanes), take(base, slack, lanes), take(base, error, lanes), take(base, state, lanes);
    take(base, thetas, a.shards * lanes), take(base, sizes, a.shards * lanes), take(base, lists, a.shards * a.chunk * a.capacity);
  }
  MC_INLINE int64_t packed_rows(const KnnArgs& a) const { return a.lanes && a.chunk > 1 ? lanes : a.chunk; }
  template <class X> void take(char* base, X*& to, int64_t n) {
    to = (X*)(base + bytes);
    bytes += round_up(n * (int64_t)sizeof(X), 64);
  }
  Lists<C> shard(const KnnArgs& a, int64_t s) const {
    return Lists<C>{thetas + s * lanes, sizes + s * lanes, lists + s * a.chunk * a.capacity, a.capacity, a.keep};
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

// The scan ---------------------------------------------------------------------------------------------------------------
// Scores, of which the smallest are wanted: |k|^2 - 2 q.k or |q - k|^2 (l2), -q.k / (|q| |k|) (cosine), a lower bound of -q.k (ip).

// A block of rows with what their scores need: squared norms (l2), inverse norms (cosine), norms (ip); NaN keeps a row out.
template <class C, class S = C> struct Block {
  const S* rows;
  const C* info;
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

// What remains of R by NV vectors of products: scores, and those that may be among the best.
template <int R, int NV, class C>
MC_INLINE void settle(const KnnArgs& a, Lists<C>& lists, Vec<C> (&s)[R][NV], const C* info, const C* slack, int64_t q, int64_t row) {
  constexpr int L = Lanes<C>::n;
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
  settle<R, NV>(a, lists, s, info, slack, q, row);
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

// Rows as vectors of the accumulation type.
template <class C> MC_INLINE Vec<C> load_wide(const C* p) { return load(p); }
template <class C> MC_INLINE Vec<C> load_wide_part(const C* p, int n) { return load_part(p, n); }
MC_INLINE Vec<float> load_wide(const bf16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  Vec<float> v;
  for (int i = 0; i < Lanes<float>::n; i++) v[i] = to_float(p[i]);
  return v;
#endif
}
MC_INLINE Vec<float> load_wide_part(const bf16* p, int n) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p)), 16);
#elif defined(__AVX2__)
  uint64_t half = 0, four = 0;  // in registers: memory that was just written in pieces would be waited for
  const bf16* last = p + (n & ~3);
  if (n & 2) {
    uint32_t two;
    std::memcpy(&two, last, 4);
    half = two, last += 2;
  }
  if (n & 1) half |= (uint64_t)last->bits << (n & 2 ? 32 : 0);
  if (n & 4) std::memcpy(&four, p, 8);
  else four = half, half = 0;
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_set_epi64x((int64_t)half, (int64_t)four)), 16);
#else
  bf16 x[Lanes<float>::n] = {};
  std::memcpy(x, p, (size_t)n * sizeof(bf16));
  return load_wide(x);
#endif
}

// R rows by QR queries along the rows; out [QR][R] has room for 4 more.
template <int R, int QR, bool L2, class C, class S> MC_INLINE void along_sums(int64_t D, const S* rows, const C* queries, int64_t Dp, C* out) {
  constexpr int L = Lanes<C>::n;
  Vec<C> s[QR * R];
#pragma GCC unroll 16
  for (int i = 0; i < QR * R; i++) s[i] = Vec<C>{};
  const auto step = [&](int64_t d, auto get) MC_INLINED {
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
  for (; d + L <= D; d += L) step(d, [](const S* p) MC_INLINED { return load_wide(p); });
  if (d < D) step(d, [&](const S* p) MC_INLINED { return load_wide_part(p, (int)(D - d)); });
  sum_all<QR * R>(s, out);
}

// The same of one query, row after row: a single stream, which a Zen 3 takes from DRAM up to half as fast again as R of them, a Zen 4 from caches too.
template <int R, bool L2, class C, class S> MC_INLINE void each_sums(int64_t D, const S* rows, const C* query, C* out) {
  constexpr int L = Lanes<C>::n, U = 4;  // sums of their own hide the latency of the adders
  Vec<C> s[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const S* row = rows + r * D;
    Vec<C> t[U];
#pragma GCC unroll 4
    for (int u = 0; u < U; u++) t[u] = Vec<C>{};
    const auto step = [&](Vec<C>& to, Vec<C> k, int64_t d) MC_INLINED {
      const Vec<C> x = load(query + d), y = L2 ? k - x : x;
      to += (L2 ? y : k) * y;
    };
    int64_t d = 0;
    for (; d + U * L <= D; d += U * L)
#pragma GCC unroll 4
      for (int u = 0; u < U; u++) step(t[u], load_wide(row + d + u * L), d + u * L);
    for (; d + L <= D; d += L) step(t[0], load_wide(row + d), d);
    if (d < D) step(t[1], load_wide_part(row + d, (int)(D - d)), d);
    s[r] = (t[0] + t[1]) + (t[2] + t[3]);
  }
  sum_all<R>(s, out);
}

template <int R, int QR, bool EACH, class C, class S>
MC_INLINE void along_tile(const KnnArgs& a, const Job<C>& job, Lists<C>& lists, const Block<C, S>& block, int64_t r, int64_t q) {
  constexpr int L = Lanes<C>::n, n = R * QR;
  const int64_t Dp = padded<C>(a.D);
  const S* rows = block.rows + r * a.D;
  const C* queries = job.packed + q * Dp;
  alignas(64) C out[n + 4 < L ? L : n + 4], limit[n < L ? L : n];
  if constexpr (EACH) {
    if (a.metric == kL2) each_sums<R, true>(a.D, rows, queries, out);
    else each_sums<R, false>(a.D, rows, queries, out);
  } else {
    if (a.metric == kL2) along_sums<R, QR, true>(a.D, rows, queries, Dp, out);
    else along_sums<R, QR, false>(a.D, rows, queries, Dp, out);
  }
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

template <int QR, int R, bool EACH = false, class C, class S>
MC_INLINE void along_panel(const KnnArgs& a, const Job<C>& job, Lists<C>& lists, const Block<C, S>& block, int64_t q, int64_t ahead) {
  int64_t r = 0;
  for (; r + R <= block.n; r += R) {
    if (ahead)
      for (int64_t i = 0; i < R * a.D * (int64_t)sizeof(S); i += 64) __builtin_prefetch((const char*)(block.rows + r * a.D) + ahead + i, 0, R == kAlongTile / QR ? 2 : 3);
    along_tile<R, QR, EACH>(a, job, lists, block, r, q);
  }
  for (; r < block.n; r++) along_tile<1, QR, false>(a, job, lists, block, r, q);
}

template <class C, class S> void along(const KnnArgs& a, const Job<C>& job, int64_t queries, Lists<C>& lists, const Block<C, S>& block) {
  int64_t q = 0;
  const int64_t row = a.D * (int64_t)sizeof(S);
  for (; q + 4 <= queries; q += 4) along_panel<4, kAlongTile / 4>(a, job, lists, block, q, kAlongTile / 2 * row);
  if (q + 2 <= queries) along_panel<2, kAlongTile / 2>(a, job, lists, block, q, kAlongTile * row), q += 2;
  if (q == queries) return;
  const bool far = a.N * row > kCached;
  if constexpr (kBytes < 64) {
    if (far) return along_panel<1, 8, true>(a, job, lists, block, q, row <= 1024 ? kAhead : 0);
  } else if (reads_ahead()) {
    return along_panel<1, kAlongTile, true>(a, job, lists, block, q, 0);
  }
  // As many streams as rows at a time: of short rows of float32, and from DRAM, 16 are quicker than 8.
  if (sizeof(S) == sizeof(C) && row <= 1024 && far) along_panel<1, kAlongTile>(a, job, lists, block, q, 2 * kAlongTile * row);
  else along_panel<1, 8>(a, job, lists, block, q, sizeof(S) < sizeof(C) || row <= 1024 ? kAhead : 0);
}

}  // namespace
}  // namespace MC_ISA
}  // namespace memcore
