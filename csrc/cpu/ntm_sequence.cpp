#include "ntm_sequence.h"

#include "common.h"

namespace memcore {
namespace {

struct Call {
  SequenceArgs a{};
  Call(const Tensor& input, const Tensor& memory, const Tensor& reads, const Tensor& weights, const Tensor& state, const Tensor& parameters,
       const OptionalTensor& lengths, int64_t outputs, bool lstm, int64_t layers, int64_t read_heads, int64_t write_heads, int64_t shift_range,
       bool write_first, double clip, int64_t every) {
    a.dtype = dtype_of(memory);
    if (a.dtype != DType::f32 && a.dtype != DType::f64) fail("memcore.ntm_sequence: the kernel takes float32 and float64 tensors");
    a.T = input.size(0), a.B = input.size(1), a.X = input.size(2), a.N = memory.size(1), a.W = memory.size(2);
    a.O = outputs, a.lstm = lstm, a.layers = layers, a.R = read_heads, a.Hw = write_heads, a.range = shift_range;
    a.write_first = write_first, a.clip = clip, a.every = every, a.K = state.size(2);
    if (layers > SavedLayout::kLayers) fail("memcore.ntm_sequence: the kernel takes up to 8 controller layers");
    const int64_t states = lstm ? 2 * layers : 0;
    const auto expected = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> shape) { expect("ntm_sequence", name, t, memory, shape); };
    expected("input", input, {a.T, a.B, a.X}), expected("memory", memory, {a.B, a.N, a.W}), expected("reads", reads, {a.B, a.R, a.W});
    expected("weights", weights, {a.B, a.H(), a.N}), expected("controller", state, {states, a.B, a.K}), expected("parameters", parameters, {parameters.numel()});
    int64_t numbers = a.I() * (a.K + 1) + a.O * (a.K + a.F() + 1);
    for (int64_t l = 0; l < layers; l++) numbers += (a.D(l) + 1) * a.G();
    if (parameters.numel() != numbers)
      fail("memcore.ntm_sequence: 'parameters' must have " + std::to_string(numbers) + " numbers, got " + std::to_string(parameters.numel()));
    a.input = in(input), a.memory = in(memory), a.reads = in(reads), a.weights = in(weights), a.state = in(state), a.parameters = in(parameters);
    a.lengths = (const int64_t*)in(lengths);
  }
  // Roughly the multiply-adds of one group.
  int64_t cost() const {
    int64_t one = a.I() * a.K + a.O * (a.K + a.F()) + (a.H() + 2) * a.N * (a.W + 32);
    for (int64_t l = 0; l < a.layers; l++) one += a.D(l) * a.G();
    return one * a.group() * a.T;
  }
  // All groups, each by a thread, or one after the other by all threads where threads would be left over.
  template <class Kernel> void run(Kernel* kernel, int64_t passes) {
    a.spread = nullptr;
    if (a.part() < a.N && a.groups() < (int64_t)torch::stable::get_num_threads()) {
      a.spread = [](int64_t n, void* context, void (*run)(void*, int64_t, int64_t)) {
        torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { run(context, begin, end); });
      };
      return kernel(a, 0, a.groups());
    }
    parallel(a.groups(), passes * cost(), [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  }
  // Weights as the kernels want them, for as long as the tensor lives.
  Tensor pack(const Tensor& like, bool backward) {
    Tensor packed = make(like, {MC_PICK(ntm_sequence_packed)(a, backward) + 64});
    a.packed = (void*)(((uintptr_t)out(packed) + 63) / 64 * 64);
    MC_PICK(ntm_sequence_pack)(a, backward);
    return packed;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ntm_sequence_fwd(
    Tensor input, Tensor memory, Tensor reads, Tensor weights, Tensor state, Tensor parameters, OptionalTensor lengths, int64_t outputs, bool lstm,
    int64_t layers, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first, double clip, int64_t every, bool keep) {
  input = dense(input), memory = dense(memory), reads = dense(reads), weights = dense(weights), state = dense(state), parameters = dense(parameters);
  lengths = dense(lengths);
  Call call(input, memory, reads, weights, state, parameters, lengths, outputs, lstm, layers, read_heads, write_heads, shift_range, write_first, clip, every);
  SequenceArgs& a = call.a;
  a.keep = keep;
  Tensor output = make(memory, {a.T, a.B, a.O}), written = make_like(memory), read = make_like(reads), found = make_like(weights), after = make_like(state);
  a.output = out(output), a.memory_out = out(written), a.reads_out = out(read), a.weights_out = out(found), a.state_out = out(after);
  Tensor saved = make(memory, {SavedLayout(a).total});
  a.saved = out(saved);
  const Tensor packed = call.pack(memory, false);
  call.run(MC_PICK(ntm_sequence_fwd), 1);
  return {output, written, read, found, after, keep ? saved : make(memory, {0})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ntm_sequence_bwd(
    OptionalTensor grad_output, OptionalTensor grad_memory, OptionalTensor grad_reads, OptionalTensor grad_weights, OptionalTensor grad_state,
    Tensor saved, Tensor input, Tensor memory, Tensor reads, Tensor weights, Tensor state, Tensor parameters, OptionalTensor lengths, int64_t outputs,
    bool lstm, int64_t layers, int64_t read_heads, int64_t write_heads, int64_t shift_range, bool write_first, double clip, int64_t every, bool) {
  input = dense(input), memory = dense(memory), reads = dense(reads), weights = dense(weights), state = dense(state), parameters = dense(parameters);
  lengths = dense(lengths);
  Call call(input, memory, reads, weights, state, parameters, lengths, outputs, lstm, layers, read_heads, write_heads, shift_range, write_first, clip, every);
  SequenceArgs& a = call.a;
  a.keep = true;
  if (saved.numel() != SavedLayout(a).total)
    fail("memcore.ntm_sequence: 'saved' must have " + std::to_string(SavedLayout(a).total) + " numbers, got " + std::to_string(saved.numel()));
  a.saved = out(saved);
  grad_output = dense(grad_output), grad_memory = dense(grad_memory), grad_reads = dense(grad_reads);
  grad_weights = dense(grad_weights), grad_state = dense(grad_state);
  a.grad_output = in(grad_output), a.grad_memory = in(grad_memory), a.grad_reads = in(grad_reads);
  a.grad_weights = in(grad_weights), a.grad_state = in(grad_state);
  Tensor dinput = make_like(input), dmemory = make_like(memory), dreads = make_like(reads), dweights = make_like(weights), dstate = make_like(state);
  Tensor dparameters = make_like(parameters), deltas = make(memory, {DeltaLayout(a).total});
  a.dinput = out(dinput), a.dmemory = out(dmemory), a.dreads = out(dreads), a.dweights = out(dweights), a.dstate = out(dstate);
  a.dparameters = out(dparameters), a.deltas = out(deltas);
  const Tensor packed = call.pack(memory, true);
  call.run(MC_PICK(ntm_sequence_bwd), 3);
  auto* panels = MC_PICK(ntm_sequence_parameters);
  const int64_t count = MC_PICK(ntm_sequence_panels)(a);
  parallel(count, call.cost() * a.groups() / (count > 0 ? count : 1), [&](int64_t begin, int64_t end) { panels(a, begin, end); });
  return {dinput, dmemory, dreads, dweights, dstate, dparameters};
}

}  // namespace
}  // namespace memcore

STABLE_TORCH_LIBRARY_IMPL(memcore, CPU, m) {
  m.impl("ntm_sequence_fwd", TORCH_BOX(&memcore::ntm_sequence_fwd));
  m.impl("ntm_sequence_bwd", TORCH_BOX(&memcore::ntm_sequence_bwd));
}
