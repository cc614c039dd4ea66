// The interface vector of one batch element: where each head's numbers lie, their activations and derivatives.
#pragma once

#include "addressing.h"

namespace memcore {
namespace cuda {

struct InterfaceLayout {
  int R, Hw, W, S;  // read heads, write heads, slot width, shifts
  __host__ __device__ int64_t head_size() const { return W + 3 + S; }
  __host__ __device__ int64_t size() const { return (R + Hw) * head_size() + 2 * (int64_t)Hw * W; }
  // Offset of head h: key, strength, gate, shift, gamma; write heads go on with erase, add.
  __device__ int64_t head(int h) const { return h < R ? h * head_size() : R * head_size() + (h - R) * (head_size() + 2 * (int64_t)W); }
  __device__ int64_t strength(int h) const { return head(h) + W; }
  __device__ int64_t gate(int h) const { return head(h) + W + 1; }
  __device__ int64_t shift(int h) const { return head(h) + W + 2; }
  __device__ int64_t gamma(int h) const { return head(h) + W + 2 + S; }
  __device__ int64_t erase(int i) const { return head(R + i) + head_size(); }
  __device__ int64_t add(int i) const { return erase(i) + W; }
};

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
__device__ inline float softplus(float x) { return fmaxf(x, 0) + log1pf(expf(-fabsf(x))) + (x != x ? x : 0); }

// Head h's numbers of x [I] to place i, by one thread.
template <class T> __device__ inline void activate_head(const Heads<T>& heads, int i, const T* x, const InterfaceLayout& l, int h) {
  heads.beta[i] = softplus(wide(x[l.strength(h)]));
  heads.gate[i] = sigmoid(wide(x[l.gate(h)]));
  heads.gamma[i] = 1 + softplus(wide(x[l.gamma(h)]));
  const T* s = x + l.shift(h);
  float top = wide(s[0]), total = 0;
  for (int j = 1; j < l.S; j++) top = fmaxf(top, wide(s[j]));
  for (int j = 0; j < l.S; j++) total += heads.shift[i * l.S + j] = expf(wide(s[j]) - top);
  for (int j = 0; j < l.S; j++) heads.shift[i * l.S + j] /= total;
}
// From the gradient of the shift's weights p to that of their logits.
template <class T> __device__ inline void shift_logits(T* dx, const float* p, const float* d, int S) {
  float mean = 0;
  for (int j = 0; j < S; j++) mean += p[j] * d[j];
  for (int j = 0; j < S; j++) dx[j] = narrow<T>(p[j] * (d[j] - mean));
}

// x [I] to keys [H, W]; visible after the next barrier.
template <class T> __device__ inline void load_keys(float* key, const T* x, const InterfaceLayout& l) {
  const int lane = threadIdx.x & 31, H = l.R + l.Hw;
  for (int h = threadIdx.x >> 5; h < H; h += kWarps)
    for (int w = lane; w < l.W; w += 32) key[(int64_t)h * l.W + w] = wide(x[l.head(h) + w]);
}
// x [I] to erase and add [Hw, W]; visible after the next barrier.
template <class T> __device__ inline void load_writes(float* erase, float* add, const T* x, const InterfaceLayout& l) {
  const int lane = threadIdx.x & 31;
  for (int i = threadIdx.x >> 5; i < l.Hw; i += kWarps)
    for (int w = lane; w < l.W; w += 32) {
      erase[(int64_t)i * l.W + w] = sigmoid(wide(x[l.erase(i) + w]));
      add[(int64_t)i * l.W + w] = wide(x[l.add(i) + w]);
    }
}
// x [I] to the heads' parameters, erase and add [Hw, W]; visible after the next barrier.
template <class T> __device__ inline void activate(const Heads<T>& heads, float* erase, float* add, const T* x, const InterfaceLayout& l) {
  load_keys(heads.s.key, x, l);
  load_writes(erase, add, x, l);
  for (int h = threadIdx.x; h < l.R + l.Hw; h += kThreads) activate_head(heads, h, x, l, h);
}

}  // namespace cuda
}  // namespace memcore
