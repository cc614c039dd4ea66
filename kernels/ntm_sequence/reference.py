"""A Neural Turing Machine over a whole sequence in plain PyTorch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _parameters
from ..ntm_step import reference

__all__ = ["NTMParameters", "NTMSequence", "ntm_sequence", "run"]


class NTMParameters(NamedTuple):
    """Weights and biases of an NTM with a standard controller.

    X inputs, K units of a controller layer, O outputs, F = read_heads * W, I the size of the interface vector. G = 4K for an LSTM, whose
    gates come in the order input, forget, output, candidate; K for tanh layers. Any weight may come as a tuple of blocks of its rows, one below
    the other.
    """

    layers: Sequence[tuple[Tensor | tuple[Tensor, ...], Tensor]]
    """(weight [D, G], bias [G]) of each controller layer, multiplied from the right. The inputs D of an LSTM's first layer are
    [x_t, h_{t-1}, reads_{t-1}], of the next [h_{t-1}, h_t of the layer below]; without gates they are [x_t, reads_{t-1}] and the layer below."""
    interface: tuple[Tensor | tuple[Tensor, ...], Tensor]
    """(weight [I, K], bias [I]) of the projection to the interface vector, as of torch.nn.Linear."""
    output: tuple[Tensor | tuple[Tensor, ...], Tensor]
    """(weight [O, K + F], bias [O]) of the projection of [h_t, reads_t] to the outputs, as of torch.nn.Linear."""


class NTMSequence(NamedTuple):
    """What a run leaves behind."""

    output: Tensor
    """[T, B, O], 0 past an item's length"""
    memory: Tensor
    """[B, N, W] after each item's last step, like the rest"""
    reads: Tensor
    """[B, R, W]"""
    weights: Tensor
    """[B, H, N], read heads first"""
    controller: Tensor
    """[2 layers, B, K]: h and c of each LSTM layer in turn; [0, B, K] without gates"""


def run(
    step: Callable,
    input: Tensor,
    memory: Tensor,
    reads: Tensor,
    weights: Tensor,
    controller: Tensor,
    parameters: NTMParameters,
    lstm: bool,
    clip: float | None,
    lengths: Tensor | None,
    **heads,
) -> NTMSequence:
    """The recurrence, time step by time step; `step` is `ntm_step` or its reference, `heads` its keyword arguments."""
    states = list(controller.unbind(0))
    if lengths is not None:  # padding may hold anything, and nothing times NaN would be NaN in the weights' gradients
        input = torch.where(torch.arange(len(input), device=input.device).view(-1, 1, 1) < lengths.view(-1, 1), input, 0)
    outputs = []
    for t, x in enumerate(input.unbind(0)):
        before = (memory, reads, weights, *states)
        below = torch.cat((x, reads.flatten(1)), 1)
        for i, (weight, bias) in enumerate(parameters.layers):
            if not lstm:
                below = torch.tanh(torch.addmm(bias, below, weight))
                continue
            h, c = states[2 * i], states[2 * i + 1]
            inputs = torch.cat((x, h, reads.flatten(1)) if i == 0 else (h, below), 1)
            enter, keep, out, new = torch.addmm(bias, inputs, weight).chunk(4, 1)
            c = torch.sigmoid(keep) * c + torch.sigmoid(enter) * torch.tanh(new)
            below = torch.sigmoid(out) * torch.tanh(c)
            states[2 * i], states[2 * i + 1] = below, c
        interface = F.linear(below, *parameters.interface)
        if clip is not None:
            interface = interface.clamp(-clip, clip)
        memory, reads, weights = step(memory, interface, weights, **heads)
        output = F.linear(torch.cat((below, reads.flatten(1)), 1), *parameters.output)
        if lengths is not None:
            alive = t < lengths
            keep_old = [torch.where(alive.view(-1, *[1] * (b.dim() - 1)), a, b) for a, b in zip((memory, reads, weights, *states), before)]
            memory, reads, weights, *states = keep_old
            output = torch.where(alive.unsqueeze(1), output, 0)
        outputs.append(output)
    out = torch.stack(outputs) if outputs else input.new_empty(0, input.shape[1], len(parameters.output[1]))
    return NTMSequence(out, memory, reads, weights, torch.stack(states) if states else controller)


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
    """Controller, memory and output layer over all time steps; see memcore.functional.ntm_sequence."""
    heads = {"read_heads": read_heads, "write_heads": write_heads, "shift_range": shift_range, "order": order}
    parameters = _parameters.together(parameters, _parameters.tensors_of(parameters), NTMParameters)
    return run(reference.ntm_step, input, memory, reads, weights, controller, parameters, lstm, clip, lengths, **heads)
