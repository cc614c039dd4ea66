// Content addressing: a block for each batch element. Forward: the memory is read once (up to 7 heads at a time). Backward: once if it fits
// shared memory, else twice (up to 5 heads at a time); the gradient of a memory shared by the batch is a second launch.
#include "content_addressing.h"

#include "addressing.h"

namespace memcore {
namespace cuda {

struct ContentLaunch {
  ContentArgs a;
  Plan plan;
  float *d, *own;  // shared memory's backward: [B, H, N], [B, N]
};

// A block's arrays.
template <class T> struct ContentBlock {
  Similarity s;
  float *slots, *d, *key_own, *scratch;
  T* rows;

  template <class A> __host__ __device__ ContentBlock(A& arena, const ContentArgs& a, bool backward, bool staged) {
    s.H = (int)a.H, s.N = (int)a.N, s.W = (int)a.W, s.cosine = a.cosine != 0;
    slots = arena.template take<float>(kSlots);
    if (backward) scratch = arena.template take<float>(8 * kThreads), key_own = arena.template take<float>(a.H);
    s.take_small(arena);
    s.take_rows(arena);
    if (backward) d = arena.template take<float>(a.H * a.N);
    if (staged) rows = arena.template take<T>(staged_size<T>(a.N * a.W));
  }

  // Similarities of element b; returns its rows.
  __device__ const T* similar(const ContentArgs& a, int64_t b, bool in_shared) {
    const T* from = (const T*)a.memory + b * a.memory_stride;
    if (in_shared) from = stage(rows, from, (int)(a.N * a.W));
    s.mask = a.mask ? (const bool*)a.mask + b * a.N : nullptr;
    bool any = !s.mask;
    for (int n = threadIdx.x; s.mask && n < s.N; n += kThreads) any |= s.mask[n];
    any = __syncthreads_or(any);
    const T* key = (const T*)a.key + b * a.H * a.W;
    // No usable slot: weights and gradients are 0 whatever key and strength hold.
    for (int64_t i = threadIdx.x; i < a.H * a.W; i += kThreads) s.key[i] = any ? wide(key[i]) : 0;
    if (in_shared) staged();
    s.forward(from);
    return from;
  }
  __device__ float strength(const ContentArgs& a, int64_t b, int h) const {
    return a.strength && h < s.H ? wide(((const T*)a.strength)[b * a.H + h]) : 1;
  }
};

template <class T, bool SPILL> MC_KERNEL content_addressing_fwd_kernel(ContentLaunch launch) {
  MC_DYN_SHARED(shared);
  const ContentArgs& a = launch.a;
  const int64_t b = blockIdx.x;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  ContentBlock<T> block(arena, a, false, launch.plan.staged);
  block.similar(a, b, launch.plan.staged);
  const Similarity& s = block.s;
  Team team(s.H, block.slots);
  for (int h0 = 0; h0 < s.H; h0 += team.count) {
    const int h = h0 + team.index, count = h < s.H ? s.N : 0;
    float* row = s.sim + (int64_t)h * s.N;
    const Scores e = score(
        team, count, block.strength(a, b, h), [&](int n) { return s.at(h, n); }, [&](int n) { return s.usable(n); },
        [&](int n, float x) { row[n] = x; });
    T* to = (T*)a.weights + (b * s.H + h) * s.N;
    for (int n = team.rank; n < count; n += team.threads) to[n] = narrow<T>(row[n] * e.inverse);
  }
}

template <class T, bool SPILL> MC_KERNEL content_addressing_bwd_kernel(ContentLaunch launch) {
  MC_DYN_SHARED(shared);
  const ContentArgs& a = launch.a;
  const int64_t b = blockIdx.x;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  ContentBlock<T> block(arena, a, true, launch.plan.staged);
  const T* rows = block.similar(a, b, launch.plan.staged);
  const Similarity& s = block.s;
  Team team(s.H, block.slots);
  for (int h0 = 0; h0 < s.H; h0 += team.count) {
    const int h = h0 + team.index, count = h < s.H ? s.N : 0;
    float* d = block.d + (int64_t)h * s.N;
    const T* grad = (const T*)a.grad + (b * s.H + h) * s.N;
    const float beta = block.strength(a, b, h);
    const auto sim = [&](int n) { return s.at(h, n); };
    const Scores e = score(team, count, beta, sim, [&](int n) { return s.usable(n); }, [&](int n, float x) { d[n] = x; });
    Sum own;
    const auto weight = [&](int n) { return d[n] * e.inverse; };
    const auto given = [&](int n) { return wide(grad[n]); };
    const float dstrength = team.sum(score_backward(
        team, count, beta, e.extreme, inner_product(team, count, weight, given), weight, given, sim,
        [&](int n, float x, float y) { d[n] = x, own.add(y); }));
    const float total = team.sum(own.total);
    if (h < s.H && team.rank == 0) {
      block.key_own[h] = key_coefficient(s, h, total);
      if (a.strength) ((T*)a.dstrength)[b * s.H + h] = narrow<T>(dstrength);
    }
  }
  __syncthreads();
  similarity_coefficients(s, block.d);
  T* dkey = (T*)a.dkey + b * a.H * a.W;
  T* dmemory = (T*)a.dmemory + b * a.N * a.W;
  const bool own = launch.d == nullptr;  // the memory is the element's own
  similarity_rows(
      Span(s.W, rows, dmemory), s, rows, block.d, block.key_own, block.scratch, [](const Span&) { return [](int) { return Numbers{}; }; },
      [&](const Span& span, int n, const Numbers& x) {
        if (own) span.store(dmemory + (int64_t)n * s.W, x);
      },
      [&](int h, int w, float x) { dkey[(int64_t)h * s.W + w] = narrow<T>(x); });
  if (own) return;
  for (int64_t i = threadIdx.x; i < a.H * a.N; i += kThreads) launch.d[b * a.H * a.N + i] = block.d[i];
  for (int n = threadIdx.x; n < s.N; n += kThreads) launch.own[b * a.N + n] = s.cosine ? s.im[n] : 0;
}

template <class T> MC_KERNEL content_addressing_bwd_shared_kernel(SharedRows<T> rows) { shared_rows(rows); }

template <class T> Plan content_plan(const ContentArgs& a, bool backward) {
  return plan_of(mc_shared_limit(a.device), [&](auto& arena, bool staged) { ContentBlock<T>(arena, a, backward, staged); });
}

template <class T> int64_t content_fwd(const ContentArgs& a, void* stream) {
  if (a.H == 0 || a.N == 0) return 0;
  const Plan p = content_plan<T>(a, false);
  const ContentLaunch launch{a, p, nullptr, nullptr};
  auto* kernel = p.spill ? content_addressing_fwd_kernel<T, true> : content_addressing_fwd_kernel<T, false>;
  return mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, launch);
}

// Behind the blocks' slices lie the coefficients of a shared memory.
inline int64_t coefficients(const ContentArgs& a) { return a.memory_stride == 0 ? a.B * (a.H + 1) * a.N * (int64_t)sizeof(float) : 0; }

template <class T> int64_t content_bwd(const ContentArgs& a, void* stream) {
  const Plan p = content_plan<T>(a, true);
  ContentLaunch launch{a, p, nullptr, nullptr};
  const bool shared = a.memory_stride == 0 && a.N > 0 && a.W > 0;
  if (shared) {
    launch.d = (float*)((char*)a.workspace + a.B * p.workspace);
    launch.own = launch.d + a.B * a.H * a.N;
  }
  auto* kernel = p.spill ? content_addressing_bwd_kernel<T, true> : content_addressing_bwd_kernel<T, false>;
  const int64_t error = mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, launch);
  if (error || !shared) return error;
  const SharedRows<T> rows{a.B, a.H, a.N, a.W, launch.d, launch.own, (const T*)a.key, (const T*)a.memory, (T*)a.dmemory};
  return mc_launch(content_addressing_bwd_shared_kernel<T>, row_tiles(a.N, a.W), kThreads, 0, a.device, stream, rows);
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

int64_t mc_content_addressing_fwd_workspace(const ContentArgs* a) {
  return with_type(a->dtype, [&](auto t) { return a->B * content_plan<decltype(t)>(*a, false).workspace; });
}
int64_t mc_content_addressing_bwd_workspace(const ContentArgs* a) {
  return with_type(a->dtype, [&](auto t) { return a->B * content_plan<decltype(t)>(*a, true).workspace + coefficients(*a); });
}
int64_t mc_content_addressing_fwd(const ContentArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return content_fwd<decltype(t)>(*a, stream); });
}
int64_t mc_content_addressing_bwd(const ContentArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return content_bwd<decltype(t)>(*a, stream); });
}
