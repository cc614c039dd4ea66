// Addressing of one batch element by one block, in float32: similarity, softmax, interpolation, circular shift, sharpening, and
// their backwards. The numbers are those of kernels/<op>/reference.py; arrays over heads and slots are [H, N].
#pragma once

#include "block.h"

namespace memcore {
namespace cuda {

// 1 / max(|x|, eps), or 0 for a zero vector.
__device__ inline float inverse_norm(float norm2) {
  if (norm2 == 0) return 0;
  const float norm = sqrtf(norm2);
  return norm < kEps ? 1 / kEps : 1 / norm;
}

// ---- similarity ----

struct Similarity {
  int H, N, W;
  bool cosine;
  const bool* mask;  // of this element, or null
  float *key, *ik;   // [H, W], [H] inverse norms
  float* sim;        // [H, N]
  float* im;         // [N] inverse norms; 0 marks rows without a share in the gradient: zero or masked

  template <class A> __host__ __device__ void take_small(A& arena) {
    ik = arena.template take<float>(H);
    key = arena.template take<float>((int64_t)H * W);
  }
  template <class A> __host__ __device__ void take_rows(A& arena) {
    im = arena.template take<float>(N);
    sim = arena.template take<float>((int64_t)H * N);
  }
  __device__ bool usable(int n) const { return !mask || mask[n]; }

  // Of the keys, which are in place and visible.
  __device__ void key_norms() {
    const int lane = threadIdx.x & 31;
    for (int h = threadIdx.x >> 5; h < H; h += kWarps) {
      float k2 = 0;
      for (int w = lane; w < W; w += 32) k2 += key[(int64_t)h * W + w] * key[(int64_t)h * W + w];
      k2 = group_sum(k2, 32);
      if (lane == 0) ik[h] = inverse_norm(k2);
    }
  }
  // Keys are in place (not yet visible to all). Leaves everything visible.
  template <class T> __device__ void forward(const T* rows) {
    __syncthreads();
    if (cosine) key_norms();
    dots(
        rows, N, W, key, H, cosine, [&](int h, int n, float x) { sim[(int64_t)h * N + n] = usable(n) ? x : 0; },
        [&](int n, float x) { im[n] = usable(n) ? inverse_norm(x) : 0; });
    __syncthreads();
  }
  // The similarity of slot n: dot products become cosines as they are used.
  __device__ float at(int h, int n) const {
    const float x = sim[(int64_t)h * N + n];
    if (!cosine) return x;
    const float i = ik[h] * im[n];
    return i == 0 ? 0 : x * i;
  }
};

// ---- softmax over strength * similarity ----

struct Scores {
  float extreme, inverse;  // the similarity scores are taken from; 1 / sum, 0 if no slot is usable
};

// put(n, exp(beta (sim - extreme))); a NaN score makes the sum NaN, and so the row. The extreme is the greatest usable similarity
// for beta >= 0, else the least.
template <class Get, class Use, class Put> __device__ inline Scores score(Team& team, int count, float beta, Get sim, Use usable, Put put) {
  const float sign = beta >= 0 ? 1 : -1;
  float top = -INFINITY;
  for (int n = team.rank; n < count; n += team.threads)
    if (usable(n)) top = fmaxf(top, sign * sim(n));
  const float extreme = sign * team.max(top);
  Sum total;
  for (int n = team.rank; n < count; n += team.threads) {
    const float e = usable(n) ? expf(beta * (sim(n) - extreme)) : 0;
    put(n, e);
    total.add(e);
  }
  const float sum = team.sum(total.total);
  return {extreme, sum == 0 ? 0 : 1 / sum};
}

// The sum of w(n) g(n), on all of the team's threads.
template <class W, class G> __device__ inline float inner_product(Team& team, int count, W w, G g) {
  Sum sum;
  for (int n = team.rank; n < count; n += team.threads) sum.add(w(n) * g(n));
  return team.sum(sum.total);
}

// Gradient g(n) of the weights w(n) = e(n) inverse in, whose inner product with them is `mean`, of the similarity out: put(n, dsim, dsim * sim).
// Returns the thread's part of the strength's gradient.
template <class W, class G, class Get, class Put>
__device__ inline float score_backward(Team& team, int count, float beta, float extreme, float mean, W w, G g, Get sim, Put put) {
  Sum strength;
  for (int n = team.rank; n < count; n += team.threads) {
    const float x = w(n), t = x == 0 ? 0 : x * (g(n) - mean), s = sim(n);
    if (t != 0) strength.add(t * (s - extreme));
    put(n, t == 0 ? 0 : t * beta, t == 0 ? 0 : t * beta * s);
  }
  return strength.total;
}

// ---- the similarity's backward ----

// From dsim [H, N] to coefficients: d becomes the rows' coefficients of the keys, im those of the rows themselves:
//   dm_n = sum over h of d[h][n] k_h - im[n] m_n          dk_h = sum over n of d[h][n] m_n - key_own[h] k_h
// Everything is visible before and after; key_own is the caller's.
__device__ inline void similarity_coefficients(const Similarity& s, float* d) {
  if (s.cosine)
    for (int n = threadIdx.x; n < s.N; n += kThreads) {
      const float i = s.im[n];
      float own = 0;
      for (int h = 0; h < s.H; h++) {
        const int64_t at = (int64_t)h * s.N + n;
        own += d[at] * s.at(h, n);
        d[at] = i == 0 ? 0 : d[at] * (s.ik[h] * i);
      }
      s.im[n] = i < 1 / kEps ? own * i * i : 0;
    }
  __syncthreads();
}

// The coefficient of the key itself, from sum over n of dsim * sim.
__device__ inline float key_coefficient(const Similarity& s, int h, float total) {
  return s.cosine && s.ik[h] < 1 / kEps ? total * s.ik[h] * s.ik[h] : 0;
}

// The pass over the rows. span: of all arrays of rows; base(span)(n) is what the memory's gradient of row n starts from; dmemory(span, n, x) and
// dkey(h, w, x) take results. scratch: 8 * kThreads floats.
template <int HC, class T, class Base, class PutM, class PutK>
__device__ inline void similarity_rows_of(
    Span span, const Similarity& s, const T* rows, const float* d, const float* key_own, float* scratch, Base base, PutM dmemory, PutK dkey) {
  for (; span.w0 < s.W; span.w0 += span.width()) {
    const auto start = base(span);
    Numbers near[HC];  // keys
#pragma unroll
    for (int j = 0; j < HC; j++) near[j] = j < s.H ? span.load(s.key + j * s.W) : Numbers{};
    for (int h0 = 0; h0 == 0 || h0 < s.H; h0 += HC) {
      Numbers acc[HC] = {};
#pragma unroll 1
      for (int first = span.first(); first < s.N; first += span.step) {
        const int n = span.row(first);
        if (n >= s.N) continue;
        const Numbers m = s.usable(n) ? span.load(rows + (int64_t)n * s.W) : Numbers{};
        Numbers x = h0 == 0 ? start(n) : Numbers{};
#pragma unroll
        for (int j = 0; j < HC; j++) {
          const float c = h0 + j < s.H ? d[(h0 + j) * s.N + n] : 0;
          add_to(acc[j], c, m);
          add_to(x, c, near[j]);
        }
        if (h0 > 0) continue;
        for (int h = HC; h < s.H; h++) add_to(x, d[h * s.N + n], span.load(s.key + h * s.W));
        if (s.cosine) add_to(x, -s.im[n], m);
        dmemory(span, n, x);
      }
      span.sum(acc, least(HC, s.H - h0), scratch, [&](int j, int at, float x) {
        const int h = h0 + j;
        dkey(h, at, s.cosine && key_own[h] != 0 ? x - key_own[h] * s.key[(int64_t)h * s.W + at] : x);
      });
    }
  }
}
template <class T, class Base, class PutM, class PutK>
__device__ inline void similarity_rows(
    const Span& span, const Similarity& s, const T* rows, const float* d, const float* key_own, float* scratch, Base base, PutM dmemory, PutK dkey) {
  if (s.H <= 2) similarity_rows_of<2>(span, s, rows, d, key_own, scratch, base, dmemory, dkey);
  else similarity_rows_of<5>(span, s, rows, d, key_own, scratch, base, dmemory, dkey);
}

// ---- circular shift ----

__device__ inline int wrapped(int n, int N) {
  if (n >= 0 && n < N) return n;
  n %= N;
  return n < 0 ? n + N : n;
}
// sum over j of s[j] x[(n + R - j) mod N], S = 2R + 1
template <class Taps> __device__ inline float shift_forward(const float* x, Taps s, int S, int N, int n) {
  float v = 0;
  int i = wrapped(n + S / 2, N);
  for (int j = 0; j < S; j++, i = i == 0 ? N - 1 : i - 1) v += s[j] * x[i];
  return v;
}
// sum over j of s[j] d[(n - R + j) mod N]
template <class Taps> __device__ inline float shift_backward(const float* d, Taps s, int S, int N, int n) {
  float v = 0;
  int i = wrapped(n - S / 2, N);
  for (int j = 0; j < S; j++, i = i + 1 == N ? 0 : i + 1) v += s[j] * d[i];
  return v;
}
// Gradients of s[j0] to s[j0 + 3], those there are: sum over n of d[n] x[(n + R - j) mod N]. Returns the thread's parts.
__device__ inline Numbers shift_backward_taps(const Team& team, int count, const float* d, const float* x, int S, int N, int j0) {
  Sum totals[kSpan];
  for (int n = team.rank; n < count; n += team.threads)
#pragma unroll
    for (int j = 0; j < kSpan; j++)
      if (j0 + j < S) totals[j].add(d[n] * x[wrapped(n + S / 2 - j0 - j, N)]);
  return {{totals[0].total, totals[1].total, totals[2].total, totals[3].total}};
}

// ---- sharpening ----

// The power of a positive weight in units of the row's extreme; 0 stays 0, a negative residue becomes 0, NaN spreads.
__device__ inline float power(float w, float extreme, float gamma) { return w <= 0 ? 0 : expf(gamma * logf(w / extreme)); }

// put(n, power); the weights are power * inverse. The extreme is the greatest weight for gamma >= 0, else the least positive one.
template <class Get, class Put> __device__ inline Scores sharpen(Team& team, int count, float gamma, Get w, Put put) {
  const float sign = gamma >= 0 ? 1 : -1;
  float top = -INFINITY;
  for (int n = team.rank; n < count; n += team.threads)
    if (w(n) > 0) top = fmaxf(top, sign * w(n));
  top = team.max(top);
  const float extreme = top == -INFINITY ? 1 : sign * top;
  Sum total;
  for (int n = team.rank; n < count; n += team.threads) {
    const float e = power(w(n), extreme, gamma);
    put(n, e);
    total.add(e);
  }
  const float sum = team.sum(total.total);
  return {extreme, gamma != gamma ? gamma : sum == 0 ? 0 : 1 / sum};
}

// Gradient g(n) of the sharpened weights p(n) in, of the weights w(n) out by put(n, x). Returns the thread's part of gamma's gradient.
template <class P, class G, class W, class Put>
__device__ inline float sharpen_backward(Team& team, int count, float gamma, float extreme, P p, G g, W w, Put put) {
  const float mean = inner_product(team, count, p, g);
  Sum exponent;
  for (int n = team.rank; n < count; n += team.threads) {
    const float x = p(n), t = x == 0 ? 0 : x * (g(n) - mean), v = w(n);
    if (t != 0) exponent.add(t * logf(v / extreme));
    put(n, t == 0 ? 0 : gamma * t / v);
  }
  return exponent.total;
}

// ---- a head's whole way: similarities to weights ----

template <class T> struct Heads {
  Similarity s;
  int S;
  float *slots, *scratch;
  float *beta, *gate, *gamma, *shift;  // [H], [H, S]
  const T* previous;                   // [H, N] of this element
  float *gated, *shifted, *weights;    // [H, N]
  // backward
  Scores *content, *sharp;  // [H]
  float *key_own, *dshift;  // [H], [H, S]
  float* d;                 // [H, N] gradient of the weights in, coefficients of the keys out

  // Small arrays first: they are used most.
  template <class A> __host__ __device__ void take_small(A& arena, int64_t H, int64_t N, int64_t W, int64_t S_, bool backward) {
    s.H = (int)H, s.N = (int)N, s.W = (int)W, s.cosine = true, s.mask = nullptr, S = (int)S_;
    slots = arena.template take<float>(kSlots);
    scratch = arena.template take<float>(8 * kThreads);
    beta = arena.template take<float>(H), gate = arena.template take<float>(H), gamma = arena.template take<float>(H);
    shift = arena.template take<float>(H * S);
    if (backward) {
      content = arena.template take<Scores>(H), sharp = arena.template take<Scores>(H);
      key_own = arena.template take<float>(H), dshift = arena.template take<float>(H * S);
    }
    s.take_small(arena);
  }
  template <class A> __host__ __device__ void take_rows(A& arena, bool backward) {
    s.take_rows(arena);
    const int64_t n = (int64_t)s.H * s.N;
    gated = arena.template take<float>(n);
    shifted = weights = s.sim;  // the forward needs each of them in turn only
    if (backward) shifted = arena.template take<float>(n), weights = arena.template take<float>(n), d = arena.template take<float>(n);
  }

  // Parameters are in place (not yet visible). Leaves the weights visible to all.
  template <bool BACKWARD> __device__ void forward(const T* rows) {
    s.forward(rows);
    focus<BACKWARD>();
  }
  // From the similarities on.
  template <bool BACKWARD> __device__ void focus() {
    Team team(s.H, slots);
    for (int h0 = 0; h0 < s.H; h0 += team.count) {
      const int h = h0 + team.index, at = least(h, s.H - 1), count = h < s.H ? s.N : 0;
      const int64_t row = (int64_t)h * s.N;
      float *x = gated + row, *y = shifted + row, *w = weights + row;
      const float g = gate[at];
      const Scores c = score(
          team, count, beta[at], [&](int n) { return s.at(h, n); }, [](int) { return true; }, [&](int n, float e) { x[n] = e; });
      for (int n = team.rank; n < count; n += team.threads) x[n] = g * (x[n] * c.inverse) + (1 - g) * wide(previous[row + n]);
      team.sync();
      for (int n = team.rank; n < count; n += team.threads) y[n] = shift_forward(x, shift + at * S, S, s.N, n);
      const Scores p = sharpen(team, count, gamma[at], [&](int n) { return y[n]; }, [&](int n, float e) { w[n] = e; });
      for (int n = team.rank; n < count; n += team.threads) w[n] *= p.inverse;
      if (BACKWARD && h < s.H && team.rank == 0) content[h] = c, sharp[h] = p;
    }
    __syncthreads();
  }

  // d [H, N] holds the weights' gradient, visible. Gives dprevious [H, N] and parameters(h, dbeta, dgate, dgamma) on one thread a
  // head; leaves dshift, key_own and the similarity's coefficients visible.
  template <class Put> __device__ void backward(T* dprevious, Put parameters) {
    Team team(s.H, slots);
    for (int h0 = 0; h0 < s.H; h0 += team.count) {
      const int h = h0 + team.index, at = least(h, s.H - 1), count = h < s.H ? s.N : 0;
      const int64_t row = (int64_t)h * s.N;
      float *x = gated + row, *y = shifted + row, *w = weights + row, *dw = d + row;
      const float* taps = shift + at * S;
      const float g = gate[at], b = beta[at], extreme = content[at].extreme, inverse = content[at].inverse;
      float sums[8];  // the gradients of gamma, gate and strength, what the key's own coefficient is made of, and four of the taps
      sums[0] = sharpen_backward(
          team, count, gamma[at], sharp[at].extreme, [&](int n) { return w[n]; }, [&](int n) { return dw[n]; },
          [&](int n) { return y[n]; }, [&](int n, float v) { dw[n] = v; });
      team.sync();
      const auto of_taps = [&](int j0) { return shift_backward_taps(team, count, dw, x, S, s.N, j0); };
      const auto put_taps = [&](int j0, const float* totals) {
        for (int j = 0; j < least(S - j0, kSpan); j++) dshift[h * S + j0 + j] = totals[j];
      };
      const bool first = h < s.H && team.rank == 0;
      for (int j0 = kSpan; j0 < S; j0 += kSpan) {
        Numbers tap = of_taps(j0);
        const float* totals = team.sums(tap.v, scratch);
        if (first) put_taps(j0, totals);
      }
      const Numbers tap = of_taps(0);
#pragma unroll
      for (int j = 0; j < kSpan; j++) sums[4 + j] = tap.v[j];
      for (int n = team.rank; n < count; n += team.threads) y[n] = shift_backward(dw, taps, S, s.N, n);
      team.sync();  // dw and x are read by neighbours no more
      const auto sim = [&](int n) { return s.at(h, n); };
      Sum dgate, inner, own;
      for (int n = team.rank; n < count; n += team.threads) {
        const float v = y[n], c = expf(b * (sim(n) - extreme)) * inverse;
        dgate.add(v * (c - wide(previous[row + n])));
        dprevious[row + n] = narrow<T>((1 - g) * v);
        x[n] = c, y[n] = g * v;
        inner.add(c * (g * v));
      }
      sums[1] = dgate.total;
      sums[2] = score_backward(
          team, count, b, extreme, team.sum(inner.total), [&](int n) { return x[n]; }, [&](int n) { return y[n]; }, sim,
          [&](int n, float v, float z) { dw[n] = v, own.add(z); });
      sums[3] = own.total;
      const float* totals = team.sums(sums, scratch);
      if (first) {
        key_own[h] = key_coefficient(s, h, totals[3]);
        put_taps(0, totals + 4);
        parameters(h, totals[2], totals[1], totals[0]);
      }
    }
    __syncthreads();
    similarity_coefficients(s, d);
  }
};

// ---- one memory for the whole batch ----

// Gradient of a shared memory's rows: of row n the sum over all B * H vectors of d[b, h, n] vec[b, h], less own[b, n] of the row
// itself (own may be null). Blocks take 256 / lanes rows each.
template <class T> struct SharedRows {
  int64_t B, H, N, W;
  const float *d, *own;
  const T *vec, *memory;
  T* dmemory;
};
template <class T> __device__ inline void shared_rows(const SharedRows<T>& a) {
  const Columns cols((int)a.W);
  const int64_t n = (int64_t)blockIdx.x * cols.step + threadIdx.x / cols.lanes;
  if (n >= a.N) return;
  float own = 0;
  if (a.own)
    for (int64_t b = 0; b < a.B; b++) own += a.own[b * a.N + n];
  for (int64_t w = cols.lane; w < a.W; w += cols.lanes) {
    Sum v;
    for (int64_t i = 0; i < a.B * a.H; i++) {
      const float d = a.d[i * a.N + n];
      if (d != 0) v.add(d * wide(a.vec[i * a.W + w]));  // a key behind an all-masked row may hold anything
    }
    if (own != 0) v.add(-own * wide(a.memory[n * a.W + w]));
    a.dmemory[n * a.W + w] = narrow<T>(v.total);
  }
}

}  // namespace cuda
}  // namespace memcore
