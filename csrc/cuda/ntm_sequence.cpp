#include "ntm_sequence.h"

#include <array>

#include "glue.h"

namespace memcore {
namespace cuda {
namespace {

const char kName[] = "ntm_sequence";

SequenceArgs arguments(
    const OnDevice& on, const Tensor& input, const Tensor& memory, const Tensor& reads, const Tensor& weights, const Tensor& state,
    const Tensor& parameters, const OptionalTensor& lengths, int64_t outputs, bool lstm, int64_t layers, int64_t read_heads, int64_t write_heads,
    int64_t shift_range, bool write_first, double clip, int64_t every) {
  if (dtype_of(memory) != DType::f32) fail("memcore.ntm_sequence: the CUDA kernel takes float32 tensors");
  SequenceArgs a{};
  a.device = on.index();
  a.T = input.size(0), a.B = input.size(1), a.X = input.size(2), a.N = memory.size(1), a.W = memory.size(2), a.K = state.size(2);
  a.O = outputs, a.lstm = lstm, a.layers = layers, a.R = read_heads, a.Hw = write_heads, a.S = 2 * shift_range + 1;
  a.write_first = write_first, a.clip = clip, a.every = every;
  small(kName, {a.X, a.N, a.W, a.K, a.O, a.R, a.Hw, a.S, a.layers});
  if (a.R > kReadHeads) fail("memcore.ntm_sequence: the CUDA kernel takes up to 8 read heads, got " + std::to_string(a.R));
  const auto expected = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) { expect(kName, name, t, memory, shape); };
  expected("input", input, {a.T, a.B, a.X}), expected("memory", memory, {a.B, a.N, a.W}), expected("reads", reads, {a.B, a.R, a.W});
  expected("weights", weights, {a.B, a.R + a.Hw, a.N}), expected("controller", state, {lstm ? 2 * layers : 0, a.B, a.K});
  expected("parameters", parameters, {parameters.numel()});
  if (parameters.numel() != a.numbers())
    fail("memcore.ntm_sequence: 'parameters' must have " + std::to_string(a.numbers()) + " numbers, got " + std::to_string(parameters.numel()));
  const auto at = [](const Tensor& t) { return (const float*)in(t); };
  a.input = at(input), a.memory = at(memory), a.reads = at(reads), a.weights = at(weights), a.state = at(state), a.parameters = at(parameters);
  a.lengths = (const int64_t*)in(lengths);
  return a;
}

// `rows` x `columns` numbers of a flat tensor, and such with padded rows.
Tensor part(Tensor flat, int64_t at, int64_t rows, int64_t columns) {
  return torch::stable::view(torch::stable::narrow(flat, 0, at, rows * columns), {rows, columns});
}
Tensor padded(const Tensor& flat, int64_t at, int64_t rows, int64_t columns) {
  Tensor all = part(flat, at, rows, SequenceArgs::padded(columns));
  return torch::stable::narrow(all, 1, 0, columns);
}
Tensor columns(Tensor of, int64_t at, int64_t count) { return torch::stable::narrow(of, 1, at, count); }
Tensor turned(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// to = a b, in place; the form with an output is one that autocast leaves alone.
void multiply(const Tensor& a, const Tensor& b, const Tensor& to) {
  namespace values = torch::stable::detail;
  std::array<StableIValue, 3> stack{values::from(a), values::from(b), values::from(to)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  values::to<Tensor>(stack[0]);
}

void fits(int64_t workspace) {
  if (workspace < 0) fail("memcore.ntm_sequence: one memory with its controller does not fit the shared memory of a block of this GPU");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> fwd(
    Tensor input, Tensor memory, Tensor reads, Tensor weights, Tensor state, Tensor parameters, OptionalTensor lengths, int64_t outputs, bool lstm,
    int64_t layers, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first, double clip, int64_t every, bool keep) {
  const OnDevice on(memory);
  input = dense(input), memory = dense(memory), reads = dense(reads), weights = dense(weights), state = dense(state);
  parameters = dense(parameters), lengths = dense(lengths);
  SequenceArgs a = arguments(
      on, input, memory, reads, weights, state, parameters, lengths, outputs, lstm, layers, read_heads, write_heads, shift_range, write_first, clip,
      every);
  a.keep = keep;
  fits(mc_ntm_sequence_fwd_workspace(&a));
  Tensor output = make(memory, {a.T, a.B, a.O}), written = make_like(memory), read = make_like(reads), found = make_like(weights);
  Tensor after = make_like(state), saved = make(memory, {keep ? a.saved_size() : 0});
  a.output = (float*)out(output), a.memory_out = (float*)out(written), a.reads_out = (float*)out(read), a.weights_out = (float*)out(found);
  a.state_out = (float*)out(after), a.saved = (float*)out(saved);
  const int64_t I = a.I(), K = a.K, Q = a.K + a.F();
  const Tensor packed = make(memory, {K * a.padded(I) + Q * a.padded(a.O)});
  Tensor interface = padded(packed, 0, K, I), output_weight = padded(packed, K * a.padded(I), Q, a.O);
  torch::stable::copy_(interface, turned(part(parameters, a.interface_at(), I, K)));
  torch::stable::copy_(output_weight, turned(part(parameters, a.output_at(), a.O, Q)));
  a.packed = (const float*)in(packed);
  on.check(kName, mc_ntm_sequence_fwd(&a, on.stream()));
  return {output, written, read, found, after, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bwd(
    OptionalTensor grad_output, OptionalTensor grad_memory, OptionalTensor grad_reads, OptionalTensor grad_weights, OptionalTensor grad_state,
    Tensor saved, Tensor input, Tensor memory, Tensor reads, Tensor weights, Tensor state, Tensor parameters, OptionalTensor lengths,
    int64_t outputs, bool lstm, int64_t layers, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first, double clip,
    int64_t every, bool) {
  const OnDevice on(memory);
  input = dense(input), memory = dense(memory), reads = dense(reads), weights = dense(weights), state = dense(state);
  parameters = dense(parameters), lengths = dense(lengths), saved = dense(saved);
  grad_output = dense(grad_output), grad_memory = dense(grad_memory), grad_reads = dense(grad_reads);
  grad_weights = dense(grad_weights), grad_state = dense(grad_state);
  SequenceArgs a = arguments(
      on, input, memory, reads, weights, state, parameters, lengths, outputs, lstm, layers, read_heads, write_heads, shift_range, write_first, clip,
      every);
  if (saved.numel() != a.saved_size())
    fail("memcore.ntm_sequence: 'saved' must have " + std::to_string(a.saved_size()) + " numbers, got " + std::to_string(saved.numel()));
  const int64_t bytes = mc_ntm_sequence_bwd_workspace(&a);
  fits(bytes);
  a.saved = (float*)saved.mutable_data_ptr();
  const auto at = [](const OptionalTensor& t) { return (const float*)in(t); };
  a.grad_output = at(grad_output), a.grad_memory = at(grad_memory), a.grad_reads = at(grad_reads);
  a.grad_weights = at(grad_weights), a.grad_state = at(grad_state);
  Tensor dinput = make_like(input), dmemory = make_like(memory), dreads = make_like(reads), dweights = make_like(weights);
  Tensor dstate = make_like(state), dparameters = make_like(parameters), deltas = make(memory, {a.T * a.B, a.delta()});
  a.dinput = (float*)out(dinput), a.dmemory = (float*)out(dmemory), a.dreads = (float*)out(dreads), a.dweights = (float*)out(dweights);
  a.dstate = (float*)out(dstate), a.deltas = (float*)out(deltas);
  const int64_t rows = a.T * a.B, I = a.I(), K = a.K, Q = a.K + a.F();
  const Tensor packed = make(memory, {a.packed_layer(layers)});
  for (int64_t l = 0; l < layers; l++) {
    Tensor to = padded(packed, a.packed_layer(l), a.G(), a.D(l));
    torch::stable::copy_(to, turned(part(parameters, a.layer(l), a.D(l), a.G())));
  }
  a.packed = (const float*)in(packed);
  const Workspace workspace(memory, bytes);
  a.workspace = (float*)workspace.data();
  on.check(kName, mc_ntm_sequence_bwd(&a, on.stream()));

  // The parameters' gradients: a layer's bias is the weight of an input that is always 1.
  const Tensor kept = part(saved, a.rows_at(), rows, a.row());
  for (int64_t l = 0; l < layers; l++)
    multiply(turned(columns(kept, a.kept(l), a.D(l) + 1)), columns(deltas, l * a.G(), a.G()), part(dparameters, a.layer(l), a.D(l) + 1, a.G()));
  const auto linear = [&](int64_t delta, int64_t n, int64_t inputs, int64_t parameter) {
    const Tensor d = turned(columns(deltas, delta, n));
    multiply(d, columns(kept, a.kept_features(), inputs), part(dparameters, parameter, n, inputs));
    multiply(d, columns(kept, a.kept_features() + Q, 1), part(dparameters, parameter + n * inputs, n, 1));
  };
  linear(a.delta_interface(), I, K, a.interface_at());
  linear(a.delta_output(), a.O, Q, a.output_at());
  return {dinput, dmemory, dreads, dweights, dstate, dparameters};
}

}  // namespace
}  // namespace cuda
}  // namespace memcore

MC_IMPL(m) {
  m.impl("_ntm_sequence_fwd_cuda", TORCH_BOX(&memcore::cuda::fwd));
  m.impl("_ntm_sequence_bwd_cuda", TORCH_BOX(&memcore::cuda::bwd));
}
