// A whole MANN run over a sequence, controller and output layer included.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

#define MC_ALWAYS inline __attribute__((always_inline))  // compiled for several instruction sets: no copy may be shared

struct MannArgs {
  static constexpr int64_t kLayers = 8;  // at most

  DType dtype;  // f32 or f64
  int64_t T, B, X, N, W, K, O, R, layers;
  bool zero, separate, write_first, keep;  // keep: what a backward needs is written to `saved`
  double decay, strength;
  int64_t every;  // steps between two copies of the memory
  const void *input, *memory, *reads, *weights, *usage, *state, *parameters;
  const int64_t* lengths;  // null: all T
  void *output, *memory_out, *reads_out, *weights_out, *usage_out, *state_out;
  void *saved, *packed;
  // backward; a null gradient is zero, a null dinput is not wanted
  const void *grad_output, *grad_memory, *grad_reads, *grad_weights, *grad_state;
  void *dinput, *dmemory, *dreads, *dweights, *dstate, *dparameters;
  void* deltas;

  static MC_ALWAYS int64_t up16(int64_t n) { return (n + 15) / 16 * 16; }
  MC_ALWAYS int64_t F() const { return R * W; }
  MC_ALWAYS int64_t words() const { return separate ? 2 * F() : F(); }
  MC_ALWAYS int64_t I() const { return words() + R; }
  MC_ALWAYS int64_t G() const { return 4 * K; }  // a layer's sums
  // Inputs of layer l: [x, its own last output, reads] or [its own last output, the layer below].
  MC_ALWAYS int64_t D(int64_t l) const { return K + (l == 0 ? X + F() : K); }

  // Batch elements whose controllers share one matrix product. It depends on shapes alone, so that results do not depend on threads.
  MC_ALWAYS int64_t group() const {
    const int64_t bytes = N * W * (dtype == DType::f64 ? 8 : 4), most = bytes <= 64 << 10 ? 8 : bytes <= 256 << 10 ? 4 : 2;
    const int64_t half = (B + 1) / 2;
    return half < most ? (half > 0 ? half : 1) : most;
  }
  // Elements that a thread runs side by side, whole groups.
  MC_ALWAYS int64_t lot() const { return group() < 8 && N * W * (dtype == DType::f64 ? 8 : 4) > 64 << 10 ? group() : (group() < 16 ? 16 / group() : 1) * group(); }
  MC_ALWAYS int64_t groups() const { return (B + group() - 1) / group(); }
  // Steps whose inputs go through one matrix product.
  MC_ALWAYS int64_t ahead() const { return T < 16 ? T : 16; }
};

// Where things lie in `saved`: rows [steps, B, size] of each kind, every size a multiple of 16, then copies of the memory. Of the state there
// is one row more than steps, the first being the state that came in. Without `keep` the rows of a few steps take turns.
struct MannSaved {
  int64_t at_hand, steps, states;  // rows in time of the first layer's sums, of what a step computes, of the state
  int64_t sums[MannArgs::kLayers], outputs[MannArgs::kLayers], cells[MannArgs::kLayers], reads, weights, similar, norms, keys, words, gates, slots, copies, total;

  MC_ALWAYS explicit MannSaved(const MannArgs& a) {
    at_hand = a.keep ? a.T : a.ahead(), steps = a.keep ? a.T : 1, states = a.keep ? a.T + 1 : 2;
    int64_t at = 0;
    const auto take = [&](int64_t rows, int64_t width) __attribute__((always_inline)) {
      const int64_t begin = at;
      at += rows * a.B * width;
      return begin;
    };
    const int64_t K = MannArgs::up16(a.K), N = MannArgs::up16(a.N), W = MannArgs::up16(a.W);
    for (int64_t l = 0; l < a.layers; l++)
      sums[l] = take(l == 0 ? at_hand : steps, MannArgs::up16(a.G())), outputs[l] = take(states, K), cells[l] = take(states, K);
    reads = take(states, MannArgs::up16(a.F())), weights = take(states, a.R * N);
    similar = take(steps, a.R * N), norms = take(steps, N), keys = take(steps, a.R * W), words = a.separate ? take(steps, a.R * W) : keys;
    gates = take(steps, MannArgs::up16(a.R)), slots = take(steps, 16);
    copies = at;
    if (a.keep) at += (a.T + a.every - 1) / a.every * a.B * a.N * a.W;
    total = at;
  }
};

// Gradients of all sums, [T, B, size] of each kind.
struct MannDeltas {
  int64_t sums[MannArgs::kLayers], interface, output, total;
  MC_ALWAYS explicit MannDeltas(const MannArgs& a) {
    int64_t at = 0;
    const auto take = [&](int64_t width) __attribute__((always_inline)) {
      const int64_t begin = at;
      at += a.T * a.B * width;
      return begin;
    };
    for (int64_t l = 0; l < a.layers; l++) sums[l] = take(MannArgs::up16(a.G()));
    interface = take(MannArgs::up16(a.I())), output = take(MannArgs::up16(a.O));
    total = at;
  }
};

// Numbers of `packed`, at most.
MC_DECLARE(int64_t mann_sequence_packed(const MannArgs& a, bool backward);
           void mann_sequence_pack(const MannArgs& a, bool backward);
           void mann_sequence_fwd(const MannArgs& a, int64_t begin, int64_t end);  // groups
           void mann_sequence_bwd(const MannArgs& a, int64_t begin, int64_t end);  // groups
           int64_t mann_sequence_panels(const MannArgs& a);
           void mann_sequence_parameters(const MannArgs& a, int64_t begin, int64_t end);)  // panels of the parameters' gradients

}  // namespace memcore
