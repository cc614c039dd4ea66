// A whole NTM run: one launch forward, one backward, a block for each batch element, which keeps its memory (backward: the memory's
// gradient) in shared memory from the first step to the last. Sizes whose blocks do not fit are `ntm_step`'s.
//
// The forward leaves, for each step, the controller's inputs and activations, the interface and the weights, and a copy of the memory every
// few steps. The backward writes the memories between two copies again, and leaves the gradients of all sums, of which matrix products
// outside make the parameters' gradients.
#include "ntm_sequence.h"

#include "interface.h"
#include "write.h"

namespace memcore {
namespace cuda {

struct SequenceLaunch {
  SequenceArgs a;
  int64_t shared;
  bool staged;  // backward, memories in the workspace: each is brought to shared memory for its step
};

// put(n, bias[n] + sum over k of x[k] w[k, n]) for n < N, on thread n modulo kThreads; bias may be null. Rows of w are `apart` numbers apart. x is
// visible before. A thread has four neighbouring columns, groups of threads take rows in turn. scratch: 4 * kThreads floats.
template <class Put>
__device__ inline void product(const float* x, const float* w, int64_t apart, const float* bias, int K, int N, float* scratch, Put put) {
  const bool aligned = apart % kSpan == 0 && (uintptr_t)w % sizeof(Numbers) == 0;
  for (int n0 = 0; n0 < N; n0 += kSpan * kThreads) {
    const int columns = least(N - n0, kSpan * kThreads), fours = (columns + kSpan - 1) / kSpan, groups = least(kThreads / fours, 32);
    const int group = (int)threadIdx.x / fours, n = (int)threadIdx.x % fours * kSpan;
    const float* from = w + n0 + n;
    Numbers sum{};
    if (group < groups) {
      if (aligned && n + kSpan <= columns) {
#pragma unroll 8
        for (int k = group; k < K; k += groups) add_to(sum, x[k], *(const Numbers*)(from + k * apart));
      } else {
#pragma unroll 4
        for (int k = group; k < K; k += groups)
#pragma unroll
          for (int j = 0; j < kSpan; j++)
            if (n + j < columns) sum.v[j] += x[k] * from[k * apart + j];
      }
    }
    __syncthreads();
    if (group < groups) *(Numbers*)(scratch + group * fours * kSpan + n) = sum;
    __syncthreads();
    for (int i = threadIdx.x; i < columns; i += kThreads) {
      float total = bias ? bias[n0 + i] : 0;
      for (int g = 0; g < groups; g++) total += scratch[g * fours * kSpan + i];
      put(n0 + i, total);
    }
  }
}

__device__ inline float clamped(float x, float clip) { return clip > 0 ? (x > clip ? clip : x < -clip ? -clip : x) : x; }

// What both directions keep in shared memory.
struct SequenceBlock {
  const SequenceArgs& a;
  Heads<float> heads;
  InterfaceLayout l;
  int K, F, I, G, O;
  int64_t b, M, steps;
  float *erase, *add;
  float* other;      // [H, N]: forward the last step's weights, backward the gradient of them
  float* interface;  // [I], clamped
  float* sums;       // [G], or their gradients
  float *hidden, *cell;  // [layers, K], or their gradients

  template <class A> __host__ __device__ SequenceBlock(A& arena, const SequenceArgs& a, bool backward) : a(a) {
    l = {(int)a.R, (int)a.Hw, (int)a.W, (int)a.S};
    K = (int)a.K, F = (int)a.F(), I = (int)a.I(), G = (int)a.G(), O = (int)a.O, M = a.N * a.W;
    heads.take_small(arena, a.H(), a.N, a.W, a.S, backward);
    erase = arena.template take<float>(a.Hw * a.W), add = arena.template take<float>(a.Hw * a.W);
    interface = arena.template take<float>(I);
    sums = arena.template take<float>(G);
    hidden = arena.template take<float>(a.layers * K), cell = arena.template take<float>(a.layers * a.cells());
    heads.take_rows(arena, backward);
    other = arena.template take<float>(a.H() * a.N);
  }
  __device__ void begin() {
    b = blockIdx.x;
    steps = a.lengths ? a.lengths[b] : a.T;
  }
  __device__ Writes writes() const {
    return {heads.s.N, l.W, l.Hw, l.R, erase, add, heads.weights + (int64_t)l.R * heads.s.N, heads.weights};
  }
  __device__ int64_t at(int64_t t) const { return t * a.B + b; }
  __device__ float* kept(int64_t t) const { return a.saved + a.rows_at() + at(t) * a.row(); }
  __device__ float* copy_of(int64_t t) const { return a.saved + (t / a.every * a.B + b) * M; }
  // h and c of each layer from the state [2 layers, B, K], or to it; of tanh layers there is none.
  __device__ int64_t in_state(int i, int which) const { return ((int64_t)(2 * (i / K) + which) * a.B + b) * K + i % K; }
};

// ---- forward ----

struct SequenceForward : SequenceBlock {
  float *inputs, *features, *rows;  // [widest D], [K + F], [N, W]

  template <class A> __host__ __device__ SequenceForward(A& arena, const SequenceArgs& a) : SequenceBlock(arena, a, false) {
    inputs = arena.template take<float>(a.widest()), features = arena.template take<float>(K + F);
    rows = arena.template take<float>(staged_size<float>(M));
  }

  __device__ void start() {
    begin();
    rows = (float*)stage(rows, a.memory + b * M, (int)M);
    const int64_t n = a.H() * a.N;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) other[i] = a.weights[b * n + i];
    for (int i = threadIdx.x; i < F; i += kThreads) features[K + i] = a.reads[b * F + i];
    if (a.lstm)
      for (int i = threadIdx.x; i < a.layers * K; i += kThreads) hidden[i] = a.state[in_state(i, 0)], cell[i] = a.state[in_state(i, 1)];
    heads.previous = other;
    staged();
  }

  // Input i of layer j at step t.
  __device__ float input(int64_t t, int j, int i) const {
    if (j == 0) {
      if (i < a.X) return a.input[at(t) * a.X + i];
      i -= (int)a.X;
    }
    if (a.lstm && i < K) return hidden[j * K + i];
    i -= a.lstm ? K : 0;
    return j == 0 ? features[K + i] : hidden[(j - 1) * K + i];
  }

  __device__ __forceinline__ void layer(int64_t t, int j, float* kept) {
    const int D = (int)a.D(j);
    for (int i = threadIdx.x; i < D; i += kThreads) {
      const float v = input(t, j, i);
      inputs[i] = v;
      if (kept) kept[i] = v;
    }
    if (kept && threadIdx.x == 0) kept[D] = 1;
    __syncthreads();
    const float* weight = a.parameters + a.layer(j);
    product(inputs, weight, G, weight + (int64_t)D * G, D, G, heads.scratch, [&](int n, float v) { sums[n] = v; });
    __syncthreads();
    for (int k = threadIdx.x; k < K; k += kThreads) {
      float h;
      if (a.lstm) {
        const float enter = sigmoid(sums[k]), keep = sigmoid(sums[K + k]), out = sigmoid(sums[2 * K + k]), now = tanhf(sums[3 * K + k]);
        const float c = keep * cell[j * K + k] + enter * now;
        cell[j * K + k] = c;
        h = out * tanhf(c);
        if (kept) {
          float* z = kept + D + 1 + k;
          z[0] = enter, z[K] = keep, z[2 * K] = out, z[3 * K] = now, z[4 * K] = c;
        }
      } else {
        h = tanhf(sums[k]);
        if (kept) kept[D + 1 + k] = h;
      }
      hidden[j * K + k] = h;
      if (j + 1 == a.layers) features[k] = h;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void step(int64_t t) {
    float* row = a.keep ? kept(t) : nullptr;
    for (int j = 0; j < a.layers; j++) layer(t, j, row ? row + a.kept(j) : nullptr);
    const float clip = (float)a.clip;
    product(features, a.packed, a.padded(I), a.parameters + a.interface_at() + (int64_t)I * K, K, I, heads.scratch, [&](int n, float v) {
      interface[n] = clamped(v, clip);
      if (row) row[a.kept_interface() + n] = v;
    });
    if (row && t % a.every == 0) {
      float* to = copy_of(t);
      for (int64_t i = threadIdx.x; i < M; i += kThreads) to[i] = rows[i];
    }
    __syncthreads();
    activate(heads, erase, add, interface, l);
    heads.forward<false>(rows);
    const int64_t n = a.H() * a.N;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      other[i] = heads.weights[i];
      if (row) row[a.kept_weights() + i] = heads.weights[i];
    }
    write_read(writes(), rows, rows, a.write_first != 0, heads.scratch, [&](int r, int w, float x) { features[K + r * l.W + w] = x; });
    __syncthreads();
    if (row) {
      float* to = row + a.kept_features();
      for (int i = threadIdx.x; i < K + F; i += kThreads) to[i] = features[i];
      if (threadIdx.x == 0) to[K + F] = 1;
    }
    float* out = a.output + at(t) * O;
    product(
        features, a.packed + K * a.padded(I), a.padded(O), a.parameters + a.output_at() + (int64_t)O * (K + F), K + F, O, heads.scratch,
        [&](int n, float v) { out[n] = v; });
  }

  __device__ void finish() {
    for (int64_t t = steps; t < a.T; t++) {
      for (int i = threadIdx.x; i < O; i += kThreads) a.output[at(t) * O + i] = 0;
      if (a.keep)
        for (int64_t i = threadIdx.x; i < a.row(); i += kThreads) kept(t)[i] = 0;
    }
    const int64_t n = a.H() * a.N;
    for (int64_t i = threadIdx.x; i < M; i += kThreads) a.memory_out[b * M + i] = rows[i];
    for (int64_t i = threadIdx.x; i < n; i += kThreads) a.weights_out[b * n + i] = other[i];
    for (int i = threadIdx.x; i < F; i += kThreads) a.reads_out[b * F + i] = features[K + i];
    if (a.lstm)
      for (int i = threadIdx.x; i < a.layers * K; i += kThreads) a.state_out[in_state(i, 0)] = hidden[i], a.state_out[in_state(i, 1)] = cell[i];
  }
};

MC_KERNEL ntm_sequence_fwd_kernel(SequenceLaunch launch) {
  MC_DYN_SHARED(shared);
  Arena<false> arena(shared, launch.shared, nullptr);
  SequenceForward s(arena, launch.a);
  s.start();
  for (int64_t t = 0; t < s.steps; t++) s.step(t);
  s.finish();
}

// ---- backward ----

// Where the memories between two copies are written again: shared memory if they find room, else the block's slice of the workspace.
template <bool WORKSPACE> struct SequenceBackward : SequenceBlock {
  float *dinterface, *dy, *dreads;  // [I], [O], [F]
  float* dmemory;                   // [N, W]
  float *memories, *room;           // [every or so, N, W]; [N, W] if staged
  bool staging;

  template <class A>
  __host__ __device__ SequenceBackward(A& arena, const SequenceArgs& a, bool staging) : SequenceBlock(arena, a, true), staging(staging) {
    dinterface = arena.template take<float>(I), dy = arena.template take<float>(O), dreads = arena.template take<float>(F);
    dmemory = arena.template take<float>(M);
    if (!WORKSPACE) memories = arena.template take<float>(least(a.every, a.T) * M);
    else if (staging) room = arena.template take<float>(staged_size<float>(M));
  }
  // Memories in the workspace: the first of each few is the copy itself.
  __host__ __device__ static int64_t workspace(const SequenceArgs& a) { return WORKSPACE ? (least(a.every, a.T) - 1) * a.N * a.W : 0; }

  __device__ float* delta(int64_t t) const { return a.deltas + at(t) * a.delta(); }
  // The memory before step t, of the last few rebuilt ones.
  __device__ float* memory(int64_t t) const {
    const int64_t i = t % a.every;
    return !WORKSPACE ? memories + i * M : i == 0 ? copy_of(t) : memories + (i - 1) * M;
  }
  __device__ static void fill(float* to, const float* from, int64_t n) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) to[i] = from ? from[i] : 0;
  }

  // The first step's barriers make it visible; a thread that takes none finishes what it began.
  __device__ void start() {
    begin();
    if (WORKSPACE) memories = a.workspace + b * workspace(a);
    const int64_t n = a.H() * a.N;
    fill(heads.d, a.grad_weights ? a.grad_weights + b * n : nullptr, n);
    fill(dreads, a.grad_reads ? a.grad_reads + b * F : nullptr, F);
    fill(dmemory, a.grad_memory ? a.grad_memory + b * M : nullptr, M);
    if (a.lstm)
      for (int i = threadIdx.x; i < a.layers * K; i += kThreads) {
        hidden[i] = a.grad_state ? a.grad_state[in_state(i, 0)] : 0;
        cell[i] = a.grad_state ? a.grad_state[in_state(i, 1)] : 0;
      }
    for (int64_t t = steps; t < a.T; t++) {
      fill(delta(t), nullptr, a.delta());
      fill(a.dinput + at(t) * a.X, nullptr, a.X);
    }
  }

  // The memories before the steps from the last copy to t.
  __device__ __forceinline__ void rebuild(int64_t t) {
    const int64_t first = t / a.every * a.every;
    const int N = heads.s.N, W = l.W;
    if (!WORKSPACE) fill(memories, copy_of(first), M);
    for (int64_t s = first; s < t; s++) {
      const float *row = kept(s), *x = row + a.kept_interface(), *w = row + a.kept_weights();
      const float clip = (float)a.clip;
      for (int i = threadIdx.x; i < l.Hw * W; i += kThreads) {
        erase[i] = sigmoid(clamped(x[l.erase(i / W) + i % W], clip));
        add[i] = clamped(x[l.add(i / W) + i % W], clip);
      }
      for (int i = l.R * N + threadIdx.x; i < heads.s.H * N; i += kThreads) heads.weights[i] = w[i];
      __syncthreads();
      Writes writes = this->writes();
      writes.R = 0;
      const float* from = memory(s);
      float* to = memory(s + 1);
      write_read(writes, from, to, true, heads.scratch, [](int, int, float) {});
      __syncthreads();
    }
  }

  // From the gradients of step t's reads, weights (heads.d) and written memory to those of its interface, of the weights before (other)
  // and of the memory that came in.
  __device__ __forceinline__ void memory_step(const float* rows) {
    const Writes writes = this->writes();
    const bool write_first = a.write_first != 0;
    const int N = heads.s.N, W = l.W;
    const float* x = interface;
    float *dx = dinterface, *dm = dmemory;
    const auto grad = [dm, W](const Span& span, int n) { return span.load(dm + n * W); };
    const Span span(W, rows, dm);
    write_read_backward<false>(
        span, writes, rows, dreads, write_first, heads.d + (int64_t)l.R * N, heads.d, heads.scratch, grad, [](const Span&, int, const Numbers&) {},
        [&](int h, int w, float v) {
          const float e = writes.erase[h * W + w];
          dx[l.erase(h) + w] = v * e * (1 - e);
        },
        [&](int h, int w, float v) { dx[l.add(h) + w] = v; });
    heads.backward(other, [&](int h, float dbeta, float dgate, float dgamma) {
      const float g = heads.gate[h];
      dx[l.strength(h)] = dbeta * sigmoid(x[l.strength(h)]);
      dx[l.gate(h)] = dgate * g * (1 - g);
      dx[l.gamma(h)] = dgamma * sigmoid(x[l.gamma(h)]);
    });
    for (int h = threadIdx.x; h < heads.s.H; h += kThreads) {
      const float *p = heads.shift + h * l.S, *d = heads.dshift + h * l.S;
      float mean = 0;
      for (int j = 0; j < l.S; j++) mean += p[j] * d[j];
      for (int j = 0; j < l.S; j++) dx[l.shift(h) + j] = p[j] * (d[j] - mean);
    }
    similarity_rows(
        span, heads.s, rows, heads.d, heads.key_own, heads.scratch,
        [&](const Span& span) { return memory_gradient(writes, span, dreads, write_first, grad); },
        [&](const Span& span, int n, const Numbers& v) { span.store(dm + n * W, v); }, [&](int h, int w, float v) { dx[l.head(h) + w] = v; });
  }

  // From the gradients of layer j's output and cell to those of its sums, of its inputs and of the cell before.
  __device__ __forceinline__ void layer(int64_t t, int j, const float* row, float* delta) {
    const int D = (int)a.D(j), X = j == 0 ? (int)a.X : 0, own = (int)a.cells();
    const float* z = row + a.kept(j) + D + 1;
    for (int k = threadIdx.x; k < K; k += kThreads) {
      const float g = hidden[j * K + k];
      if (!a.lstm) {
        const float y = z[k];
        sums[k] = g * (1 - y * y);
      } else {
        const float enter = z[k], keep = z[K + k], out = z[2 * K + k], now = z[3 * K + k], y = tanhf(z[4 * K + k]);
        const float last = t > 0 ? (z - a.B * a.row())[4 * K + k] : a.state[in_state(j * K + k, 1)];
        const float gc = cell[j * K + k] + g * out * (1 - y * y);
        sums[k] = gc * now * enter * (1 - enter);
        sums[K + k] = gc * last * keep * (1 - keep);
        sums[2 * K + k] = g * y * out * (1 - out);
        sums[3 * K + k] = gc * enter * (1 - now * now);
        cell[j * K + k] = gc * keep;
      }
      for (int i = k; i < G; i += K) delta[j * G + i] = sums[i];
    }
    __syncthreads();
    product(sums, a.packed + a.packed_layer(j), a.padded(D), nullptr, G, D, heads.scratch, [&](int n, float v) {
      if (n < X) a.dinput[at(t) * X + n] = v;
      else if (n - X < own) hidden[j * K + n - X] = v;
      else if (j == 0) dreads[n - X - own] = v;
      else hidden[(j - 1) * K + n - own] = v + (own ? hidden[(j - 1) * K + n - own] : 0);
    });
    __syncthreads();
  }

  __device__ __forceinline__ void step(int64_t t) {
    if (t + 1 == steps || t % a.every == a.every - 1) rebuild(t);
    const float *row = kept(t), *raw = row + a.kept_interface(), *rows = memory(t);
    float *to = delta(t), *top = hidden + (a.layers - 1) * K;
    const float clip = (float)a.clip;
    if (WORKSPACE && staging) rows = stage(room, rows, (int)M);
    for (int i = threadIdx.x; i < O; i += kThreads) to[a.delta_output() + i] = dy[i] = a.grad_output ? a.grad_output[at(t) * O + i] : 0;
    for (int i = threadIdx.x; i < I; i += kThreads) interface[i] = clamped(raw[i], clip);
    __syncthreads();
    product(dy, a.parameters + a.output_at(), K + F, nullptr, O, K + F, heads.scratch, [&](int n, float v) {
      if (n >= K) dreads[n - K] += v;
      else top[n] = v + (a.lstm ? top[n] : 0);
    });
    activate(heads, erase, add, interface, l);
    heads.previous = t > 0 ? kept(t - 1) + a.kept_weights() : a.weights + b * a.H() * a.N;
    if (WORKSPACE && staging) staged();
    heads.forward<true>(rows);
    memory_step(rows);
    __syncthreads();
    for (int i = threadIdx.x; i < I; i += kThreads) {
      if (clip > 0 && fabsf(raw[i]) > clip) dinterface[i] = 0;
      to[a.delta_interface() + i] = dinterface[i];
    }
    __syncthreads();
    // Thread k modulo kThreads adds to unit k here and takes it up in the layer.
    product(dinterface, a.parameters + a.interface_at(), K, nullptr, I, K, heads.scratch, [&](int n, float v) { top[n] += v; });
    for (int j = (int)a.layers - 1; j >= 0; j--) layer(t, j, row, to);
    float* before = other;
    other = heads.d, heads.d = before;
  }

  __device__ void finish() {
    const int64_t n = a.H() * a.N;
    for (int64_t i = threadIdx.x; i < M; i += kThreads) a.dmemory[b * M + i] = dmemory[i];
    for (int64_t i = threadIdx.x; i < n; i += kThreads) a.dweights[b * n + i] = heads.d[i];
    for (int i = threadIdx.x; i < F; i += kThreads) a.dreads[b * F + i] = dreads[i];
    if (a.lstm)
      for (int i = threadIdx.x; i < a.layers * K; i += kThreads) a.dstate[in_state(i, 0)] = hidden[i], a.dstate[in_state(i, 1)] = cell[i];
  }
};

template <bool WORKSPACE> MC_KERNEL ntm_sequence_bwd_kernel(SequenceLaunch launch) {
  MC_DYN_SHARED(shared);
  Arena<false> arena(shared, launch.shared, nullptr);
  SequenceBackward<WORKSPACE> s(arena, launch.a, launch.staged);
  s.start();
  for (int64_t t = s.steps - 1; t >= 0; t--) s.step(t);
  s.finish();
}

// ---- launching ----

struct SequencePlan {
  int64_t shared;
  bool fits, workspace, staged;
};

template <class F> int64_t shared_of(F layout) {
  Arena<false> arena(nullptr, 0, nullptr);
  layout(arena);
  return arena.used;
}
inline SequencePlan forward_plan(const SequenceArgs& a) {
  const int64_t shared = shared_of([&](auto& arena) { SequenceForward(arena, a); });
  return {shared, shared <= mc_shared_limit(a.device), false, false};
}
// The first of these that fits: memories in shared memory; in the workspace, each brought to shared memory; read where they are.
inline SequencePlan backward_plan(const SequenceArgs& a) {
  const int64_t limit = mc_shared_limit(a.device);
  const int64_t all = shared_of([&](auto& arena) { SequenceBackward<false>(arena, a, false); });
  const int64_t one = shared_of([&](auto& arena) { SequenceBackward<true>(arena, a, true); });
  const int64_t none = shared_of([&](auto& arena) { SequenceBackward<true>(arena, a, false); });
  if (all <= limit) return {all, true, false, false};
  return one <= limit ? SequencePlan{one, true, true, true} : SequencePlan{none, none <= limit, true, false};
}

}  // namespace cuda
}  // namespace memcore

using namespace memcore::cuda;

int64_t mc_ntm_sequence_fwd_workspace(const SequenceArgs* a) { return forward_plan(*a).fits ? 0 : -1; }
int64_t mc_ntm_sequence_bwd_workspace(const SequenceArgs* a) {
  const SequencePlan p = backward_plan(*a);
  return !p.fits ? -1 : p.workspace ? a->B * SequenceBackward<true>::workspace(*a) * (int64_t)sizeof(float) : 0;
}
int64_t mc_ntm_sequence_fwd(const SequenceArgs* a, void* stream) {
  const SequencePlan p = forward_plan(*a);
  return mc_launch(ntm_sequence_fwd_kernel, a->B, kThreads, p.shared, a->device, stream, SequenceLaunch{*a, p.shared, false});
}
int64_t mc_ntm_sequence_bwd(const SequenceArgs* a, void* stream) {
  const SequencePlan p = backward_plan(*a);
  auto* kernel = p.workspace ? ntm_sequence_bwd_kernel<true> : ntm_sequence_bwd_kernel<false>;
  return mc_launch(kernel, a->B, kThreads, p.shared, a->device, stream, SequenceLaunch{*a, p.shared, p.staged});
}
