// The only header beside this project's own that a kernel file includes: CUDA under nvcc; under a plain C++ compiler the shim of
// tests/cuda_on_cpu, which runs the same source on a CPU.
//
//   mc_launch(kernel, blocks, threads, shared, device, stream, args)   kernel(args), one plain struct by value; the runtime's error code
//   mc_shared_limit(device)                                            bytes of shared memory a block may have
//   mc_processors(device)                                              multiprocessors
//   mc_arrive(count), mc_await(count, all)                             by one thread: counts it in; waits until `all` are. What was visible to those
//                                                                      who arrived is visible to those who waited
//   MC_KERNEL                                                          heads a kernel's definition
//   MC_KERNEL_TWO                                                      the same where two blocks to a multiprocessor hide more than registers gain
//   MC_DYN_SHARED(name)                                                the block's dynamic shared memory, a char*, 16-byte aligned
//   MC_ARRAY(X, at, n)                                                 n X of the block's from address `at` on
#pragma once

#include <stdint.h>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

// One block an SM must fit: without this ptxas spills to make room for more.
#define MC_KERNEL __global__ void __launch_bounds__(256, 1)
#define MC_KERNEL_TWO __global__ void __launch_bounds__(256, 2)
#define MC_DYN_SHARED(name)                                 \
  extern __shared__ __align__(16) char mc_dynamic_shared[]; \
  char* name = mc_dynamic_shared
#define MC_ARRAY(X, at, n) ((X*)(at))

__device__ inline void mc_arrive(unsigned* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(count)) : "memory");
}
__device__ inline void mc_await(const unsigned* count, unsigned all) {
  for (;;) {
    unsigned seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(__cvta_generic_to_global(count)) : "memory");
    if (seen >= all) return;
    __nanosleep(50);
  }
}

template <class A>
inline int64_t mc_launch(void (*kernel)(A), int64_t blocks, int threads, int64_t shared, int64_t device, void* stream, const A& args) {
  if (blocks <= 0) return 0;
  if (blocks > 2147483647) return cudaErrorInvalidConfiguration;
  // torch's runtime is another one: this one has to be told the device too.
  cudaError_t error = cudaSetDevice((int)device);
  if (error == cudaSuccess && shared > 48 * 1024)
    error = cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared);
  if (error != cudaSuccess) return error;
  kernel<<<dim3((unsigned)blocks), dim3((unsigned)threads), (size_t)shared, (cudaStream_t)stream>>>(args);
  return cudaGetLastError();
}

inline int64_t mc_shared_limit(int64_t device) {
  int bytes = 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, (int)device) != cudaSuccess) return 48 * 1024;
  return bytes;
}
inline int64_t mc_processors(int64_t device) {
  int n = 0;
  if (cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, (int)device) != cudaSuccess) return 1;
  return n;
}

#else
#include "cuda_shim.h"
#endif
