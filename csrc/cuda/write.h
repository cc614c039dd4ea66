// Erase/add writes and reads on the rows of one batch element, in float32.
#pragma once

#include "block.h"

namespace memcore {
namespace cuda {

// Hw write heads and R read heads over N slots of width W.
struct Writes {
  int N, W, Hw, R;
  const float *erase, *add;      // [Hw, W]
  const float *weights, *reads;  // [Hw, N] of the write heads, [R, N] of the read heads

  // The factor that write heads other than `but` leave of slot n, column w.
  __device__ float kept(int n, int w, int but = -1) const {
    float f = 1;
    for (int h = 0; h < Hw; h++)
      if (h != but) f *= 1 - weights[(int64_t)h * N + n] * erase[(int64_t)h * W + w];
    return f;
  }
  __device__ float written(float m, int n, int w) const {
    float v = m * kept(n, w);
    for (int h = 0; h < Hw; h++) v += weights[(int64_t)h * N + n] * add[(int64_t)h * W + w];
    return v;
  }
  // sum over the read heads of weight * gradient of the read vector: what the reads ask of slot n
  __device__ float asked(const float* dreads, int n, int w) const {
    float v = 0;
    for (int r = 0; r < R; r++) v += reads[(int64_t)r * N + n] * dreads[(int64_t)r * W + w];
    return v;
  }
};

// One walk over memory: to[n, w] = written rows (null: none), read(r, w, x) the read vectors, after the write or before it.
// scratch: HC * kThreads floats.
template <int HC, class T, class Put>
__device__ inline void write_read_of(const Writes& a, const T* rows, T* to, bool write_first, float* scratch, Put read) {
  const Columns cols(a.W);
  for (int w0 = 0; w0 < a.W; w0 += cols.lanes) {
    const int w = w0 + cols.lane;
    for (int r0 = 0; r0 == 0 || r0 < a.R; r0 += HC) {
      float acc[HC];
#pragma unroll
      for (int j = 0; j < HC; j++) acc[j] = 0;
#pragma unroll 4
      for (int first = cols.first(); first < a.N; first += cols.step) {
        const int n = cols.row(first);
        if (n >= a.N || w >= a.W) continue;
        const float m = wide(rows[(int64_t)n * a.W + w]), v = to || write_first ? a.written(m, n, w) : m;
        if (to && r0 == 0) to[(int64_t)n * a.W + w] = narrow<T>(v);
        const float x = write_first ? v : m;
#pragma unroll
        for (int j = 0; j < HC; j++)
          if (r0 + j < a.R) acc[j] += a.reads[(int64_t)(r0 + j) * a.N + n] * x;
      }
      if (a.R > 0) cols.sum(acc, least(HC, a.R - r0), w0, a.W, scratch, [&](int j, int at, float x) { read(r0 + j, at, x); });
    }
  }
}
template <class T, class Put>
__device__ inline void write_read(const Writes& a, const T* rows, T* to, bool write_first, float* scratch, Put read) {
  if (a.R <= 1) write_read_of<1>(a, rows, to, write_first, scratch, read);
  else write_read_of<8>(a, rows, to, write_first, scratch, read);
}

// Backward of the writes and reads, less the memory's gradient:
//   G = grad + asked if written first              dread[r][n] += sum over w of dreads[r] . what was read
//   q_h = G m * the other heads' factors           dwrite[h][n] += sum over w of add_h G - erase_h q_h
//   erase(h, w, - sum over n of c_h q_h)           add(h, w, sum over n of c_h G)
// grad(n, w) is the gradient of the written memory. dwrite [Hw, N] and dread [R, N] are visible before and after.
// put(n, w, x), if PUT, takes the memory's gradient. scratch: 2 * HC * kThreads floats.
template <int HC, bool PUT, class T, class Grad, class Put, class Erase, class Add>
__device__ inline void write_read_backward_of(
    const Writes& a, const T* rows, const float* dreads, bool write_first, float* dwrite, float* dread, float* scratch, Grad grad,
    Put put, Erase erase, Add add) {
  const Columns cols(a.W);
  for (int w0 = 0; w0 < a.W; w0 += cols.lanes) {
    const int w = w0 + cols.lane;
    for (int h0 = 0; h0 == 0 || h0 < a.Hw || h0 < a.R; h0 += HC) {
      float acc[2 * HC];  // of erase, of add
#pragma unroll
      for (int j = 0; j < 2 * HC; j++) acc[j] = 0;
#pragma unroll 2
      for (int first = cols.first(); first < a.N; first += cols.step) {
        const int n = cols.row(first);
        const bool on = n < a.N && w < a.W;
        float m = 0, g = 0, seen = 0;
        if (on) {
          m = wide(rows[(int64_t)n * a.W + w]);
          g = grad(n, w);
          if (write_first) g += a.asked(dreads, n, w);
          if (PUT && h0 == 0) put(n, w, g * a.kept(n, w) + (write_first ? 0 : a.asked(dreads, n, w)));
          seen = write_first ? a.written(m, n, w) : m;
        }
#pragma unroll
        for (int j = 0; j < HC; j++) {
          const int h = h0 + j;
          if (h < a.Hw) {
            float row = 0;
            if (on) {
              const float c = a.weights[(int64_t)h * a.N + n], q = g * m * a.kept(n, w, h);
              row = a.add[(int64_t)h * a.W + w] * g - a.erase[(int64_t)h * a.W + w] * q;
              acc[j] -= c * q;
              acc[HC + j] += c * g;
            }
            row = group_sum(row, cols.lanes);
            if (cols.lane == 0 && n < a.N) dwrite[(int64_t)h * a.N + n] += row;
          }
          if (h < a.R) {
            const float row = group_sum(on ? dreads[(int64_t)h * a.W + w] * seen : 0, cols.lanes);
            if (cols.lane == 0 && n < a.N) dread[(int64_t)h * a.N + n] += row;
          }
        }
      }
      if (h0 < a.Hw)
        cols.sum(acc, 2 * HC, w0, a.W, scratch, [&](int j, int at, float x) {
          const int h = h0 + j % HC;
          if (h >= a.Hw) return;
          if (j < HC) erase(h, at, x);
          else add(h, at, x);
        });
    }
  }
  __syncthreads();
}
template <bool PUT, class T, class Grad, class Put, class Erase, class Add>
__device__ inline void write_read_backward(
    const Writes& a, const T* rows, const float* dreads, bool write_first, float* dwrite, float* dread, float* scratch, Grad grad,
    Put put, Erase erase, Add add) {
  if (a.Hw <= 1 && a.R <= 1) write_read_backward_of<1, PUT>(a, rows, dreads, write_first, dwrite, dread, scratch, grad, put, erase, add);
  else write_read_backward_of<4, PUT>(a, rows, dreads, write_first, dwrite, dread, scratch, grad, put, erase, add);
}

}  // namespace cuda
}  // namespace memcore
