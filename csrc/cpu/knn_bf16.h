// Products of bfloat16: by AMX 32 rows by 1, 16 or 32 queries at a time; by AVX512-BF16, two numbers a lane, of one query along the rows, of many across them.
#pragma once

#include "knn_scan.h"

namespace memcore {
namespace MC_ISA {
namespace {

// Dimensions of a packed row: whole tiles, or pairs.
MC_INLINE int64_t packed_width(const KnnArgs& a) { return round_up(a.D, a.pairs ? 2 : 32); }

// Query q of a job in its place [q / 16][width / 2][q % 16][2], or one that is alone; returns what rounding lost, squared. The products take
// subnormals for 0.
MC_INLINE double pack_query(const KnnArgs& a, bf16* packed, int64_t q, const double* from, double factor) {
  bf16* to = packed + q / 16 * packed_width(a) * 16 + q % 16 * 2;
  const int64_t pair = a.chunk == 1 ? 2 : 32;
  double lost = 0;
  for (int64_t d = 0; d < a.D; d++) {
    bf16 x = to_bf16((float)(factor * from[d]));
    if ((x.bits & 0x7f80) == 0) x.bits = 0;
    to[d / 2 * pair + d % 2] = x;
    const double e = (double)to_float(x) - factor * from[d];
    lost += e * e;
  }
  return lost;
}

constexpr int64_t kGroup = 32;  // rows at a time
constexpr int64_t kSecond = 3 << 19;  // bytes that the second cache holds
constexpr int64_t kAlong = 8 << 10;   // of a group, from which one at a time is enough for the first
constexpr int64_t kPanel = 8;   // vectors of queries that stay in the first cache while a block of rows goes by

#if defined(__AVX512F__) && defined(__x86_64__)

// What one group of rows needs: its first row, elements from one row to the next, `info`.
struct Group {
  const bf16* rows;
  int64_t stride;
  const float* info;
  int64_t first;
};

// Inline assembly, not intrinsics: GCC 12 takes ldtilecfg to read 8 bytes and tileloadd to read none.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
MC_INLINE void load_config(const TileConfig& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c) : "memory"); }

// The tile registers while it lives; then what was configured before, which others may rely on.
class Tiles {
 public:
  explicit Tiles(const KnnArgs& a) : wanted_(a.halves && !a.pairs) {
    if (!wanted_) return;
    __asm__ volatile("sttilecfg %0" : "=m"(before_)::"memory");
    TileConfig c{1, 0, {}, {}, {}};
    for (int i = 0; i < 8; i++) c.bytes[i] = 64, c.rows[i] = 16;
    if (a.chunk == 1) {
      const int rest = a.D % 2 == 0 && a.D % 32 != 0 ? (int)(a.D % 32) : 32;  // rows of an odd D are copied to a width of whole tiles
      c.bytes[0] = c.bytes[1] = c.bytes[6] = c.bytes[7] = 4;
      c.bytes[2] = c.bytes[3] = (uint16_t)(2 * rest), c.rows[7] = (uint8_t)(rest / 2);
    }
    load_config(c);
  }
  ~Tiles() {
    if (!wanted_) return;
    if (before_.palette) load_config(before_);
    else __asm__ volatile("tilerelease" ::: "memory");
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  bool wanted_;
  TileConfig before_;
};
#define MC_TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t :::"memory")
#define MC_TILE_LOAD(t, p, stride) __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t ::"r"(p), "r"(stride) : "memory")
#define MC_TILE_STORE_BY(t, p, stride) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((int64_t)(stride)) : "memory")
#define MC_TILE_STORE(t, p) MC_TILE_STORE_BY(t, p, 64)
#define MC_TILE_PRODUCTS(to, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #to :::"memory")

MC_INLINE void settle_tile(const KnnArgs& a, const Job<float>& job, Lists<float>& lists, const float* sums, const float* info, int64_t q, int64_t row) {
  Vec<float> s[16][1];
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) {
    s[r][0] = load(sums + r * 16);
    if (a.metric == kL2) s[r][0] += splat(info[r]);
  }
  settle<16, 1>(a, lists, s, info, job.slack + q, q, row);
}

// Tiles 0-3: sums of 16 rows (0, 1: the first 16; 2, 3: the next) by 16 queries; 4, 5: rows; 6, 7: queries.
MC_INLINE void by_tiles(const KnnArgs& a, const Job<float>& job, Lists<float>& lists, const Group& g, int64_t begin, int64_t end) {
  const int64_t width = packed_width(a), stride = g.stride * 2, whole = 64;
  alignas(64) float sums[4][256];
  const char *upper = (const char*)g.rows, *lower = upper + 16 * stride;
  for (int64_t v = begin; v < end; v += 2) {
    const char* b = (const char*)job.packed + v * width * 32;
    const bool two = v + 1 < end;
    MC_TILE_ZERO(0);
    MC_TILE_ZERO(2);
    if (two) {
      MC_TILE_ZERO(1);
      MC_TILE_ZERO(3);
      for (int64_t d = 0; d < width; d += 32) {
        MC_TILE_LOAD(4, upper + d * 2, stride);
        MC_TILE_LOAD(6, b + d * 32, whole);
        MC_TILE_PRODUCTS(0, 4, 6);
        MC_TILE_LOAD(5, lower + d * 2, stride);
        MC_TILE_PRODUCTS(2, 5, 6);
        MC_TILE_LOAD(7, b + (width + d) * 32, whole);
        MC_TILE_PRODUCTS(1, 4, 7);
        MC_TILE_PRODUCTS(3, 5, 7);
      }
      MC_TILE_STORE(1, sums[1]);
      MC_TILE_STORE(3, sums[3]);
    } else {
      for (int64_t d = 0; d < width; d += 32) {
        MC_TILE_LOAD(4, upper + d * 2, stride);
        MC_TILE_LOAD(5, lower + d * 2, stride);
        MC_TILE_LOAD(6, b + d * 32, whole);
        MC_TILE_PRODUCTS(0, 4, 6);
        MC_TILE_PRODUCTS(2, 5, 6);
      }
    }
    MC_TILE_STORE(0, sums[0]);
    MC_TILE_STORE(2, sums[2]);
    settle_tile(a, job, lists, sums[0], g.info, v * 16, g.first);
    settle_tile(a, job, lists, sums[2], g.info + 16, v * 16, g.first + 16);
    if (!two) continue;
    settle_tile(a, job, lists, sums[1], g.info, v * 16 + 16, g.first);
    settle_tile(a, job, lists, sums[3], g.info + 16, v * 16 + 16, g.first + 16);
  }
}

// R rows by NV vectors of queries, which begin at q and are packed at `b`.
template <int R, int NV>
MC_INLINE void pairs_tile(const KnnArgs& a, const Job<float>& job, Lists<float>& lists, const bf16* rows, int64_t stride, const float* info, const bf16* b, int64_t q, int64_t row) {
  const int64_t width = packed_width(a);
  Vec<float> s[R][NV];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) s[r][j] = Vec<float>{};
  for (int64_t d = 0; d < width; d += 2) {
    Vec<float> x[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) x[j] = load((const float*)(b + (j * width + d) * 16));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float pair;  // of bfloat16
      std::memcpy(&pair, rows + r * stride + d, sizeof pair);
      const Vec<float> k = splat(pair);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) __asm__("vdpbf16ps %2, %1, %0" : "+v"(s[r][j]) : "v"(k), "v"(x[j]));
    }
  }
  if (a.metric == kL2)
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) s[r][j] += splat(info[r]);
  settle<R, NV>(a, lists, s, info, job.slack + q, q, row);
}
template <int NV> MC_INLINE void pairs_panel(const KnnArgs& a, const Job<float>& job, Lists<float>& lists, const Group& g, int64_t v) {
  constexpr int R = NV == 1 ? 16 : 8;
  const bf16* b = (const bf16*)job.packed + v * packed_width(a) * 16;
  for (int64_t r = 0; r < kGroup; r += R) pairs_tile<R, NV>(a, job, lists, g.rows + r * g.stride, g.stride, g.info + r, b, v * 16, g.first + r);
}
MC_INLINE void by_pairs(const KnnArgs& a, const Job<float>& job, Lists<float>& lists, const Group& g, int64_t begin, int64_t end) {
  int64_t v = begin;
  for (; end - v > 4 || end - v == 3; v += 3) pairs_panel<3>(a, job, lists, g, v);
  for (; end - v >= 2; v += 2) pairs_panel<2>(a, job, lists, g, v);
  if (v < end) pairs_panel<1>(a, job, lists, g, v);
}

// One query's products with kGroup rows, each along the row.
MC_INLINE void pairs_of_one(const KnnArgs& a, const bf16* query, const bf16* rows, float* sums) {
  constexpr int R = 16;
  const __mmask32 rest = (__mmask32)(((uint64_t)1 << a.D % 32) - 1);
  const auto step = [](Vec<float>& s, Vec<float> x, Vec<float> k) MC_INLINED { __asm__("vdpbf16ps %2, %1, %0" : "+v"(s) : "v"(k), "v"(x)); };
  for (int64_t first = 0; first < kGroup; first += R) {
    Vec<float> s[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const bf16* row = rows + (first + r) * a.D;
      Vec<float> t[2] = {};
      int64_t d = 0;
      for (; d + 64 <= a.D; d += 64) {
        step(t[0], load((const float*)(query + d)), load((const float*)(row + d)));
        step(t[1], load((const float*)(query + d + 32)), load((const float*)(row + d + 32)));
      }
      if (d + 32 <= a.D) step(t[0], load((const float*)(query + d)), load((const float*)(row + d))), d += 32;
      if (d < a.D) step(t[1], (Vec<float>)_mm512_maskz_loadu_epi16(rest, query + d), (Vec<float>)_mm512_maskz_loadu_epi16(rest, row + d));
      s[r] = t[0] + t[1];
    }
    sum_all<R>(s, sums + first);
  }
}

// One query's products with kGroup rows. Tiles 0, 1: sums of 16 rows each; 4, 5: rows; 6: the query; 2, 3, 7: the same of what D leaves over.
MC_INLINE void by_rows(const Job<float>& job, const bf16* rows, int64_t stride, float* sums) {
  const int64_t row = stride * 2, whole = stride / 32 * 64, pair = 4;
  const char *upper = (const char*)rows, *lower = upper + 16 * row, *b = (const char*)job.packed;
  MC_TILE_ZERO(0);
  MC_TILE_ZERO(1);
  int64_t d = 0;
  for (; d < whole; d += 64) {
    MC_TILE_LOAD(6, b + d, pair);
    MC_TILE_LOAD(4, upper + d, row);
    MC_TILE_PRODUCTS(0, 4, 6);
    MC_TILE_LOAD(5, lower + d, row);
    MC_TILE_PRODUCTS(1, 5, 6);
  }
  if (d < row) {
    MC_TILE_LOAD(7, b + d, pair);
    MC_TILE_LOAD(2, upper + d, row);
    MC_TILE_PRODUCTS(0, 2, 7);
    MC_TILE_LOAD(3, lower + d, row);
    MC_TILE_PRODUCTS(1, 3, 7);
  }
  MC_TILE_STORE_BY(0, sums, pair);
  MC_TILE_STORE_BY(1, sums + 16, pair);
}

// One query and a block of rows, many at a time: sums are not read while they are still on their way to the cache.
MC_INLINE void products_of_one(const KnnArgs& a, const Job<float>& job, Lists<float>& lists, const Block<float, bf16>& block, bf16* copies) {
  constexpr int64_t kMany = 16 * kGroup;
  const int64_t width = a.pairs || a.D % 2 == 0 ? a.D : packed_width(a), group = kGroup * a.D * 2;
  // Tiles are read across the rows. From beyond the second cache, groups are asked for along them: the next one, or this one if it is large.
  const bool far = a.N * a.D * 2 > kSecond && !(a.pairs && reads_ahead());
  const int64_t ahead = group > kAlong ? 0 : group;
  alignas(64) float sums[kMany];
  for (int64_t first = 0; first < block.n; first += kMany) {
    const int64_t n = block.n - first < kMany ? block.n - first : kMany;
    for (int64_t r = 0; r < n; r += kGroup) {
      const bf16* rows = block.rows + (first + r) * a.D;
      if (far)
        for (int64_t i = 0; i < group; i += 64) __builtin_prefetch((const char*)rows + ahead + i, 0, 3);
      const int64_t m = n - r < kGroup ? n - r : kGroup;
      if (m < kGroup || width != a.D) {
        for (int64_t i = 0; i < m; i++) std::memcpy(copies + i * width, rows + i * a.D, (size_t)a.D * 2);
        rows = copies;
      }
      if (a.pairs) pairs_of_one(a, (const bf16*)job.packed, rows, sums + r);
      else by_rows(job, rows, width, sums + r);
    }
    const Vec<float> slack = splat(job.slack[0]);
    for (int64_t r = 0; r < n; r += 16) {
      const Vec<float> x = load(sums + r), info = load(block.info + first + r);
      const Vec<float> s = a.metric == kL2 ? x + info : a.metric == kCosine ? x * info : x - info * slack;
      for (uint32_t hits = below(s, splat(lists.theta[0])); hits; hits &= hits - 1) {
        const int i = __builtin_ctz(hits);
        lists.push(0, s[i], block.first + first + r + i);
      }
    }
  }
}

// `info` has kGroup numbers more than the block has rows, NaN. Rows that cannot be read in place go to `copies` [kGroup, packed_width], zero
// behind D.
void products(const KnnArgs& a, const Job<float>& job, Lists<float>& lists, const Block<float, bf16>& block, bf16* copies) {
  if (a.chunk == 1) return products_of_one(a, job, lists, block, copies);
  const int64_t width = packed_width(a), vectors = job.lanes / 16;
  for (int64_t begin = 0; begin < vectors; begin += kPanel) {
    const int64_t end = begin + kPanel < vectors ? begin + kPanel : vectors;
    for (int64_t r = 0; r < block.n; r += kGroup) {
      const int64_t n = block.n - r < kGroup ? block.n - r : kGroup;
      Group g{block.rows + r * a.D, a.D, block.info + r, block.first + r};
      if (begin == 0)
        for (int64_t i = 0; i < kGroup * a.D; i += 32) __builtin_prefetch(g.rows + 2 * kGroup * a.D + i, 0, 2);
      if (n < kGroup || width != a.D) {
        for (int64_t i = 0; i < n; i++) std::memcpy(copies + i * width, g.rows + i * a.D, (size_t)a.D * 2);
        g.rows = copies, g.stride = width;
      }
      if (a.pairs) by_pairs(a, job, lists, g, begin, end);
      else by_tiles(a, job, lists, g, begin, end);
    }
  }
}

#else

struct Tiles {
  explicit Tiles(const KnnArgs&) {}
};
MC_INLINE void products(const KnnArgs&, const Job<float>&, Lists<float>&, const Block<float, bf16>&, bf16*) {}

#endif

}  // namespace
}  // namespace MC_ISA
}  // namespace memcore
