"""A Neural Turing Machine over a whole sequence: checks, schema, autograd."""

import math

import torch
from torch import Tensor

from ... import _backend, _checks
from .. import _parameters
from .._op import register
from ..ntm_step.op import ntm_step
from ..split_interface.op import check_heads
from . import cuda, reference
from .reference import NTMParameters, NTMSequence

__all__ = ["NTMParameters", "NTMSequence", "ntm_sequence"]

_OP = "ntm_sequence"
_ORDERS = ("write_read", "read_write")
_MOST_LAYERS = 8  # of the native kernel


def _sizes(inputs, units, outputs, width, lstm, layers, read_heads, write_heads, shift_range) -> list[tuple[int, ...]]:
    """Shapes in the flat parameters: (weight, bias) of each layer, of the interface and of the output."""
    reads, gates = read_heads * width, 4 * units if lstm else units
    own = units if lstm else 0
    found = []
    for i in range(layers):
        found += [(own + (inputs + reads if i == 0 else units), gates), (gates,)]
    size = (read_heads + write_heads) * (width + 4 + 2 * shift_range) + 2 * width * write_heads
    return [*found, (size, units), (size,), (outputs, units + reads), (outputs,)]


def _unpack(flat: Tensor, *shapes_of) -> NTMParameters:
    shapes = _sizes(*shapes_of)
    parts = [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes)]
    pairs = list(zip(parts[::2], parts[1::2]))
    return NTMParameters(pairs[:-2], pairs[-2], pairs[-1])


def _reference(
    input, memory, reads, weights, controller, parameters, lengths, outputs, lstm, layers, read_heads, write_heads, shift_range, write_first, clip, every, keep
):  # fmt: skip
    shapes_of = input.shape[2], controller.shape[2], outputs, memory.shape[2], lstm, layers, read_heads, write_heads, shift_range
    return reference.ntm_sequence(
        input,
        memory,
        reads,
        weights,
        controller,
        _unpack(parameters, *shapes_of),
        read_heads=read_heads,
        write_heads=write_heads,
        shift_range=shift_range,
        order=_ORDERS[0 if write_first else 1],
        lstm=lstm,
        clip=clip or None,
        lengths=lengths,
    )


def _up16(n):
    return (n + 15) // 16 * 16


def copies_every(steps: int) -> int:
    """Steps between two kept copies of the memory: as many copies as floor(sqrt(T)), evenly apart."""
    return max(1, -(-steps // max(1, math.isqrt(steps))))


def saved_numbers(
    steps, batch, inputs, units, slots, width, lstm, layers, read_heads, write_heads, shift_range, every
) -> dict[str, int]:  # fmt: skip
    """How many numbers the forward keeps for the backward, by kind: of the controller, the addressing, and copies of the memory."""
    shapes = _sizes(inputs, units, 1, width, lstm, layers, read_heads, write_heads, shift_range)
    controller = sum(_up16(d) + _up16(g) + (_up16(units) if lstm else 0) for d, g in shapes[: 2 * layers : 2])
    controller += _up16(units + read_heads * width)
    heads = read_heads + write_heads
    addressing = _up16(shapes[-4][0]) + (2 * heads + 1) * _up16(slots)
    return {
        "controller": steps * batch * controller,
        "addressing": steps * batch * addressing,
        "memory": (steps - 1) // every * batch * _up16(slots) * width if steps else 0,  # the first is an input
    }


def _fake(
    input, memory, reads, weights, controller, parameters, lengths, outputs, lstm, layers, read_heads, write_heads, shift_range, write_first, clip, every, keep
):  # fmt: skip
    steps, batch, inputs = input.shape
    _, slots, width = memory.shape
    if memory.is_cuda:
        sizes = cuda.Sizes(inputs, controller.shape[2], outputs, slots, width, lstm, layers, read_heads, write_heads, shift_range)
        saved = cuda.saved_numbers(sizes, steps, batch, every)
    else:
        saved = saved_numbers(
            steps, batch, inputs, controller.shape[2], slots, width, lstm, layers, read_heads, write_heads, shift_range, every
        )  # fmt: skip
    return (
        memory.new_empty(steps, batch, outputs),
        memory.new_empty(memory.shape),
        memory.new_empty(reads.shape),
        memory.new_empty(weights.shape),
        memory.new_empty(controller.shape),
        memory.new_empty(sum(saved.values()) if keep else 0),
    )


_fwd = register(
    _OP,
    "Tensor input, Tensor memory, Tensor reads, Tensor weights, Tensor controller, Tensor parameters, Tensor? lengths, int outputs, bool lstm, "
    "int layers, int read_heads, int write_heads, int shift_range, bool write_first, float clip, int every, bool keep",
    _reference,
    _fake,
    outputs=5,
    saved=1,
    differentiable=("input", "memory", "reads", "weights", "controller", "parameters"),
)


def runs_whole(memory: Tensor, *sizes: int) -> bool:
    """Whether one kernel runs the recurrence of a network of these `cuda.Sizes`, all but slots and width, which are those of `memory`."""
    if memory.is_cuda:
        inputs, units, outputs, *rest = sizes
        return cuda.fits(memory, cuda.Sizes(inputs, units, outputs, *memory.shape[1:], *rest))
    return memory.device.type == "cpu" and _backend.takes_kernel(_OP, memory.device)


def ntm_sequence(
    input: Tensor,
    memory: Tensor,
    reads: Tensor,
    weights: Tensor,
    controller: Tensor,
    parameters: NTMParameters,
    *,
    read_heads: int,
    write_heads: int,
    shift_range: int = 1,
    order: str = "write_read",
    lstm: bool = True,
    clip: float | None = None,
    lengths: Tensor | None = None,
    checkpoint_every: int | None = None,
) -> NTMSequence:
    """A Neural Turing Machine over a whole sequence in ONE operator, controller and output layer included (Graves et al. 2014).

    At each step: h_t = controller([x_t, reads_{t-1}]); interface = W_i h_t + b_i, clamped to -clip..clip; memory, reads and weights by
    `ntm_step`; output_t = W_o [h_t, reads_t] + b_o. The backward goes through time by hand: it keeps each step's activations, similarities
    and weights, and the memory once every `checkpoint_every` steps, from which it rebuilds the others. On NVIDIA GPUs a block of threads
    keeps an element's memory in shared memory throughout; where it does not fit, and on other devices, `ntm_step` runs step by step.

    Args:
        input: [T, B, X].
        memory: [B, N, W]; reads [B, R, W], weights [B, H, N] (read heads first) and controller [2 layers, B, K] (h, c of each LSTM layer in
            turn; [0, B, K] without gates): the state before the first step.
        parameters: `NTMParameters`.
        read_heads, write_heads: either may be 0, not both.
        shift_range: R; 2R + 1 shifts are allowed.
        order: "write_read" reads after the write (the paper's M_t), "read_write" before it.
        lstm: LSTM layers; False: tanh layers.
        clip: bound of the interface's raw numbers; None: none.
        lengths: [B] integers: item b ends after lengths[b] steps, its state stays as it is and its outputs are 0. None: all T.
        checkpoint_every: steps between two kept copies of the memory; None: about sqrt(T). It changes no result.

    Returns:
        NTMSequence(output [T, B, O], memory, reads, weights, controller), the last four as they came in. Differentiable to any order in
        every tensor; results do not depend on the number of threads.

    Raises:
        ValueError: wrong shape, head counts, order, clip or checkpoint_every. TypeError: not floating, or lengths not integers.
        RuntimeError: devices differ.
    """
    named = [("input", input), ("memory", memory), ("reads", reads), ("weights", weights), ("controller", controller)]
    named += [("parameters", t) for t in _parameters.tensors_of(parameters)]
    input, memory, reads, weights, controller, *flat = _checks.common(_OP, *named)
    check_heads(_OP, read_heads, write_heads, shift_range)
    _checks.dims(_OP, "input", input, "T, B, X")
    _checks.dims(_OP, "memory", memory, "B, N, W")
    _checks.dims(_OP, "controller", controller, "2 layers, B, K")
    T, B, X = input.shape
    _, N, W = memory.shape
    K, L = controller.shape[2], len(parameters.layers)
    H, O = read_heads + write_heads, flat[-1].shape[0]
    _checks.shape(_OP, "memory", memory, "B, N, W", (B, N, W), "input", input.shape)
    _checks.shape(_OP, "reads", reads, "B, R, W", (B, read_heads, W), "memory", memory.shape)
    _checks.shape(_OP, "weights", weights, "B, H, N", (B, H, N), "memory", memory.shape)
    if L < 1:
        raise ValueError(f"memcore.{_OP}: 'parameters.layers' must have at least one layer, got none")
    _checks.shape(_OP, "controller", controller, "2 layers, B, K", (2 * L if lstm else 0, B, K), "parameters", (L, B, K))
    _parameters.check(_OP, parameters, flat, _sizes(X, K, O, W, lstm, L, read_heads, write_heads, shift_range))
    if order not in _ORDERS:
        raise ValueError(f"memcore.{_OP}: 'order' must be 'write_read' or 'read_write', got {order!r}")
    if clip is not None and not clip > 0:
        raise ValueError(f"memcore.{_OP}: 'clip' must be positive or None, got {clip}")
    if checkpoint_every is not None:
        _checks.whole(_OP, "checkpoint_every", checkpoint_every, 1)
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"memcore.{_OP}: 'lengths' must be a tensor of integers, got {getattr(lengths, 'dtype', type(lengths).__name__)}")
        _checks.shape(_OP, "lengths", lengths, "B", (B,), "input", input.shape)
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and B and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T:
            raise ValueError(f"memcore.{_OP}: 'lengths' must lie in 0..T = 0..{T}, got {lengths.tolist()}")
        lengths = lengths.to(memory.device, torch.int64).clamp(0, T)
    heads = {"read_heads": read_heads, "write_heads": write_heads, "shift_range": shift_range, "order": order}
    if N > 0 and L <= _MOST_LAYERS and runs_whole(memory, X, K, O, lstm, L, read_heads, write_heads, shift_range):
        dtype = memory.dtype
        states = [input, memory, reads, weights, controller]
        vector = _parameters.vector(flat)
        if dtype in (torch.bfloat16, torch.float16):  # the kernel's state stays in float32 from the first step to the last
            *states, vector = (t.float() for t in (*states, vector))
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (*states, vector))
        every = checkpoint_every or copies_every(T)
        rest = O, lstm, L, read_heads, write_heads, shift_range, order == _ORDERS[0], float(clip or 0), every, keep
        found = _fwd(*states, vector, lengths, *rest)
        return NTMSequence(*(found if vector.dtype == dtype else (t.to(dtype) for t in found)))
    unpacked = _parameters.together(parameters, flat, NTMParameters)
    return reference.run(ntm_step, input, memory, reads, weights, controller, unpacked, lstm, clip, lengths, **heads)
