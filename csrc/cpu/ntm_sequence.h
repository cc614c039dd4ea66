// A whole NTM run over a sequence, controller and output layer included.
#pragma once

#include "dtype.h"
#include "isa.h"

namespace memcore {

#define MC_ALWAYS inline __attribute__((always_inline))  // compiled for several instruction sets: no copy may be shared

MC_ALWAYS int64_t up16(int64_t n) { return (n + 15) / 16 * 16; }

struct SequenceArgs {
  DType dtype;  // f32 or f64
  int64_t T, B, X, N, W, K, O, R, Hw, range, layers;
  bool lstm, write_first, keep;  // keep: what a backward needs is written to `saved`
  double clip;                   // of the interface; 0: none
  int64_t every;                 // steps between two copies of the memory
  const void *input, *memory, *reads, *weights, *state, *parameters;
  const int64_t* lengths;  // null: all T
  void *output, *memory_out, *reads_out, *weights_out, *state_out;
  void *saved, *packed;
  // backward; a null gradient is zero
  const void *grad_output, *grad_memory, *grad_reads, *grad_weights, *grad_state;
  void *dinput, *dmemory, *dreads, *dweights, *dstate, *dparameters;
  void* deltas;
  // Where given, run(context, begin, end) over ranges of 0 .. n by all threads: one group is worked on at a time, its steps shared out.
  void (*spread)(int64_t n, void* context, void (*run)(void* context, int64_t begin, int64_t end));

  MC_ALWAYS int64_t H() const { return R + Hw; }
  MC_ALWAYS int64_t F() const { return R * W; }
  MC_ALWAYS int64_t I() const { return H() * (W + 4 + 2 * range) + 2 * Hw * W; }
  MC_ALWAYS int64_t G() const { return lstm ? 4 * K : K; }  // a layer's sums
  // Inputs of layer l: the layer's own last output if it has one, and below it [x, .., reads] or the layer before.
  MC_ALWAYS int64_t D(int64_t l) const { return (lstm ? K : 0) + (l == 0 ? X + F() : K); }

  // Batch elements whose controllers share one matrix product. It depends on shapes alone, so that results do not depend on threads.
  MC_ALWAYS int64_t group() const {
    const int64_t bytes = N * W * (dtype == DType::f64 ? 8 : 4), most = bytes <= 64 << 10 ? 8 : bytes <= 256 << 10 ? 4 : 2;
    const int64_t half = (B + 1) / 2;
    return half < most ? (half > 0 ? half : 1) : most;
  }
  MC_ALWAYS int64_t groups() const { return (B + group() - 1) / group(); }
  // Slots of a part of a memory, whose sums are taken apart from the others' and then added in order: all, or where few large memories leave threads
  // idle a 16th of them. Shapes alone decide, too.
  MC_ALWAYS int64_t part() const {
    const int64_t slots = ((N + 15) / 16 + 255) / 256 * 256;
    return B <= 8 && N * W >= 65536 && N > slots ? slots : up16(N);
  }
};

// Where things lie in `saved`: rows [T, B, size] of each kind, every size a multiple of 16, then copies of the memory (tiles.h), but for the first
// one, which the inputs hold.
struct SavedLayout {
  int64_t rows, inputs[9], sums[9], cells[9], features, interface, weights, similar, norms, copies, total;
  int64_t width_features, width_interface, width_slots;

  static constexpr int64_t kLayers = 8;
  MC_ALWAYS explicit SavedLayout(const SequenceArgs& a) {
    rows = (a.keep ? a.T : 1) * a.B;
    int64_t at = 0;
    const auto take = [&](int64_t width) __attribute__((always_inline)) {
      const int64_t begin = at;
      at += rows * width;
      return begin;
    };
    for (int64_t l = 0; l < a.layers; l++)
      inputs[l] = take(up16(a.D(l))), sums[l] = take(up16(a.G())), cells[l] = take(a.lstm ? up16(a.K) : 0);
    width_features = up16(a.K + a.F()), width_interface = up16(a.I()), width_slots = up16(a.N);
    features = take(width_features), interface = take(width_interface);
    weights = take(a.H() * width_slots), similar = take(a.H() * width_slots), norms = take(width_slots);
    copies = at;
    if (a.keep && a.T > 0) at += (a.T - 1) / a.every * a.B * width_slots * a.W;
    total = at;
  }
};

// Gradients of all sums, [T, B, size] of each kind.
struct DeltaLayout {
  int64_t sums[9], interface, output, total;
  MC_ALWAYS explicit DeltaLayout(const SequenceArgs& a) {
    int64_t at = 0;
    const auto take = [&](int64_t width) __attribute__((always_inline)) {
      const int64_t begin = at;
      at += a.T * a.B * width;
      return begin;
    };
    for (int64_t l = 0; l < a.layers; l++) sums[l] = take(up16(a.G()));
    interface = take(up16(a.I())), output = take(up16(a.O));
    total = at;
  }
};

// Numbers of `packed`, at most.
MC_DECLARE(int64_t ntm_sequence_packed(const SequenceArgs& a, bool backward);
           void ntm_sequence_pack(const SequenceArgs& a, bool backward);
           void ntm_sequence_fwd(const SequenceArgs& a, int64_t begin, int64_t end);  // groups
           void ntm_sequence_bwd(const SequenceArgs& a, int64_t begin, int64_t end);  // groups
           int64_t ntm_sequence_panels(const SequenceArgs& a);
           void ntm_sequence_parameters(const SequenceArgs& a, int64_t begin, int64_t end);)  // panels of the parameters' gradients

}  // namespace memcore
