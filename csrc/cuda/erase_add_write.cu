// Erase/add writes. Forward: tiles of rows, memory once in, once out (in place too: an element is read before it is written, by one
// thread). Backward: a block for each batch element, memory and gradient read once (up to 3 heads at a time).
#include "erase_add_write.h"

#include "write.h"

namespace memcore {
namespace cuda {

struct EraseAddLaunch {
  EraseAddArgs a;
  Plan plan;
};

template <class T> MC_KERNEL erase_add_write_fwd_kernel(EraseAddLaunch launch) {
  const EraseAddArgs& a = launch.a;
  const T *memory = (const T*)a.memory, *all_erase = (const T*)a.erase, *all_add = (const T*)a.add;
  Span span((int)a.W, memory, (const T*)a.written, all_erase, all_add);
  const int64_t tiles = span_tiles(a.N, a.W), b = blockIdx.x / tiles, n = blockIdx.x % tiles * span.step + span.row(span.first());
  if (n >= a.N) return;
  const T *weights = (const T*)a.weights + b * a.H * a.N + n, *erase = all_erase + b * a.H * a.W, *add = all_add + b * a.H * a.W;
  for (; span.w0 < a.W; span.w0 += span.width()) {
    Numbers x = span.load(memory + (b * a.N + n) * a.W), added{};
    for (int64_t h = 0; h < a.H; h++) {
      const float c = wide(weights[h * a.N]);
      erase_from(x, c, span.load(erase + h * a.W));
      add_to(added, c, span.load(add + h * a.W));
    }
    add_to(x, 1, added);
    span.store((T*)a.written + (b * a.N + n) * a.W, x);
  }
}

template <class T> struct EraseAddBlock {
  float *scratch, *erase, *add, *weights, *dweights;

  template <class A> __host__ __device__ EraseAddBlock(A& arena, const EraseAddArgs& a) {
    scratch = arena.template take<float>(8 * kThreads);
    erase = arena.template take<float>(a.H * a.W), add = arena.template take<float>(a.H * a.W);
    weights = arena.template take<float>(a.H * a.N), dweights = arena.template take<float>(a.H * a.N);
  }
};

template <class T, bool SPILL> MC_KERNEL erase_add_write_bwd_kernel(EraseAddLaunch launch) {
  MC_DYN_SHARED(shared);
  const EraseAddArgs& a = launch.a;
  const int64_t b = blockIdx.x, n = a.H * a.N;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  EraseAddBlock<T> block(arena, a);
  widen(block.erase, (const T*)a.erase + b * a.H * a.W, a.H * a.W);
  widen(block.add, (const T*)a.add + b * a.H * a.W, a.H * a.W);
  widen(block.weights, (const T*)a.weights + b * n, n);
  for (int64_t i = threadIdx.x; i < n; i += kThreads) block.dweights[i] = 0;
  __syncthreads();
  const Writes writes{(int)a.N, (int)a.W, (int)a.H, 0, block.erase, block.add, block.weights, nullptr};
  const T *memory = (const T*)a.memory + b * a.N * a.W, *grad = (const T*)a.grad + b * a.N * a.W;
  T *dmemory = (T*)a.dmemory + b * a.N * a.W, *derase = (T*)a.derase + b * a.H * a.W, *dadd = (T*)a.dadd + b * a.H * a.W;
  write_read_backward<true>(
      Span(writes.W, memory, grad, dmemory), writes, memory, nullptr, false, block.dweights, nullptr, block.scratch,
      [&](const Span& span, int n) { return span.load(grad + n * a.W); }, [&](const Span& span, int n, const Numbers& x) { span.store(dmemory + n * a.W, x); },
      [&](int h, int w, float x) { derase[h * a.W + w] = narrow<T>(x); }, [&](int h, int w, float x) { dadd[h * a.W + w] = narrow<T>(x); });
  for (int64_t i = threadIdx.x; i < n; i += kThreads) ((T*)a.dweights)[b * n + i] = narrow<T>(block.dweights[i]);
}

template <class T> int64_t erase_add_fwd(const EraseAddArgs& a, void* stream) {
  return mc_launch(erase_add_write_fwd_kernel<T>, a.B * span_tiles(a.N, a.W), kThreads, 0, a.device, stream, EraseAddLaunch{a, {}});
}
template <class T> Plan erase_add_plan(const EraseAddArgs& a) {
  return plan_of(mc_shared_limit(a.device), [&](auto& arena, bool) { EraseAddBlock<T>(arena, a); });
}
template <class T> int64_t erase_add_bwd(const EraseAddArgs& a, void* stream) {
  const Plan p = erase_add_plan<T>(a);
  auto* kernel = p.spill ? erase_add_write_bwd_kernel<T, true> : erase_add_write_bwd_kernel<T, false>;
  return mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, EraseAddLaunch{a, p});
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

int64_t mc_erase_add_write_bwd_workspace(const EraseAddArgs* a) {
  return with_type(a->dtype, [&](auto t) { return a->B * erase_add_plan<decltype(t)>(*a).workspace; });
}
int64_t mc_erase_add_write_fwd(const EraseAddArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return erase_add_fwd<decltype(t)>(*a, stream); });
}
int64_t mc_erase_add_write_bwd(const EraseAddArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return erase_add_bwd<decltype(t)>(*a, stream); });
}
