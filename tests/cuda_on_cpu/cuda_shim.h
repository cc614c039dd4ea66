// CUDA's names for kernels that run on a CPU, for TESTS ONLY: built-in variables, barriers, warp operations, atomics, math, narrow types, copies, launches.
// Threads and blocks are those of cuda_shim_blocks.h.
#pragma once
#include "cuda_shim_blocks.h"

#define threadIdx (mcshim::cur()->tid)
#define blockIdx (mcshim::blk()->bid)
#define blockDim (mcshim::blk()->bdim)
#define gridDim (mcshim::blk()->gdim)
static const int warpSize = 32;
#define MC_SITE const char* mc_f = __builtin_FILE(), int mc_l = __builtin_LINE()

inline void __syncthreads(MC_SITE) { mcshim::block_barrier({mc_f, mc_l}, 0, 0); }
inline int __syncthreads_count(int p, MC_SITE) { return mcshim::block_barrier({mc_f, mc_l}, 1, p); }
inline int __syncthreads_and(int p, MC_SITE) { return mcshim::block_barrier({mc_f, mc_l}, 2, p); }
inline int __syncthreads_or(int p, MC_SITE) { return mcshim::block_barrier({mc_f, mc_l}, 3, p); }
inline void __syncwarp(unsigned m = 0xffffffffu, MC_SITE) { mcshim::warp_op(mcshim::W_SYNC, m, 0, -1, {mc_f, mc_l}); }
template <class T> T __shfl_sync(unsigned m, T v, int src, int width = 32, MC_SITE) {
  int lane = mcshim::cur()->lin & 31;
  return mcshim::unpack<T>(mcshim::warp_op(mcshim::W_SHFL, m, mcshim::pack(v), (lane & ~(width - 1)) + (src & (width - 1)), {mc_f, mc_l}));
}
template <class T> T __shfl_xor_sync(unsigned m, T v, int x, int width = 32, MC_SITE) {
  int lane = mcshim::cur()->lin & 31, s = lane ^ x;
  if (s >= (lane & ~(width - 1)) + width) s = -1;
  return mcshim::unpack<T>(mcshim::warp_op(mcshim::W_SHFL, m, mcshim::pack(v), s, {mc_f, mc_l}));
}
template <class T> T __shfl_down_sync(unsigned m, T v, unsigned d, int width = 32, MC_SITE) {
  int lane = mcshim::cur()->lin & 31, s = lane + int(d);
  if (s >= (lane & ~(width - 1)) + width) s = -1;
  return mcshim::unpack<T>(mcshim::warp_op(mcshim::W_SHFL, m, mcshim::pack(v), s, {mc_f, mc_l}));
}
template <class T> T __shfl_up_sync(unsigned m, T v, unsigned d, int width = 32, MC_SITE) {
  int lane = mcshim::cur()->lin & 31, s = lane - int(d);
  if (s < (lane & ~(width - 1))) s = -1;
  return mcshim::unpack<T>(mcshim::warp_op(mcshim::W_SHFL, m, mcshim::pack(v), s, {mc_f, mc_l}));
}
inline unsigned __ballot_sync(unsigned m, int p, MC_SITE) { return unsigned(mcshim::warp_op(mcshim::W_BALLOT, m, p != 0, -1, {mc_f, mc_l})); }
inline int __any_sync(unsigned m, int p, MC_SITE) { return __ballot_sync(m, p, mc_f, mc_l) != 0; }
inline int __all_sync(unsigned m, int p, MC_SITE) { return __ballot_sync(m, !p, mc_f, mc_l) == 0; }
template <class T> unsigned __match_any_sync(unsigned m, T v, MC_SITE) { return unsigned(mcshim::warp_op(mcshim::W_MATCH, m, mcshim::pack(v), -1, {mc_f, mc_l})); }
inline unsigned __reduce_add_sync(unsigned m, unsigned v, MC_SITE) { return unsigned(mcshim::warp_op(mcshim::W_ADD, m, v, -1, {mc_f, mc_l})); }
inline int __reduce_min_sync(unsigned m, int v, MC_SITE) { return int(mcshim::warp_op(mcshim::W_MIN, m, unsigned(v), -1, {mc_f, mc_l})); }
inline int __reduce_max_sync(unsigned m, int v, MC_SITE) { return int(mcshim::warp_op(mcshim::W_MAX, m, unsigned(v), -1, {mc_f, mc_l})); }
// __activemask() is left out on purpose: its value is not defined by the program text.

inline void __threadfence_block() {
#ifdef MC_TSAN
  __tsan_acquire(&mcshim::g_fence); __tsan_release(&mcshim::g_fence);
#endif
}
inline void __threadfence() { __threadfence_block(); mcshim::maybe_yield(); }
inline void __threadfence_system() { __threadfence(); }

// ---------------------------------------------------------------- atomics (relaxed, as in CUDA)
namespace mcshim {
template <class T, class Op> T atomic_rmw(T* p, Op op) {
  using U = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
  maybe_yield();
  U* u = reinterpret_cast<U*>(p);
  U o = __atomic_load_n(u, __ATOMIC_RELAXED), n;
  T ov, nv;
  do {
    std::memcpy(&ov, &o, sizeof ov);
    nv = op(ov);
    std::memcpy(&n, &nv, sizeof n);
  } while (!__atomic_compare_exchange_n(u, &o, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return ov;
}
}  // namespace mcshim
template <class T> T atomicAdd(T* p, T v) { return mcshim::atomic_rmw(p, [v](T o) { return T(o + v); }); }
template <class T> T atomicSub(T* p, T v) { return mcshim::atomic_rmw(p, [v](T o) { return T(o - v); }); }
template <class T> T atomicMin(T* p, T v) { return mcshim::atomic_rmw(p, [v](T o) { return v < o ? v : o; }); }
template <class T> T atomicMax(T* p, T v) { return mcshim::atomic_rmw(p, [v](T o) { return v > o ? v : o; }); }
template <class T> T atomicExch(T* p, T v) { return mcshim::atomic_rmw(p, [v](T) { return v; }); }
template <class T> T atomicOr(T* p, T v) { return mcshim::atomic_rmw(p, [v](T o) { return T(o | v); }); }
template <class T> T atomicAnd(T* p, T v) { return mcshim::atomic_rmw(p, [v](T o) { return T(o & v); }); }
template <class T> T atomicCAS(T* p, T c, T v) {
  T o = mcshim::atomic_rmw(p, [c, v](T x) { return x == c ? v : x; });
  if (!(o == c)) mcshim::yield();  // a spin loop must let the holder run
  return o;
}

// ---------------------------------------------------------------- blocks that wait for each other
inline void mc_arrive(unsigned* count) {
  mcshim::arrive();
  __atomic_fetch_add(count, 1u, __ATOMIC_RELEASE);
}
inline void mc_await(const unsigned* count, unsigned all) {
  while (__atomic_load_n(count, __ATOMIC_ACQUIRE) < all) mcshim::sleep();
}

// ---------------------------------------------------------------- math
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float_as_int(float f) { int i; std::memcpy(&i, &f, 4); return i; }
inline float __int_as_float(int i) { float f; std::memcpy(&f, &i, 4); return f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class T> inline T __ldg(const T* p) { return *p; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

// ---------------------------------------------------------------- fp16 / bf16 (stored as 16 bits, arithmetic by float)
namespace mcshim {
inline uint16_t f2h(float f) {
  uint32_t x; std::memcpy(&x, &f, 4);
  uint32_t s = x >> 16 & 0x8000, a = x & 0x7fffffff;
  if (a >= 0x7f800000) return uint16_t(s | (a > 0x7f800000 ? 0x7fff : 0x7c00));
  if (a >= 0x477ff000) return uint16_t(s | 0x7c00);
  if (a < 0x33000001) return uint16_t(s);
  int e = int(a >> 23) - 127;
  uint32_t m = (a & 0x7fffff) | 0x800000;
  int sh = e < -14 ? 13 + (-14 - e) : 13;
  uint32_t base = e < -14 ? 0 : uint32_t(e + 14) << 10;  // the implicit bit adds 1 to the exponent
  uint32_t q = m >> sh, r = m & ((1u << sh) - 1), h = 1u << (sh - 1);
  if (r > h || (r == h && (q & 1))) ++q;
  return uint16_t(s | (base + q));
}
inline float h2f(uint16_t h) {
  uint32_t s = uint32_t(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023, x;
  if (e == 31) x = s | 0x7f800000 | m << 13;
  else if (e) x = s | (e + 112) << 23 | m << 13;
  else { float f = std::ldexp(float(m), -24); return s ? -f : f; }
  float f; std::memcpy(&f, &x, 4); return f;
}
inline uint16_t f2b(float f) {
  uint32_t x; std::memcpy(&x, &f, 4);
  if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((x + 0x7fff + (x >> 16 & 1)) >> 16);
}
inline float b2f(uint16_t b) { uint32_t x = uint32_t(b) << 16; float f; std::memcpy(&f, &x, 4); return f; }
}  // namespace mcshim
#define MC_SMALL_FLOAT(T, TO, FROM)                                                   \
  struct T {                                                                          \
    uint16_t x;                                                                       \
    T() = default;                                                                    \
    T(float f) : x(mcshim::TO(f)) {}                                                  \
    operator float() const { return mcshim::FROM(x); }                                \
  };                                                                                  \
  inline T operator+(T a, T b) { return T(float(a) + float(b)); }                     \
  inline T operator-(T a, T b) { return T(float(a) - float(b)); }                     \
  inline T operator*(T a, T b) { return T(float(a) * float(b)); }                     \
  inline T operator/(T a, T b) { return T(float(a) / float(b)); }                     \
  inline T __hadd(T a, T b) { return a + b; }                                         \
  inline T __hmul(T a, T b) { return a * b; }                                         \
  inline T __hfma(T a, T b, T c) { return T(float(std::fma(double(float(a)), double(float(b)), double(float(c))))); }
MC_SMALL_FLOAT(__half, f2h, h2f)
MC_SMALL_FLOAT(__nv_bfloat16, f2b, b2f)
using half = __half;
inline __half __float2half(float f) { return __half(f); }
inline __half __float2half_rn(float f) { return __half(f); }
inline float __half2float(__half h) { return float(h); }
inline __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
inline float __bfloat162float(__nv_bfloat16 h) { return float(h); }
struct alignas(4) __half2 { __half x, y; };
struct alignas(4) __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float2 __half22float2(__half2 h) { return {float(h.x), float(h.y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {float(h.x), float(h.y)}; }

// ---------------------------------------------------------------- cp.async (cuda_pipeline_primitives.h)
// The copy happens at the WAIT, not at the call: a missing wait reads the poison.
namespace mcshim {
MC_NOTSAN void cp_queue(void* dst, const void* src, size_t n, size_t zfill) {
  Fiber* f = g_cur;
  if (!f->q) f->q = (Async*)std::malloc(64 * sizeof(Async));
  if (f->qn == 64) fail("more than 64 cp.async outstanding in one thread");
  f->q[f->qn++] = {dst, src, n, zfill, f->qgroup};
}
MC_NOTSAN void cp_commit() { g_cur->qgroup++; }
MC_NOTSAN void cp_wait(int keep) {
  Fiber* f = g_cur;
  int k = 0;
  for (int i = 0; i < f->qn; ++i) {
    Async a = f->q[i];
    if (a.group >= f->qgroup - keep) { f->q[k++] = a; continue; }
    void* (*volatile copy)(void*, const void*, size_t) = std::memcpy;  // a real call: the sanitizers see the access
    copy(a.dst, a.src, a.n - a.zfill);
    if (a.zfill) std::memset((char*)a.dst + a.n - a.zfill, 0, a.zfill);
  }
  f->qn = k;
}
}  // namespace mcshim
inline void __pipeline_memcpy_async(void* dst, const void* src, size_t n, size_t zfill = 0) {
  if (n != 4 && n != 8 && n != 16) mcshim::fail("cp.async copies 4, 8 or 16 bytes");
  if (uintptr_t(dst) % n || uintptr_t(src) % n) mcshim::fail("cp.async: address not aligned to the copy size");
  mcshim::cp_queue(dst, src, n, zfill);
}
inline void __pipeline_commit() { mcshim::cp_commit(); }
inline void __pipeline_wait_prior(int keep) { mcshim::cp_wait(keep); }

// ---------------------------------------------------------------- host side
// MC_SHARED(float, tile, [32][33]);
#define MC_SHARED(T, name, dims) \
  static char name##_mckey;      \
  using name##_mcT = mcshim::id<T dims>; \
  typename name##_mcT::t& name = *static_cast<typename name##_mcT::t*>(mcshim::shared_var(&name##_mckey, sizeof(typename name##_mcT::t)))
namespace mcshim { template <class T> struct id { using t = T; }; }
#define MC_KERNEL inline void
#define MC_KERNEL_TWO inline void
#define MC_DYN_SHARED(name) char* name = static_cast<char*>(mcshim::dyn_shared())
#define MC_ARRAY(X, at, n) static_cast<X*>(mcshim::array(at, size_t(n) * sizeof(X)))

namespace mcshim {
inline int64_t g_shared_limit = 227 * 1024;
inline int64_t g_processors = 132;
// Where set, a launch is told instead of run: kernel, blocks, threads, bytes of shared memory, the argument, its size.
using Recorder = void (*)(const void*, int64_t, int, int64_t, const void*, int64_t);
inline Recorder g_recorder = nullptr;
}  // namespace mcshim
inline int64_t mc_shared_limit(int64_t) { return mcshim::g_shared_limit; }
inline int64_t mc_processors(int64_t) { return mcshim::g_processors; }
template <class A>
int64_t mc_launch(void (*kernel)(A), int64_t blocks, int threads, int64_t shared, int64_t, void*, const A& args) {
  static_assert(std::is_trivially_copyable<A>::value && sizeof(A) <= 4096, "a kernel takes one plain struct");
  if (blocks <= 0) return 0;
  if (shared > mcshim::g_shared_limit) mcshim::fail("more shared memory than the device has");
  if (mcshim::g_recorder) mcshim::g_recorder((const void*)kernel, blocks, threads, shared, &args, int64_t(sizeof args));
  else mcshim::launch(dim3(unsigned(blocks)), dim3(unsigned(threads)), size_t(shared), [&] { kernel(args); });
  return 0;
}
