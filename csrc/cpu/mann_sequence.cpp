#include "mann_sequence.h"

#include <cstring>

#include "common.h"

namespace memcore {
namespace {

struct Call {
  MannArgs a{};
  Call(const Tensor& input, const Tensor& memory, const Tensor& reads, const Tensor& weights, const Tensor& usage, const Tensor& state,
       const Tensor& parameters, const OptionalTensor& lengths, int64_t outputs, int64_t layers, double decay, double strength, bool zero, bool separate,
       bool write_first, int64_t every) {
    a.dtype = dtype_of(memory);
    if (a.dtype != DType::f32 && a.dtype != DType::f64) fail("memcore.mann_sequence: the kernel takes float32 and float64 tensors");
    a.T = input.size(0), a.B = input.size(1), a.X = input.size(2), a.N = memory.size(1), a.W = memory.size(2), a.R = reads.size(1);
    a.O = outputs, a.layers = layers, a.decay = decay, a.strength = strength, a.zero = zero, a.separate = separate, a.write_first = write_first, a.every = every;
    a.K = state.size(2);
    if (layers > MannArgs::kLayers) fail("memcore.mann_sequence: the kernel takes up to 8 controller layers");
    const auto expected = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) { expect("mann_sequence", name, t, memory, shape); };
    expected("input", input, {a.T, a.B, a.X}), expected("memory", memory, {a.B, a.N, a.W}), expected("reads", reads, {a.B, a.R, a.W});
    expected("read_weights", weights, {a.B, a.R, a.N}), expected("usage", usage, {a.B, a.N}), expected("controller", state, {2 * layers, a.B, a.K});
    expected("parameters", parameters, {parameters.numel()});
    int64_t numbers = a.I() * (a.K + 1) + a.O * (a.K + a.F() + 1);
    for (int64_t l = 0; l < layers; l++) numbers += (a.D(l) + 1) * a.G();
    if (parameters.numel() != numbers)
      fail("memcore.mann_sequence: 'parameters' must have " + std::to_string(numbers) + " numbers, got " + std::to_string(parameters.numel()));
    a.input = in(input), a.memory = in(memory), a.reads = in(reads), a.weights = in(weights), a.usage = in(usage), a.state = in(state);
    a.parameters = in(parameters), a.lengths = (const int64_t*)in(lengths);
  }
  // Roughly the multiply-adds of one group.
  int64_t cost() const {
    int64_t one = a.I() * a.K + a.O * (a.K + a.F()) + 3 * a.R * a.N * (a.W + 32);
    for (int64_t l = 0; l < a.layers; l++) one += a.D(l) * a.G();
    return one * a.group() * a.T;
  }
  // Weights as the kernels want them, for as long as the tensor lives.
  Tensor pack(const Tensor& like, bool backward) {
    Tensor packed = make(like, {MC_PICK(mann_sequence_packed)(a, backward) + 64});
    a.packed = (void*)(((uintptr_t)out(packed) + 63) / 64 * 64);
    MC_PICK(mann_sequence_pack)(a, backward);
    return packed;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mann_sequence_fwd(
    Tensor input, Tensor memory, Tensor reads, Tensor weights, Tensor usage, Tensor state, Tensor parameters, OptionalTensor lengths, int64_t outputs,
    int64_t layers, double decay, double strength, bool zero, bool separate, bool write_first, int64_t every, bool keep, bool) {
  input = dense(input), memory = dense(memory), reads = dense(reads), weights = dense(weights), usage = dense(usage), state = dense(state);
  parameters = dense(parameters), lengths = dense(lengths);
  Call call(input, memory, reads, weights, usage, state, parameters, lengths, outputs, layers, decay, strength, zero, separate, write_first, every);
  MannArgs& a = call.a;
  a.keep = keep;
  Tensor output = make(memory, {a.T, a.B, a.O}), written = make_like(memory), read = make_like(reads), found = make_like(weights);
  Tensor used = make_like(usage), after = make_like(state), saved = make(memory, {MannSaved(a).total});
  a.output = out(output), a.memory_out = out(written), a.reads_out = out(read), a.weights_out = out(found), a.usage_out = out(used);
  a.state_out = out(after), a.saved = out(saved);
  const Tensor packed = call.pack(memory, false);
  auto* kernel = MC_PICK(mann_sequence_fwd);
  parallel(a.groups(), call.cost(), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {output, written, read, found, used, after, keep ? saved : make(memory, {0})};
}

// The input with zeros where items have ended: whatever the padding holds, it must not reach the parameters' gradients.
Tensor without_padding(const MannArgs& a, const Tensor& input) {
  Tensor clean = make_like(input);
  const int64_t row = a.X * (a.dtype == DType::f64 ? 8 : 4);
  for (int64_t i = 0; i < a.T * a.B && row > 0; i++) {
    char* to = (char*)out(clean) + i * row;
    if (i / a.B < a.lengths[i % a.B]) std::memcpy(to, (const char*)a.input + i * row, (size_t)row);
    else std::memset(to, 0, (size_t)row);
  }
  return clean;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mann_sequence_bwd(
    OptionalTensor grad_output, OptionalTensor grad_memory, OptionalTensor grad_reads, OptionalTensor grad_weights, OptionalTensor,
    OptionalTensor grad_state, Tensor saved, Tensor input, Tensor memory, Tensor reads, Tensor weights, Tensor usage, Tensor state, Tensor parameters,
    OptionalTensor lengths, int64_t outputs, int64_t layers, double decay, double strength, bool zero, bool separate, bool write_first, int64_t every, bool,
    bool input_grad) {
  input = dense(input), memory = dense(memory), reads = dense(reads), weights = dense(weights), usage = dense(usage), state = dense(state);
  parameters = dense(parameters), lengths = dense(lengths);
  Call call(input, memory, reads, weights, usage, state, parameters, lengths, outputs, layers, decay, strength, zero, separate, write_first, every);
  MannArgs& a = call.a;
  a.keep = true;
  if (saved.numel() != MannSaved(a).total)
    fail("memcore.mann_sequence: 'saved' must have " + std::to_string(MannSaved(a).total) + " numbers, got " + std::to_string(saved.numel()));
  a.saved = out(saved);
  if (a.lengths) input = without_padding(a, input), a.input = in(input);
  grad_output = dense(grad_output), grad_memory = dense(grad_memory), grad_reads = dense(grad_reads);
  grad_weights = dense(grad_weights), grad_state = dense(grad_state);
  a.grad_output = in(grad_output), a.grad_memory = in(grad_memory), a.grad_reads = in(grad_reads);
  a.grad_weights = in(grad_weights), a.grad_state = in(grad_state);
  Tensor dinput = input_grad ? make_like(input) : torch::stable::new_zeros(input, input.sizes());
  Tensor dmemory = make_like(memory), dreads = make_like(reads), dweights = make_like(weights), dstate = make_like(state);
  Tensor dparameters = make_like(parameters), deltas = make(memory, {MannDeltas(a).total});
  a.dinput = input_grad ? out(dinput) : nullptr;
  a.dmemory = out(dmemory), a.dreads = out(dreads), a.dweights = out(dweights), a.dstate = out(dstate);
  a.dparameters = out(dparameters), a.deltas = out(deltas);
  const Tensor packed = call.pack(memory, true);
  auto *groups = MC_PICK(mann_sequence_bwd), *panels = MC_PICK(mann_sequence_parameters);
  parallel(a.groups(), 3 * call.cost(), [&](int64_t begin, int64_t end) { groups(a, begin, end); });
  const int64_t count = MC_PICK(mann_sequence_panels)(a);
  parallel(count, call.cost() * a.groups() / (count > 0 ? count : 1), [&](int64_t begin, int64_t end) { panels(a, begin, end); });
  return {dinput, dmemory, dreads, dweights, dstate, dparameters};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("mann_sequence_fwd", TORCH_BOX(&memcore::mann_sequence_fwd));
  m.impl("mann_sequence_bwd", TORCH_BOX(&memcore::mann_sequence_bwd));
}
