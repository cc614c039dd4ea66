"""A memory-augmented network over a whole sequence in plain PyTorch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _parameters
from ..content_addressing.reference import content_addressing
from ..lrua_write.reference import lrua_write
from ..read.reference import read
from ..usage_update.reference import usage_update

__all__ = ["MANNParameters", "MANNSequence", "Operators", "mann_sequence", "run"]


class MANNParameters(NamedTuple):
    """Weights and biases of a MANN with an LSTM controller.

    X inputs, K units of a controller layer, O outputs, F = R * W for R heads, I = F + R, or 2F + R with add="separate". Any weight
    may come as a tuple of blocks of its rows, one below the other.
    """

    layers: Sequence[tuple[Tensor | tuple[Tensor, ...], Tensor]]
    """(weight [D, 4K], bias [4K]) of each LSTM layer, multiplied from the right; gates in the order input, forget, output, candidate. The inputs
    D of the first layer are [x_t, h_{t-1}, reads_{t-1}], of the next [h_{t-1}, h_t of the layer below]."""
    interface: tuple[Tensor | tuple[Tensor, ...], Tensor]
    """(weight [I, K], bias [I]) of the projection to every head's key, with add="separate" every head's word, and every head's gate, as of
    torch.nn.Linear."""
    output: tuple[Tensor | tuple[Tensor, ...], Tensor]
    """(weight [O, K + F], bias [O]) of the projection of [h_t, reads_t] to the outputs, as of torch.nn.Linear."""


class MANNSequence(NamedTuple):
    """What a run leaves behind."""

    output: Tensor
    """[T, B, O], 0 past an item's length"""
    memory: Tensor
    """[B, N, W] after each item's last step, like the rest"""
    reads: Tensor
    """[B, R, W]"""
    read_weights: Tensor
    """[B, R, N]"""
    usage: Tensor
    """[B, N], without a gradient"""
    controller: Tensor
    """[2 layers, B, K]: h and c of each LSTM layer in turn"""


class Operators(NamedTuple):
    """The public operators, or their references."""

    lrua_write: Callable
    content_addressing: Callable
    read: Callable
    usage_update: Callable


def run(
    ops: Operators,
    input: Tensor,
    memory: Tensor,
    reads: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    controller: Tensor,
    parameters: MANNParameters,
    decay: float,
    strength: float,
    zero: str | None,
    separate: bool,
    write_first: bool,
    lengths: Tensor | None,
) -> MANNSequence:
    """The recurrence, time step by time step."""
    R, W = reads.shape[1:]
    states = list(controller.unbind(0))
    usage = usage.detach()  # it only ranks the slots
    if lengths is not None:  # padding may hold anything, and nothing times NaN would be NaN in the weights' gradients
        input = torch.where(torch.arange(len(input), device=input.device).view(-1, 1, 1) < lengths.view(-1, 1), input, 0)
    beta = None if strength == 1 else input.new_full(reads.shape[:2], strength)
    outputs = []
    for t, x in enumerate(input.unbind(0)):
        before = (memory, reads, read_weights, usage, *states)
        below = x
        for i, (weight, bias) in enumerate(parameters.layers):
            h, c = states[2 * i], states[2 * i + 1]
            inputs = torch.cat((x, h, reads.flatten(1)) if i == 0 else (h, below), 1)
            enter, keep, out, new = torch.addmm(bias, inputs, weight).chunk(4, 1)
            c = torch.sigmoid(keep) * c + torch.sigmoid(enter) * torch.tanh(new)
            below = torch.sigmoid(out) * torch.tanh(c)
            states[2 * i], states[2 * i + 1] = below, c
        words, gate = F.linear(below, *parameters.interface).tensor_split((-R,), 1)
        words = torch.tanh(words).unflatten(1, (-1, W))
        key, word = words.chunk(2, 1) if separate else (words, None)
        old = memory
        memory, write_weights = ops.lrua_write(memory, key, read_weights, usage, torch.sigmoid(gate), zero=zero, add=word)
        source = memory if write_first else old
        read_weights = ops.content_addressing(key, source, beta)
        reads = ops.read(source, read_weights)
        usage = ops.usage_update(usage, read_weights.detach(), write_weights.detach(), decay)
        output = F.linear(torch.cat((below, reads.flatten(1)), 1), *parameters.output)
        if lengths is not None:
            alive = t < lengths
            after = (memory, reads, read_weights, usage, *states)
            chosen = [torch.where(alive.view(-1, *[1] * (b.dim() - 1)), a, b) for a, b in zip(after, before)]
            memory, reads, read_weights, usage, *states = chosen
            output = torch.where(alive.unsqueeze(1), output, 0)
        outputs.append(output)
    out = torch.stack(outputs) if outputs else input.new_empty(0, input.shape[1], len(parameters.output[1]))
    return MANNSequence(out, memory, reads, read_weights, usage, torch.stack(states))


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
    """Controller, memory and output layer over all time steps; see memcore.functional.mann_sequence."""
    ops = Operators(lrua_write, content_addressing, read, usage_update)
    state = memory, reads, read_weights, usage, controller
    parameters = _parameters.together(parameters, _parameters.tensors_of(parameters), MANNParameters)
    return run(ops, input, *state, parameters, decay, strength, zero, add == "separate", order == "write_read", lengths)
