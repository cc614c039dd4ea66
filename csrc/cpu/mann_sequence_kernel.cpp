// The recurrence of a MANN for groups of batch elements. Within a group time is outermost: the controller's layers are matrix products of
// the group's rows, the memory work goes element by element, and a group is small enough that its memories stay in the caches. A thread runs
// a few groups side by side, which changes no sum and reads the weights less often. What the input alone decides goes through one product
// for several steps.
//
// The forward leaves, for each step, what the backward would otherwise have to compute again (the controller's activations, keys, gates,
// similarities, squared norms, weights, which slot was the least used) and a copy of the memory every few steps, from which the backward
// rebuilds the others.
#include "mann_sequence.h"

#include "lstm.h"
#include "recurrence.h"

namespace memcore {
namespace MC_ISA {
namespace {

MC_INLINE int64_t up16(int64_t n) { return MannArgs::up16(n); }

// Weights as the products of one direction want them, biases padded. Rows of a layer's weight: of the input (first layer), of its own last
// output, and of what lies below (the reads, the layer below).
template <class C> struct Weights {
  Packed<C> input, own[MannArgs::kLayers], below[MannArgs::kLayers], interface, output_own, output_reads;
  C *bias[MannArgs::kLayers], *interface_bias, *output_bias;

  template <class A> void layout(A& at, const MannArgs& a, bool backward) {
    const int64_t K = a.K, F = a.F(), I = a.I(), O = a.O, G = a.G();
    for (int64_t l = 0; l < a.layers; l++) {
      const int64_t under = l == 0 ? F : K;
      if (backward) own[l].layout(at, G, K + under);
      else own[l].layout(at, K, G), below[l].layout(at, under, G), at.take(bias[l], up16(G));
    }
    if (backward) {
      input.layout(at, G, a.dinput ? a.X : 0), interface.layout(at, I, K), output_own.layout(at, O, K + F);
      return;
    }
    input.layout(at, a.X, G), interface.layout(at, K, I), output_own.layout(at, K, O), output_reads.layout(at, F, O);
    at.take(interface_bias, up16(I)), at.take(output_bias, up16(O));
  }
  void fill_in(const MannArgs& a, bool backward) {
    const Parameters<const C, MannArgs::kLayers> p(a, (const C*)a.parameters);
    const int64_t G = a.G();
    for (int64_t l = 0; l < a.layers; l++) {
      const C* from = p.weight[l] + (l == 0 ? a.X * G : 0);
      if (backward) own[l].pack_transposed(from);
      else own[l].pack(from), below[l].pack(from + a.K * G), pad(bias[l], p.bias[l], G, up16(G));
    }
    if (backward) {
      input.pack_transposed(p.weight[0]), interface.pack(p.interface), output_own.pack(p.output);
      return;
    }
    input.pack(p.weight[0]), interface.pack_transposed(p.interface);
    transpose(output_own, p.output, a.K + a.F()), transpose(output_reads, p.output + a.K, a.K + a.F());
    pad(interface_bias, p.interface_bias, a.I(), up16(a.I())), pad(output_bias, p.output_bias, a.O, up16(a.O));
  }
  // The transpose of rows `ld` apart.
  static void transpose(const Packed<C>& to, const C* from, int64_t ld) {
    for (int64_t n = 0; n < to.Np; n += to.P) {
      const int64_t w = to.width(n);
      for (int64_t k = 0; k < to.K; k++)
        for (int64_t i = 0; i < w; i++) to.panel(n)[k * w + i] = n + i < to.N ? from[(n + i) * ld + k] : 0;
    }
  }
};

// The least-used slot: lowest index on a tie, NaN counts as most used.
template <class C> int64_t least(const C* usage, int64_t N) {
  int64_t at = 0;
  for (int64_t n = 1; n < N; n++)
    if (usage[n] < usage[at] || (usage[at] != usage[at] && usage[n] == usage[n])) at = n;
  return at;
}

template <class C> struct Sequence {
  static constexpr int L = Lanes<C>::n;

  const MannArgs& a;
  const MannSaved saved;
  const MannDeltas deltas;
  Weights<C> weights;
  const int64_t R, I, K, F, G, M, Kp, Gp, Ip, Fp, Op, Np, Wp, group, lot, top, step_rows;
  Similarity<C> s;
  C *ww, *reads, *usage, *raw, *output, *hoisted;
  C *dsim, *dww, *found, *own, *key_own, *dkey, *dword, *dreads, *carried, *dh, *dcell, *dfeedback, *dfeatures, *dbelow, *rebuilt;

  Sequence(const MannArgs& args, bool backward)
      : a(args), saved(args), deltas(args), R(args.R), I(args.I()), K(args.K), F(args.F()), G(args.G()), M(args.N * args.W), Kp(up16(K)), Gp(up16(G)),
        Ip(up16(I)), Fp(up16(F)), Op(up16(args.O)), Np(up16(args.N)), Wp(up16(args.W)), group(args.group()), lot(args.lot()), top(args.layers - 1),
        step_rows(block_rows<C>(args.W)) {
    s.sizes(R, a.N, a.W, true);
    s.Np = Np, s.Wp = Wp;
    Cursor at{(char*)a.packed};
    weights.layout(at, a, backward);
  }
  void layout(Arena& arena, bool backward) {
    arena.take(s.ik, R), arena.take(s.im, Np), arena.take(ww, R * Np);
    if (!backward) {
      arena.take(reads, R * Wp), arena.take(usage, lot * Np), arena.take(raw, lot * Ip), arena.take(output, lot * Op);
      return;
    }
    arena.take(dsim, R * Np), arena.take(dww, R * Np), arena.take(found, R * Np), arena.take(own, Np), arena.take(key_own, R);
    arena.take(dkey, R * Wp), arena.take(dword, R * Wp), arena.take(dreads, R * Wp), arena.take(carried, lot * R * Np);
    arena.take(dh, a.layers * lot * Kp), arena.take(dcell, a.layers * lot * Kp), arena.take(dfeedback, lot * Fp);
    arena.take(dfeatures, lot * up16(K + F)), arena.take(dbelow, lot * up16(K + (F > K ? F : K)));
    arena.take(hoisted, a.dinput ? a.ahead() * lot * up16(a.X) : 0);
    arena.take(rebuilt, ((a.every < a.T ? a.every : a.T) - 1) * lot * M);
  }

  bool alive(int64_t t, int64_t b) const { return !a.lengths || t < a.lengths[b]; }
  // Rows of time t: of the state before step t, and of what step t computes.
  C* row(int64_t kind, int64_t width, int64_t rows, int64_t t, int64_t b) const { return (C*)a.saved + kind + ((a.keep ? t : t % rows) * a.B + b) * width; }
  C* outputs(int64_t l, int64_t t, int64_t b) const { return row(saved.outputs[l], Kp, saved.states, t, b); }
  C* cells(int64_t l, int64_t t, int64_t b) const { return row(saved.cells[l], Kp, saved.states, t, b); }
  C* feedback(int64_t t, int64_t b) const { return row(saved.reads, Fp, saved.states, t, b); }
  C* slots(int64_t t, int64_t b) const { return row(saved.weights, R * Np, saved.states, t, b); }
  C* sums(int64_t l, int64_t t, int64_t b) const { return row(saved.sums[l], Gp, l == 0 ? saved.at_hand : saved.steps, t, b); }
  C* keys(int64_t t, int64_t b) const { return row(saved.keys, R * Wp, saved.steps, t, b); }
  C* words(int64_t t, int64_t b) const { return row(saved.words, R * Wp, saved.steps, t, b); }
  C* gates(int64_t t, int64_t b) const { return row(saved.gates, up16(R), saved.steps, t, b); }
  C* least_row(int64_t t, int64_t b) const { return row(saved.slots, 16, saved.steps, t, b); }
  int64_t least_at(int64_t t, int64_t b) const {
    int64_t at;
    std::memcpy(&at, least_row(t, b), sizeof at);
    return at;
  }
  C* copy_of(int64_t t, int64_t b) const { return (C*)a.saved + saved.copies + (t / a.every * a.B + b) * M; }
  C* delta(int64_t kind, int64_t width, int64_t t, int64_t b) const { return (C*)a.deltas + kind + (t * a.B + b) * width; }

  void point(int64_t t, int64_t b) {
    s.key = keys(t, b), s.sim = row(saved.similar, R * Np, saved.steps, t, b), s.norm2 = row(saved.norms, Np, saved.steps, t, b);
  }
  // c (+)= a b for the same rows of several steps, panel by panel so that a panel stays in the caches; a group at a time, whose rows share
  // the order of their sums.
  template <bool ADD, class FC, class FA> void products(int64_t t0, int64_t t1, FC c, int64_t ldc, const C* start, FA from, int64_t lda, int64_t count, const Packed<C>& b) const {
    for (int64_t n = 0; n < b.Np; n += b.P)
      for (int64_t t = t0; t < t1; t++)
        for (int64_t i = 0; i < count; i += group)
          product_panel<ADD>(c(t) + i * ldc, ldc, start, from(t) + i * lda, lda, count - i < group ? count - i : group, b, n);
  }
  template <bool ADD> void multiply(C* c, int64_t ldc, const C* start, const C* from, int64_t lda, int64_t count, const Packed<C>& b) const {
    products<ADD>(0, 1, [&](int64_t) { return c; }, ldc, start, [&](int64_t) { return from; }, lda, count, b);
  }

  // ---- the write ----

  // Write weights of step t in `ww`; returns the least-used slot.
  int64_t address(int64_t t, int64_t b) {
    const int64_t at = least_at(t, b);
    const C *previous = slots(t, b), *gate = gates(t, b);
    for (int64_t h = 0; h < R; h++) {
      const C g = gate[h], keep = 1 - g;
      // The slots that are not the least used get keep * 0 too: a gate that is not finite shows.
      for (int64_t n = 0; n < Np; n += L) store(ww + h * Np + n, g * load(previous + h * Np + n) + keep * 0);
      ww[h * Np + at] = g * previous[h * Np + at] + keep;
    }
    return at;
  }
  // The memory after step t's write from that before; the two may be the same.
  void write(int64_t t, int64_t b, C* to, const C* from) {
    const int64_t at = address(t, b);
    const C* word = words(t, b);
    for (int64_t n = 0; n < a.N; n += step_rows) {
      const int64_t rows = a.N - n < step_rows ? a.N - n : step_rows;
      scatter(to + n * a.W, a.W, from + n * a.W, a.W, rows, a.W, ww + n, Np, R, word, Wp);
      if (a.zero && at >= n && at < n + rows) scatter(to + at * a.W, a.W, (const C*)nullptr, a.W, 1, a.W, ww + at, Np, R, word, Wp);
    }
  }

  // ---- forward ----

  // Keys, words and gates from the interface.
  void activate(int64_t t, int64_t b, const C* x) {
    const auto rows = [&](C* to, const C* from) MC_INLINED {
      for (int64_t h = 0; h < R; h++)
        for (int64_t w = 0; w < a.W; w += L) {
          const int part = a.W - w < L ? (int)(a.W - w) : L;
          store(to + h * Wp + w, first<C>(hyperbolic_tangent(load_n(from + h * a.W + w, part)), part));
        }
    };
    rows(keys(t, b), x);
    if (a.separate) rows(words(t, b), x + F);
    C* gate = gates(t, b);
    for (int64_t h = 0; h < R; h += L) store(gate + h, sigmoid(load_n(x + a.words() + h, R - h < L ? (int)(R - h) : L)));
  }

  void read(int64_t t, int64_t b, const C* m) {
    point(t, b);
    s.forward(m, nullptr, (C*)nullptr);
    C* w = slots(t + 1, b);
    const int64_t used = padded<C>(a.N);
    for (int64_t h = 0; h < R; h++) {
      softmax<C>(w + h * Np, s.sim + h * Np, a.N, used, (C)a.strength, nullptr);
      fill(w + h * Np + used, Np - used, (C)0);
    }
    fill(reads, R * Wp, (C)0);
    for (int64_t n = 0; n < a.N; n += step_rows)
      gather(m + n * a.W, a.W, a.N - n < step_rows ? a.N - n : step_rows, a.W, w + n, Np, R, reads, Wp);
    narrow_rows(feedback(t + 1, b), reads, R, a.W, Wp);
    if (a.keep && t % a.every == 0) copy(copy_of(t, b), m, M);
  }

  void step(int64_t t, int64_t b, C* m, C* used, const C* x) {
    activate(t, b, x);
    const int64_t at = least(used, a.N);
    std::memcpy(least_row(t, b), &at, sizeof at);
    if (!a.write_first) read(t, b, m);
    write(t, b, m, m);
    if (a.write_first) read(t, b, m);
    const C* wr = slots(t + 1, b);
    for (int64_t n = 0; n < Np; n += L) {
      Vec<C> u = load(used + n) * (C)a.decay;
      for (int64_t h = 0; h < R; h++) u += load(wr + h * Np + n);
      for (int64_t h = 0; h < R; h++) u += load(ww + h * Np + n);
      store(used + n, u);
    }
  }

  void forward(int64_t b0, int64_t count) {
    const C* state = (const C*)a.state;
    C* memory = (C*)a.memory_out;
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i;
      copy(memory + b * M, (const C*)a.memory + b * M, M);
      widen_rows(slots(0, b), (const C*)a.weights + b * R * a.N, R, a.N, Np);
      widen_rows(usage + i * Np, (const C*)a.usage + b * a.N, 1, a.N, Np);
      copy(feedback(0, b), (const C*)a.reads + b * F, F);
      for (int64_t l = 0; l < a.layers; l++)
        copy(outputs(l, 0, b), state + (2 * l * a.B + b) * K, K), copy(cells(l, 0, b), state + ((2 * l + 1) * a.B + b) * K, K);
    }
    for (int64_t t = 0; t < a.T; t++) {
      if (t % a.ahead() == 0)
        products<false>(
            t, a.T - t < a.ahead() ? a.T : t + a.ahead(), [&](int64_t i) { return sums(0, i, b0); }, Gp, weights.bias[0],
            [&](int64_t i) { return (const C*)a.input + (i * a.B + b0) * a.X; }, a.X, count, weights.input);
      for (int64_t l = 0; l < a.layers; l++) {
        if (l == 0) multiply<true>(sums(0, t, b0), Gp, (const C*)nullptr, outputs(0, t, b0), Kp, count, weights.own[0]);
        else multiply<false>(sums(l, t, b0), Gp, weights.bias[l], outputs(l, t, b0), Kp, count, weights.own[l]);
        const C* below = l == 0 ? feedback(t, b0) : outputs(l - 1, t + 1, b0);
        multiply<true>(sums(l, t, b0), Gp, (const C*)nullptr, below, l == 0 ? Fp : Kp, count, weights.below[l]);
        for (int64_t b = b0; b < b0 + count; b++)
          if (alive(t, b)) lstm_forward(sums(l, t, b), cells(l, t, b), cells(l, t + 1, b), outputs(l, t + 1, b), K);
          else if (a.keep) fill(outputs(l, t + 1, b), K, (C)0);
      }
      multiply<false>(raw, Ip, weights.interface_bias, outputs(top, t + 1, b0), Kp, count, weights.interface);
      for (int64_t i = 0; i < count; i++)
        if (alive(t, b0 + i)) step(t, b0 + i, memory + (b0 + i) * M, usage + i * Np, raw + i * Ip);
        else if (a.keep) fill(feedback(t + 1, b0 + i), F, (C)0);
      multiply<false>(output, Op, weights.output_bias, outputs(top, t + 1, b0), Kp, count, weights.output_own);
      multiply<true>(output, Op, (const C*)nullptr, feedback(t + 1, b0), Fp, count, weights.output_reads);
      for (int64_t i = 0; i < count; i++) {
        C* to = (C*)a.output + (t * a.B + b0 + i) * a.O;
        if (alive(t, b0 + i)) copy(to, output + i * Op, a.O);
        else fill(to, a.O, (C)0);
      }
    }
    C* after = (C*)a.state_out;
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i, steps = a.lengths ? a.lengths[b] : a.T;
      narrow_rows((C*)a.weights_out + b * R * a.N, slots(steps, b), R, a.N, Np);
      copy((C*)a.usage_out + b * a.N, usage + i * Np, a.N);
      copy((C*)a.reads_out + b * F, feedback(steps, b), F);
      for (int64_t l = 0; l < a.layers; l++)
        copy(after + (2 * l * a.B + b) * K, outputs(l, steps, b), K), copy(after + ((2 * l + 1) * a.B + b) * K, cells(l, steps, b), K);
    }
  }

  void forward_lots(int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b += lot) forward(b, end - b < lot ? end - b : lot);
  }
  void backward_lots(int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; b += lot) backward(b, end - b < lot ? end - b : lot);
  }

  // ---- backward ----

  template <class F> void blocks(F f) const {
    for (int64_t n = 0; n < a.N; n += step_rows) f(n, a.N - n < step_rows ? a.N - n : step_rows);
  }

  // From the gradients of step t's reads (dreads) and read weights (carried) to those of the keys and of the memory m that was read (g).
  void read_backward(int64_t t, int64_t b, const C* dweights, const C* m, C* g) {
    const C* w = slots(t + 1, b);
    s.invert_norms();
    blocks([&](int64_t n, int64_t rows) { dots(m + n * a.W, a.W, rows, a.W, dreads, Wp, R, dsim + n, Np, (C*)nullptr); });
    for (int64_t h = 0; h < R; h++) {
      C* d = dsim + h * Np;
      fill(d + a.N, Np - a.N, (C)0);
      Total<C> inner;
      for (int64_t n = 0; n < Np; n += L) {
        const Vec<C> x = load(d + n) + load(dweights + h * Np + n);
        inner.add(load(w + h * Np + n) * x);
        store(d + n, x);
      }
      const C mean = inner.value();
      for (int64_t n = 0; n < Np; n += L) store(d + n, (C)a.strength * load(w + h * Np + n) * (load(d + n) - mean));
    }
    s.backward(dsim, own, key_own);
    fill(dkey, R * Wp, (C)0);
    blocks([&](int64_t n, int64_t rows) {
      C* gn = g + n * a.W;
      scatter(gn, a.W, gn, a.W, rows, a.W, w + n, Np, R, dreads, Wp);
      similarity_rows<C>(s, m + n * a.W, n, rows, gn, gn, dsim, own, dkey);
    });
    for (int64_t h = 0; h < R; h++)
      for (int64_t i = 0; i < a.W; i++) dkey[h * Wp + i] -= key_own[h] * s.key[h * Wp + i];
  }

  // From the gradient of the memory written (g) to those of the memory before (g), the words, the gates and the read weights before.
  void write_backward(int64_t t, int64_t b, C* g, C* dgate, C* dprevious) {
    const int64_t at = address(t, b);
    const C *word = words(t, b), *previous = slots(t, b), *gate = gates(t, b);
    fill(dword, R * Wp, (C)0);
    blocks([&](int64_t n, int64_t rows) {
      dots(g + n * a.W, a.W, rows, a.W, word, Wp, R, dww + n, Np, (C*)nullptr);
      gather(g + n * a.W, a.W, rows, a.W, ww + n, Np, R, dword, Wp);
    });
    if (a.zero) clear(g + at * a.W, a.W);
    for (int64_t h = 0; h < R; h++) {
      C* d = dww + h * Np;
      fill(d + a.N, Np - a.N, (C)0);
      Total<C> total;
      for (int64_t n = 0; n < Np; n += L) total.add(load(d + n) * load(previous + h * Np + n));
      dgate[h] = (total.value() - d[at]) * gate[h] * (1 - gate[h]);
      for (int64_t n = 0; n < Np; n += L) store(dprevious + h * Np + n, gate[h] * load(d + n));
    }
  }

  void step_backward(int64_t t, int64_t b, C* dweights, const C* m, C* g, C* dx) {
    point(t, b);
    C* dgate = dx + a.words();
    if (a.write_first) read_backward(t, b, dweights, m, g), write_backward(t, b, g, dgate, dweights);
    else write_backward(t, b, g, dgate, found), read_backward(t, b, dweights, m, g), copy(dweights, found, R * Np);
    const C *key = keys(t, b), *word = words(t, b);
    for (int64_t h = 0; h < R; h++)
      for (int64_t i = 0; i < a.W; i++) {
        const C k = key[h * Wp + i], w = word[h * Wp + i], d = dkey[h * Wp + i], dw = dword[h * Wp + i];
        dx[h * a.W + i] = (a.separate ? d : d + dw) * (1 - k * k);
        if (a.separate) dx[F + h * a.W + i] = dw * (1 - w * w);
      }
  }

  // The memories that the steps t0 .. t1 - 1 of the elements read, from the copy at t0.
  C* rebuilt_at(int64_t t, int64_t b, int64_t i) const { return t % a.every == 0 ? copy_of(t, b) : rebuilt + ((t % a.every - 1) * lot + i) * M; }
  void rebuild(int64_t t0, int64_t t1, int64_t b0, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i;
      for (int64_t t = t0 + 1; t < t1 && alive(t, b); t++) write(a.write_first ? t : t - 1, b, rebuilt_at(t, b, i), rebuilt_at(t - 1, b, i));
    }
  }

  void backward(int64_t b0, int64_t count) {
    const int64_t Qp = up16(K + F);
    C* dmemory = (C*)a.dmemory;
    const C* gstate = (const C*)a.grad_state;
    const auto start = [](C* to, const void* from, int64_t at, int64_t n) {
      if (from) copy(to, (const C*)from + at, n);
      else fill(to, n, (C)0);
    };
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i;
      start(dmemory + b * M, a.grad_memory, b * M, M);
      if (a.grad_weights) widen_rows(carried + i * R * Np, (const C*)a.grad_weights + b * R * a.N, R, a.N, Np);
      else fill(carried + i * R * Np, R * Np, (C)0);
      start(dfeedback + i * Fp, a.grad_reads, b * F, F);
      for (int64_t l = 0; l < a.layers; l++) {
        start(dh + (l * lot + i) * Kp, gstate, (2 * l * a.B + b) * K, K);
        start(dcell + (l * lot + i) * Kp, gstate, ((2 * l + 1) * a.B + b) * K, K);
      }
    }
    for (int64_t t = a.T - 1; t >= 0; t--) {
      if (t == a.T - 1 || t % a.every == a.every - 1) rebuild(t / a.every * a.every, t + 1, b0, count);
      C *dy = delta(deltas.output, Op, t, b0), *dx = delta(deltas.interface, Ip, t, b0);
      for (int64_t i = 0; i < count; i++) {
        start(dy + i * Op, alive(t, b0 + i) ? a.grad_output : nullptr, (t * a.B + b0 + i) * a.O, a.O);
        fill(dy + i * Op + a.O, Op - a.O, (C)0);
      }
      multiply<false>(dfeatures, Qp, (const C*)nullptr, dy, Op, count, weights.output_own);
      for (int64_t i = 0; i < count; i++) {
        const int64_t b = b0 + i;
        fill(dx + i * Ip, Ip, (C)0);
        if (!alive(t, b)) continue;
        const C* df = dfeatures + i * Qp;
        C *dtop = dh + (top * lot + i) * Kp, *dr = dfeedback + i * Fp;
        for (int64_t k = 0; k < K; k++) dtop[k] += df[k];
        for (int64_t k = 0; k < F; k++) dr[k] += df[K + k];
        widen_rows(dreads, dr, R, a.W, Wp);
        step_backward(t, b, carried + i * R * Np, rebuilt_at(t, b, i), dmemory + b * M, dx + i * Ip);
      }
      multiply<true>(dh + top * lot * Kp, Kp, (const C*)nullptr, dx, Ip, count, weights.interface);
      for (int64_t l = top; l >= 0; l--) {
        C* dz = delta(deltas.sums[l], Gp, t, b0);
        const int64_t Dp = up16(K + (l == 0 ? F : K));
        for (int64_t i = 0; i < count; i++) {
          const int64_t b = b0 + i, at = (l * lot + i) * Kp;
          if (alive(t, b)) {
            lstm_backward(dz + i * Gp, sums(l, t, b), cells(l, t, b), cells(l, t + 1, b), dh + at, dcell + at, K);
            fill(dz + i * Gp + G, Gp - G, (C)0);
          } else {
            fill(dz + i * Gp, Gp, (C)0);
          }
        }
        multiply<false>(dbelow, Dp, (const C*)nullptr, dz, Gp, count, weights.own[l]);
        for (int64_t i = 0; i < count; i++) {
          if (!alive(t, b0 + i)) continue;
          const C* from = dbelow + i * Dp;
          copy(dh + (l * lot + i) * Kp, from, K);
          if (l == 0) copy(dfeedback + i * Fp, from + K, F);
          else
            for (int64_t k = 0; k < K; k++) dh[((l - 1) * lot + i) * Kp + k] += from[K + k];
        }
      }
      if (a.dinput && t % a.ahead() == 0) input_backward(t, a.T - t < a.ahead() ? a.T : t + a.ahead(), b0, count);
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i;
      narrow_rows((C*)a.dweights + b * R * a.N, carried + i * R * Np, R, a.N, Np);
      copy((C*)a.dreads + b * F, dfeedback + i * Fp, F);
      for (int64_t l = 0; l < a.layers; l++) {
        copy((C*)a.dstate + (2 * l * a.B + b) * K, dh + (l * lot + i) * Kp, K);
        copy((C*)a.dstate + ((2 * l + 1) * a.B + b) * K, dcell + (l * lot + i) * Kp, K);
      }
    }
  }
  void input_backward(int64_t t0, int64_t t1, int64_t b0, int64_t count) {
    const int64_t Xp = up16(a.X);
    products<false>(
        t0, t1, [&](int64_t t) { return hoisted + (t - t0) * lot * Xp; }, Xp, (const C*)nullptr,
        [&](int64_t t) { return delta(deltas.sums[0], Gp, t, b0); }, Gp, count, weights.input);
    for (int64_t t = t0; t < t1; t++)
      for (int64_t i = 0; i < count; i++) {
        C* to = (C*)a.dinput + (t * a.B + b0 + i) * a.X;
        if (alive(t, b0 + i)) copy(to, hoisted + ((t - t0) * lot + i) * Xp, a.X);
        else fill(to, a.X, (C)0);
      }
  }
};

template <class C, class F> void gradients(const MannArgs& a, F f) {
  const MannSaved saved(a);
  const MannDeltas deltas(a);
  const Parameters<C, MannArgs::kLayers> p(a, (C*)a.dparameters);
  const C *from = (const C*)a.saved, *d = (const C*)a.deltas;
  const int64_t K = a.K, F_ = a.F(), G = a.G(), Kp = up16(K), Fp = up16(F_), next = a.B, top = a.layers - 1;
  for (int64_t l = 0; l < a.layers; l++) {
    C *w = p.weight[l], *own = w + (l == 0 ? a.X * G : 0), *below = own + K * G;
    const Source<C> first{(const C*)a.input, a.X, l == 0 ? a.X : 0, w, G}, self{from + saved.outputs[l], Kp, K, own, G};
    const Source<C> under = l == 0 ? Source<C>{from + saved.reads, Fp, F_, below, G} : Source<C>{from + saved.outputs[l - 1] + next * Kp, Kp, K, below, G};
    f(Gradient<C>{{first, self, under}, p.bias[l], d + deltas.sums[l], G, up16(G), false});
  }
  const Source<C> none{nullptr, 0, 0, nullptr, 0};
  const C *h = from + saved.outputs[top] + next * Kp, *r = from + saved.reads + next * Fp;
  f(Gradient<C>{{{h, Kp, K, p.interface, K}, none, none}, p.interface_bias, d + deltas.interface, a.I(), up16(a.I()), true});
  f(Gradient<C>{{{h, Kp, K, p.output, K + F_}, {r, Fp, F_, p.output + K, K + F_}, none}, p.output_bias, d + deltas.output, a.O, up16(a.O), true});
}

}  // namespace

int64_t mann_sequence_packed(const MannArgs& a, bool backward) { return packed_numbers<Weights>(a, backward); }
void mann_sequence_pack(const MannArgs& a, bool backward) { pack<Weights>(a, backward); }
void mann_sequence_fwd(const MannArgs& a, int64_t begin, int64_t end) {
  with_wide(a.dtype, [&](auto c) {
    Sequence<decltype(c)> s(a, false);
    Arena arena([&](Arena& x) { s.layout(x, false); });
    s.forward_lots(begin * s.group, end * s.group < a.B ? end * s.group : a.B);
  });
}
void mann_sequence_bwd(const MannArgs& a, int64_t begin, int64_t end) {
  with_wide(a.dtype, [&](auto c) {
    Sequence<decltype(c)> s(a, true);
    Arena arena([&](Arena& x) { s.layout(x, true); });
    s.backward_lots(begin * s.group, end * s.group < a.B ? end * s.group : a.B);
  });
}
int64_t mann_sequence_panels(const MannArgs& a) {
  int64_t count = 0;
  with_wide(a.dtype, [&](auto c) { count = count_panels<decltype(c)>([&](auto f) { gradients<decltype(c)>(a, f); }); });
  return count;
}
void mann_sequence_parameters(const MannArgs& a, int64_t begin, int64_t end) {
  with_wide(a.dtype, [&](auto c) {
    for (int64_t i = begin; i < end; i++) panel_of<decltype(c)>([&](auto f) { gradients<decltype(c)>(a, f); }, i, a.T * a.B);
  });
}

}  // namespace MC_ISA
}  // namespace memcore
