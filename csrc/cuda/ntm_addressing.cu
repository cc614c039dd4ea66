// The NTM's whole addressing: content, interpolation, shift and sharpening of all heads of a batch element in one block.
#include "ntm_addressing.h"

#include "addressing.h"

namespace memcore {
namespace cuda {

struct NtmAddressingLaunch {
  NtmAddressingArgs a;
  Plan plan;
  float *d, *own;  // shared memory's backward: [B, H, N], [B, N]
};

template <class T> struct NtmAddressingBlock {
  Heads<T> heads;
  T* rows;

  template <class A> __host__ __device__ NtmAddressingBlock(A& arena, const NtmAddressingArgs& a, bool backward, bool staged) {
    heads.take_small(arena, a.H, a.N, a.W, a.S, backward);
    heads.take_rows(arena, backward);
    if (staged) rows = arena.template take<T>(staged_size<T>(a.N * a.W));
  }

  // Parameters of element b in place; returns its rows.
  __device__ const T* load(const NtmAddressingArgs& a, int64_t b, bool in_shared) {
    const T* from = (const T*)a.memory + b * a.memory_stride;
    if (in_shared) from = stage(rows, from, (int)(a.N * a.W));
    widen(heads.s.key, (const T*)a.key + b * a.H * a.W, a.H * a.W);
    widen(heads.beta, (const T*)a.strength + b * a.H, a.H);
    widen(heads.gate, (const T*)a.gate + b * a.H, a.H);
    widen(heads.gamma, (const T*)a.gamma + b * a.H, a.H);
    widen(heads.shift, (const T*)a.shift + b * a.H * a.S, a.H * a.S);
    heads.previous = (const T*)a.previous + b * a.H * a.N;
    if (in_shared) staged();
    return from;
  }
};

template <class T, bool SPILL> MC_KERNEL ntm_addressing_fwd_kernel(NtmAddressingLaunch launch) {
  MC_DYN_SHARED(shared);
  const NtmAddressingArgs& a = launch.a;
  const int64_t b = blockIdx.x, n = a.H * a.N;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  NtmAddressingBlock<T> block(arena, a, false, launch.plan.staged);
  const T* rows = block.load(a, b, launch.plan.staged);
  block.heads.template forward<false>(rows);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) ((T*)a.weights)[b * n + i] = narrow<T>(block.heads.weights[i]);
}

template <class T, bool SPILL> MC_KERNEL ntm_addressing_bwd_kernel(NtmAddressingLaunch launch) {
  MC_DYN_SHARED(shared);
  const NtmAddressingArgs& a = launch.a;
  const int64_t b = blockIdx.x, n = a.H * a.N;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  NtmAddressingBlock<T> block(arena, a, true, launch.plan.staged);
  const T* rows = block.load(a, b, launch.plan.staged);
  Heads<T>& heads = block.heads;
  const Similarity& s = heads.s;
  widen(heads.d, (const T*)a.grad + b * n, n);
  heads.template forward<true>(rows);
  heads.backward((T*)a.dprevious + b * n, [&](int h, float dbeta, float dgate, float dgamma) {
    ((T*)a.dstrength)[b * s.H + h] = narrow<T>(dbeta);
    ((T*)a.dgate)[b * s.H + h] = narrow<T>(dgate);
    ((T*)a.dgamma)[b * s.H + h] = narrow<T>(dgamma);
  });
  for (int64_t i = threadIdx.x; i < a.H * a.S; i += kThreads) ((T*)a.dshift)[b * a.H * a.S + i] = narrow<T>(heads.dshift[i]);
  T* dkey = (T*)a.dkey + b * a.H * a.W;
  T* dmemory = (T*)a.dmemory + b * a.N * a.W;
  const bool own = launch.d == nullptr;  // the memory is the element's own
  similarity_rows(
      Span(s.W, rows, dmemory), s, rows, heads.d, heads.key_own, heads.scratch, [](const Span&) { return [](int) { return Numbers{}; }; },
      [&](const Span& span, int n, const Numbers& x) {
        if (own) span.store(dmemory + (int64_t)n * s.W, x);
      },
      [&](int h, int w, float x) { dkey[(int64_t)h * s.W + w] = narrow<T>(x); });
  if (own) return;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) launch.d[b * n + i] = heads.d[i];
  for (int i = threadIdx.x; i < s.N; i += kThreads) launch.own[b * a.N + i] = s.im[i];
}

template <class T> MC_KERNEL ntm_addressing_bwd_shared_kernel(SharedRows<T> rows) { shared_rows(rows); }

template <class T> Plan ntm_addressing_plan(const NtmAddressingArgs& a, bool backward) {
  return plan_of(mc_shared_limit(a.device), [&](auto& arena, bool staged) { NtmAddressingBlock<T>(arena, a, backward, staged); });
}
// Behind the blocks' slices lie the coefficients of a shared memory.
inline int64_t coefficients(const NtmAddressingArgs& a) {
  return a.memory_stride == 0 ? a.B * (a.H + 1) * a.N * (int64_t)sizeof(float) : 0;
}

template <class T> int64_t ntm_addressing_fwd(const NtmAddressingArgs& a, void* stream) {
  if (a.H == 0 || a.N == 0) return 0;
  const Plan p = ntm_addressing_plan<T>(a, false);
  auto* kernel = p.spill ? ntm_addressing_fwd_kernel<T, true> : ntm_addressing_fwd_kernel<T, false>;
  return mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, NtmAddressingLaunch{a, p, nullptr, nullptr});
}

template <class T> int64_t ntm_addressing_bwd(const NtmAddressingArgs& a, void* stream) {
  const Plan p = ntm_addressing_plan<T>(a, true);
  NtmAddressingLaunch launch{a, p, nullptr, nullptr};
  const bool shared = a.memory_stride == 0 && a.N > 0 && a.W > 0;
  if (shared) {
    launch.d = (float*)((char*)a.workspace + a.B * p.workspace);
    launch.own = launch.d + a.B * a.H * a.N;
  }
  auto* kernel = p.spill ? ntm_addressing_bwd_kernel<T, true> : ntm_addressing_bwd_kernel<T, false>;
  const int64_t error = mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, launch);
  if (error || !shared) return error;
  const SharedRows<T> rows{a.B, a.H, a.N, a.W, launch.d, launch.own, (const T*)a.key, (const T*)a.memory, (T*)a.dmemory};
  return mc_launch(ntm_addressing_bwd_shared_kernel<T>, row_tiles(a.N, a.W), kThreads, 0, a.device, stream, rows);
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

int64_t mc_ntm_addressing_fwd_workspace(const NtmAddressingArgs* a) {
  return with_type(a->dtype, [&](auto t) { return a->B * ntm_addressing_plan<decltype(t)>(*a, false).workspace; });
}
int64_t mc_ntm_addressing_bwd_workspace(const NtmAddressingArgs* a) {
  return with_type(a->dtype, [&](auto t) { return a->B * ntm_addressing_plan<decltype(t)>(*a, true).workspace + coefficients(*a); });
}
int64_t mc_ntm_addressing_fwd(const NtmAddressingArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return ntm_addressing_fwd<decltype(t)>(*a, stream); });
}
int64_t mc_ntm_addressing_bwd(const NtmAddressingArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return ntm_addressing_bwd<decltype(t)>(*a, stream); });
}
