// One NTM time step. Small memories: one launch forward, one backward, a block for each batch element, which reads its memory once. Larger ones go by
// tiles (ntm_step_tiles.cu). The backward keeps nothing of the forward but its inputs.
#include "ntm_step.h"

#include "interface.h"
#include "write.h"

namespace memcore {
namespace cuda {

struct StepLaunch {
  StepArgs a;
  Plan plan;
};

template <class T> struct StepBlock {
  Heads<T> heads;
  InterfaceLayout l;
  float *erase, *add, *dreads;
  T* rows;

  template <class A> __host__ __device__ StepBlock(A& arena, const StepArgs& a, bool backward, bool staged) {
    l = {(int)a.R, (int)a.Hw, (int)a.W, (int)a.S};
    heads.take_small(arena, a.R + a.Hw, a.N, a.W, a.S, backward);
    erase = arena.template take<float>(a.Hw * a.W), add = arena.template take<float>(a.Hw * a.W);
    if (backward) dreads = arena.template take<float>(a.R * a.W);
    heads.take_rows(arena, backward);
    if (staged) rows = arena.template take<T>(staged_size<T>(a.N * a.W));
  }

  // Parameters of element b in place; returns its rows.
  __device__ const T* load(const StepArgs& a, int64_t b, bool in_shared) {
    const T* from = (const T*)a.memory + b * a.N * a.W;
    if (in_shared) from = stage(rows, from, (int)(a.N * a.W));
    activate(heads, erase, add, (const T*)a.interface + b * l.size(), l);
    heads.previous = (const T*)a.previous + b * (a.R + a.Hw) * a.N;
    if (in_shared) staged();
    return from;
  }
  __device__ Writes writes() const {
    return {heads.s.N, l.W, l.Hw, l.R, erase, add, heads.weights + (int64_t)l.R * heads.s.N, heads.weights};
  }
};

template <class T, bool SPILL> MC_KERNEL ntm_step_fwd_kernel(StepLaunch launch) {
  MC_DYN_SHARED(shared);
  const StepArgs& a = launch.a;
  const int64_t b = blockIdx.x, n = (a.R + a.Hw) * a.N;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  StepBlock<T> block(arena, a, false, launch.plan.staged);
  const T* rows = block.load(a, b, launch.plan.staged);
  block.heads.template forward<false>(rows);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) ((T*)a.weights)[b * n + i] = narrow<T>(block.heads.weights[i]);
  T* reads = (T*)a.reads + b * a.R * a.W;
  write_read(
      block.writes(), rows, (T*)a.written + b * a.N * a.W, a.write_first != 0, block.heads.scratch,
      [&](int r, int w, float x) { reads[r * a.W + w] = narrow<T>(x); });
}

template <class T, bool SPILL> MC_KERNEL ntm_step_bwd_kernel(StepLaunch launch) {
  MC_DYN_SHARED(shared);
  const StepArgs& a = launch.a;
  const int64_t b = blockIdx.x, n = (a.R + a.Hw) * a.N;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  StepBlock<T> block(arena, a, true, launch.plan.staged);
  const T* rows = block.load(a, b, launch.plan.staged);
  Heads<T>& heads = block.heads;
  const InterfaceLayout& l = block.l;
  const bool write_first = a.write_first != 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) heads.d[i] = a.grad_weights ? wide(((const T*)a.grad_weights)[b * n + i]) : 0;
  for (int64_t i = threadIdx.x; i < a.R * a.W; i += kThreads)
    block.dreads[i] = a.grad_reads ? wide(((const T*)a.grad_reads)[b * a.R * a.W + i]) : 0;
  heads.template forward<true>(rows);

  const Writes writes = block.writes();
  const T* x = (const T*)a.interface + b * l.size();
  T* dx = (T*)a.dinterface + b * l.size();
  const T* grown = a.grad_written ? (const T*)a.grad_written + b * a.N * a.W : nullptr;
  const auto grad = [&](const Span& span, int n) { return grown ? span.load(grown + n * a.W) : Numbers{}; };
  T* dmemory = (T*)a.dmemory + b * a.N * a.W;
  const Span span(l.W, rows, grown, dmemory);
  write_read_backward<false>(
      span, writes, rows, block.dreads, write_first, heads.d + a.R * a.N, heads.d, heads.scratch, grad, [](const Span&, int, const Numbers&) {},
      [&](int h, int w, float v) {
        const float e = writes.erase[(int64_t)h * l.W + w];
        dx[l.erase(h) + w] = narrow<T>(v * e * (1 - e));
      },
      [&](int h, int w, float v) { dx[l.add(h) + w] = narrow<T>(v); });

  heads.backward((T*)a.dprevious + b * n, [&](int h, float dbeta, float dgate, float dgamma) {
    const float g = heads.gate[h];
    dx[l.strength(h)] = narrow<T>(dbeta * sigmoid(wide(x[l.strength(h)])));
    dx[l.gate(h)] = narrow<T>(dgate * g * (1 - g));
    dx[l.gamma(h)] = narrow<T>(dgamma * sigmoid(wide(x[l.gamma(h)])));
  });
  for (int h = threadIdx.x; h < heads.s.H; h += kThreads) shift_logits(dx + l.shift(h), heads.shift + h * l.S, heads.dshift + h * l.S, l.S);

  similarity_rows(
      span, heads.s, rows, heads.d, heads.key_own, heads.scratch,
      [&](const Span& span) { return memory_gradient(writes, span, block.dreads, write_first, grad); },
      [&](const Span& span, int n, const Numbers& x) { span.store(dmemory + n * a.W, x); },
      [&](int h, int w, float v) { dx[l.head(h) + w] = narrow<T>(v); });
}

template <class T> Plan step_plan(const StepArgs& a, bool backward) {
  return plan_of(mc_shared_limit(a.device), [&](auto& arena, bool staged) { StepBlock<T>(arena, a, backward, staged); });
}

template <class T> int64_t step_fwd(const StepArgs& a, void* stream) {
  const Plan p = step_plan<T>(a, false);
  auto* kernel = p.spill ? ntm_step_fwd_kernel<T, true> : ntm_step_fwd_kernel<T, false>;
  return mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, StepLaunch{a, p});
}
template <class T> int64_t step_bwd(const StepArgs& a, void* stream) {
  const Plan p = step_plan<T>(a, true);
  auto* kernel = p.spill ? ntm_step_bwd_kernel<T, true> : ntm_step_bwd_kernel<T, false>;
  return mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, StepLaunch{a, p});
}
int64_t step_workspace(const StepArgs& a, bool backward) {
  if (step_by_tiles(a, backward)) return step_tiles_workspace(a, backward);
  return with_type(a.dtype, [&](auto t) { return a.B * step_plan<decltype(t)>(a, backward).workspace; });
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

int64_t mc_ntm_step_fwd_workspace(const StepArgs* a) { return step_workspace(*a, false); }
int64_t mc_ntm_step_bwd_workspace(const StepArgs* a) { return step_workspace(*a, true); }
int64_t mc_ntm_step_fwd(const StepArgs* a, void* stream) {
  if (step_by_tiles(*a, false)) return step_tiles(*a, false, stream);
  return with_type(a->dtype, [&](auto t) { return step_fwd<decltype(t)>(*a, stream); });
}
int64_t mc_ntm_step_bwd(const StepArgs* a, void* stream) {
  if (step_by_tiles(*a, true)) return step_tiles(*a, true, stream);
  return with_type(a->dtype, [&](auto t) { return step_bwd<decltype(t)>(*a, stream); });
}
