"""A memory-augmented network over a whole sequence: checks, schema, autograd."""

import math

import torch
from torch import Tensor

from ... import _backend, _checks
from .. import _parameters
from .._op import register
from ..content_addressing.op import content_addressing
from ..lrua_write.op import lrua_write
from ..read.op import read
from ..usage_update.op import usage_update
from . import reference
from .reference import MANNParameters, MANNSequence

__all__ = ["MANNParameters", "MANNSequence", "mann_sequence"]

_OP = "mann_sequence"
_ADDS = ("key", "separate")
_ORDERS = ("write_read", "read_write")
_MOST_LAYERS = 8  # of the native kernel


def _sizes(inputs, units, outputs, width, layers, heads, separate) -> list[tuple[int, ...]]:
    """Shapes in the flat parameters: (weight, bias) of each layer, of the interface and of the output."""
    reads = heads * width
    found = []
    for i in range(layers):
        found += [(units + (inputs + reads if i == 0 else units), 4 * units), (4 * units,)]
    size = reads * (2 if separate else 1) + heads
    return [*found, (size, units), (size,), (outputs, units + reads), (outputs,)]


def _unpack(flat: Tensor, *shapes_of) -> MANNParameters:
    shapes = _sizes(*shapes_of)
    parts = [part.view(shape) for part, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes)]
    pairs = list(zip(parts[::2], parts[1::2]))
    return MANNParameters(pairs[:-2], pairs[-2], pairs[-1])


def _reference(
    input, memory, reads, read_weights, usage, controller, parameters, lengths, outputs, layers, decay, strength, zero, separate, write_first, every, keep, input_grad
):  # fmt: skip
    shapes_of = input.shape[2], controller.shape[2], outputs, memory.shape[2], layers, reads.shape[1], separate
    return reference.mann_sequence(
        input,
        memory,
        reads,
        read_weights,
        usage,
        controller,
        _unpack(parameters, *shapes_of),
        decay=decay,
        strength=strength,
        zero="least_used" if zero else None,
        add=_ADDS[1 if separate else 0],
        order=_ORDERS[0 if write_first else 1],
        lengths=lengths,
    )


def _up16(n):
    return (n + 15) // 16 * 16


def saved_numbers(steps, batch, units, slots, width, layers, heads, separate, every) -> dict[str, int]:
    """How many numbers the forward keeps for the backward, by kind: of the controller, the addressing, and copies of the memory."""
    k, n, w = _up16(units), _up16(slots), _up16(width)
    state = layers * 2 * k + _up16(heads * width)
    addressing = heads * (n + w * (2 if separate else 1)) + n + _up16(heads) + 16
    return {
        "controller": batch * (steps * layers * _up16(4 * units) + (steps + 1) * state),
        "addressing": batch * (steps * addressing + (steps + 1) * heads * n),
        "memory": -(-steps // every) * batch * slots * width,
    }


def _fake(
    input, memory, reads, read_weights, usage, controller, parameters, lengths, outputs, layers, decay, strength, zero, separate, write_first, every, keep, input_grad
):  # fmt: skip
    steps, batch, _ = input.shape
    _, slots, width = memory.shape
    saved = saved_numbers(steps, batch, controller.shape[2], slots, width, layers, reads.shape[1], separate, every)
    return (
        memory.new_empty(steps, batch, outputs),
        memory.new_empty(memory.shape),
        memory.new_empty(reads.shape),
        memory.new_empty(read_weights.shape),
        memory.new_empty(usage.shape),
        memory.new_empty(controller.shape),
        memory.new_empty(sum(saved.values()) if keep else 0),
    )


_fwd = register(
    _OP,
    "Tensor input, Tensor memory, Tensor reads, Tensor read_weights, Tensor usage, Tensor controller, Tensor parameters, Tensor? lengths, int outputs, "
    "int layers, float decay, float strength, bool zero, bool separate, bool write_first, int every, bool keep, bool input_grad",
    _reference,
    _fake,
    outputs=6,
    saved=1,
    differentiable=("input", "memory", "reads", "read_weights", "controller", "parameters"),
)


def runs_whole(device: torch.device) -> bool:
    """Whether one kernel runs the recurrence; on GPUs the operators of a step run it step by step."""
    return device.type == "cpu" and _backend.takes_kernel(_OP, device)


def mann_sequence(
    input: Tensor,
    memory: Tensor,
    reads: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    controller: Tensor,
    parameters: MANNParameters,
    *,
    decay: float = 0.95,
    strength: float = 1.0,
    zero: str | None = "least_used",
    add: str = "key",
    order: str = "write_read",
    lengths: Tensor | None = None,
    checkpoint_every: int | None = None,
) -> MANNSequence:
    """A MANN over a whole sequence in ONE operator on the CPU, LSTM controller and output layer included (Santoro et al. 2016).

    At each step: h_t = LSTM([x_t, reads_{t-1}]); one linear layer on h_t gives every head's key k_t (through tanh), gate (through a sigmoid) and,
    with add="separate", word (through tanh); the memory is written by `lrua_write`, to one least-used slot that all heads share; read_weights_t =
    softmax_n strength cos(k_t, M_t(n)); reads_t = read_weights_t M_t; usage_t = decay usage_{t-1} + sum of read and write weights; output_t = W_o [h_t,
    reads_t] + b_o. The backward goes through time by hand: it keeps each step's activations, similarities and weights, and the memory once every
    `checkpoint_every` steps, from which it rebuilds the others. On GPUs the operators named run time step by time step.

    Args:
        input: [T, B, X].
        memory: [B, N, W]; reads [B, R, W], read_weights [B, R, N], usage [B, N] and controller [2 layers, B, K] (h, c of each LSTM layer in turn):
            the state before the first step.
        parameters: `MANNParameters`.
        decay: of the usage, a finite number.
        strength: of the read keys, a finite number; the paper has none, which is 1.
        zero: "least_used" zeroes the one least-used slot before the write, None does not.
        add: what is written: "key", or "separate", a word of its own.
        order: "write_read" reads after the write (the paper's M_t), "read_write" before it.
        lengths: [B] integers: item b ends after lengths[b] steps, its state stays as it is and its outputs are 0. None: all T.
        checkpoint_every: steps between two kept copies of the memory; None: about sqrt(T). It changes no result.

    Returns:
        MANNSequence(output [T, B, O], memory, reads, read_weights, usage, controller), the last five as they came in. Differentiable to any order
        in every tensor but the usage, which only ranks the slots; results do not depend on the number of threads.

    Raises:
        ValueError: wrong shape, decay, zero, add, order or checkpoint_every. TypeError: not floating, or lengths not integers.
        RuntimeError: devices differ.
    """
    named = [("input", input), ("memory", memory), ("reads", reads), ("read_weights", read_weights), ("usage", usage), ("controller", controller)]
    named += [("parameters", t) for t in _parameters.tensors_of(parameters)]
    input, memory, reads, read_weights, usage, controller, *flat = _checks.common(_OP, *named)
    _checks.dims(_OP, "input", input, "T, B, X")
    _checks.dims(_OP, "memory", memory, "B, N, W")
    _checks.dims(_OP, "reads", reads, "B, R, W")
    _checks.dims(_OP, "controller", controller, "2 layers, B, K")
    T, B, X = input.shape
    _, N, W = memory.shape
    R, K, L = reads.shape[1], controller.shape[2], len(parameters.layers)
    O = flat[-1].shape[0]
    _checks.shape(_OP, "memory", memory, "B, N, W", (B, N, W), "input", input.shape)
    _checks.shape(_OP, "reads", reads, "B, R, W", (B, R, W), "memory", memory.shape)
    _checks.shape(_OP, "read_weights", read_weights, "B, R, N", (B, R, N), "memory", memory.shape)
    _checks.shape(_OP, "usage", usage, "B, N", (B, N), "memory", memory.shape)
    if R < 1:
        raise ValueError(f"memcore.{_OP}: 'reads' must have at least one head, got shape {tuple(reads.shape)}")
    if L < 1:
        raise ValueError(f"memcore.{_OP}: 'parameters.layers' must have at least one layer, got none")
    _checks.shape(_OP, "controller", controller, "2 layers, B, K", (2 * L, B, K), "parameters", (L, B, K))
    if zero not in ("least_used", None):
        raise ValueError(f"memcore.{_OP}: 'zero' must be 'least_used' or None, got {zero!r}")
    if add not in _ADDS:
        raise ValueError(f"memcore.{_OP}: 'add' must be 'key' or 'separate', got {add!r}")
    if order not in _ORDERS:
        raise ValueError(f"memcore.{_OP}: 'order' must be 'write_read' or 'read_write', got {order!r}")
    for name, value in (("decay", decay), ("strength", strength)):
        _checks.finite_number(_OP, name, value)
    separate = add == "separate"
    _parameters.check(_OP, parameters, flat, _sizes(X, K, O, W, L, R, separate))
    if checkpoint_every is not None:
        _checks.whole(_OP, "checkpoint_every", checkpoint_every, 1)
    if lengths is not None:
        if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise TypeError(f"memcore.{_OP}: 'lengths' must be a tensor of integers, got {getattr(lengths, 'dtype', type(lengths).__name__)}")
        _checks.shape(_OP, "lengths", lengths, "B", (B,), "input", input.shape)
        if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and B and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T:
            raise ValueError(f"memcore.{_OP}: 'lengths' must lie in 0..T = 0..{T}, got {lengths.tolist()}")
        lengths = lengths.to(memory.device, torch.int64).clamp(0, T)
    state = memory, reads, read_weights, usage, controller
    if N > 0 and L <= _MOST_LAYERS and runs_whole(memory.device):
        dtype = memory.dtype
        tensors = [input, *state, _parameters.vector(flat)]
        if dtype in (torch.bfloat16, torch.float16):  # the kernel's state stays in float32 from the first step to the last
            tensors = [t.float() for t in tensors]
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        every = checkpoint_every or max(1, round(math.sqrt(T)))
        rest = O, L, float(decay), float(strength), zero is not None, separate, order == _ORDERS[0], every, keep, keep and input.requires_grad
        found = _fwd(*tensors, lengths, *rest)
        found = MANNSequence(*(found if tensors[0].dtype == dtype else (t.to(dtype) for t in found)))
        return found._replace(usage=found.usage.detach())
    unpacked = _parameters.together(parameters, flat, MANNParameters)
    ops = reference.Operators(lrua_write, content_addressing, read, usage_update)
    return reference.run(ops, input, *state, unpacked, decay, strength, zero, separate, order == _ORDERS[0], lengths)
