// Addressing of one batch element in the accumulation type C: similarity, softmax, interpolation, circular shift,
// sharpening, and their backwards. Rows over the slots are padded to whole vectors (`Np`), the padding is 0.
#pragma once

#include <cstdlib>

#include "blocks.h"
#include "kept.h"
#include "rows_stream.h"

namespace memcore {
namespace MC_ISA {

// Scratch memory: laid out twice, first without memory to learn the size.
class Arena {
 public:
  template <class F> explicit Arena(F layout) {
    layout(*this);
    size_ = round_up(used_ > 0 ? used_ : 1, 64);
    if (size_ >= kBlock) base_ = (char*)take_block(size_);
    block_ = base_ != nullptr;
    if (!block_) base_ = (char*)std::aligned_alloc(64, (size_t)size_);
    if (!base_) std::abort();
    used_ = 0;
    layout(*this);
  }
  ~Arena() {
    if (block_) give_block(base_, size_);
    else std::free(base_);
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  template <class C> void take(C*& p, int64_t n) {
    p = (C*)(base_ + used_);
    used_ += round_up((n > 0 ? n : 1) * (int64_t)sizeof(C), 64);
  }

 private:
  char* base_ = nullptr;
  int64_t used_ = 0, size_ = 0;
  bool block_ = false;
};

template <class C> MC_INLINE void fill(C* p, int64_t n, C x) {
  for (int64_t i = 0; i < n; i++) p[i] = x;
}

// The first `valid` lanes of v, 0 in the others.
template <class C> MC_INLINE Vec<C> first(Vec<C> v, int64_t valid) {
  if (__builtin_expect(valid < Lanes<C>::n, 0)) {
    C lane[Lanes<C>::n];  // through memory here alone: a vector that is indexed would lie there always
    store(lane, v);
    for (int64_t i = valid > 0 ? valid : 0; i < Lanes<C>::n; i++) lane[i] = 0;
    v = load(lane);
  }
  return v;
}

// Sums of any length to rounding, n of them: lanes in C for a while, then double.
template <class C, int n> class Totals {
 public:
  MC_INLINE void add(const Vec<C>* v) {
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) lanes_[i] += v[i];
    if (++count_ == 64) flush();
  }
  MC_INLINE C value(int i) {
    flush();
    return (C)total_[i];
  }

 private:
  MC_INLINE void flush() {
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) total_[i] += (double)sum<C>(lanes_[i]), lanes_[i] = Vec<C>{};
    count_ = 0;
  }
  Vec<C> lanes_[n]{};
  int count_ = 0;
  double total_[n]{};
};
template <class C> class Total {
 public:
  MC_INLINE void add(Vec<C> v) { one_.add(&v); }
  MC_INLINE C value() { return one_.value(0); }

 private:
  Totals<C, 1> one_;
};

constexpr double kEps = 1e-8;
constexpr int64_t kAhead = 256 << 10;  // bytes: a few memories of this size fit the second cache

// ---- similarity ----

// Rows n0.. of a memory in C, masked rows as zeros; scratch holds the block.
template <class T> MC_INLINE const Acc<T>* block_of(const T* memory, int64_t n0, int64_t rows, int64_t W, const bool* mask, Acc<T>* scratch) {
  if (!mask) return widened(memory + n0 * W, rows * W, scratch);
  for (int64_t n = 0; n < rows; n++)
    if (mask[n0 + n]) widen(scratch + n * W, memory + (n0 + n) * W, W);
    else std::memset(scratch + n * W, 0, (size_t)W * sizeof(Acc<T>));
  return scratch;
}

// 1 / max(|x|, eps), or 0 for a zero vector.
template <class C> MC_INLINE C inverse_norm(C norm2) {
  const C norm = root(norm2);
  return norm2 == 0 ? 0 : norm < (C)kEps ? (C)(1 / kEps) : 1 / norm;
}

// What the similarity of one element's keys and memory leaves for the backward: in scratch, or where a forward kept it.
template <class C> struct Similarity {
  int64_t H, N, W, Np, Wp;
  bool cosine;
  C* key;    // [H, Wp]
  C* ik;     // [H] inverse key norms
  C* sim;    // [H, Np]
  C* im;     // [Np] inverse row norms
  C* norm2;  // [Np]

  void sizes(int64_t H_, int64_t N_, int64_t W_, bool cosine_) {
    H = H_, N = N_, W = W_, Np = padded<C>(N_), Wp = padded<C>(W_), cosine = cosine_;
  }
  void layout(Arena& a) {
    a.take(key, H * Wp);
    a.take(ik, H);
    a.take(sim, H * Np);
    a.take(im, Np);
    a.take(norm2, Np);
  }

  // `forward`, with sim and norm2 in an element's share of what it keeps (kept.h; may be null).
  template <class T> void forward_kept(const T* memory, const bool* mask, C* block, C* kept) {
    if (kept) sim = kept + kKeptHead, norm2 = sim + H * Np;
    forward(memory, mask, block);
    if (!kept) return;
    fill(kept, kKeptHead, (C)0);
    kept[0] = (C)Np;
    C* rest = sim + (cosine ? H + 1 : H) * Np;
    fill(rest, kept + similar_numbers(H, N) - rest, (C)0);
  }
  // What `forward_kept` left, for the backward; computed again if nothing was kept, or by code of other vectors.
  template <class T> void resume(const T* memory, const bool* mask, C* block, C* kept) {
    if (!kept || kept[0] != (C)Np) return forward(memory, mask, block);
    sim = kept + kKeptHead, norm2 = sim + H * Np;
    if (cosine) invert_norms();
  }
  // ik and im from the key and norm2.
  void invert_norms() {
    constexpr int L = Lanes<C>::n;
    for (int64_t n = 0; n < Np; n += L) {
      const Vec<C> q = load(norm2 + n), i = inverse_root(q);
      store(im + n, q == 0 || q == infinity<C>() ? Vec<C>{} : q < (C)(kEps * kEps) ? splat((C)(1 / kEps)) : i);
    }
    for (int64_t h = 0; h < H; h++) {
      C k2 = 0;
      for (int64_t w = 0; w < W; w++) k2 += key[h * Wp + w] * key[h * Wp + w];
      ik[h] = inverse_norm(k2);
    }
  }

  // key is in place; block is scratch.
  template <class T> void forward(const T* memory, const bool* mask, C* block) {
    const int64_t step = block_rows<C>(W), size = step * W * (int64_t)sizeof(T);
    const bool large = N * W * (int64_t)sizeof(T) > kAhead;
    for (int64_t n = 0; n < N; n += step) {
      const int64_t rows = N - n < step ? N - n : step;
      if (large && n + 3 * step <= N) fetch(memory + (n + 2 * step) * W, size);
      dots(block_of(memory, n, rows, W, mask, block), W, rows, W, key, Wp, H, sim + n, Np, cosine ? norm2 + n : nullptr);
    }
    scale();
  }
  // Dot products (and squared norms) become similarities, of zero (and so of masked) rows 0.
  void scale() {
    for (int64_t h = 0; h < H; h++) fill(sim + h * Np + N, Np - N, (C)0);
    if (!cosine) return;
    fill(norm2 + N, Np - N, (C)0);
    invert_norms();
    constexpr int L = Lanes<C>::n;
    for (int64_t h = 0; h < H; h++) {
      C* s = sim + h * Np;
      if (ik[h] == 0) fill(s, Np, (C)0);
      else
        for (int64_t n = 0; n < Np; n += L) store(s + n, load(norm2 + n) == 0 ? Vec<C>{} : load(s + n) * (ik[h] * load(im + n)));
    }
  }

  // dsim [H, Np] becomes the rows' coefficients of the keys; own[n] and key_own[h] are those of the rows and keys themselves:
  //   dm_n = sum over h of dsim[h][n] k_h - own[n] m_n          dk_h = sum over n of dsim[h][n] m_n - key_own[h] k_h
  void backward(C* dsim, C* own, C* key_own) const {
    constexpr int L = Lanes<C>::n;
    fill(own, Np, (C)0);
    fill(key_own, H, (C)0);
    if (!cosine) return;
    const C least = (C)(kEps * kEps);
    for (int64_t h = 0; h < H; h++) {
      Total<C> total;
      for (int64_t n = 0; n < Np; n += L) {
        const Vec<C> d = load(dsim + h * Np + n), x = d * load(sim + h * Np + n), i = load(im + n);
        total.add(x);
        store(own + n, load(own + n) + (load(norm2 + n) > least ? x * i * i : Vec<C>{}));
        store(dsim + h * Np + n, i == 0 ? Vec<C>{} : d * (ik[h] * i));
      }
      key_own[h] = ik[h] < (C)(1 / kEps) ? total.value() * ik[h] * ik[h] : 0;
    }
  }
};

// Row pass of the similarity's backward: dm (+)= ..., dk += .... `base` is what dm starts from (null: zero).
template <class T>
MC_INLINE void similarity_rows(
    const Similarity<Acc<T>>& s, const Acc<T>* m, int64_t n, int64_t rows, const Acc<T>* base, Acc<T>* dm, const Acc<T>* c, const Acc<T>* own, Acc<T>* dk) {
  if (dk && dm && s.cosine) return pull_push(dm, base, m, rows, s.W, c + n, s.Np, s.H, s.key, dk, s.Wp, own + n);
  if (dk) gather(m, s.W, rows, s.W, c + n, s.Np, s.H, dk, s.Wp);
  if (!dm) return;
  if (s.cosine) scatter_own(dm, s.W, base, s.W, rows, s.W, c + n, s.Np, s.H, s.key, s.Wp, own + n, m, s.W);
  else scatter(dm, s.W, base, s.W, rows, s.W, c + n, s.Np, s.H, s.key, s.Wp);
}

// The same into the gradient `to` of rows n0.. itself; scratch holds a block.
template <class T>
MC_INLINE void similarity_rows_to(
    const RowSink<T>& sink, T* to, const Similarity<Acc<T>>& s, const Acc<T>* m, int64_t n, int64_t rows, const Acc<T>* base, const Acc<T>* c,
    const Acc<T>* own, Acc<T>* dk, Acc<T>* scratch) {
  if constexpr (__is_same(T, Acc<T>))
    if (s.cosine && s.H > 0 && s.H <= kStreamHeads && s.H <= block_rows<T>(s.W) && sink.streams(to, s.W))
      return pull_push_stream(to, base, m, rows, s.W, c + n, s.Np, s.H, s.key, dk, s.Wp, own + n, scratch);
  Acc<T>* dm = sink.place(to, scratch);
  similarity_rows<T>(s, m, n, rows, base, dm, c, own, dk);
  sink.finish(to, dm, rows * s.W);
}

// ---- softmax over strength * similarity ----

// The usable similarity that scores are taken from: the greatest for a strength >= 0, else the least; NaN is passed over.
template <class C> MC_INLINE C extreme_of(const C* sim, int64_t N, bool greatest, const bool* mask) {
  constexpr int L = Lanes<C>::n;
  C extreme = greatest ? -infinity<C>() : infinity<C>();
  Vec<C> x = splat(extreme);
  int64_t n = 0;
  if (!mask) {
    if (greatest)
      for (; n + L <= N; n += L) x = running_max(x, load(sim + n));
    else
      for (; n + L <= N; n += L) x = running_min(x, load(sim + n));
    extreme = greatest ? max_of<C>(x) : min_of<C>(x);
  }
  for (; n < N; n++)
    if (!mask || mask[n]) extreme = (greatest ? sim[n] > extreme : sim[n] < extreme) ? sim[n] : extreme;
  return extreme;
}

// w = exp(beta (sim - extreme)) over usable slots, 0 elsewhere; returns the extreme and the reciprocal of the sum. A NaN score
// makes the sum NaN, and so the row.
template <class C> struct Scores {
  C extreme, inverse;
};
template <class C> MC_INLINE C score_extreme(const C* sim, int64_t N, C beta, const bool* mask) {
  const C extreme = extreme_of(sim, N, beta >= 0, mask);
  return extreme == infinity<C>() || extreme == -infinity<C>() ? extreme - extreme : extreme;  // nothing but NaN, or infinite scores
}
template <class C> MC_INLINE C score_from(C* w, const C* sim, int64_t N, int64_t Np, C beta, C extreme, const bool* mask) {
  constexpr int L = Lanes<C>::n;
  Total<C> total;
  abreast<C>(Np, [&](int64_t n, auto count) MC_INLINED {
    constexpr int B = count.value;
    Vec<C> e[B];
    each_of<B>([&](int i) MC_INLINED { e[i] = beta * (load(sim + n + i * L) - extreme); });
    exp_negatives<B>(e);
    for (int i = 0; i < B; i++) {
      e[i] = first<C>(e[i], N - n - i * L);
      if (mask) {
        C lane[L];
        store(lane, e[i]);
        for (int64_t j = 0; j < L && n + i * L + j < N; j++) lane[j] = mask[n + i * L + j] ? lane[j] : 0;
        e[i] = load(lane);
      }
      store(w + n + i * L, e[i]);
      total.add(e[i]);
    }
  });
  return 1 / total.value();
}
template <class C> inline Scores<C> score(C* w, const C* sim, int64_t N, int64_t Np, C beta, const bool* mask) {
  bool any = !mask && N > 0;
  for (int64_t n = 0; mask && n < N && !any; n++) any = mask[n];
  if (!any) {
    fill(w, Np, (C)0);
    return {0, 0};
  }
  const C extreme = score_extreme(sim, N, beta, mask);
  return {extreme, score_from(w, sim, N, Np, beta, extreme, mask)};
}
// w = softmax(beta (sim - extreme)); returns the extreme.
template <class C> inline C softmax(C* w, const C* sim, int64_t N, int64_t Np, C beta, const bool* mask) {
  constexpr int L = Lanes<C>::n;
  const Scores<C> s = score<C>(w, sim, N, Np, beta, mask);
  for (int64_t n = 0; n < Np; n += L) store(w + n, load(w + n) * s.inverse);
  fill(w + N, Np - N, (C)0);
  return s.extreme;
}

template <class C> MC_INLINE C inner_product(const C* a, const C* b, int64_t Np) {
  constexpr int L = Lanes<C>::n;
  Total<C> total;
  for (int64_t n = 0; n < Np; n += L) total.add(load(a + n) * load(b + n));
  return total.value();
}
// dw becomes dsim; returns dbeta. `mean` is the inner product of w and dw.
template <class C> MC_INLINE C softmax_backward_from(C* dw, const C* w, const C* sim, C extreme, C mean, int64_t Np, C beta) {
  constexpr int L = Lanes<C>::n;
  Total<C> strength;
  for (int64_t n = 0; n < Np; n += L) {
    const Vec<C> x = load(w + n);
    const Vec<C> t = x == 0 ? Vec<C>{} : x * (load(dw + n) - mean);
    strength.add(t == 0 ? Vec<C>{} : t * (load(sim + n) - extreme));
    store(dw + n, t == 0 ? Vec<C>{} : t * beta);
  }
  return strength.value();
}
template <class C> inline C softmax_backward(C* dw, const C* w, const C* sim, C extreme, int64_t Np, C beta) {
  return softmax_backward_from(dw, w, sim, extreme, inner_product(w, dw, Np), Np, beta);
}

// ---- circular shift ----

// ring[i + R] = w[i mod N] for i in -R .. Np + R - 1, so that every shift is a plain offset; N > 0.
template <class C> MC_INLINE void wrap(C* ring, int64_t N, int64_t Np, int64_t R) {
  C* w = ring + R;
  for (int64_t i = 1; i <= R; i++) w[-i] = w[N - 1 - (i - 1) % N];
  for (int64_t i = N; i < Np + R; i++) w[i] = w[i - N];
}
template <class C> MC_INLINE void unroll(C* ring, const C* w, int64_t N, int64_t Np, int64_t R) {
  std::memcpy(ring + R, w, (size_t)N * sizeof(C));
  wrap(ring, N, Np, R);
}
template <class C> MC_INLINE int64_t ring_size(int64_t Np, int64_t R) { return Np + 2 * R; }

// out_i = sum over j of s[j + R] w[(i - j) mod N]; ring is w unrolled.
template <class C> MC_INLINE void shift_row(C* out, const C* ring, const C* s, int64_t N, int64_t Np, int64_t R) {
  constexpr int L = Lanes<C>::n;
  if (R == 1) {  // the usual range
    const Vec<C> s0 = splat(s[0]), s1 = splat(s[1]), s2 = splat(s[2]);
    for (int64_t n = 0; n < Np; n += L) {
      Vec<C> v = s0 * load(ring + n + 2);
      v += s1 * load(ring + n + 1);
      v += s2 * load(ring + n);
      store(out + n, first<C>(v, N - n));
    }
    return;
  }
  for (int64_t n = 0; n < Np; n += L) {
    Vec<C> v = s[0] * load(ring + n + 2 * R);
    for (int64_t j = 1; j <= 2 * R; j++) v += s[j] * load(ring + n + 2 * R - j);
    store(out + n, first<C>(v, N - n));
  }
}

// dring is the unrolled gradient of the output, ring the unrolled input. dw_i = sum over j of s[j + R] d[(i + j) mod N]; ds += ....
template <class C>
MC_INLINE void shift_backward(C* dw, C* ds, const C* dring, const C* ring, const C* s, int64_t N, int64_t Np, int64_t R) {
  constexpr int L = Lanes<C>::n;
  if (dw && R == 1) {  // the usual range, in one pass
    Totals<C, 3> t;
    const Vec<C> s0 = splat(s[0]), s1 = splat(s[1]), s2 = splat(s[2]);
    for (int64_t n = 0; n < Np; n += L) {
      const Vec<C> d = load(dring + n + 1);
      Vec<C> v = s0 * load(dring + n), x[3] = {d * load(ring + n + 2), d * load(ring + n + 1), d * load(ring + n)};
      v += s1 * d;
      v += s2 * load(dring + n + 2);
      if (__builtin_expect(N - n < L, 0)) {
        v = first<C>(v, N - n);
        for (int j = 0; j < 3; j++) x[j] = first<C>(x[j], N - n);
      }
      store(dw + n, v);
      t.add(x);
    }
    for (int j = 0; j < 3; j++) ds[j] += t.value(j);
    return;
  }
  if (dw)
    for (int64_t n = 0; n < Np; n += L) {
      Vec<C> v = s[0] * load(dring + n);
      for (int64_t j = 1; j <= 2 * R; j++) v += s[j] * load(dring + n + j);
      store(dw + n, first<C>(v, N - n));
    }
  for (int64_t j = 0; j <= 2 * R; j++) {
    Total<C> t;
    for (int64_t n = 0; n < Np; n += L) t.add(first<C>(load(dring + R + n) * load(ring + n + 2 * R - j), N - n));
    ds[j] += t.value();
  }
}

// ---- sharpening ----

// The weight whose power is the greatest.
template <class C> MC_INLINE C sharpest(const C* w, C gamma, int64_t Np) {
  constexpr int L = Lanes<C>::n;
  const C inf = infinity<C>();
  Vec<C> x{};
  if (gamma >= 0) {
    for (int64_t n = 0; n < Np; n += L) x = running_max(x, load(w + n));
  } else {  // NaN gamma too
    x = splat(inf);
    for (int64_t n = 0; n < Np; n += L) {
      const Vec<C> v = load(w + n);
      x = running_min(x, v <= 0 ? splat(inf) : v);
    }
  }
  return gamma >= 0 ? max_of<C>(x) : min_of<C>(x);
}

// v / extreme without a division a vector; the factor keeps a subnormal extreme's reciprocal finite.
template <class C> struct Ratio {
  C up, inverse;
  explicit Ratio(C extreme) {
    constexpr C tiny = sizeof(C) == 4 ? (C)1e-30 : (C)1e-290;
    up = extreme < tiny ? (C)18446744073709551616.0 : (C)1;
    inverse = 1 / (extreme * up);
  }
  MC_INLINE Vec<C> of(Vec<C> v) const { return v * up * inverse; }
};

// Whether there is a sharpest weight to take the others in units of; if not, every weight becomes 0, or NaN.
template <class C> MC_INLINE bool can_sharpen(C extreme, C gamma) { return !(gamma != gamma || extreme == 0 || (gamma < 0 && extreme == infinity<C>())); }

// p = w^gamma / sum w^gamma over positive weights, as exp(gamma log(w / extreme)), but for the factor that is returned; ratio_log keeps
// log(w / extreme) for a backward, which with KNOWN is all that is wanted.
template <class C, bool LOG, bool KNOWN> MC_INLINE C sharpen_from(C* p, C* ratio_log, const C* w, C gamma, C extreme, int64_t N, int64_t Np) {
  constexpr int L = Lanes<C>::n;
  if (!can_sharpen(extreme, gamma)) {
    C nan = gamma != gamma ? gamma : 0;
    for (int64_t n = 0; n < N; n++) nan = w[n] != w[n] ? w[n] : nan;
    if (!KNOWN) fill(p, N, nan), fill(p + N, Np - N, (C)0);
    if (LOG) fill(ratio_log, Np, (C)0);
    return 1;
  }
  // Logarithms and exponentials in loops of their own: one chain of both is longer than a processor looks ahead.
  C* logs = LOG ? ratio_log : p;
  const Ratio<C> ratio(extreme);
  abreast<C>(Np, [&](int64_t n, auto count) MC_INLINED {
    constexpr int B = count.value;
    Vec<C> l[B];
    each_of<B>([&](int i) MC_INLINED { l[i] = ratio.of(load(w + n + i * L)); });
    log_positives<B>(l);
    each_of<B>([&](int i) MC_INLINED { store(logs + n + i * L, load(w + n + i * L) <= 0 ? Vec<C>{} : l[i]); });
  });
  if (KNOWN) return 1;
  Total<C> total;
  abreast<C>(Np, [&](int64_t n, auto count) MC_INLINED {
    constexpr int B = count.value;
    Vec<C> l[B];
    each_of<B>([&](int i) MC_INLINED { l[i] = gamma * load(logs + n + i * L); });
    exp_negatives<B>(l);
    each_of<B>([&](int i) MC_INLINED {
      l[i] = load(w + n + i * L) <= 0 ? Vec<C>{} : l[i];
      store(p + n + i * L, l[i]);
      total.add(l[i]);
    });
  });
  return 1 / total.value();
}
template <class C> MC_INLINE void scale_row(C* p, C factor, int64_t N, int64_t Np) {
  constexpr int L = Lanes<C>::n;
  for (int64_t n = 0; n < Np; n += L) store(p + n, load(p + n) * factor);
  fill(p + N, Np - N, (C)0);
}
template <class C, bool LOG> inline void sharpen_row(C* p, C* ratio_log, const C* w, C gamma, int64_t N, int64_t Np) {
  const C extreme = sharpest(w, gamma, Np), factor = sharpen_from<C, LOG, false>(p, ratio_log, w, gamma, extreme, N, Np);
  if (can_sharpen(extreme, gamma)) scale_row(p, factor, N, Np);
}

// dp becomes dw; returns dgamma. `mean` is the inner product of p and dp.
template <class C> MC_INLINE C sharpen_backward_from(C* dp, const C* p, const C* ratio_log, const C* w, C gamma, C mean, int64_t Np) {
  constexpr int L = Lanes<C>::n;
  Total<C> power;
  for (int64_t n = 0; n < Np; n += L) {
    const Vec<C> x = load(p + n), v = load(w + n);
    const Vec<C> t = x == 0 ? Vec<C>{} : x * (load(dp + n) - mean);
    power.add(t == 0 ? Vec<C>{} : t * load(ratio_log + n));
    store(dp + n, t == 0 ? Vec<C>{} : gamma * t / v);
  }
  return power.value();
}
template <class C> inline C sharpen_backward(C* dp, const C* p, const C* ratio_log, const C* w, C gamma, int64_t Np) {
  return sharpen_backward_from(dp, p, ratio_log, w, gamma, inner_product(p, dp, Np), Np);
}

// ---- a head's way from similarities to weights ----

// Arrays of all heads of one element for the NTM's addressing; `keep` is for a backward.
template <class C> struct Addressing {
  static constexpr int kSide = 4;  // heads side by side, so that none waits for its own sums
  Similarity<C> similar;
  int64_t R;
  C *beta, *gate, *gamma, *extreme;  // [H]
  C* shift;                          // [H, 2R + 1]
  C* previous;                       // [H, Np]
  C* content;                        // [H, Np]
  C* ring;                           // [H, Np + 2R] interpolated, unrolled
  C* shifted;                        // [H, Np]
  C* ratio_log;                      // [H, Np]
  C* weights;                        // [H, Np]
  C* row;                            // [H, Np + 2R] scratch

  void sizes(int64_t H, int64_t N, int64_t W, int64_t R_) {
    similar.sizes(H, N, W, true);
    R = R_;
  }
  void layout(Arena& a) {
    similar.layout(a);
    const int64_t H = similar.H, Np = similar.Np;
    a.take(beta, H), a.take(gate, H), a.take(gamma, H), a.take(extreme, H);
    a.take(shift, H * (2 * R + 1));
    a.take(previous, H * Np), a.take(content, H * Np), a.take(shifted, H * Np), a.take(ratio_log, H * Np), a.take(weights, H * Np);
    a.take(ring, H * ring_size<C>(Np, R));
    a.take(row, H * ring_size<C>(Np, R));
  }
  // f(first head, how many) over all heads.
  template <class F> MC_INLINE void over_heads(F f) {
    for (int64_t h = 0; h < similar.H; h += kSide) f(h, similar.H - h < kSide ? (int)(similar.H - h) : kSide);
  }
  // Keys, parameters and previous are in place. `kept` (may be null) is this element's share of what the forward keeps for the backward.
  template <bool BACKWARD, class T> void forward(const T* memory, C* block, C* kept) {
    if (BACKWARD) similar.resume(memory, nullptr, block, kept);
    else similar.forward_kept(memory, nullptr, block, kept);
    weigh<BACKWARD>();
  }
  // From the similarities on; with KNOWN the weights are there already.
  template <bool BACKWARD, bool KNOWN = false> void weigh() {
    over_heads([&](int64_t h, int heads) { weigh_heads<BACKWARD, KNOWN>(h, heads); });
  }
  template <bool BACKWARD, bool KNOWN = false> void weigh_heads(int64_t h0, int heads) {
    constexpr int L = Lanes<C>::n;
    const int64_t N = similar.N, Np = similar.Np, ringed = ring_size<C>(Np, R);
    if (N == 0) return;
    C factor[kSide], sharp[kSide];
    for (int i = 0; i < heads; i++) extreme[h0 + i] = score_extreme<C>(similar.sim + (h0 + i) * Np, N, beta[h0 + i], nullptr);
    for (int i = 0; i < heads; i++) {
      const int64_t h = h0 + i;
      factor[i] = score_from<C>(content + h * Np, similar.sim + h * Np, N, Np, beta[h], extreme[h], nullptr);
    }
    for (int i = 0; i < heads; i++) {
      const int64_t h = h0 + i;
      C *wc = content + h * Np, *pr = previous + h * Np, *rg = ring + h * ringed;
      const C g = gate[h], keep = 1 - g;
      for (int64_t n = 0; n < Np; n += L) {
        const Vec<C> c = load(wc + n) * factor[i];
        if (BACKWARD) store(wc + n, c);
        store(rg + R + n, g * c + keep * load(pr + n));
      }
      if (BACKWARD) fill(wc + N, Np - N, (C)0);
      wrap(rg, N, Np, R);
    }
    for (int i = 0; i < heads; i++) shift_row(shifted + (h0 + i) * Np, ring + (h0 + i) * ringed, shift + (h0 + i) * (2 * R + 1), N, Np, R);
    for (int i = 0; i < heads; i++) sharp[i] = sharpest(shifted + (h0 + i) * Np, gamma[h0 + i], Np);
    for (int i = 0; i < heads; i++) {
      const int64_t at = (h0 + i) * Np;
      factor[i] = sharpen_from<C, BACKWARD, KNOWN>(weights + at, ratio_log + at, shifted + at, gamma[h0 + i], sharp[i], N, Np);
    }
    for (int i = 0; i < heads && !KNOWN; i++)
      if (can_sharpen(sharp[i], gamma[h0 + i])) scale_row(weights + (h0 + i) * Np, factor[i], N, Np);
  }
  // dw [H, Np]: gradient of the weights in, of the similarities out. The other gradients are [H] and [H, 2R + 1]; dprevious [H, Np].
  void backward(C* dw, C* dbeta, C* dgate, C* dshift, C* dgamma, C* dprevious) {
    over_heads([&](int64_t h, int heads) { backward_heads(h, heads, dw, dbeta, dgate, dshift, dgamma, dprevious); });
  }
  void backward_heads(int64_t h0, int heads, C* dw, C* dbeta, C* dgate, C* dshift, C* dgamma, C* dprevious) {
    constexpr int L = Lanes<C>::n;
    const int64_t N = similar.N, Np = similar.Np, S = 2 * R + 1, ringed = ring_size<C>(Np, R);
    fill(dshift + h0 * S, heads * S, (C)0);
    if (N == 0) {
      fill(dbeta + h0, heads, (C)0), fill(dgate + h0, heads, (C)0), fill(dgamma + h0, heads, (C)0);
      return;
    }
    C mean[kSide];
    for (int i = 0; i < heads; i++) mean[i] = inner_product(weights + (h0 + i) * Np, dw + (h0 + i) * Np, Np);
    for (int i = 0; i < heads; i++) {
      const int64_t h = h0 + i, at = h * Np;
      dgamma[h] = sharpen_backward_from(dw + at, weights + at, ratio_log + at, shifted + at, gamma[h], mean[i], Np);
    }
    for (int i = 0; i < heads; i++) unroll(row + (h0 + i) * ringed, dw + (h0 + i) * Np, N, Np, R);
    for (int i = 0; i < heads; i++) {
      const int64_t h = h0 + i;
      shift_backward(dw + h * Np, dshift + h * S, row + h * ringed, ring + h * ringed, shift + h * S, N, Np, R);
    }
    for (int i = 0; i < heads; i++) {
      const int64_t h = h0 + i;
      C *d = dw + h * Np, *wc = content + h * Np, *pr = previous + h * Np, *dp = dprevious + h * Np;
      Total<C> t;
      for (int64_t n = 0; n < Np; n += L) {
        const Vec<C> x = load(d + n);
        t.add(x * (load(wc + n) - load(pr + n)));
        store(dp + n, x * (1 - gate[h]));
        store(d + n, x * gate[h]);
      }
      dgate[h] = t.value();
    }
    for (int i = 0; i < heads; i++) mean[i] = inner_product(content + (h0 + i) * Np, dw + (h0 + i) * Np, Np);
    for (int i = 0; i < heads; i++) {
      const int64_t h = h0 + i, at = h * Np;
      dbeta[h] = softmax_backward_from(dw + at, content + at, similar.sim + at, extreme[h], mean[i], Np, beta[h]);
    }
  }
};

// How a kernel goes twice over each batch element's memory [N, W], `step` rows at a time. While it works on a small memory the second time it
// asks for the next element's; over a large one it goes back, beginning with what is still in the second cache.
template <class T> struct Passes {
  int64_t B, N, W, step;
  bool ahead, kept;

  // kept: there is no first pass, for its results were kept.
  Passes(int64_t B_, int64_t N_, int64_t W_, int64_t step_, bool kept_)
      : B(B_), N(N_), W(W_), step(step_), ahead(N * W * (int64_t)sizeof(T) <= kAhead), kept(kept_) {}
  // First row of the second pass's block instead of i, and of the block after that of row n, or -1; the same of the third pass.
  MC_INLINE int64_t second(int64_t i) const { return ahead || kept ? i : back(i); }
  MC_INLINE int64_t after(int64_t n) const {
    const int64_t next = ahead || kept ? n + step : n - step;
    return next < N ? next : -1;
  }
  MC_INLINE int64_t third(int64_t i) const { return !ahead && kept ? back(i) : i; }
  MC_INLINE int64_t back(int64_t i) const { return (N - 1) / step * step - i; }
  // The second pass reads the memory first if there is no other.
  MC_INLINE void ask_after(const void* of, int64_t b, int64_t n) const {
    if (!ahead && kept && n + 3 * step <= N) fetch((const T*)of + (b * N + n + 2 * step) * W, step * W * (int64_t)sizeof(T));
  }
  MC_INLINE void ask_next(const void* of, int64_t b, int64_t n, int64_t rows) const {
    if (ahead && b + 1 < B) fetch((const T*)of + ((b + 1) * N + n) * W, rows * W * (int64_t)sizeof(T));
  }
};

// [rows, n] storage to [rows, np] scratch with zero padding, and back.
template <class T> MC_INLINE void widen_rows(Acc<T>* to, const T* from, int64_t rows, int64_t n, int64_t np) {
  for (int64_t r = 0; r < rows; r++) {
    widen(to + r * np, from + r * n, n);
    fill(to + r * np + n, np - n, (Acc<T>)0);
  }
}
template <class T> MC_INLINE void narrow_rows(T* to, const Acc<T>* from, int64_t rows, int64_t n, int64_t np) {
  for (int64_t r = 0; r < rows; r++) narrow(to + r * n, from + r * np, n);
}

}  // namespace MC_ISA
}  // namespace memcore
