// The recurrence of an NTM for groups of batch elements. Within a group time is outermost: the controller's layers are matrix products of
// the group's rows, the memory work goes element by element, and a group is small enough that its memories stay in the caches. Inside the
// recurrence a memory lies in tiles (tiles.h).
//
// The forward leaves, for each step, what the backward would otherwise have to compute again (inputs and activations of the controller,
// interface, similarities, squared norms, weights) and a copy of the memory every few steps, from which the backward rebuilds the others.
#include "ntm_sequence.h"

#include "interface.h"
#include "lstm.h"
#include "recurrence.h"
#include "tiles.h"

namespace memcore {
namespace MC_ISA {
namespace {

// Weights as the products of one direction want them, biases padded.
template <class C> struct Weights {
  Packed<C> layer[9], interface, output;
  C *bias[9], *interface_bias, *output_bias;

  template <class A> void layout(A& at, const SequenceArgs& a, bool backward) {
    for (int64_t l = 0; l < a.layers; l++) {
      if (backward) layer[l].layout(at, a.G(), a.D(l));
      else layer[l].layout(at, a.D(l), a.G()), at.take(bias[l], up16(a.G()));
    }
    const int64_t K = a.K, F = a.F(), I = a.I(), O = a.O;
    if (backward) interface.layout(at, I, K), output.layout(at, O, K + F);
    else interface.layout(at, K, I), output.layout(at, K + F, O), at.take(interface_bias, up16(I)), at.take(output_bias, up16(O));
  }
  void fill_in(const SequenceArgs& a, bool backward) {
    const Parameters<const C, SavedLayout::kLayers> p(a, (const C*)a.parameters);
    for (int64_t l = 0; l < a.layers; l++) {
      if (backward) layer[l].pack_transposed(p.weight[l]);
      else layer[l].pack(p.weight[l]), pad(bias[l], p.bias[l], a.G(), up16(a.G()));
    }
    if (backward) interface.pack(p.interface), output.pack(p.output);
    else interface.pack_transposed(p.interface), output.pack_transposed(p.output), pad(interface_bias, p.interface_bias, a.I(), up16(a.I())), pad(output_bias, p.output_bias, a.O, up16(a.O));
  }
};

template <class C> struct Sequence {
  static constexpr int L = Lanes<C>::n;

  const SequenceArgs& a;
  const SavedLayout saved;
  const DeltaLayout deltas;
  Weights<C> weights;
  const InterfaceLayout l;
  const int64_t H, I, K, F, G, M, group;
  Addressing<C> s;
  Pieces<C> p, d;
  int64_t Np, Wp, tiles, part, parts;  // part: tiles
  bool fused;
  C *x, *reads, *current, *first, *hidden, *cell, *feedback, *output;
  C *dw, *dprevious, *own, *key_own, *dreads, *found, *scratch, *written, *carried, *dh, *dcell, *dfeedback, *dfeatures, *dbelow, *rebuilt, *erased, *added, *partial;

  Sequence(const SequenceArgs& args, bool backward)
      : a(args), saved(args), deltas(args), l{args.R, args.Hw, args.W, args.range}, H(args.H()), I(args.I()), K(args.K), F(args.F()), G(args.G()),
        M(up16(args.N) * args.W), group(args.group()) {
    s.sizes(H, a.N, a.W, a.range);
    Np = s.similar.Np, Wp = s.similar.Wp, tiles = Np / L;
    part = a.part() / L, parts = tiles > 0 ? (tiles + part - 1) / part : 1;
    fused = a.write_first && a.Hw == 1 && a.R > 0 && a.R <= kMostHeads;
    Cursor at{(char*)a.packed};
    weights.layout(at, a, backward);
  }
  void layout(Arena& arena, bool backward) {
    s.layout(arena);
    p.layout(arena, l);
    p.key = s.similar.key, p.strength = s.beta, p.gate = s.gate, p.shift = s.shift, p.gamma = s.gamma;
    arena.take(x, up16(I)), arena.take(reads, a.R * Wp);
    arena.take(current, group * M), arena.take(first, group * H * Np), arena.take(partial, (parts - 1) * stride()), arena.take(scratch, parts * room());
    if (!backward) {
      arena.take(hidden, a.layers * group * K), arena.take(cell, a.layers * group * K);
      arena.take(feedback, group * F), arena.take(output, group * up16(a.O));
      return;
    }
    d.layout(arena, l);
    arena.take(dw, H * Np), arena.take(dprevious, H * Np), arena.take(own, Np), arena.take(key_own, H);
    arena.take(dreads, a.R * Wp), arena.take(found, a.R * Np), arena.take(written, fused ? 0 : M);
    arena.take(carried, group * H * Np), arena.take(dh, a.layers * group * up16(K)), arena.take(dcell, a.layers * group * K);
    arena.take(dfeedback, group * F), arena.take(dfeatures, group * up16(K + F));
    int64_t widest = 0;
    for (int64_t i = 0; i < a.layers; i++) widest = a.D(i) > widest ? a.D(i) : widest;
    arena.take(dbelow, group * up16(widest));
    const int64_t most = a.every < a.T ? a.every : a.T;
    arena.take(rebuilt, most * group * M), arena.take(erased, most * a.Hw * Wp), arena.take(added, most * a.Hw * Wp);
  }

  bool alive(int64_t t, int64_t b) const { return !a.lengths || t < a.lengths[b]; }
  // Row (t, b) of a kind of saved rows.
  C* row(int64_t kind, int64_t width, int64_t t, int64_t b) const { return (C*)a.saved + kind + ((a.keep ? t : 0) * a.B + b) * width; }
  C* inputs(int64_t layer, int64_t t, int64_t b) const { return row(saved.inputs[layer], up16(a.D(layer)), t, b); }
  C* sums(int64_t layer, int64_t t, int64_t b) const { return row(saved.sums[layer], up16(G), t, b); }
  C* cells(int64_t layer, int64_t t, int64_t b) const { return row(saved.cells[layer], up16(K), t, b); }
  C* features(int64_t t, int64_t b) const { return row(saved.features, saved.width_features, t, b); }
  C* interface(int64_t t, int64_t b) const { return row(saved.interface, saved.width_interface, t, b); }
  C* slots(int64_t t, int64_t b) const { return row(saved.weights, H * saved.width_slots, t, b); }
  C* copy_of(int64_t t, int64_t b) const { return (C*)a.saved + saved.copies + ((t / a.every - 1) * a.B + b) * M; }  // t > 0

  // The weights that step t of element b begins with; `i` is its place in the group.
  C* previous(int64_t t, int64_t b, int64_t i) const { return t == 0 ? first + i * H * Np : slots(t - 1, b); }

  void point(int64_t t, int64_t b, int64_t i) {
    s.previous = previous(t, b, i);
    s.weights = slots(t, b);
    s.similar.sim = row(saved.similar, H * saved.width_slots, t, b), s.similar.norm2 = row(saved.norms, saved.width_slots, t, b);
  }
  void clamped(const C* raw) {
    copy(x, raw, I);
    if (a.clip > 0)
      for (int64_t i = 0; i < I; i++) x[i] = x[i] > (C)a.clip ? (C)a.clip : x[i] < -(C)a.clip ? -(C)a.clip : x[i];
  }

  // ---- work that threads share ----

  // f(i) for 0 <= i < n.
  template <class F> void each(int64_t n, const F& f) const {
    if (!a.spread || n < 2) {
      for (int64_t i = 0; i < n; i++) f(i);
      return;
    }
    a.spread(n, (void*)&f, [](void* context, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) (*(const F*)context)(i);
    });
  }
  // f(part, its first tile, how many) for all parts of a memory.
  template <class F> void each_part(const F& f) const {
    each(parts, [&](int64_t i) { f(i, i * part, tiles - i * part < part ? tiles - i * part : part); });
  }
  // f(first head, how many): side by side in one thread, or a head a thread.
  template <class F> void each_heads(const F& f) const {
    const int64_t side = a.spread ? 1 : Addressing<C>::kSide;
    each((H + side - 1) / side, [&](int64_t i) { f(i * side, (int)(H - i * side < side ? H - i * side : side)); });
  }
  int64_t stride() const { return 2 * (H * Wp + 16); }  // of the parts' sums
  int64_t room() const {                                 // of the parts' scratch
    const int64_t one = tile_scratch<C>(a.W), several = (2 * a.W + 1) * a.Hw * L;
    return one > several ? one : several;
  }
  // Where part i adds up n numbers that end in `total`, zeros at first; at the end all are added to it in order.
  C* sums_of(int64_t i, C* total, int64_t n) const {
    C* to = i == 0 ? total : partial + (i - 1) * stride();
    fill(to, n, (C)0);
    return to;
  }
  void add_parts(C* total, int64_t n) const {
    for (int64_t i = 1; i < parts; i++)
      for (int64_t j = 0; j < n; j += L) store(total + j, load(total + j) + load(partial + (i - 1) * stride() + j));
  }
  template <bool ADD> void multiply(C* c, int64_t ldc, const C* start, const C* in, int64_t ldi, int64_t rows, const Packed<C>& b) const {
    if (!a.spread || rows * b.K * b.Np < 500000) return product<ADD>(c, ldc, start, in, ldi, rows, b);
    each((b.Np + b.P - 1) / b.P, [&](int64_t i) { product_panel<ADD>(c, ldc, start, in, ldi, rows, b, i * b.P); });
  }
  // Whether the memories that come out go past the caches.
  bool past() const { return a.B * a.N * a.W * (int64_t)sizeof(C) >= kStreamBytes; }
  // To where only the backward reads it again: past the caches, if they do not hold all of these copies.
  void keep_memory(C* to, const C* from) const {
    const bool far = (a.T - 1) / a.every * a.B * M * (int64_t)sizeof(C) > 16 << 20;
    each_part([&](int64_t, int64_t t, int64_t n) {
      t *= a.W * L, n *= a.W * L;
      if (far) stream_copy(to + t, from + t, n), stream_fence();
      else copy(to + t, from + t, n);
    });
  }

  // ---- forward ----

  void step(int64_t t, int64_t b, int64_t i, C* m, C* to) {
    clamped(interface(t, b));
    activate(p, x, l);
    point(t, b, i);
    each_part([&](int64_t, int64_t t, int64_t n) {
      tile_dots(m + t * a.W * L, n, a.W, s.similar.key, Wp, H, s.similar.sim + t * L, Np, s.similar.norm2 + t * L);
    });
    s.similar.scale();
    each_heads([&](int64_t h, int heads) { s.template weigh_heads<false>(h, heads); });
    each_part([&](int64_t i, int64_t t, int64_t n) {
      C *rows = m + t * a.W * L, *found = sums_of(i, reads, a.R * Wp);
      const C *wr = s.weights + t * L, *ww = wr + a.R * Np;
      if (fused) return tile_write_read(rows, n, a.W, ww, p.erase, p.add, wr, Np, a.R, found, Wp, scratch + i * room());
      if (!a.write_first) tile_gather(rows, n, a.W, wr, Np, a.R, found, Wp, scratch + i * room());
      if (a.Hw > 0) tile_erase_add(rows, rows, n, a.W, ww, Np, a.Hw, p.erase, p.add, Wp);
      if (a.write_first) tile_gather(rows, n, a.W, wr, Np, a.R, found, Wp, scratch + i * room());
    });
    add_parts(reads, a.R * Wp);
    narrow_rows(to, reads, a.R, a.W, Wp);
  }

  // One row of a layer: activations in place of the sums; the cell and the output. `last` is the cell before.
  MC_INLINE void activate_layer(C* z, const C* last, C* c, C* h) const {
    if (a.lstm) return lstm_forward(z, last, c, h, K);
    for (int64_t k = 0; k < K; k += L) {
      const int n = K - k < L ? (int)(K - k) : L;
      const Vec<C> y = hyperbolic_tangent(load_n(z + k, n));
      store_n(z + k, y, n), store_n(h + k, y, n);
    }
  }

  void forward(int64_t b0, int64_t count) {
    const C* state = (const C*)a.state;
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i;
      to_tiles(current + i * M, (const C*)a.memory + b * a.N * a.W, a.N, a.W);
      widen_rows(first + i * H * Np, (const C*)a.weights + b * H * a.N, H, a.N, Np);
      copy(feedback + i * F, (const C*)a.reads + b * F, F);
      for (int64_t j = 0; a.lstm && j < a.layers; j++)
        copy(hidden + (j * group + i) * K, state + (2 * j * a.B + b) * K, K), copy(cell + (j * group + i) * K, state + ((2 * j + 1) * a.B + b) * K, K);
    }
    for (int64_t t = 0; t < a.T; t++) {
      for (int64_t j = 0; j < a.layers; j++) {
        for (int64_t i = 0; i < count; i++) {
          C* to = inputs(j, t, b0 + i);
          if (!alive(t, b0 + i)) {
            fill(to, a.D(j), (C)0);
            continue;
          }
          if (j == 0) copy(to, (const C*)a.input + (t * a.B + b0 + i) * a.X, a.X), to += a.X;
          if (a.lstm) copy(to, hidden + (j * group + i) * K, K), to += K;
          if (j == 0) copy(to, feedback + i * F, F);
          else copy(to, hidden + ((j - 1) * group + i) * K, K);
        }
        multiply<false>(sums(j, t, b0), up16(G), weights.bias[j], inputs(j, t, b0), up16(a.D(j)), count, weights.layer[j]);
        for (int64_t i = 0; i < count; i++) {
          if (!alive(t, b0 + i)) continue;
          C *h = hidden + (j * group + i) * K, *c = cell + (j * group + i) * K;
          activate_layer(sums(j, t, b0 + i), c, c, h);
          if (a.lstm) copy(cells(j, t, b0 + i), c, K);
        }
      }
      for (int64_t i = 0; i < count; i++) {
        C* to = features(t, b0 + i);
        if (alive(t, b0 + i)) copy(to, hidden + ((a.layers - 1) * group + i) * K, K);
        else fill(to, K + F, (C)0);
      }
      multiply<false>(interface(t, b0), saved.width_interface, weights.interface_bias, features(t, b0), saved.width_features, count, weights.interface);
      for (int64_t i = 0; i < count; i++) {
        const int64_t b = b0 + i;
        if (!alive(t, b)) continue;
        if (a.keep && t > 0 && t % a.every == 0) keep_memory(copy_of(t, b), current + i * M);
        step(t, b, i, current + i * M, features(t, b) + K);
        copy(feedback + i * F, features(t, b) + K, F);
      }
      multiply<false>(output, up16(a.O), weights.output_bias, features(t, b0), saved.width_features, count, weights.output);
      for (int64_t i = 0; i < count; i++) {
        C* to = (C*)a.output + (t * a.B + b0 + i) * a.O;
        if (alive(t, b0 + i)) copy(to, output + i * up16(a.O), a.O);
        else fill(to, a.O, (C)0);
      }
    }
    C* after = (C*)a.state_out;
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i, steps = a.lengths ? a.lengths[b] : a.T;
      from_tiles((C*)a.memory_out + b * a.N * a.W, current + i * M, a.N, a.W, past());
      narrow_rows((C*)a.weights_out + b * H * a.N, previous(steps, b, i), H, a.N, Np);
      copy((C*)a.reads_out + b * F, feedback + i * F, F);
      for (int64_t j = 0; a.lstm && j < a.layers; j++)
        copy(after + (2 * j * a.B + b) * K, hidden + (j * group + i) * K, K), copy(after + ((2 * j + 1) * a.B + b) * K, cell + (j * group + i) * K, K);
    }
  }

  // ---- backward ----

  // Of one part of the memory, the n tiles from t on: from the gradient g of what was written to that of the memory m, in place; those of the
  // weights grow, those of the erase vectors begin at `sums`, of the add vectors V later.
  void write_read_backward(const C* m, C* g, C* dweights, int64_t q, int64_t t, int64_t n, C* sums, int64_t V) {
    m += t * a.W * L, g += t * a.W * L;
    const C *wr = s.weights + t * L, *ww = wr + a.R * Np;
    C *dwr = dweights + t * L, *dww = dwr + a.R * Np, *derase = sums, *dadd = sums + V;
    if (fused) return tile_write_read_backward(g, m, n, a.W, ww, p.erase, p.add, wr, Np, a.R, dreads, Wp, dwr, dww, derase, dadd, scratch + q * room());
    if (a.R > 0) {
      const C* seen = m;
      if (a.write_first && a.Hw > 0) {
        tile_erase_add(written + t * a.W * L, m, n, a.W, ww, Np, a.Hw, p.erase, p.add, Wp);
        seen = written + t * a.W * L;
      }
      tile_dots(seen, n, a.W, dreads, Wp, a.R, found + t * L, Np, (C*)nullptr);
      for (int64_t h = 0; h < a.R; h++)
        for (int64_t j = h * Np; j < h * Np + n * L; j += L) store(dwr + j, load(dwr + j) + load(found + t * L + j));
      if (a.write_first) tile_scatter(g, n, a.W, wr, Np, a.R, dreads, Wp);
    }
    tile_erase_add_backward(g, m, n, a.W, ww, Np, a.Hw, p.erase, p.add, Wp, dww, derase, dadd, scratch + q * room());
    if (a.R > 0 && !a.write_first) tile_scatter(g, n, a.W, wr, Np, a.R, dreads, Wp);
  }

  // From the gradients of step t's reads (in `dreads`), weights (carried) and written memory (g) to those of its interface (dx), of the
  // weights before (carried) and of the memory m that came in (g).
  void step_backward(int64_t t, int64_t b, int64_t i, const C* m, C* g, C* dx) {
    const C* raw = interface(t, b);
    clamped(raw);
    activate(p, x, l);
    point(t, b, i);
    s.similar.invert_norms();
    each_heads([&](int64_t h, int heads) { s.template weigh_heads<true, true>(h, heads); });
    C* dweights = carried + i * H * Np;
    const int64_t V = d.add - d.erase;
    each_part([&](int64_t q, int64_t t, int64_t n) { write_read_backward(m, g, dweights, q, t, n, sums_of(q, d.erase, 2 * V), V); });
    add_parts(d.erase, 2 * V);
    each_heads([&](int64_t h, int heads) { s.backward_heads(h, heads, dweights, d.strength, d.gate, d.shift, d.gamma, dprevious); });
    s.similar.backward(dweights, own, key_own);
    each_part([&](int64_t q, int64_t t, int64_t n) {
      tile_pull_push(g + t * a.W * L, m + t * a.W * L, n, a.W, dweights + t * L, Np, H, p.key, sums_of(q, d.key, H * Wp), Wp, own + t * L, scratch + q * room());
    });
    add_parts(d.key, H * Wp);
    for (int64_t h = 0; h < H; h++)
      for (int64_t w = 0; w < a.W; w++) d.key[h * Wp + w] -= key_own[h] * p.key[h * Wp + w];
    activate_backward(dx, x, p, d, l);
    if (a.clip > 0)
      for (int64_t j = 0; j < I; j++) dx[j] = raw[j] > (C)a.clip || raw[j] < -(C)a.clip ? 0 : dx[j];
    copy(dweights, dprevious, H * Np);
  }

  // Gradient of a layer's sums from those of its output and cell; dc becomes that of the cell before.
  MC_INLINE void layer_backward(C* dz, const C* z, const C* last, const C* c, const C* dh, C* dc) const {
    if (a.lstm) return lstm_backward(dz, z, last, c, dh, dc, K);
    for (int64_t k = 0; k < K; k += L) {
      const int n = K - k < L ? (int)(K - k) : L;
      const Vec<C> y = load_n(z + k, n);
      store_n(dz + k, load_n(dh + k, n) * (1 - y * y), n);
    }
  }

  // The memory before step t.
  C* rebuilt_at(int64_t t, int64_t i) const { return rebuilt + (t % a.every * group + i) * M; }
  const C* before(int64_t t, int64_t b, int64_t i) const { return t > 0 && t % a.every == 0 ? copy_of(t, b) : rebuilt_at(t, i); }
  // The memories before the steps t0 .. t1 - 1 of the group, from the one before t0: some tiles through all steps, so that what one step writes
  // the next one finds in the first cache.
  void rebuild(int64_t t0, int64_t t1, int64_t b0, int64_t count) {
    const int64_t V = a.Hw * Wp, some = (16 << 10) / ((a.W > 0 ? a.W : 1) * kBytes), most = some > 1 ? some : 1;
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i;
      if (!alive(t0, b)) continue;
      if (t0 == 0) to_tiles(rebuilt_at(0, i), (const C*)a.memory + b * a.N * a.W, a.N, a.W);
      int64_t steps = 0;
      for (; t0 + steps + 1 < t1 && alive(t0 + steps + 1, b); steps++) {
        clamped(interface(t0 + steps, b));
        for (int64_t h = 0; h < a.Hw; h++)
          for (int64_t w = 0; w < Wp; w += L) {
            const int part = a.W - w < L ? (int)(a.W - w) : L;
            store(erased + steps * V + h * Wp + w, MC_ISA::first<C>(sigmoid(load_n(x + l.erase(h) + w, part)), part));
            store(added + steps * V + h * Wp + w, load_n(x + l.add(h) + w, part));
          }
      }
      each_part([&](int64_t, int64_t first, int64_t all) {
        for (int64_t n = first; n < first + all; n += most)
          for (int64_t j = 0; j < steps; j++) {
            const int64_t at = n * a.W * L, now = first + all - n < most ? first + all - n : most;
            const C *from = before(t0 + j, b, i) + at, *ww = slots(t0 + j, b) + a.R * Np + n * L;
            tile_erase_add(rebuilt_at(t0 + j + 1, i) + at, from, now, a.W, ww, Np, a.Hw, erased + j * V, added + j * V, Wp);
          }
      });
    }
  }

  void backward(int64_t b0, int64_t count) {
    const int64_t Kp = up16(K), Gp = up16(G), Ip = up16(I), Op = up16(a.O), Qp = up16(K + F);
    const C *state = (const C*)a.state, *gstate = (const C*)a.grad_state;
    const auto start = [](C* to, const void* from, int64_t at, int64_t n) {
      if (from) copy(to, (const C*)from + at, n);
      else fill(to, n, (C)0);
    };
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i;
      if (a.grad_memory) to_tiles(current + i * M, (const C*)a.grad_memory + b * a.N * a.W, a.N, a.W);
      else fill(current + i * M, Np * a.W, (C)0);
      if (a.grad_weights) widen_rows(carried + i * H * Np, (const C*)a.grad_weights + b * H * a.N, H, a.N, Np);
      else fill(carried + i * H * Np, H * Np, (C)0);
      widen_rows(first + i * H * Np, (const C*)a.weights + b * H * a.N, H, a.N, Np);
      start(dfeedback + i * F, a.grad_reads, b * F, F);
      for (int64_t j = 0; j < a.layers; j++) {
        start(dh + (j * group + i) * Kp, a.lstm ? gstate : nullptr, (2 * j * a.B + b) * K, K);
        start(dcell + (j * group + i) * K, a.lstm ? gstate : nullptr, ((2 * j + 1) * a.B + b) * K, K);
      }
    }
    for (int64_t t = a.T - 1; t >= 0; t--) {
      if (t == a.T - 1 || t % a.every == a.every - 1) rebuild(t / a.every * a.every, t + 1, b0, count);
      C *dy = delta(deltas.output, Op, t, b0), *dx = delta(deltas.interface, Ip, t, b0);
      for (int64_t i = 0; i < count; i++) {
        const bool is = alive(t, b0 + i);
        start(dy + i * Op, is ? a.grad_output : nullptr, (t * a.B + b0 + i) * a.O, a.O);
        fill(dy + i * Op + a.O, Op - a.O, (C)0);
      }
      multiply<false>(dfeatures, Qp, (const C*)nullptr, dy, Op, count, weights.output);
      for (int64_t i = 0; i < count; i++) {
        const int64_t b = b0 + i;
        fill(dx + i * Ip, Ip, (C)0);
        if (!alive(t, b)) continue;
        const C* df = dfeatures + i * Qp;
        C *top = dh + ((a.layers - 1) * group + i) * Kp, *dr = dfeedback + i * F;
        for (int64_t k = 0; k < K; k++) top[k] += df[k];
        for (int64_t k = 0; k < F; k++) dr[k] += df[K + k];
        widen_rows(dreads, dr, a.R, a.W, Wp);
        step_backward(t, b, i, before(t, b, i), current + i * M, dx + i * Ip);
      }
      multiply<true>(dh + (a.layers - 1) * group * Kp, Kp, (const C*)nullptr, dx, Ip, count, weights.interface);
      for (int64_t j = a.layers - 1; j >= 0; j--) {
        C* dz = delta(deltas.sums[j], Gp, t, b0);
        const int64_t Dp = up16(a.D(j));
        for (int64_t i = 0; i < count; i++) {
          const int64_t b = b0 + i;
          if (!alive(t, b)) {
            fill(dz + i * Gp, Gp, (C)0);
            continue;
          }
          const C* last = !a.lstm ? nullptr : t > 0 ? cells(j, t - 1, b) : state + ((2 * j + 1) * a.B + b) * K;
          layer_backward(dz + i * Gp, sums(j, t, b), last, cells(j, t, b), dh + (j * group + i) * Kp, dcell + (j * group + i) * K);
          fill(dz + i * Gp + G, Gp - G, (C)0);
        }
        multiply<false>(dbelow, Dp, (const C*)nullptr, dz, Gp, count, weights.layer[j]);
        for (int64_t i = 0; i < count; i++) {
          const int64_t b = b0 + i;
          const C* from = dbelow + i * Dp;
          const bool is = alive(t, b);
          if (j == 0) start((C*)a.dinput + (t * a.B + b) * a.X, is ? from : nullptr, 0, a.X);
          if (!is) continue;
          if (j == 0) from += a.X;
          C* h = dh + (j * group + i) * Kp;
          if (a.lstm) copy(h, from, K), from += K;
          else fill(h, K, (C)0);
          if (j == 0) copy(dfeedback + i * F, from, F);
          else
            for (int64_t k = 0; k < K; k++) dh[((j - 1) * group + i) * Kp + k] += from[k];
        }
      }
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t b = b0 + i;
      from_tiles((C*)a.dmemory + b * a.N * a.W, current + i * M, a.N, a.W, past());
      narrow_rows((C*)a.dweights + b * H * a.N, carried + i * H * Np, H, a.N, Np);
      copy((C*)a.dreads + b * F, dfeedback + i * F, F);
      for (int64_t j = 0; a.lstm && j < a.layers; j++)
        copy((C*)a.dstate + (2 * j * a.B + b) * K, dh + (j * group + i) * Kp, K), copy((C*)a.dstate + ((2 * j + 1) * a.B + b) * K, dcell + (j * group + i) * K, K);
    }
  }
  C* delta(int64_t kind, int64_t width, int64_t t, int64_t b) const { return (C*)a.deltas + kind + (t * a.B + b) * width; }
};

template <class C, class F> void gradients(const SequenceArgs& a, F f) {
  const SavedLayout saved(a);
  const DeltaLayout deltas(a);
  const Parameters<C, SavedLayout::kLayers> p(a, (C*)a.dparameters);
  const C *from = (const C*)a.saved, *d = (const C*)a.deltas;
  const int64_t Q = a.K + a.F();
  const Source<C> none{nullptr, 0, 0, nullptr, 0};
  for (int64_t l = 0; l < a.layers; l++)
    f(Gradient<C>{{{from + saved.inputs[l], up16(a.D(l)), a.D(l), p.weight[l], a.G()}, none, none}, p.bias[l], d + deltas.sums[l], a.G(), up16(a.G()), false});
  const C* features = from + saved.features;
  f(Gradient<C>{{{features, up16(Q), a.K, p.interface, a.K}, none, none}, p.interface_bias, d + deltas.interface, a.I(), up16(a.I()), true});
  f(Gradient<C>{{{features, up16(Q), Q, p.output, Q}, none, none}, p.output_bias, d + deltas.output, a.O, up16(a.O), true});
}

}  // namespace

int64_t ntm_sequence_packed(const SequenceArgs& a, bool backward) { return packed_numbers<Weights>(a, backward); }
void ntm_sequence_pack(const SequenceArgs& a, bool backward) { pack<Weights>(a, backward); }
void ntm_sequence_fwd(const SequenceArgs& a, int64_t begin, int64_t end) {
  with_wide(a.dtype, [&](auto c) {
    Sequence<decltype(c)> s(a, false);
    Arena arena([&](Arena& x) { s.layout(x, false); });
    for (int64_t g = begin; g < end; g++) s.forward(g * s.group, a.B - g * s.group < s.group ? a.B - g * s.group : s.group);
  });
}
void ntm_sequence_bwd(const SequenceArgs& a, int64_t begin, int64_t end) {
  with_wide(a.dtype, [&](auto c) {
    Sequence<decltype(c)> s(a, true);
    Arena arena([&](Arena& x) { s.layout(x, true); });
    for (int64_t g = begin; g < end; g++) s.backward(g * s.group, a.B - g * s.group < s.group ? a.B - g * s.group : s.group);
  });
}
int64_t ntm_sequence_panels(const SequenceArgs& a) {
  int64_t count = 0;
  with_wide(a.dtype, [&](auto c) { count = count_panels<decltype(c)>([&](auto f) { gradients<decltype(c)>(a, f); }); });
  return count;
}
void ntm_sequence_parameters(const SequenceArgs& a, int64_t begin, int64_t end) {
  with_wide(a.dtype, [&](auto c) {
    for (int64_t i = begin; i < end; i++) panel_of<decltype(c)>([&](auto f) { gradients<decltype(c)>(a, f); }, i, a.T * a.B);
  });
}

}  // namespace MC_ISA
}  // namespace memcore
