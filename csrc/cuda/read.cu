// Reads: a block for each batch element. The memory is read once forward and once backward (up to 7 heads at a time); the gradient
// of a memory shared by the batch is a second launch.
#include "read.h"

#include "addressing.h"
#include "write.h"

namespace memcore {
namespace cuda {

struct ReadLaunch {
  ReadArgs a;
  Plan plan;
  float* d;  // shared memory's backward: the weights in float32, [B, H, N]
};

// Seven heads share one look at a row; for more the memory is staged, so that it is read once all the same.
template <class T> struct ReadBlock {
  float *scratch, *weights, *grad;
  T* rows;

  template <class A> __host__ __device__ ReadBlock(A& arena, const ReadArgs& a, bool backward, bool staged) {
    if (!backward) scratch = arena.template take<float>(8 * kThreads);
    if (backward) grad = arena.template take<float>(a.H * a.W);
    weights = arena.template take<float>(a.H * a.N);
    if (staged && a.H > 7) rows = arena.template take<T>(staged_size<T>(a.N * a.W));
  }

  // Weights of element b, visible to all; returns its rows.
  __device__ const T* load(const ReadArgs& a, int64_t b, bool staged_) {
    const T* from = (const T*)a.memory + b * a.memory_stride;
    const bool in_shared = staged_ && a.H > 7;
    if (in_shared) from = stage(rows, from, (int)(a.N * a.W));
    widen(weights, (const T*)a.weights + b * a.H * a.N, a.H * a.N);
    if (in_shared) staged();
    else __syncthreads();
    return from;
  }
};

template <class T, bool SPILL> MC_KERNEL read_fwd_kernel(ReadLaunch launch) {
  MC_DYN_SHARED(shared);
  const ReadArgs& a = launch.a;
  const int64_t b = blockIdx.x;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  ReadBlock<T> block(arena, a, false, launch.plan.staged);
  const T* rows = block.load(a, b, launch.plan.staged);
  const Writes reads{(int)a.N, (int)a.W, 0, (int)a.H, nullptr, nullptr, nullptr, block.weights};
  T* result = (T*)a.result + b * a.H * a.W;
  write_read(reads, rows, (T*)nullptr, false, block.scratch, [&](int h, int w, float x) {
    result[h * a.W + w] = narrow<T>(x);
  });
}

template <class T, bool SPILL> MC_KERNEL read_bwd_kernel(ReadLaunch launch) {
  MC_DYN_SHARED(shared);
  const ReadArgs& a = launch.a;
  const int64_t b = blockIdx.x, n = a.H * a.N;
  auto arena = arena_of<SPILL>(shared, launch.plan, a.workspace);
  ReadBlock<T> block(arena, a, true, launch.plan.staged);
  widen(block.grad, (const T*)a.grad + b * a.H * a.W, a.H * a.W);
  const T* rows = block.load(a, b, launch.plan.staged);
  T* dweights = (T*)a.dweights + b * n;
  dots(
      rows, (int)a.N, (int)a.W, block.grad, (int)a.H, false,
      [&](int h, int i, float x) { dweights[h * a.N + i] = narrow<T>(x); }, [](int, float) {});
  if (launch.d) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) launch.d[b * n + i] = block.weights[i];
    return;
  }
  const Writes reads{(int)a.N, (int)a.W, 0, (int)a.H, nullptr, nullptr, nullptr, block.weights};
  T* dmemory = (T*)a.dmemory + b * a.N * a.W;
  for (Span span(reads.W, dmemory); span.w0 < reads.W; span.w0 += span.width()) {
    const Asked<4> asked(reads, span, block.grad);
    for (int i = span.row(span.first()); i < reads.N; i += span.step) span.store(dmemory + i * a.W, asked(i));
  }
}

template <class T> MC_KERNEL read_bwd_shared_kernel(SharedRows<T> rows) { shared_rows(rows); }

template <class T> Plan read_plan(const ReadArgs& a, bool backward) {
  return plan_of(mc_shared_limit(a.device), [&](auto& arena, bool staged) { ReadBlock<T>(arena, a, backward, staged); });
}

template <class T> int64_t read_fwd(const ReadArgs& a, void* stream) {
  const Plan p = read_plan<T>(a, false);
  auto* kernel = p.spill ? read_fwd_kernel<T, true> : read_fwd_kernel<T, false>;
  return mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, ReadLaunch{a, p, nullptr});
}

template <class T> int64_t read_bwd(const ReadArgs& a, void* stream) {
  const Plan p = read_plan<T>(a, true);
  ReadLaunch launch{a, p, nullptr};
  const bool shared = a.memory_stride == 0 && a.N > 0 && a.W > 0;
  if (shared) launch.d = (float*)((char*)a.workspace + a.B * p.workspace);
  auto* kernel = p.spill ? read_bwd_kernel<T, true> : read_bwd_kernel<T, false>;
  const int64_t error = mc_launch(kernel, a.B, kThreads, p.shared, a.device, stream, launch);
  if (error || !shared) return error;
  const SharedRows<T> rows{a.B, a.H, a.N, a.W, launch.d, nullptr, (const T*)a.grad, (const T*)a.memory, (T*)a.dmemory};
  return mc_launch(read_bwd_shared_kernel<T>, row_tiles(a.N, a.W), kThreads, 0, a.device, stream, rows);
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

int64_t mc_read_fwd_workspace(const ReadArgs* a) {
  return with_type(a->dtype, [&](auto t) { return a->B * read_plan<decltype(t)>(*a, false).workspace; });
}
int64_t mc_read_bwd_workspace(const ReadArgs* a) {
  return with_type(a->dtype, [&](auto t) {
    // One more byte, so that a shared memory of a batch without heads has an address, too.
    return a->B * read_plan<decltype(t)>(*a, true).workspace + (a->memory_stride == 0 ? a->B * a->H * a->N * (int64_t)sizeof(float) + 1 : 0);
  });
}
int64_t mc_read_fwd(const ReadArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return read_fwd<decltype(t)>(*a, stream); });
}
int64_t mc_read_bwd(const ReadArgs* a, void* stream) {
  return with_type(a->dtype, [&](auto t) { return read_bwd<decltype(t)>(*a, stream); });
}
