// Least-recently-used access: a block for each batch element finds its least-used slot, makes the write weights and writes. Forward:
// the memory once in, once out. Backward: the gradient once in (up to 8 heads at a time), once out.
#include "lrua_write.h"

#include "block.h"

namespace memcore {
namespace cuda {

struct LruaLaunch {
  LruaArgs a;
  Plan plan;
};

// The least-used slot: lowest index on a tie, NaN counts as most used. `slots`: 2 * kWarps floats. Ends in a barrier.
template <class T> __device__ inline int least_used(const T* usage, int N, float* slots) {
  const auto before = [](float u, int i, float v, int j) {  // (u, i) comes before (v, j)
    if (u == v || (u != u && v != v)) return i < j;
    return v != v || u < v;
  };
  float best = NAN;
  int at = N;  // after every slot, NaN or not
  for (int n = threadIdx.x; n < N; n += kThreads) {
    const float u = wide(usage[n]);
    if (before(u, n, best, at)) best = u, at = n;
  }
  const auto take = [&](float u, int i) {
    if (before(u, i, best, at)) best = u, at = i;
  };
  for (int x = 16; x; x >>= 1) {
    const float u = __shfl_xor_sync(kFull, best, x);
    take(u, __shfl_xor_sync(kFull, at, x));
  }
  int* places = (int*)(slots + kWarps);
  if ((threadIdx.x & 31) == 0) slots[threadIdx.x >> 5] = best, places[threadIdx.x >> 5] = at;
  __syncthreads();
  for (int i = 0; i < kWarps; i++) take(slots[i], places[i]);
  return at;
}

template <class T> struct LruaBlock {
  float *slots, *scratch, *word, *weights, *dweights;
  int chosen;

  template <class A> __host__ __device__ LruaBlock(A& arena, const LruaArgs& a, bool backward) {
    slots = arena.template take<float>(kSlots);
    if (backward) scratch = arena.template take<float>(8 * kThreads);
    word = arena.template take<float>(a.H * a.W);
    weights = arena.template take<float>(a.H * a.N);
    if (backward) dweights = arena.template take<float>(a.H * a.N);
  }
  // Slot, words and write weights of element b, visible to all.
  __device__ void address(const LruaArgs& a, int64_t b) {
    chosen = least_used((const T*)a.usage + b * a.N, (int)a.N, slots);
    widen(word, (const T*)a.word + b * a.H * a.W, a.H * a.W);
    const T *previous = (const T*)a.previous + b * a.H * a.N, *gate = (const T*)a.gate + b * a.H;
    for (int64_t i = threadIdx.x; i < a.H * a.N; i += kThreads) {
      const float g = wide(gate[i / a.N]);
      weights[i] = g * wide(previous[i]) + (1 - g) * (i % a.N == chosen ? 1 : 0);  // not left out: a gate that is not finite shows
    }
    __syncthreads();
  }
};

template <class T, bool SPILL> MC_KERNEL lrua_write_fwd_kernel(LruaLaunch launch) {
  MC_DYN_SHARED(shared);
  const LruaArgs& a = launch.a;
  const int64_t b = blockIdx.x;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  LruaBlock<T> block(arena, a, false);
  block.address(a, b);
  for (int64_t i = threadIdx.x; i < a.H * a.N; i += kThreads) ((T*)a.weights)[b * a.H * a.N + i] = narrow<T>(block.weights[i]);
  const T* from = (const T*)a.memory + b * a.N * a.W;
  T* to = (T*)a.written + b * a.N * a.W;
  for (Span span((int)a.W, from, to); span.w0 < a.W; span.w0 += span.width())
    for (int n = span.row(span.first()); n < a.N; n += span.step) {
      Numbers x = a.zero && n == block.chosen ? Numbers{} : span.load(from + n * a.W);
      for (int h = 0; h < a.H; h++) add_to(x, block.weights[h * a.N + n], span.load(block.word + h * a.W));
      span.store(to + n * a.W, x);
    }
}

template <class T, bool SPILL> MC_KERNEL lrua_write_bwd_kernel(LruaLaunch launch) {
  MC_DYN_SHARED(shared);
  const LruaArgs& a = launch.a;
  const int64_t b = blockIdx.x;
  const int N = (int)a.N, W = (int)a.W, H = (int)a.H;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  LruaBlock<T> block(arena, a, true);
  block.address(a, b);
  T *dmemory = (T*)a.dmemory + b * a.N * a.W, *dword = (T*)a.dword + b * a.H * a.W;
  const T* grown = a.grad_written ? (const T*)a.grad_written + b * a.N * a.W : nullptr;
  const T* given = a.grad_weights ? (const T*)a.grad_weights + b * a.H * a.N : nullptr;
  for (int64_t i = threadIdx.x; i < a.H * a.N; i += kThreads) block.dweights[i] = given ? wide(given[i]) : 0;
  __syncthreads();

  // Down the columns: the words' gradient; along the rows: the weights'. The memory's gradient passes through.
  constexpr int HC = 8;
  for (Span span(W, grown, dmemory); span.w0 < W; span.w0 += span.width())
    for (int h0 = 0; h0 == 0 || h0 < H; h0 += HC) {
      Numbers words[HC], acc[HC] = {};
#pragma unroll
      for (int j = 0; j < HC; j++) words[j] = h0 + j < H ? span.load(block.word + (h0 + j) * W) : Numbers{};
      for (int first = span.first(); first < N; first += span.step) {
        const int at = span.row(first), n = least(at, N - 1);  // all go along, because the sums are the warp's
        const bool on = at < N;
        const Numbers g = on && grown ? span.load(grown + (int64_t)n * W) : Numbers{};
        if (on && h0 == 0) span.store(dmemory + (int64_t)n * W, a.zero && n == block.chosen ? Numbers{} : g);
        float sums[HC];
#pragma unroll
        for (int j = 0; j < HC; j++) {
          add_to(acc[j], h0 + j < H ? block.weights[(h0 + j) * N + n] : 0, g);
          sums[j] = dot(words[j], g);
        }
        group_sums(sums, span.lanes, [&](int j, float x) {
          if (on && h0 + j < H) block.dweights[(h0 + j) * N + n] += x;
        });
      }
      span.sum(acc, least(HC, H - h0), block.scratch, [&](int j, int at, float x) { dword[(h0 + j) * W + at] = narrow<T>(x); });
    }

  // dweights are visible: each of the sums above began with a barrier.
  Team team(H, block.slots);
  for (int h0 = 0; h0 < H; h0 += team.count) {
    const int h = h0 + team.index, count = h < H ? N : 0;
    const float* d = block.dweights + (int64_t)h * N;
    const T* previous = (const T*)a.previous + (b * H + h) * N;
    T* dprevious = (T*)a.dprevious + (b * H + h) * N;
    const float g = h < H ? wide(((const T*)a.gate)[b * H + h]) : 0;
    Sum total;
    for (int n = team.rank; n < count; n += team.threads) {
      total.add(d[n] * wide(previous[n]));
      dprevious[n] = narrow<T>(g * d[n]);
    }
    const float sum = team.sum(total.total);
    if (h < H && team.rank == 0) ((T*)a.dgate)[b * H + h] = narrow<T>(count ? sum - d[block.chosen] : 0);
  }
}

template <class T> Plan lrua_plan(const LruaArgs& a, bool backward) {
  return plan_of(mc_shared_limit(a.device), [&](auto& arena, bool) { LruaBlock<T>(arena, a, backward); });
}
template <class T> int64_t lrua_fwd(const LruaArgs& a, void* stream) {
  if (a.N == 0) return 0;
  const Plan p = lrua_plan<T>(a, false);
  auto* kernel = p.spill ? lrua_write_fwd_kernel<T, true> : lrua_write_fwd_kernel<T, false>;
  return mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, LruaLaunch{a, p});
}
template <class T> int64_t lrua_bwd(const LruaArgs& a, void* stream) {
  const Plan p = lrua_plan<T>(a, true);
  auto* kernel = p.spill ? lrua_write_bwd_kernel<T, true> : lrua_write_bwd_kernel<T, false>;
  return mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, LruaLaunch{a, p});
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

int64_t mc_lrua_write_fwd_workspace(const LruaArgs* a) {
  return with_type(a->dtype, [&](auto t) { return a->B * lrua_plan<decltype(t)>(*a, false).workspace; });
}
int64_t mc_lrua_write_bwd_workspace(const LruaArgs* a) {
  return with_type(a->dtype, [&](auto t) { return a->B * lrua_plan<decltype(t)>(*a, true).workspace; });
}
int64_t mc_lrua_write_fwd(const LruaArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return lrua_fwd<decltype(t)>(*a, stream); });
}
int64_t mc_lrua_write_bwd(const LruaArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return lrua_bwd<decltype(t)>(*a, stream); });
}
