// Products of bfloat16 by AMX: 32 rows by 16 or 32 queries at a time. (AVX512-BF16's are no quicker than float32's.)
#pragma once

#include "knn_scan.h"

namespace memcore {
namespace MC_ISA {
namespace {

// Dimensions of a packed row: whole tiles.
MC_INLINE int64_t packed_width(int64_t D) { return round_up(D, 32); }

// Query q of a job in its place [q / 16][width / 2][q % 16][2]; returns what rounding lost, squared. AMX takes subnormals for 0.
MC_INLINE double pack_query(bf16* packed, int64_t q, const double* from, double factor, int64_t D) {
  bf16* to = packed + q / 16 * packed_width(D) * 16 + q % 16 * 2;
  double lost = 0;
  for (int64_t d = 0; d < D; d++) {
    bf16 x = to_bf16((float)(factor * from[d]));
    if ((x.bits & 0x7f80) == 0) x.bits = 0;
    to[d / 2 * 32 + d % 2] = x;
    const double e = (double)to_float(x) - factor * from[d];
    lost += e * e;
  }
  return lost;
}

constexpr int64_t kGroup = 32;  // rows at a time
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
  explicit Tiles(bool wanted) : wanted_(wanted) {
    if (!wanted_) return;
    __asm__ volatile("sttilecfg %0" : "=m"(before_)::"memory");
    TileConfig c{1, 0, {}, {}, {}};
    for (int i = 0; i < 8; i++) c.bytes[i] = 64, c.rows[i] = 16;
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
#define MC_TILE_STORE(t, p) __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"((int64_t)64) : "memory")
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
  const int64_t width = packed_width(a.D), stride = g.stride * 2, whole = 64;
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

// `info` has kGroup numbers more than the block has rows, NaN. Rows that cannot be read in place go to `copies` [kGroup, packed_width], zero
// behind D.
void products(const KnnArgs& a, const Job<float>& job, Lists<float>& lists, const Block<float, bf16>& block, bf16* copies) {
  const int64_t width = packed_width(a.D), vectors = job.lanes / 16;
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
      by_tiles(a, job, lists, g, begin, end);
    }
  }
}

#else

struct Tiles {
  explicit Tiles(bool) {}
};
MC_INLINE void products(const KnnArgs&, const Job<float>&, Lists<float>&, const Block<float, bf16>&, bf16*) {}

#endif

}  // namespace
}  // namespace MC_ISA
}  // namespace memcore
