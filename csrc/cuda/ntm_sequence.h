// A whole NTM run over a sequence, controller and output layer included, in float32.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#define MC_BOTH __host__ __device__
#else
#define MC_BOTH
#endif

namespace memcore {
namespace cuda {

constexpr int64_t kReadHeads = 8;  // what a block reads at a time, while it writes over the memory

struct SequenceArgs {
  int64_t device, T, B, X, N, W, K, O, R, Hw, S, layers, lstm, write_first, keep;  // keep: what a backward needs goes to `saved`
  int64_t every;                                                                   // steps between two copies of the memory
  double clip;                                                                     // of the interface; 0: none
  const float *input, *memory, *reads, *weights, *state, *parameters;
  const float* packed;     // forward: interface [K, I], output [K + F, O]; backward: of each layer [G, D]; rows apart by padded(..)
  const int64_t* lengths;  // null: all T
  float *output, *memory_out, *reads_out, *weights_out, *state_out;
  float* saved;
  // backward; a null gradient is zero
  const float *grad_output, *grad_memory, *grad_reads, *grad_weights, *grad_state;
  float *dinput, *dmemory, *dreads, *dweights, *dstate;
  float *deltas, *workspace;

  MC_BOTH int64_t H() const { return R + Hw; }
  MC_BOTH int64_t F() const { return R * W; }
  MC_BOTH int64_t I() const { return H() * (W + 3 + S) + 2 * Hw * W; }
  MC_BOTH int64_t G() const { return lstm ? 4 * K : K; }  // a layer's sums
  // Inputs of layer l: the layer's own last output if it has one, and below it [x, .., reads] or the layer before.
  MC_BOTH int64_t D(int64_t l) const { return (lstm ? K : 0) + (l == 0 ? X + F() : K); }
  MC_BOTH int64_t widest() const { return layers > 1 && D(1) > D(0) ? D(1) : D(0); }

  // The flat parameters: of each layer weight [D, G] and bias [G]; interface weight [I, K] and bias; output weight [O, K + F] and bias.
  MC_BOTH int64_t layer(int64_t l) const { return (l == 0 ? 0 : D(0) + 1 + (l - 1) * (D(1) + 1)) * G(); }
  MC_BOTH int64_t interface_at() const { return layer(layers); }
  MC_BOTH int64_t output_at() const { return interface_at() + I() * (K + 1); }
  MC_BOTH int64_t numbers() const { return output_at() + O * (K + F() + 1); }
  MC_BOTH static int64_t padded(int64_t n) { return (n + 3) / 4 * 4; }  // so that rows of a matrix are read four numbers at a time
  MC_BOTH int64_t packed_layer(int64_t l) const { return (l == 0 ? 0 : padded(D(0)) + (l - 1) * padded(D(1))) * G(); }

  // `saved`: copies of the memory, [T / every, B, N, W]; then rows, [T, B, row()]: of each layer inputs [D], 1, activations [G], cells [K];
  // features [K + F], 1; interface [I]; weights [H, N]. Rows past an item's length are 0.
  MC_BOTH int64_t cells() const { return lstm ? K : 0; }
  MC_BOTH int64_t kept(int64_t l) const { return l == 0 ? 0 : D(0) + (l - 1) * D(1) + l * (1 + G() + cells()); }
  MC_BOTH int64_t kept_features() const { return kept(layers); }
  MC_BOTH int64_t kept_interface() const { return kept_features() + K + F() + 1; }
  MC_BOTH int64_t kept_weights() const { return kept_interface() + I(); }
  MC_BOTH int64_t row() const { return kept_weights() + H() * N; }
  MC_BOTH int64_t copies() const { return (T + every - 1) / every; }
  MC_BOTH int64_t rows_at() const { return copies() * B * N * W; }
  MC_BOTH int64_t saved_size() const { return rows_at() + T * B * row(); }

  // A row of `deltas`, [T, B, delta()]: gradients of each layer's sums [G], of the interface [I], of the output [O].
  MC_BOTH int64_t delta_interface() const { return layers * G(); }
  MC_BOTH int64_t delta_output() const { return delta_interface() + I(); }
  MC_BOTH int64_t delta() const { return delta_output() + O; }
};

}  // namespace cuda
}  // namespace memcore

extern "C" {
// Bytes; -1 where no block of this device holds what it has to.
int64_t mc_ntm_sequence_fwd_workspace(const memcore::cuda::SequenceArgs* a);
int64_t mc_ntm_sequence_bwd_workspace(const memcore::cuda::SequenceArgs* a);
int64_t mc_ntm_sequence_fwd(const memcore::cuda::SequenceArgs* a, void* stream);
int64_t mc_ntm_sequence_bwd(const memcore::cuda::SequenceArgs* a, void* stream);
}
