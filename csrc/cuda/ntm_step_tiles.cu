// One NTM time step by many blocks: the rows of every memory in tiles. Forward in one launch, where a memory fits a block's shared memory: the blocks
// of an element keep their rows, meet between the phases and read the memory once. Else in launches, the weights of every head in a block of their
// own: four forward, six backward; the memory is read twice forward and three times backward. In float32, sums in a fixed order.
#include "interface.h"
#include "ntm_step.h"
#include "write.h"

namespace memcore {
namespace cuda {

constexpr int kTile = 8192;  // numbers of a memory in a tile, about: the best of 1024 to 16384 on an H200, where there are tiles for all multiprocessors

inline int tile_rows(int64_t N, int64_t W) {
  const int64_t rows = W > 0 ? kTile / W / kWarps * kWarps : kTile;
  return (int)least<int64_t>(N, rows > kWarps ? rows : kWarps);
}

struct TilesLaunch {
  StepArgs a;
  Plan plan;
  int64_t rows, tiles;
  int64_t heads;  // one launch: of a tile's block, at the most
  void* spilled;  // what the heads' blocks have no shared memory for
  bool backward, once;
};

// Hands out arrays of a workspace that all blocks share.
struct Shares {
  char* start;
  int64_t used = 0;
  template <class X> __host__ __device__ X* take(int64_t n) {
    X* at = (X*)(start + used);
    used += (n * (int64_t)sizeof(X) + 15) / 16 * 16;
    return at;
  }
};

// What the launches leave for each other, of the whole batch.
struct Between {
  float *sim, *im;         // [B, H, N] keys times rows, [B, N] the rows' inverse norms
  float* weights;          // [B, H, N]
  float* parts;            // [B, tiles, P, W] sums of a tile: the reads; backward of erase, add and keys
  float *d, *own, *keys;   // backward: [B, H, N] gradients of the weights, then the rows' coefficients; [B, H, N] and [B, H] those of rows and keys themselves
  unsigned* arrived;       // one launch: [1 + B] blocks that have begun, and an element's that have come to a meeting

  __host__ __device__ Between(Shares& all, const StepArgs& a, int64_t tiles, bool backward, bool once) {
    const int64_t H = a.R + a.Hw, n = a.B * H * a.N;
    sim = all.take<float>(n), im = all.take<float>(a.B * a.N);
    weights = all.take<float>(n);
    parts = all.take<float>(a.B * tiles * (backward ? 2 * a.Hw + H : a.R) * a.W);
    if (backward) d = all.take<float>(n), own = all.take<float>(n), keys = all.take<float>(a.B * H);
    if (once) arrived = all.take<unsigned>(1 + a.B);  // last, where one too many is beyond the workspace
  }
};
inline int64_t between_bytes(const StepArgs& a, int64_t tiles, bool backward, bool once) {
  Shares all{nullptr};
  Between(all, a, tiles, backward, once);
  return all.used;
}

// What every block of a tile knows.
template <class T> struct Tile {
  InterfaceLayout l;
  int64_t b, index;
  int first, count, H;
  const T *rows, *x;
  Between between;

  // Number `block` of them all.
  __device__ Tile(const TilesLaunch& t, Between at, int64_t block)
      : l{(int)t.a.R, (int)t.a.Hw, (int)t.a.W, (int)t.a.S}, b(block / t.tiles), index(block % t.tiles), H(l.R + l.Hw), between(at) {
    first = (int)(index * t.rows), count = (int)least<int64_t>(t.rows, t.a.N - first);
    rows = (const T*)t.a.memory + (b * t.a.N + first) * l.W, x = (const T*)t.a.interface + b * l.size();
  }
  // Where number n of head h lies in a [B, H, N].
  __device__ int64_t at(const TilesLaunch& t, int h, int n) const { return (b * H + h) * t.a.N + first + n; }
  // [H, count] of the block from [B, H, N], and back.
  __device__ void load(const TilesLaunch& t, float* to, const float* from) const {
    for (int h = 0; h < H; h++)
      for (int n = threadIdx.x; n < count; n += kThreads) to[h * count + n] = from[at(t, h, n)];
  }
  __device__ void store(const TilesLaunch& t, float* to, const float* from) const {
    for (int h = 0; h < H; h++)
      for (int n = threadIdx.x; n < count; n += kThreads) to[at(t, h, n)] = from[h * count + n];
  }
  __device__ float* part(const TilesLaunch& t, int P) const { return between.parts + (b * t.tiles + index) * P * l.W; }
};

__device__ inline Between between_of(const TilesLaunch& t) {
  Shares all{(char*)t.a.workspace};
  return Between(all, t.a, t.tiles, t.backward, t.once);
}

// ---- similarities of a tile ----

struct LookBlock {
  Similarity s;
  template <class A> __host__ __device__ LookBlock(A& arena, const StepArgs& a, int64_t rows) {
    s.H = (int)(a.R + a.Hw), s.N = (int)rows, s.W = (int)a.W, s.cosine = true, s.mask = nullptr;
    s.take_small(arena), s.take_rows(arena);
  }
  // Keys are in place (not yet visible to all).
  template <class T> __device__ void look(const TilesLaunch& t, const Tile<T>& tile, const T* rows) {
    s.N = tile.count;
    s.forward(rows);
    tile.store(t, tile.between.sim, s.sim);
    for (int n = threadIdx.x; n < tile.count; n += kThreads) tile.between.im[tile.b * t.a.N + tile.first + n] = s.im[n];
  }
};

template <class T> MC_KERNEL_TWO ntm_step_look_kernel(TilesLaunch t) {
  MC_DYN_SHARED(shared);
  const Tile<T> tile(t, between_of(t), blockIdx.x);
  Arena<false> arena(shared, 0, nullptr);
  LookBlock block(arena, t.a, t.rows);
  load_keys(block.s.key, tile.x, tile.l);
  block.look(t, tile, tile.rows);
}

// ---- weights of heads ----

// A few heads of one element.
template <class T> struct HeadBlock {
  Heads<T> heads;
  template <class A> __host__ __device__ HeadBlock(A& arena, const StepArgs& a, int64_t most, bool backward) {
    heads.take_small(arena, most, a.N, a.W, a.S, backward);
    heads.take_rows(arena, backward);
  }
  // Similarities and parameters of heads first to first + count of element b. Leaves everything visible.
  __device__ void load(const StepArgs& a, const Between& between, int64_t b, int first, int count, const InterfaceLayout& l) {
    const int64_t row = (b * (l.R + l.Hw) + first) * a.N;
    const T* x = (const T*)a.interface + b * l.size();
    heads.s.H = count;
    for (int64_t i = threadIdx.x; i < count * a.N; i += kThreads) heads.s.sim[i] = between.sim[row + i];
    for (int64_t n = threadIdx.x; n < a.N; n += kThreads) heads.s.im[n] = between.im[b * a.N + n];
    for (int h = 0; h < count; h++)
      for (int w = threadIdx.x; w < l.W; w += kThreads) heads.s.key[h * l.W + w] = wide(x[l.head(first + h) + w]);
    for (int h = threadIdx.x; h < count; h += kThreads) activate_head(heads, h, x, l, first + h);
    heads.previous = (const T*)a.previous + row;
    __syncthreads();
    heads.s.key_norms();
    __syncthreads();
  }
  // The weights of what is loaded, for the blocks to come and as the step's output.
  __device__ void focus(const StepArgs& a, const Between& between, int64_t head) {
    heads.template focus<false>();
    const int64_t row = head * a.N, n = heads.s.H * a.N;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      between.weights[row + i] = heads.weights[i];
      if (a.weights) ((T*)a.weights)[row + i] = narrow<T>(heads.weights[i]);
    }
  }
};

template <class T, bool SPILL> MC_KERNEL_TWO ntm_step_focus_kernel(TilesLaunch t) {
  MC_DYN_SHARED(shared);
  const StepArgs& a = t.a;
  const InterfaceLayout l{(int)a.R, (int)a.Hw, (int)a.W, (int)a.S};
  const Between between = between_of(t);
  const int H = l.R + l.Hw, h = (int)(blockIdx.x % H);
  auto arena = arena_of<SPILL>(shared, t.plan, t.spilled);
  HeadBlock<T> block(arena, a, 1, false);
  block.load(a, between, blockIdx.x / H, h, 1, l);
  block.focus(a, between, blockIdx.x);
}

template <class T, bool SPILL> MC_KERNEL_TWO ntm_step_focus_bwd_kernel(TilesLaunch t) {
  MC_DYN_SHARED(shared);
  const StepArgs& a = t.a;
  const InterfaceLayout l{(int)a.R, (int)a.Hw, (int)a.W, (int)a.S};
  const Between between = between_of(t);
  const int H = l.R + l.Hw, h = (int)(blockIdx.x % H);
  const int64_t b = blockIdx.x / H, row = blockIdx.x * a.N;
  auto arena = arena_of<SPILL>(shared, t.plan, t.spilled);
  HeadBlock<T> block(arena, a, 1, true);
  Heads<T>& head = block.heads;
  block.load(a, between, b, h, 1, l);
  head.template focus<true>();
  for (int64_t n = threadIdx.x; n < a.N; n += kThreads) head.d[n] = between.d[row + n];  // those that this thread reads first
  const T* x = (const T*)a.interface + b * l.size();
  T* dx = (T*)a.dinterface + b * l.size();
  head.backward((T*)a.dprevious + row, [&](int, float dbeta, float dgate, float dgamma) {
    const float g = head.gate[0];
    dx[l.strength(h)] = narrow<T>(dbeta * sigmoid(wide(x[l.strength(h)])));
    dx[l.gate(h)] = narrow<T>(dgate * g * (1 - g));
    dx[l.gamma(h)] = narrow<T>(dgamma * sigmoid(wide(x[l.gamma(h)])));
    between.keys[blockIdx.x] = head.key_own[0];
  });
  if (threadIdx.x == 0) shift_logits(dx + l.shift(h), head.shift, head.dshift, l.S);
  for (int64_t n = threadIdx.x; n < a.N; n += kThreads) between.d[row + n] = head.d[n], between.own[row + n] = head.s.im[n];
}

// ---- rows of a tile ----

struct RowsBlock {
  float *scratch, *erase, *add, *dreads, *key, *weights, *d, *im, *zero;
  template <class A> __host__ __device__ RowsBlock(A& arena, const StepArgs& a, int64_t rows, bool backward, bool keys) {
    const int64_t H = a.R + a.Hw;
    scratch = arena.template take<float>(8 * kThreads);
    erase = arena.template take<float>(a.Hw * a.W), add = arena.template take<float>(a.Hw * a.W);
    weights = arena.template take<float>(H * rows);
    if (backward) dreads = arena.template take<float>(a.R * a.W), d = arena.template take<float>(H * rows);
    if (keys) key = arena.template take<float>(H * a.W), im = arena.template take<float>(rows), zero = arena.template take<float>(H);
  }
  template <class T> __device__ void load(const TilesLaunch& t, const Tile<T>& tile) {
    load_writes(erase, add, tile.x, tile.l);
    tile.load(t, weights, tile.between.weights);
  }
  template <class T> __device__ void load_gradients(const TilesLaunch& t, const Tile<T>& tile) {
    const int64_t n = t.a.R * t.a.W;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) dreads[i] = t.a.grad_reads ? wide(((const T*)t.a.grad_reads)[tile.b * n + i]) : 0;
  }
  template <class T> __device__ Writes writes(const Tile<T>& tile) const {
    return {tile.count, tile.l.W, tile.l.Hw, tile.l.R, erase, add, weights + tile.l.R * tile.count, weights};
  }
  // The tile's rows written, and its part of the reads. Everything is in place (not yet visible to all).
  template <class T> __device__ void write(const TilesLaunch& t, const Tile<T>& tile, const T* rows) {
    const int W = tile.l.W;
    T* written = (T*)t.a.written + (tile.b * t.a.N + tile.first) * W;
    float* part = tile.part(t, tile.l.R);
    __syncthreads();
    write_read(writes(tile), rows, written, t.a.write_first != 0, scratch, [&](int r, int w, float x) { part[r * W + w] = x; });
  }
};

template <class T> MC_KERNEL_TWO ntm_step_write_kernel(TilesLaunch t) {
  MC_DYN_SHARED(shared);
  const Tile<T> tile(t, between_of(t), blockIdx.x);
  Arena<false> arena(shared, 0, nullptr);
  RowsBlock block(arena, t.a, t.rows, false, false);
  block.load(t, tile);
  block.write(t, tile, tile.rows);
}

template <class T> MC_KERNEL_TWO ntm_step_write_bwd_kernel(TilesLaunch t) {
  MC_DYN_SHARED(shared);
  const StepArgs& a = t.a;
  const Tile<T> tile(t, between_of(t), blockIdx.x);
  const InterfaceLayout& l = tile.l;
  Arena<false> arena(shared, 0, nullptr);
  RowsBlock block(arena, a, t.rows, true, false);
  block.load(t, tile);
  block.load_gradients(t, tile);
  for (int h = 0; h < tile.H; h++)
    for (int n = threadIdx.x; n < tile.count; n += kThreads)
      block.d[h * tile.count + n] = a.grad_weights ? wide(((const T*)a.grad_weights)[tile.at(t, h, n)]) : 0;
  __syncthreads();
  const T* grown = a.grad_written ? (const T*)a.grad_written + (tile.b * a.N + tile.first) * l.W : nullptr;
  float *derase = tile.part(t, 2 * l.Hw + tile.H), *dadd = derase + l.Hw * l.W;
  write_read_backward<false>(
      Span(l.W, tile.rows, grown), block.writes(tile), tile.rows, block.dreads, a.write_first != 0, block.d + l.R * tile.count, block.d, block.scratch,
      [&](const Span& span, int n) { return grown ? span.load(grown + (int64_t)n * l.W) : Numbers{}; }, [](const Span&, int, const Numbers&) {},
      [&](int h, int w, float x) { derase[h * l.W + w] = x; }, [&](int h, int w, float x) { dadd[h * l.W + w] = x; });
  tile.store(t, tile.between.d, block.d);
}

template <class T> MC_KERNEL_TWO ntm_step_rows_bwd_kernel(TilesLaunch t) {
  MC_DYN_SHARED(shared);
  const StepArgs& a = t.a;
  const Tile<T> tile(t, between_of(t), blockIdx.x);
  const InterfaceLayout& l = tile.l;
  Arena<false> arena(shared, 0, nullptr);
  RowsBlock block(arena, a, t.rows, true, true);
  block.load(t, tile);
  block.load_gradients(t, tile);
  load_keys(block.key, tile.x, l);
  tile.load(t, block.d, tile.between.d);
  for (int n = threadIdx.x; n < tile.count; n += kThreads) {
    float own = 0;
    for (int h = 0; h < tile.H; h++) own += tile.between.own[tile.at(t, h, n)];
    block.im[n] = own;
  }
  for (int h = threadIdx.x; h < tile.H; h += kThreads) block.zero[h] = 0;
  __syncthreads();
  const Similarity s{tile.H, tile.count, l.W, true, nullptr, block.key, nullptr, nullptr, block.im};
  const Writes writes = block.writes(tile);
  const int64_t at = (tile.b * a.N + tile.first) * l.W;
  const T* grown = a.grad_written ? (const T*)a.grad_written + at : nullptr;
  T* dmemory = (T*)a.dmemory + at;
  float* dkey = tile.part(t, 2 * l.Hw + tile.H) + 2 * l.Hw * l.W;
  similarity_rows(
      Span(l.W, tile.rows, grown, dmemory), s, tile.rows, block.d, block.zero, block.scratch,
      [&](const Span& span) {
        return memory_gradient(writes, span, block.dreads, a.write_first != 0, [&](const Span& span, int n) {
          return grown ? span.load(grown + (int64_t)n * l.W) : Numbers{};
        });
      },
      [&](const Span& span, int n, const Numbers& x) { span.store(dmemory + (int64_t)n * l.W, x); },
      [&](int h, int w, float v) { dkey[h * l.W + w] = v; });
}

// ---- sums over the tiles ----

__device__ inline float over_tiles(const TilesLaunch& t, int64_t b, int64_t P, int64_t i) {
  const int64_t step = P * t.a.W;
  const float* part = between_of(t).parts + b * t.tiles * step + i;
  Sum v;
  for (int64_t k = 0; k < t.tiles; k++) v.add(part[k * step]);
  return v.total;
}

template <class T> MC_KERNEL ntm_step_reads_kernel(TilesLaunch t) {
  const int64_t n = t.a.R * t.a.W, i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i < t.a.B * n) ((T*)t.a.reads)[i] = narrow<T>(over_tiles(t, i / n, t.a.R, i % n));
}

template <class T> MC_KERNEL ntm_step_sums_bwd_kernel(TilesLaunch t) {
  const StepArgs& a = t.a;
  const InterfaceLayout l{(int)a.R, (int)a.Hw, (int)a.W, (int)a.S};
  const int H = l.R + l.Hw, P = 2 * l.Hw + H;
  const int64_t n = (int64_t)P * l.W, i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i >= a.B * n) return;
  const int64_t b = i / n;
  const int p = (int)(i % n / l.W), w = (int)(i % l.W);
  const float v = over_tiles(t, b, P, i % n);
  const T* x = (const T*)a.interface + b * l.size();
  T* dx = (T*)a.dinterface + b * l.size();
  if (p < l.Hw) {
    const float e = sigmoid(wide(x[l.erase(p) + w]));
    dx[l.erase(p) + w] = narrow<T>(v * e * (1 - e));
  } else if (p < 2 * l.Hw) {
    dx[l.add(p - l.Hw) + w] = narrow<T>(v);
  } else {
    const int h = p - 2 * l.Hw;
    const float own = between_of(t).keys[b * H + h];
    dx[l.head(h) + w] = narrow<T>(own != 0 ? v - own * wide(x[l.head(h) + w]) : v);
  }
}

// ---- the forward in one launch ----

template <class T> struct OnceBlock {
  unsigned* number;
  LookBlock look;
  HeadBlock<T> heads;
  RowsBlock rows;
  T* room;
  template <class A> __host__ __device__ OnceBlock(A& arena, const StepArgs& a, int64_t rows_, int64_t heads_)
      : number(arena.template take<unsigned>(1)), look(arena, a, rows_), heads(arena, a, heads_, false), rows(arena, a, rows_, false, false) {
    room = arena.template take<T>(staged_size<T>(rows_ * a.W));
  }
};

// The blocks of an element, for the n-th time: what all of them did before is visible to those that stay.
template <class T> __device__ inline void meet(const TilesLaunch& t, const Tile<T>& tile, unsigned n, bool stay = true) {
  unsigned* arrived = tile.between.arrived + 1 + tile.b;
  __syncthreads();
  if (threadIdx.x == 0) mc_arrive(arrived);
  if (!stay) return;
  if (threadIdx.x == 0) mc_await(arrived, n * (unsigned)t.tiles);
  __syncthreads();
}

MC_KERNEL ntm_step_begin_kernel(TilesLaunch t) {
  const int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x;
  if (i < 1 + t.a.B) between_of(t).arrived[i] = 0;
}

// Blocks take their numbers as they begin, so that those of the first elements are all there, whatever the order in which the device gives out
// blocks: one that waits waits for blocks that run, or that take the next free place (once_fits).
template <class T> MC_KERNEL_TWO ntm_step_once_kernel(TilesLaunch t) {
  MC_DYN_SHARED(shared);
  const StepArgs& a = t.a;
  const Between between = between_of(t);
  Arena<false> arena(shared, 0, nullptr);
  OnceBlock<T> block(arena, a, t.rows, t.heads);
  if (threadIdx.x == 0) *block.number = atomicAdd(between.arrived, 1u);
  __syncthreads();
  const Tile<T> tile(t, between, *block.number);
  const T* rows = stage(block.room, tile.rows, tile.count * tile.l.W);
  load_keys(block.look.s.key, tile.x, tile.l);
  staged();
  block.look.look(t, tile, rows);
  meet(t, tile, 1);
  const int first = (int)(tile.index * t.heads), count = least((int)t.heads, tile.H - first);
  if (count > 0) {
    block.heads.load(a, between, tile.b, first, count, tile.l);
    block.heads.focus(a, between, tile.b * tile.H + first);
  }
  meet(t, tile, 2);
  block.rows.load(t, tile);
  block.rows.write(t, tile, rows);
  meet(t, tile, 3, tile.index == 0);
  if (tile.index > 0) return;
  for (int64_t i = threadIdx.x; i < a.R * a.W; i += kThreads) ((T*)a.reads)[tile.b * a.R * a.W + i] = narrow<T>(over_tiles(t, tile.b, a.R, i));
}

// ---- launches ----

// Bytes of shared memory that the tiles' blocks need at the most.
inline int64_t tile_bytes(const StepArgs& a, int64_t rows, bool backward) {
  Arena<false> look(nullptr, 0, nullptr), row(nullptr, 0, nullptr);
  LookBlock(look, a, rows);
  RowsBlock(row, a, rows, backward, backward);
  return look.used > row.used ? look.used : row.used;
}

template <class T> int64_t once_bytes(const StepArgs& a, int64_t rows, int64_t heads) {
  Arena<false> arena(nullptr, 0, nullptr);
  OnceBlock<T>(arena, a, rows, heads);
  return arena.used;
}
// Whether the blocks of an element may wait for each other: a device must have places for all of them, whatever else runs there. A quarter of its
// multiprocessors with one block each leave enough.
template <class T> bool once_fits(const TilesLaunch& t) {
  const StepArgs& a = t.a;
  const int64_t limit = mc_shared_limit(a.device);
  const bool asked = a.way == kOnce || (a.way == kAutomatic && a.N * a.W * (int64_t)sizeof(T) <= limit);
  return !t.backward && asked && t.tiles > 0 && 4 * t.tiles <= mc_processors(a.device) && once_bytes<T>(a, t.rows, t.heads) <= limit;
}

template <class T> TilesLaunch tiles_launch(const StepArgs& a, bool backward) {
  TilesLaunch t{};
  t.a = a, t.backward = backward, t.rows = tile_rows(a.N, a.W), t.tiles = t.rows > 0 ? (a.N + t.rows - 1) / t.rows : 0;
  t.heads = t.tiles > 0 ? (a.R + a.Hw + t.tiles - 1) / t.tiles : 0;
  t.once = once_fits<T>(t);
  t.spilled = (char*)a.workspace + between_bytes(a, t.tiles, backward, t.once);
  t.plan = plan_of(mc_shared_limit(a.device), [&](auto& arena, bool) { HeadBlock<T>(arena, a, 1, backward); });
  return t;
}
inline int64_t tiles_workspace(const TilesLaunch& t) {
  return between_bytes(t.a, t.tiles, t.backward, t.once) + (t.once ? 0 : t.a.B * (t.a.R + t.a.Hw) * t.plan.workspace);
}

template <class T> int64_t tiles_look(const TilesLaunch& t, void* stream) {
  const StepArgs& a = t.a;
  Arena<false> look(nullptr, 0, nullptr);
  LookBlock(look, a, t.rows);
  if (int64_t e = mc_launch(ntm_step_look_kernel<T>, a.B * t.tiles, kThreads, look.used, a.device, stream, t)) return e;
  auto* focus = t.plan.spill ? ntm_step_focus_kernel<T, true> : ntm_step_focus_kernel<T, false>;
  return mc_launch(focus, a.B * (a.R + a.Hw), kThreads, t.plan.shared, a.device, stream, t);
}
inline int64_t rows_bytes(const TilesLaunch& t, bool keys) {
  Arena<false> arena(nullptr, 0, nullptr);
  RowsBlock(arena, t.a, t.rows, t.backward, keys);
  return arena.used;
}
inline int64_t spread(int64_t n) { return (n + kThreads - 1) / kThreads; }

template <class T> int64_t tiles_once(const TilesLaunch& t, void* stream) {
  const StepArgs& a = t.a;
  if (int64_t e = mc_launch(ntm_step_begin_kernel, spread(1 + a.B), kThreads, 0, a.device, stream, t)) return e;
  return mc_launch(ntm_step_once_kernel<T>, a.B * t.tiles, kThreads, once_bytes<T>(a, t.rows, t.heads), a.device, stream, t);
}
template <class T> int64_t tiles_fwd(const TilesLaunch& t, void* stream) {
  if (t.once) return tiles_once<T>(t, stream);
  const StepArgs& a = t.a;
  if (int64_t e = tiles_look<T>(t, stream)) return e;
  if (int64_t e = mc_launch(ntm_step_write_kernel<T>, a.B * t.tiles, kThreads, rows_bytes(t, false), a.device, stream, t)) return e;
  return mc_launch(ntm_step_reads_kernel<T>, spread(a.B * a.R * a.W), kThreads, 0, a.device, stream, t);
}
template <class T> int64_t tiles_bwd(const TilesLaunch& t, void* stream) {
  const StepArgs& a = t.a;
  const int64_t H = a.R + a.Hw;
  TilesLaunch look = t;  // the weights again
  look.plan = plan_of(mc_shared_limit(a.device), [&](auto& arena, bool) { HeadBlock<T>(arena, a, 1, false); });
  if (int64_t e = tiles_look<T>(look, stream)) return e;
  if (int64_t e = mc_launch(ntm_step_write_bwd_kernel<T>, a.B * t.tiles, kThreads, rows_bytes(t, false), a.device, stream, t)) return e;
  auto* focus = t.plan.spill ? ntm_step_focus_bwd_kernel<T, true> : ntm_step_focus_bwd_kernel<T, false>;
  if (int64_t e = mc_launch(focus, a.B * H, kThreads, t.plan.shared, a.device, stream, t)) return e;
  if (int64_t e = mc_launch(ntm_step_rows_bwd_kernel<T>, a.B * t.tiles, kThreads, rows_bytes(t, true), a.device, stream, t)) return e;
  return mc_launch(ntm_step_sums_bwd_kernel<T>, spread(a.B * (2 * a.Hw + H) * a.W), kThreads, 0, a.device, stream, t);
}

// A memory larger than a block gets through in good time, whose vectors find room in shared memory.
bool step_by_tiles(const StepArgs& a, bool backward) {
  const bool wanted = a.way == kAutomatic ? a.N * a.W > kWhole : a.way != kBlock;
  return wanted && a.R + a.Hw > 0 && tile_bytes(a, tile_rows(a.N, a.W), backward) <= mc_shared_limit(a.device);
}
int64_t step_tiles_workspace(const StepArgs& a, bool backward) {
  return with_type(a.dtype, [&](auto t) { return tiles_workspace(tiles_launch<decltype(t)>(a, backward)); });
}
int64_t step_tiles(const StepArgs& a, bool backward, void* stream) {
  return with_type(a.dtype, [&](auto t) {
    const TilesLaunch launch = tiles_launch<decltype(t)>(a, backward);
    return backward ? tiles_bwd<decltype(t)>(launch, stream) : tiles_fwd<decltype(t)>(launch, stream);
  });
}

}  // namespace cuda
}  // namespace memcore
