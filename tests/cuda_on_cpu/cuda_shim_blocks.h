// How the threads and blocks of a CUDA kernel run on a CPU, for TESTS ONLY (C++17, GCC or Clang, x86-64 or any ucontext host).
//
// Every CUDA thread of a block is a fiber; all run on one OS thread; blocks run one after another, a block that waits for others
// (mc_await) steps aside for the next ones, and a grid in which nothing can go on any more is refused.
// A fiber runs until it waits (__syncthreads, a warp operation, a yield at an atomic) or returns. Nothing
// moves in lockstep, so code that silently relies on warp lockstep fails here as it may on Volta and newer.
//
// Build modes: plain; -fsanitize=address,undefined (out-of-bounds in global, static and dynamic shared memory);
// -fsanitize=thread (data races in shared AND global memory, within a block and between blocks).
// Environment: MC_SHIM_SCHED = forward (default) | reverse | random:<seed>.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <type_traits>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MC_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define MC_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define MC_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define MC_TSAN 1
#endif
#ifdef MC_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef MC_TSAN
#include <sanitizer/tsan_interface.h>
#define MC_NOTSAN __attribute__((no_sanitize("thread"), noinline)) inline
#else
#define MC_NOTSAN inline
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
// There is no __shared__: MC_DYN_SHARED and MC_SHARED are poisoned and checked.

// ---------------------------------------------------------------- vector types
struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace mcshim {
struct error : std::runtime_error { using std::runtime_error::runtime_error; };
struct Site { const char* file; int line; };
inline bool same(const Site& a, const Site& b) { return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file)); }
enum Kind { RUN, BARRIER, WARP, DONE };
enum WOp { W_SYNC, W_SHFL, W_BALLOT, W_MATCH, W_ADD, W_MIN, W_MAX, W_AND, W_OR, W_XOR };
static const char* const kWName[] = {"__syncwarp", "__shfl_*_sync", "__ballot/any/all_sync", "__match_any_sync",
                                     "__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
                                     "__reduce_and_sync", "__reduce_or_sync", "__reduce_xor_sync"};
struct Async { void* dst; const void* src; size_t n, zfill; int group; };

struct Fiber {
  uint3 tid;
  unsigned lin;
  Kind kind;
  bool asleep;  // until the block's next turn
  Site site;
  // barrier reduction / warp operation
  WOp op;
  unsigned mask;
  uint64_t val, res;
  int src;  // source lane, -1 = keep own value
  int barop, barval;
  bool released;
  // cp.async queue
  Async* q;  // 64 entries, allocated at first use
  int qn, qgroup;
  // machine
  void* sp;
  char* stk;
#if !defined(__x86_64__)
  ucontext_t uc;
#endif
#ifdef MC_TSAN
  void* ts;
#endif
#ifdef MC_ASAN
  void* fake;
#endif
};
struct SharedVar { const void* key; char* p; size_t n; };

struct Block {
  uint3 bid;
  dim3 bdim, gdim;
  unsigned n, live;
  Fiber* f;
  char* stk;
  size_t stkbytes;
  SharedVar sv[64];
  int nsv;
  SharedVar arrays[64];
  int narrays;
  char* dyn;
  size_t dynbytes;
  int barres;
  void (*entry)(void*);
  void* arg;
  std::exception_ptr err;
  int haserr;
#ifdef MC_TSAN
  void* mainfiber;
  char *bartok, *wtok;  // of this block alone, two each, in turn: else one block's barriers would order another's accesses
  unsigned phase, wphase[32];
  char* arena;
  size_t arenaused;
#endif
#ifdef MC_ASAN
  const void* mstk; size_t mstkn; void* mfake;
#endif
#if !defined(__x86_64__)
  ucontext_t uc;
#endif
  void* mainsp;
};
inline thread_local Block* g_blk = nullptr;
inline thread_local Fiber* g_cur = nullptr;
inline thread_local uint64_t g_rng = 1;
inline thread_local int g_sched = 0;  // 0 forward, 1 reverse, 2 random
inline unsigned long long g_switches = 0, g_arrivals = 0;
#ifdef MC_TSAN
inline char g_fence;
inline char g_done;
#endif

MC_NOTSAN Fiber* cur() { return g_cur; }
MC_NOTSAN Block* blk() { return g_blk; }
MC_NOTSAN uint32_t rnd() {
  g_rng ^= g_rng << 13; g_rng ^= g_rng >> 7; g_rng ^= g_rng << 17;
  return uint32_t(g_rng >> 16);
}
}  // namespace mcshim

// ---------------------------------------------------------------- context switch
#if defined(__x86_64__)
extern "C" void mcshim_switch(void** save, void* load);
asm(R"(
  .text
  .weak mcshim_switch
  .type mcshim_switch,@function
mcshim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size mcshim_switch,.-mcshim_switch
)");
#endif

namespace mcshim {
#if defined(MC_ASAN)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
[[maybe_unused]] constexpr size_t kArena = 256 << 10;

MC_NOTSAN void to_main() {  // called on a fiber
  Fiber* me = g_cur;
  Block* b = g_blk;
#ifdef MC_TSAN
  __tsan_switch_to_fiber(b->mainfiber, 1 /* no happens-before by switching */);
#endif
#ifdef MC_ASAN
  __sanitizer_start_switch_fiber(me->kind == DONE ? nullptr : &me->fake, b->mstk, b->mstkn);
#endif
#if defined(__x86_64__)
  mcshim_switch(&me->sp, b->mainsp);
#else
  swapcontext(&me->uc, &b->uc);
#endif
#ifdef MC_ASAN
  __sanitizer_finish_switch_fiber(me->fake, &b->mstk, &b->mstkn);
#endif
}
MC_NOTSAN void to_fiber(Fiber* f) {  // called on the scheduler
  Block* b = g_blk;
  g_cur = f;
  ++g_switches;
#ifdef MC_TSAN
  __tsan_switch_to_fiber(f->ts, 1);
#endif
#ifdef MC_ASAN
  __sanitizer_start_switch_fiber(&b->mfake, f->stk, kStack);
#endif
#if defined(__x86_64__)
  mcshim_switch(&b->mainsp, f->sp);
#else
  swapcontext(&b->uc, &f->uc);
#endif
#ifdef MC_ASAN
  __sanitizer_finish_switch_fiber(b->mfake, nullptr, nullptr);
#endif
  g_cur = nullptr;
}
MC_NOTSAN void yield() { if (g_cur) to_main(); }
MC_NOTSAN void sleep() { g_cur->asleep = true; to_main(); }
MC_NOTSAN void maybe_yield() { if (g_sched == 2 && g_cur && (rnd() & 7) == 0) to_main(); }
MC_NOTSAN void arrive() { ++g_arrivals; maybe_yield(); }

[[noreturn]] inline void fail(const std::string& m) { throw error(m); }
inline std::string where(const Site& s) {
  const char* p = s.file ? std::strrchr(s.file, '/') : nullptr;
  return std::string(p ? p + 1 : (s.file ? s.file : "?")) + ":" + std::to_string(s.line);
}
MC_NOTSAN void finish(Fiber* f) { f->kind = DONE; g_blk->live--; }
MC_NOTSAN void set_err() {
  if (!g_blk->haserr) { g_blk->haserr = 1; g_blk->err = std::current_exception(); }
}
inline void run_entry() {
  Block* b = blk();
#ifdef MC_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &b->mstk, &b->mstkn);
#endif
  try { b->entry(b->arg); } catch (...) { set_err(); }
#ifdef MC_TSAN
  __tsan_release(&g_done);
#endif
  finish(cur());
  to_main();
  std::abort();
}

// ---------------------------------------------------------------- barrier and warp rendezvous
MC_NOTSAN int block_barrier(Site s, int op, int v) {
  Fiber* me = g_cur;
  Block* b = g_blk;
#ifdef MC_TSAN
  unsigned ph = b->phase & 1;
  __tsan_release(b->bartok + 8 * ph);
#endif
  me->site = s; me->barop = op; me->barval = v; me->kind = BARRIER;
  to_main();
#ifdef MC_TSAN
  __tsan_acquire(b->bartok + 8 * ph);
#endif
  return b->barres;
}
inline unsigned lane_of(const Fiber* f) { return f->lin & 31; }
MC_NOTSAN uint64_t warp_op(WOp op, unsigned mask, uint64_t val, int src, Site s) {
  Fiber* me = g_cur;
  unsigned lane = me->lin & 31;
  if (!(mask >> lane & 1)) fail(std::string(kWName[op]) + " at " + where(s) + ": the calling lane " + std::to_string(lane) + " is not in its own mask");
  if (op == W_SHFL && src >= 0 && !(mask >> src & 1)) fail(std::string(kWName[op]) + " at " + where(s) + ": lane " + std::to_string(lane) + " reads lane " + std::to_string(src) + ", which is not in the mask (undefined on a GPU)");
#ifdef MC_TSAN
  Block* b = g_blk;
  unsigned w = me->lin >> 5, ph = b->wphase[w] & 1;
  if (op == W_SYNC) __tsan_release(b->wtok + 16 * w + 8 * ph);  // votes and shuffles order no memory
#endif
  me->op = op; me->mask = mask; me->val = val; me->src = src; me->site = s; me->kind = WARP;
  to_main();
#ifdef MC_TSAN
  if (op == W_SYNC) __tsan_acquire(b->wtok + 16 * w + 8 * ph);
#endif
  return me->res;
}
// try to complete the warp operation that fiber f waits in; true if it was completed
MC_NOTSAN bool try_warp(Block* b, unsigned w, unsigned lead) {
  Fiber* base = b->f + w * 32;
  unsigned nl = b->n - w * 32 < 32 ? b->n - w * 32 : 32;
  Fiber* f0 = base + lead;
  unsigned mask = f0->mask;
  if (nl < 32) mask &= (1u << nl) - 1;
  for (unsigned l = 0; l < nl; ++l)
    if (mask >> l & 1) {
      Fiber* f = base + l;
      if (f->kind != WARP) return false;
      if (f->op != f0->op || f->mask != f0->mask || !same(f->site, f0->site))
        fail(std::string("warp operations differ within one mask: lane ") + std::to_string(lead) + " waits in " + kWName[f0->op] + " at " + where(f0->site) + ", lane " + std::to_string(l) + " in " + kWName[f->op] + " at " + where(f->site));
    }
  uint64_t acc = 0;
  bool first = true;
  for (unsigned l = 0; l < nl; ++l)
    if (mask >> l & 1) {
      uint64_t v = base[l].val;
      int32_t sv = int32_t(v), sa = int32_t(acc);
      switch (f0->op) {
        case W_BALLOT: if (v) acc |= 1ull << l; break;
        case W_ADD: acc = uint32_t(acc + v); break;
        case W_MIN: acc = first || sv < sa ? uint32_t(v) : acc; break;
        case W_MAX: acc = first || sv > sa ? uint32_t(v) : acc; break;
        case W_AND: acc = first ? v : acc & v; break;
        case W_OR: acc |= v; break;
        case W_XOR: acc ^= v; break;
        default: break;
      }
      first = false;
    }
  for (unsigned l = 0; l < nl; ++l)
    if (mask >> l & 1) {
      Fiber* f = base + l;
      if (f->op == W_SHFL) f->res = f->src < 0 ? f->val : (unsigned(f->src) < nl ? base[f->src].val : 0);
      else if (f->op == W_MATCH) {
        uint64_t m = 0;
        for (unsigned k = 0; k < nl; ++k) if ((mask >> k & 1) && base[k].val == f->val) m |= 1ull << k;
        f->res = m;
      } else f->res = acc;
    }
  for (unsigned l = 0; l < nl; ++l) if (mask >> l & 1) base[l].kind = RUN;
#ifdef MC_TSAN
  b->wphase[w]++;
#endif
  return true;
}

// ---------------------------------------------------------------- shared memory
MC_NOTSAN char* shared_alloc(size_t n) {
  size_t m = (n + 15) & ~size_t(15);
#if defined(MC_TSAN)  // mapped by the scheduler for each block anew, so that TSan sees no owner
  char* p = g_blk->arena + g_blk->arenaused;
  g_blk->arenaused += m;
  for (size_t i = 0; i < m; ++i) p[i] = char(0xFF);
#else
  (void)m;
  char* p = (char*)std::malloc(n ? n : 1);  // exact size: ASan sees one byte too far
  std::memset(p, 0xFF, n);  // NaN for float/half/bf16, -1 for int: a read before a write shows
#endif
  return p;
}
MC_NOTSAN void shared_free(char* p, size_t n) {
  if (!p) return;
  (void)n;
#if !defined(MC_TSAN)
  std::free(p);
#endif
}
MC_NOTSAN void* shared_var(const void* key, size_t n) {
  Block* b = g_blk;
  for (int i = 0; i < b->nsv; ++i) if (b->sv[i].key == key) return b->sv[i].p;
  if (b->nsv == 64) fail("more than 64 shared variables in one kernel");
  size_t tot = b->dynbytes + n;
  for (int i = 0; i < b->nsv; ++i) tot += b->sv[i].n;
  if (tot > 227 * 1024) fail("more than 227 KiB of shared memory in one block");
  b->sv[b->nsv] = {key, shared_alloc(n), n};
  return b->sv[b->nsv++].p;
}
MC_NOTSAN void* dyn_shared() {
  if (!g_blk->dyn) fail("dynamic shared memory used, but the launch asked for 0 bytes");
  return g_blk->dyn;
}

// Under ASan an array laid out at `at` lies in memory of its own, so that one element too far is not the next array's first. The place it
// would have had must be the block's.
MC_NOTSAN void* array(char* at, size_t n) {
#ifdef MC_ASAN
  Block* b = g_blk;
  if (!b || !n) return at;
  for (int i = 0; i < b->narrays; ++i) if (b->arrays[i].key == at) return b->arrays[i].p;
  if (b->narrays == 64) fail("more than 64 arrays in one kernel");
  const volatile char *first = at, *last = at + n - 1;
  (void)*first, (void)*last;  // ASan looks
  b->arrays[b->narrays] = {at, shared_alloc(n), n};
  return b->arrays[b->narrays++].p;
#else
  (void)n;
  return at;
#endif
}

// ---------------------------------------------------------------- launch
inline void read_env() {
  const char* e = std::getenv("MC_SHIM_SCHED");
  g_sched = 0;
  if (e && !std::strcmp(e, "reverse")) g_sched = 1;
  if (e && !std::strncmp(e, "random", 6)) { g_sched = 2; g_rng = 88172645463325252ull ^ (e[6] == ':' ? std::strtoull(e + 7, nullptr, 10) * 0x9E3779B97F4A7C15ull : 0); }
}
inline std::string stuck(Block* b) {
  std::string m = "block (" + std::to_string(b->bid.x) + "," + std::to_string(b->bid.y) + "," + std::to_string(b->bid.z) + ") is stuck (divergent barrier or warp operation, or blocks that never arrive):";
  int shown = 0;
  for (unsigned i = 0; i < b->n; ++i) {
    Fiber* f = b->f + i;
    if (i && f->kind == b->f[i - 1].kind && (f->kind == DONE || f->site.line == b->f[i - 1].site.line)) continue;
    if (++shown > 8) { m += " ..."; break; }
    m += "\n  from thread " + std::to_string(i) + ": " + (f->kind == DONE ? "has returned" : f->kind == RUN ? "waits for other blocks" : f->kind == BARRIER ? "waits in __syncthreads at " + where(f->site) : std::string("waits in ") + kWName[f->op] + " mask 0x" + [&] { char t[16]; snprintf(t, 16, "%08x", f->mask); return std::string(t); }() + " at " + where(f->site));
  }
  return m;
}
// True if the block has ended, false if it waits for others.
MC_NOTSAN bool run_block(Block* b) {
  unsigned n = b->n, start = 0;
  g_blk = b;
  for (unsigned i = 0; i < n; ++i) b->f[i].asleep = false;
  while (b->live) {
    bool progress = false;
    if (g_sched == 2) start = rnd() % n;
    for (unsigned k = 0; k < n; ++k) {
      unsigned i = g_sched == 1 ? n - 1 - k : g_sched == 2 ? (start + k * 7919u) % n : k;
      if (g_sched == 2 && n % 7919u == 0) i = k;
      Fiber* f = b->f + i;
      if (f->kind == RUN && !f->asleep) { to_fiber(f); progress = true; if (b->haserr) return true; }
      if (f->kind == WARP && try_warp(b, i >> 5, i & 31)) progress = true;
    }
    if (progress) continue;
    unsigned nb = 0, sum = 0, alland = 1, anyor = 0;
    Fiber* first = nullptr;
    for (unsigned i = 0; i < n; ++i) {
      Fiber* f = b->f + i;
      if (f->kind == BARRIER) {
        ++nb; sum += f->barval != 0; alland &= f->barval != 0; anyor |= f->barval != 0;
        if (!first) first = f;
        else if (!same(first->site, f->site) || first->barop != f->barop)
          fail("threads of one block wait in different barriers: thread " + std::to_string(first->lin) + " at " + where(first->site) + ", thread " + std::to_string(f->lin) + " at " + where(f->site));
      }
    }
    if (nb == 0 || nb != b->live) {
      for (unsigned i = 0; i < n; ++i) if (b->f[i].kind == RUN) return false;  // asleep
      fail(stuck(b));
    }
    b->barres = first->barop == 1 ? int(sum) : first->barop == 2 ? int(alland) : int(anyor);
    for (unsigned i = 0; i < n; ++i) if (b->f[i].kind == BARRIER) b->f[i].kind = RUN;
#ifdef MC_TSAN
    b->phase++;
#endif
  }
  return true;
}
template <class F> void tramp(void* p) { (*static_cast<F*>(p))(); }

MC_NOTSAN void make_fiber(Block* b, unsigned i) {
  Fiber* f = b->f + i;
  f->lin = i;
  f->tid = {i % b->bdim.x, i / b->bdim.x % b->bdim.y, i / (b->bdim.x * b->bdim.y)};
  f->kind = RUN; f->asleep = false; f->qn = 0; f->qgroup = 0; f->site = {nullptr, 0};
  f->stk = b->stk + i * (kStack + 4096) + 4096;
#ifdef MC_ASAN
  f->fake = nullptr;
  __asan_unpoison_memory_region(f->stk, kStack);  // frames of the fiber before may have left marks
#endif
#if defined(__x86_64__)
  void** s = (void**)(f->stk + kStack - (i * 320u & 4095u));  // stagger: equal page offsets would share cache sets
  *--s = nullptr;  // keeps the stack 16-byte aligned at entry
  *--s = (void*)&run_entry;
  for (int k = 0; k < 6; ++k) *--s = nullptr;
  f->sp = s;
#else
  getcontext(&f->uc);
  f->uc.uc_stack.ss_sp = f->stk; f->uc.uc_stack.ss_size = kStack; f->uc.uc_link = nullptr;
  makecontext(&f->uc, (void (*)())run_entry, 0);
#endif
#ifdef MC_TSAN
  f->ts = __tsan_create_fiber(0);
#endif
}
MC_NOTSAN void map_stacks(Block* b) {
  b->stkbytes = size_t(b->n) * (kStack + 4096);
  b->stk = (char*)mmap(nullptr, b->stkbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (b->stk == MAP_FAILED) fail("cannot map fiber stacks");
  for (unsigned i = 0; i < b->n; ++i) mprotect(b->stk + i * (kStack + 4096), 4096, PROT_NONE);  // guard page
}
MC_NOTSAN Block* new_block(unsigned n, dim3 block, dim3 grid, void (*entry)(void*), void* arg) {
  Block* b = (Block*)calloc(1, sizeof(Block));
  new (&b->err) std::exception_ptr();
  b->f = (Fiber*)calloc(n, sizeof(Fiber));
  b->n = n; b->bdim = block; b->gdim = grid; b->entry = entry; b->arg = arg;
#ifndef MC_TSAN
  map_stacks(b);
#else
  b->mainfiber = __tsan_get_current_fiber();
#endif
  return b;
}
MC_NOTSAN void free_block(Block* b) {
#ifndef MC_TSAN
  munmap(b->stk, b->stkbytes);
#endif
  b->err.~exception_ptr();
  for (unsigned i = 0; i < b->n; ++i) std::free(b->f[i].q);
  std::free(b->f); std::free(b);
}
MC_NOTSAN void begin_block(Block* b, size_t smem) {
  b->live = b->n; b->nsv = b->narrays = 0; b->dynbytes = smem; b->haserr = 0;
#ifdef MC_TSAN
  b->arena = (char*)mmap(nullptr, kArena, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  b->bartok = b->arena, b->wtok = b->arena + 16, b->arenaused = 16 + 32 * 16;
#endif
  g_blk = b;
  b->dyn = smem ? shared_alloc(smem) : nullptr;
#ifdef MC_TSAN
  map_stacks(b);  // fresh memory for each block: TSan must not compare the stacks of two blocks
#endif
  for (unsigned i = 0; i < b->n; ++i) make_fiber(b, i);
}
MC_NOTSAN void end_block(Block* b) {
#ifdef MC_TSAN
  for (unsigned i = 0; i < b->n; ++i) __tsan_destroy_fiber(b->f[i].ts);
  munmap(b->stk, b->stkbytes);
  munmap(b->arena, kArena);
#endif
  for (int i = 0; i < b->nsv; ++i) shared_free(b->sv[i].p, b->sv[i].n);
  for (int i = 0; i < b->narrays; ++i) shared_free(b->arrays[i].p, b->arrays[i].n);
  shared_free(b->dyn, b->dynbytes);
}
template <class F> MC_NOTSAN void launch(dim3 grid, dim3 block, size_t smem, F body) {
  size_t n = size_t(block.x) * block.y * block.z;
  if (n == 0 || n > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) fail("invalid block size");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u) fail("invalid grid size");
  if (smem > 227 * 1024) fail("too much dynamic shared memory");
  if (g_blk) fail("a kernel launched from a kernel (dynamic parallelism) is not supported");
  read_env();
  std::exception_ptr err;
  std::vector<Block*> waiting, spare;  // those of ended blocks serve again
  // Whether it waits for others.
  const auto turn = [&](Block* b) {
    bool ended = true;
    try { ended = run_block(b); } catch (...) { err = std::current_exception(); }
    if (b->haserr) {
#ifdef MC_TSAN
      __tsan_acquire(&g_done);
#endif
      err = b->err; b->err = nullptr;
    }
    g_blk = nullptr;
    if (!ended) return true;
    end_block(b);
    spare.push_back(b);
    return false;
  };
  size_t nb = size_t(grid.x) * grid.y * grid.z, off = g_sched == 2 ? g_rng % nb : 0;
  int still = 0;  // turns of all that waited in which nobody arrived
  for (size_t q = 0; (q < nb || !waiting.empty()) && !err; ++q) {
    if (q < nb) {
      size_t id = g_sched == 1 ? nb - 1 - q : g_sched == 2 ? (q * 7919 + off) % nb : q;
      if (g_sched == 2 && nb % 7919 == 0) id = q;
      Block* b = spare.empty() ? new_block(unsigned(n), block, grid, &tramp<F>, &body) : spare.back();
      if (!spare.empty()) spare.pop_back();
      b->bid = {unsigned(id % grid.x), unsigned(id / grid.x % grid.y), unsigned(id / grid.x / grid.y)};
      begin_block(b, smem);
      if (turn(b)) waiting.push_back(b);
    }
    const auto arrivals = g_arrivals;
    std::vector<Block*> others;
    others.swap(waiting);
    if (g_sched == 1) std::reverse(others.begin(), others.end());
    for (Block* b : others)
      if (err || turn(b)) waiting.push_back(b);
    if (g_sched == 1) std::reverse(waiting.begin(), waiting.end());
    still = q < nb || g_arrivals != arrivals || waiting.size() != others.size() ? 0 : still + 1;
    if (still == 2 && !err) {
      g_blk = waiting.front();
      try { fail(stuck(g_blk)); } catch (...) { err = std::current_exception(); }
      g_blk = nullptr;
    }
  }
  for (Block* b : waiting) end_block(b);
#ifdef MC_TSAN
  __tsan_acquire(&g_done);
  if (err) std::rethrow_exception(err);  // fibers that never ended: leak their memory rather than report its release
#endif
  for (Block* b : waiting) free_block(b);
  for (Block* b : spare) free_block(b);
  if (err) std::rethrow_exception(err);
}

template <class T> inline uint64_t pack(T v) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "warp operations take values of at most 8 bytes");
  uint64_t r = 0; std::memcpy(&r, &v, sizeof v); return r;
}
template <class T> inline T unpack(uint64_t r) { T v; std::memcpy(&v, &r, sizeof v); return v; }
}  // namespace mcshim
