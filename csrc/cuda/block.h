// What the blocks of every kernel do together: 256 threads on one batch element. All sums are taken in a fixed order, in float32
// or better, so that results repeat bit for bit.
//
// Names: a group is 1 to 32 neighbouring threads (a power of two) that share a memory row; a team is one or more whole warps
// that share a head.
#pragma once

#include "mc_device.h"

#include "../cpu/dtype.h"

namespace memcore {
namespace cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kFull = 0xffffffffu;
constexpr float kEps = 1e-8f;

__device__ inline float wide(float x) { return x; }
__device__ inline float wide(__half x) { return __half2float(x); }
__device__ inline float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T> __device__ inline T narrow(float x);
template <> __device__ inline float narrow<float>(float x) { return x; }
template <> __device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

template <class T> __host__ __device__ inline T least(T a, T b) { return b < a ? b : a; }

// f(tag) with the storage type: a value of that type.
template <class F> inline auto with_type(int64_t dtype, F f) {
  if (dtype == (int64_t)DType::f32) return f(float());
  if (dtype == (int64_t)DType::bf16) return f(__nv_bfloat16());
  return f(__half());
}

// ---- where a block keeps its arrays ----

// In shared memory. Kernels come in two forms: SPILL = false, all arrays there, and SPILL = true, what finds no room lies in the
// block's slice of a workspace. The element's memory rows are staged in shared memory if they, too, find room, else read in place.

// Host and device lay out alike: the host to learn the sizes (with SPILL), the device to get the addresses.
template <bool SPILL> struct Arena {
  char *shared, *workspace;
  int64_t room, used = 0, spilled = 0;

  __host__ __device__ Arena(char* shared, int64_t room, char* workspace) : shared(shared), workspace(workspace), room(room) {}
  template <class X> __host__ __device__ X* take(int64_t n) {
    const int64_t bytes = (n * (int64_t)sizeof(X) + 15) / 16 * 16;
    if (!SPILL || used + bytes <= room) {
      used += bytes;
      return MC_ARRAY(X, shared + used - bytes, n);
    }
    spilled += bytes;
    return MC_ARRAY(X, workspace + spilled - bytes, n);
  }
};

// How a block is laid out; every launch carries it.
struct Plan {
  int64_t shared, workspace;  // bytes of a block
  bool spill, staged;
};

// `layout(arena, staged)` takes what a block needs.
template <class F> inline Plan plan_of(int64_t limit, F layout) {
  Arena<true> all(nullptr, limit, nullptr), some(nullptr, limit, nullptr);
  layout(all, true);
  if (all.spilled == 0) return {all.used > 0 ? all.used : 16, 0, false, true};
  layout(some, false);
  return {some.used > 0 ? some.used : 16, some.spilled, some.spilled > 0, false};
}

template <bool SPILL> __device__ inline Arena<SPILL> arena_of(char* shared, const Plan& plan, void* workspace) {
  return {shared, plan.shared, (char*)workspace + blockIdx.x * plan.workspace};
}

// ---- memory rows ----

// Elements to set aside for `stage` of n.
template <class T> __host__ __device__ inline int64_t staged_size(int64_t n) { return n + 16 / (int64_t)sizeof(T); }

// Starts copying n elements to shared memory, 16 bytes at a time; finish with `staged`. The copy keeps its source's address modulo 16.
template <class T> __device__ inline const T* stage(T* room, const T* from, int n) {
  constexpr int per = 16 / (int)sizeof(T);
  const int skew = (int)(((uintptr_t)from & 15) / sizeof(T));
  T* to = room + skew;
  const int head = least(n, (per - skew) & (per - 1)), body = (n - head) / per;
  for (int i = threadIdx.x; i < body; i += kThreads) __pipeline_memcpy_async(to + head + i * per, from + head + i * per, 16);
  __pipeline_commit();
  for (int i = threadIdx.x; i < head; i += kThreads) to[i] = from[i];
  for (int i = head + body * per + threadIdx.x; i < n; i += kThreads) to[i] = from[i];
  return to;
}
__device__ inline void staged() {
  __pipeline_wait_prior(0);
  __syncthreads();
}

template <class T> __device__ inline void widen(float* to, const T* from, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += kThreads) to[i] = wide(from[i]);
}

// ---- sums ----

// A long sum, as exact as if taken in twice the precision.
struct Sum {
  float total = 0, rest = 0;
  __device__ void add(float x) {
    const float y = x - rest, t = total + y;
    rest = (t - total) - y;
    total = t;
  }
};

__device__ inline float group_sum(float v, int lanes) {
  for (int x = lanes >> 1; x; x >>= 1) v += __shfl_xor_sync(kFull, v, x);
  return v;
}

// The sums over a group's lanes of K numbers (a power of two), shared out among its threads: put(k, sum of v[k]) on one thread for each k. At every
// step a thread gives one half of its numbers away and goes on with the other.
template <int K, class Put> __device__ inline void group_sums(float (&v)[K], int lanes, Put put) {
  const int lane = threadIdx.x & (lanes - 1);
  int x = lanes, mine = 0, held = K;
#pragma unroll
  for (int half = K / 2; half; half /= 2)
    if (x > 1) {
      x /= 2;
      const bool upper = (lane & x) != 0;
#pragma unroll
      for (int k = 0; k < half; k++) {
        const float given = upper ? v[k] : v[k + half];
        v[k] = (upper ? v[k + half] : v[k]) + __shfl_xor_sync(kFull, given, x);
      }
      mine += upper ? half : 0, held = half;
    }
  const bool owner = (lane & (x - 1)) == 0;
  while (x > 1) {
    x /= 2;
    v[0] += __shfl_xor_sync(kFull, v[0], x);
  }
  if (!owner) return;
  put(mine, v[0]);
#pragma unroll
  for (int k = 1; k < K; k++)
    if (k < held) put(mine + k, v[k]);
}

// The block's warps shared out among H heads: one head or more at a time, each with 1, 2, 4 or 8 warps. Loops over heads are
//   for (int h0 = 0; h0 < H; h0 += team.count) { const int h = h0 + team.index; ... }
// and a team without a head (h >= H) goes along, because the barriers are the block's.
struct Team {
  int count, index, warps, threads, rank;
  float* slots;  // 2 * kWarps floats: reductions in a row take turns, so that one barrier each is enough
  int turn = 0;
  static constexpr int kSums = 8;

  __device__ Team(int64_t H, float* slots) : slots(slots) {
    count = H <= 1 ? 1 : H <= 2 ? 2 : H <= 4 ? 4 : 8;
    warps = kWarps / count, threads = warps * 32;
    index = (int)threadIdx.x / threads, rank = (int)threadIdx.x % threads;
  }
  // Makes what the team's threads wrote visible to each other.
  __device__ void sync() const {
    if (warps > 1) __syncthreads();
    else __syncwarp();
  }
  template <class Op> __device__ float reduce(float v, Op op) {
    for (int x = 16; x; x >>= 1) v = op(v, __shfl_xor_sync(kFull, v, x));
    if (warps == 1) return v;
    float* mine = slots + turn * kWarps + index * warps;
    turn ^= 1;
    if ((threadIdx.x & 31) == 0) mine[rank >> 5] = v;
    __syncthreads();
    float all = mine[0];
    for (int i = 1; i < warps; i++) all = op(all, mine[i]);
    return all;
  }
  __device__ float sum(float v) {
    return reduce(v, [](float a, float b) { return a + b; });
  }
  // The sums of K numbers (a power of two, up to kSums) lie where the result points to, visible to the team until its next sums. Teams have places
  // of their own in `room`: 2 * kSums * kWarps floats.
  template <int K> __device__ const float* sums(float (&v)[K], float* room) const {
    static_assert(K <= kSums, "");
    float *mine = room + index * warps * kSums, *totals = room + (kWarps + index) * kSums;
    group_sums(v, 32, [&](int k, float x) { mine[(rank >> 5) * K + k] = x; });
    sync();
    if (rank < K) {
      float total = mine[rank];
      for (int i = 1; i < warps; i++) total += mine[i * K + rank];
      totals[rank] = total;
    }
    sync();
    return totals;
  }
  __device__ float max(float v) {  // NaN is passed over
    return reduce(v, [](float a, float b) { return fmaxf(a, b); });
  }
};
constexpr int kSlots = 2 * kWarps;

// ---- a thread's columns ----

// Lanes to a row: about four elements each.
__host__ __device__ inline int dot_lanes(int W) {
  int lanes = 1;
  while (lanes < 32 && lanes * 4 < W) lanes *= 2;
  return lanes;
}

constexpr int kSpan = 4;
template <class X> struct alignas(kSpan * sizeof(X)) Packed {
  X v[kSpan];
};
using Numbers = Packed<float>;
__device__ inline void add_to(Numbers& sum, float c, const Numbers& x) {
#pragma unroll
  for (int j = 0; j < kSpan; j++) sum.v[j] += c * x.v[j];
}
__device__ inline float dot(const Numbers& x, const Numbers& y) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kSpan; j++) sum += x.v[j] * y.v[j];
  return sum;
}

// Rows are taken by groups in turn, up to 128 columns at a time (from w0 on), four neighbours to a thread. What it needs of vectors over the columns
// it loads once and keeps in registers.
struct Span {
  int W, lanes, lane, step, w0 = 0;
  bool whole;  // rows are whole fours, each in one access

  // Of rows of width W in these arrays.
  template <class... X> __device__ explicit Span(int W, const X*... arrays) : W(W), lanes(dot_lanes(W)) {
    lane = threadIdx.x & (lanes - 1), step = kThreads / lanes;
    whole = W % kSpan == 0 && (true && ... && ((uintptr_t)arrays % sizeof(Packed<X>) == 0));
  }
  __device__ int first() const { return (int)(threadIdx.x & ~31u) / lanes; }  // the warp's first row
  __device__ int row(int first) const { return first + (int)(threadIdx.x & 31) / lanes; }
  __device__ int width() const { return kSpan * lanes; }
  __device__ int at() const { return w0 + kSpan * lane; }

  // A row's or vector's numbers, 0 beyond its end.
  template <class X> __device__ Numbers load(const X* from) const {
    Numbers x{};
    if (whole) {
      if (at() < W) {
        const Packed<X> four = *(const Packed<X>*)(from + at());
#pragma unroll
        for (int j = 0; j < kSpan; j++) x.v[j] = wide(four.v[j]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kSpan; j++)
        if (at() + j < W) x.v[j] = wide(from[at() + j]);
    }
    return x;
  }
  template <class X> __device__ void store(X* to, const Numbers& x) const {
    if (whole) {
      Packed<X> four;
#pragma unroll
      for (int j = 0; j < kSpan; j++) four.v[j] = narrow<X>(x.v[j]);
      if (at() < W) *(Packed<X>*)(to + at()) = four;
    } else {
#pragma unroll
      for (int j = 0; j < kSpan; j++)
        if (at() + j < W) to[at() + j] = narrow<X>(x.v[j]);
    }
  }

  // put(k, w, sum of acc[k] over all groups) on one thread for each k < count and column w. scratch: 8 * kThreads floats, free again after the
  // barrier at the start of the next call.
  template <int K, class Put> __device__ void sum(Numbers (&acc)[K], int count, float* scratch, Put put) const {
    const int columns = width(), most = 8 * kThreads / (kWarps * columns);  // sums at a time
#pragma unroll
    for (int i = 0; i < K; i++)
      for (int x = lanes; x < 32; x <<= 1)
#pragma unroll
        for (int j = 0; j < kSpan; j++) acc[i].v[j] += __shfl_xor_sync(kFull, acc[i].v[j], x);
    for (int k0 = 0; k0 < count; k0 += most) {
      __syncthreads();
#pragma unroll
      for (int k = 0; k < K; k++)
        if (k >= k0 && k < least(count, k0 + most) && (threadIdx.x & 31) < lanes)
          *(Numbers*)(scratch + ((k - k0) * kWarps + (threadIdx.x >> 5)) * columns + kSpan * lane) = acc[k];
      __syncthreads();
      for (int i = threadIdx.x; i < least(most, count - k0) * columns; i += kThreads) {
        const int k = i / columns, w = i & (columns - 1);
        if (w0 + w >= W) continue;
        float total = 0;
        for (int g = 0; g < kWarps; g++) total += scratch[(k * kWarps + g) * columns + w];
        put(k0 + k, w0 + w, total);
      }
    }
  }
};

// Tiles of as many rows as a block has groups.
inline __host__ __device__ int64_t span_tiles(int64_t N, int64_t W) {
  const int64_t rows = kThreads / dot_lanes((int)W);
  return (N + rows - 1) / rows;
}

// ---- rows times vectors ----

// put(h, n, row_n . vec_h) and own(n, |row_n|^2) for all rows; every row sums in the same order, so identical rows give identical
// bits. HC heads share one look at a row.
template <int HC, class T, class Put, class Own>
__device__ inline void dots_of(const T* rows, int N, int W, const float* vec, int H, bool norms, Put put, Own own) {
  const Span span(W, rows, vec);
  const bool once = W <= span.width();
  for (int h0 = 0; h0 < H; h0 += HC) {
    const int count = least(HC, H - h0);
    Numbers kept[HC];
#pragma unroll
    for (int j = 0; j < HC; j++) kept[j] = once && j < count ? span.load(vec + (h0 + j) * W) : Numbers{};
    // The loop's bounds are the warp's, because all of it takes part in the sums.
#pragma unroll 2
    for (int first = span.first(); first < N; first += span.step) {
      const int n = span.row(first);
      const T* row = rows + (int64_t)least(n, N - 1) * W;
      float sums[HC + 1] = {};  // the last: of squares
      if (once) {
        const Numbers m = span.load(row);
#pragma unroll
        for (int j = 0; j < HC; j++) sums[j] = dot(m, kept[j]);
        sums[HC] = dot(m, m);
      } else {
        for (Span part = span; part.w0 < W; part.w0 += part.width()) {
          const Numbers m = part.load(row);
#pragma unroll
          for (int i = 0; i < HC; i++)
            if (i < count) sums[i] += dot(m, part.load(vec + (h0 + i) * W));
          sums[HC] += dot(m, m);
        }
      }
      group_sums(sums, span.lanes, [&](int j, float x) {
        if (n >= N) return;
        if (j < count) put(h0 + j, n, x);
        if (j == HC && norms && h0 == 0) own(n, x);
      });
    }
  }
}
template <class T, class Put, class Own>
__device__ inline void dots(const T* rows, int N, int W, const float* vec, int H, bool norms, Put put, Own own) {
  if (H <= 3) dots_of<3>(rows, N, W, vec, H, norms, put, own);
  else dots_of<7>(rows, N, W, vec, H, norms, put, own);
}

// ---- sums down the columns ----

__host__ __device__ inline int column_lanes(int64_t W) {
  int lanes = 1;
  while (lanes < 32 && lanes < W) lanes *= 2;
  return lanes;
}
// Tiles of rows, each as many as a block has groups.
inline int64_t row_tiles(int64_t N, int64_t W) {
  const int64_t rows = kThreads / column_lanes(W);
  return (N + rows - 1) / rows;
}

// The block's threads side by side over up to 32 columns, groups taking rows in turn.
struct Columns {
  int lanes, lane, step;

  __device__ explicit Columns(int W) : lanes(column_lanes(W)) { lane = threadIdx.x & (lanes - 1), step = kThreads / lanes; }
  __device__ int first() const { return (int)(threadIdx.x & ~31u) / lanes; }  // the warp's first row
  __device__ int row(int first) const { return first + (int)(threadIdx.x & 31) / lanes; }

  // put(k, sum of acc[k] over all groups) on one thread for each k < count and column w0 + lane < W. scratch: K * kThreads floats,
  // free again after the barrier at the start of the next call.
  template <int K, class Put> __device__ void sum(float (&acc)[K], int count, int w0, int W, float* scratch, Put put) const {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; k++)
      if (k < count) {
        float v = acc[k];
        for (int x = lanes; x < 32; x <<= 1) v += __shfl_xor_sync(kFull, v, x);
        if ((threadIdx.x & 31) < lanes) scratch[(k * kWarps + (threadIdx.x >> 5)) * lanes + lane] = v;
      }
    __syncthreads();
    for (int i = threadIdx.x; i < count * lanes; i += kThreads) {
      const int k = i / lanes, w = i & (lanes - 1);
      if (w0 + w >= W) continue;
      float total = 0;
      for (int g = 0; g < kWarps; g++) total += scratch[(k * kWarps + g) * lanes + w];
      put(k, w0 + w, total);
    }
  }
};

}  // namespace cuda
}  // namespace memcore
