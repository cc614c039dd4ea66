// Kernels that each make one mistake, and right ones: what the shim and the sanitizers must see, and what they must not.
//   wrong_kernels NAME        prints "wrong result" where only the result shows the mistake
#include <functional>
#include <iostream>
#include <map>
#include <vector>

#include "cuda/mc_device.h"

namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kThreads = 64;
struct Args {
  float *to, *from;
  int n;
  unsigned* count;
};

// ---- right ----

// Blocks share nothing, threads exchange by shared memory and by shuffles, a tail is copied asynchronously.
MC_KERNEL right(Args a) {
  MC_DYN_SHARED(shared);
  float* x = MC_ARRAY(float, shared, kThreads);
  float* y = MC_ARRAY(float, shared + kThreads * sizeof(float), kThreads);
  const int i = threadIdx.x;
  __pipeline_memcpy_async(x + i, a.from + i, 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  for (int turn = 0; turn < 3; turn++) {
    y[i] = x[kThreads - 1 - i];
    __syncthreads();
    x[i] = y[i] + __shfl_xor_sync(kFull, y[i], 1) * 0;
    __syncthreads();
  }
  y[i] = x[i ^ 1];
  __syncwarp();
  a.to[blockIdx.x * kThreads + i] = y[i ^ 1];
}

// Two blocks read what the other one wrote, between two meetings.
enum Mistake { kNone, kNoArrival, kNoWait, kNoBarrierBefore, kNoBarrierAfter };
template <Mistake M> MC_KERNEL meeting(Args a) {
  float *mine = a.to + blockIdx.x * kThreads, *other = a.to + (1 - blockIdx.x) * kThreads;
  const auto meet = [&](unsigned n) {
    if (M != kNoBarrierBefore) __syncthreads();
    if (threadIdx.x == 0) {
      if (M != kNoArrival) mc_arrive(a.count);
      if (M != kNoWait) mc_await(a.count, 2 * n);
    }
    if (M != kNoBarrierAfter) __syncthreads();
  };
  mine[threadIdx.x] = 2;
  meet(1);
  const float v = other[kThreads - 1 - threadIdx.x];
  meet(2);
  mine[threadIdx.x] = v - 1;
}
MC_KERNEL blocks_meet(Args a) { meeting<kNone>(a); }
MC_KERNEL blocks_never_arrive(Args a) { meeting<kNoArrival>(a); }
MC_KERNEL blocks_do_not_wait(Args a) { meeting<kNoWait>(a); }
MC_KERNEL blocks_arrive_too_soon(Args a) { meeting<kNoBarrierBefore>(a); }
MC_KERNEL blocks_go_on_too_soon(Args a) { meeting<kNoBarrierAfter>(a); }

// ---- barriers and masks ----

MC_KERNEL divergent_barrier(Args a) {
  if (threadIdx.x < 40) __syncthreads();
  a.to[threadIdx.x] = __shfl_xor_sync(kFull, 1.f, 1);
}
MC_KERNEL two_barriers(Args a) {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
  a.to[threadIdx.x] = 1;
}
MC_KERNEL divergent_shuffle(Args a) {
  float v = 1;
  if ((threadIdx.x & 31) < 16) v += __shfl_xor_sync(kFull, v, 1);
  a.to[threadIdx.x] = v;
}
MC_KERNEL not_in_own_mask(Args a) { a.to[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.f, 1); }
MC_KERNEL lane_outside_mask(Args a) {
  float v = 1;
  if ((threadIdx.x & 31) < 16) v = __shfl_sync(0xffffu, v, 20);
  a.to[threadIdx.x] = v;
}

// ---- reads before writes: NaN in the result ----

MC_KERNEL uninitialised_shared(Args a) {
  MC_DYN_SHARED(shared);
  float* x = MC_ARRAY(float, shared, kThreads);
  if (threadIdx.x > 0) x[threadIdx.x] = 1;
  __syncthreads();
  a.to[threadIdx.x] = x[threadIdx.x];
}
MC_KERNEL missing_barrier(Args a) {
  MC_DYN_SHARED(shared);
  float* x = MC_ARRAY(float, shared, kThreads);
  x[threadIdx.x] = a.from[threadIdx.x];
  a.to[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
}
MC_KERNEL missing_wait(Args a) {
  MC_DYN_SHARED(shared);
  float* x = MC_ARRAY(float, shared, kThreads);
  __pipeline_memcpy_async(x + threadIdx.x, a.from + threadIdx.x, 4);
  __pipeline_commit();
  __syncthreads();
  a.to[threadIdx.x] = x[threadIdx.x];
}

// ---- out of bounds ----

MC_KERNEL past_global(Args a) { a.to[threadIdx.x + 1] = 1; }
MC_KERNEL before_global(Args a) { a.to[threadIdx.x] = a.from[(int)threadIdx.x - 1]; }
MC_KERNEL past_shared(Args a) {
  MC_DYN_SHARED(shared);
  float* x = MC_ARRAY(float, shared, 2 * kThreads);
  x[threadIdx.x + kThreads + 1] = 1;
  a.to[threadIdx.x] = 1;
}
// The array's neighbour is the block's, too.
MC_KERNEL past_array(Args a) {
  MC_DYN_SHARED(shared);
  float* x = MC_ARRAY(float, shared, kThreads);
  float* y = MC_ARRAY(float, shared + kThreads * sizeof(float), kThreads);
  y[threadIdx.x] = 0;
  x[threadIdx.x + 1] = 1;
  a.to[threadIdx.x] = 1;
}
MC_KERNEL array_past_shared(Args a) {
  MC_DYN_SHARED(shared);
  a.to[threadIdx.x] = MC_ARRAY(float, shared + kThreads * sizeof(float), kThreads + 1) != nullptr;
}
MC_KERNEL past_local(Args a) {
  float x[4] = {};
  for (int i = 0; i < a.n; i++) x[i] = (float)i;
  a.to[threadIdx.x] = x[threadIdx.x & 3];
}
MC_KERNEL misaligned(Args a) { a.to[threadIdx.x] = *(const float*)((const char*)a.from + 2); }

// ---- races ----

// The barrier between the last read and the next write: no order of threads shows it.
MC_KERNEL write_after_read(Args a) {
  MC_DYN_SHARED(shared);
  float* x = MC_ARRAY(float, shared, kThreads);
  x[threadIdx.x] = a.from[threadIdx.x];
  __syncthreads();
  float v = x[0];
  if (threadIdx.x == 0) x[0] = 7;
  a.to[blockIdx.x * kThreads + threadIdx.x] = v;
}
MC_KERNEL missing_syncwarp(Args a) {
  MC_DYN_SHARED(shared);
  volatile float* x = MC_ARRAY(float, shared, kThreads);
  x[threadIdx.x] = a.from[threadIdx.x];
  a.to[blockIdx.x * kThreads + threadIdx.x] = x[threadIdx.x ^ 1];
}
// Lanes do meet in a shuffle, but what they wrote before need not be visible.
MC_KERNEL shuffle_for_syncwarp(Args a) {
  MC_DYN_SHARED(shared);
  float* x = MC_ARRAY(float, shared, kThreads);
  x[threadIdx.x] = a.from[threadIdx.x];
  const float v = __shfl_xor_sync(kFull, 0.f, 1);
  a.to[threadIdx.x] = x[threadIdx.x ^ 1] + v;
}
// Both after a barrier: one block's must not order the other's.
MC_KERNEL blocks_write_one_place(Args a) {
  __syncthreads();
  a.to[threadIdx.x] = (float)blockIdx.x;
}
MC_KERNEL block_reads_anothers(Args a) {
  __syncthreads();
  a.to[blockIdx.x * kThreads + threadIdx.x] = 1;
  __syncthreads();
  if (blockIdx.x == 1) a.to[kThreads + threadIdx.x] += a.to[threadIdx.x];
}

const std::map<std::string, void (*)(Args)> kKernels = {
#define K(name) {#name, &name}
    K(right), K(divergent_barrier), K(two_barriers), K(divergent_shuffle), K(not_in_own_mask), K(lane_outside_mask),
    K(uninitialised_shared), K(missing_barrier), K(missing_wait), K(past_global), K(before_global), K(past_shared), K(past_array),
    K(array_past_shared), K(past_local), K(misaligned), K(write_after_read), K(missing_syncwarp), K(shuffle_for_syncwarp), K(blocks_write_one_place),
    K(block_reads_anothers), K(blocks_meet), K(blocks_never_arrive), K(blocks_do_not_wait), K(blocks_arrive_too_soon), K(blocks_go_on_too_soon),
#undef K
};

}  // namespace

int main(int argc, char** argv) {
  const int n = 2 * kThreads;
  float *to = new float[n], *from = new float[kThreads];
  for (int i = 0; i < n; i++) to[i] = 1;
  for (int i = 0; i < kThreads; i++) from[i] = 1;
  unsigned count = 0;
  const std::string name = argc > 1 ? argv[1] : "";
  const int blocks = name == "right" || name.rfind("block", 0) == 0 ? 2 : 1;
  const bool beyond = name == "past_global";  // blocks write up to the buffer's end and one element further
  try {
    mc_launch(kKernels.at(name), blocks, kThreads, 2 * kThreads * sizeof(float), 0, nullptr, Args{beyond ? to + kThreads : to, from, 5, &count});
  } catch (const mcshim::error& e) {
    std::cout << "refused: " << e.what() << "\n";
    return 1;
  }
  int wrong = 0;
  for (int i = 0; i < n; i++) wrong += !(to[i] == 1);
  delete[] to;
  delete[] from;
  if (wrong) std::cout << "wrong result: " << wrong << " of " << n << "\n";
  return wrong > 0;
}
