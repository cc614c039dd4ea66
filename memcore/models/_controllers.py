"""Controllers: what turns the input and the last reads into the hidden vector that drives the memory.

The sequence loop calls `hoist` once on the whole input [T,B,X] and `step` at every time step, so that whatever does not
depend on the recurrence is one matrix product for all T.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks

__all__ = ["FeedForwardController", "LSTMController", "UserController", "for_batch", "make_controller"]


def for_batch(t: Tensor, batch_size: int, dim: int = 0) -> Tensor:
    """`t` for every element, along a new dimension. Of one element the gradient is a view, not a sum."""
    if batch_size == 1:
        return t.unsqueeze(dim)
    return t.unsqueeze(dim).expand(*t.shape[:dim], batch_size, *t.shape[dim:])


class LSTMController(nn.Module):
    """LSTM layers over [x_t, reads_{t-1}]; gates in the order input, forget, output, candidate.

    Layer 1 multiplies [h_{t-1}, reads_{t-1}] with one matrix and adds the hoisted input part; layer l > 1 multiplies
    [h_{t-1}, h_t of the layer below]. Weights start Xavier uniform for each gate, biases 0, but the forget gate's at 1.
    The state is (h, c) of layer 1, (h, c) of layer 2, ... as one flat tuple of [B,K]; it starts at zero, or at learned
    vectors that themselves start at zero.
    """

    def __init__(self, input_size: int, feedback_size: int, size: int, layers: int, learned_start: bool, **factory):
        super().__init__()
        self.output_size = size
        self.weight_input = nn.Parameter(torch.empty(input_size, 4 * size, **factory))
        widths = [size + feedback_size] + [2 * size] * (layers - 1)
        self.weights = nn.ParameterList(torch.empty(width, 4 * size, **factory) for width in widths)
        self.biases = nn.ParameterList(torch.empty(4 * size, **factory) for _ in widths)
        self.start = nn.Parameter(torch.empty(2 * layers, size, **factory)) if learned_start else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        size = self.output_size
        for i, weight in enumerate(self.weights):
            bound = math.sqrt(6 / (len(weight) + size + (len(self.weight_input) if i == 0 else 0)))
            nn.init.uniform_(weight, -bound, bound)
            if i == 0:
                nn.init.uniform_(self.weight_input, -bound, bound)
        for bias in self.biases:
            nn.init.zeros_(bias)
            nn.init.ones_(bias[size : 2 * size])
        if self.start is not None:
            nn.init.zeros_(self.start)

    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        if self.start is None:
            return (self.weight_input.new_zeros(batch_size, self.output_size),) * (2 * len(self.weights))
        return self.first_state(batch_size).unbind(0)

    def first_state(self, batch_size: int) -> Tensor:
        """`initial_state` as one tensor [2 layers, B, K]."""
        if self.start is None:
            return self.weight_input.new_zeros(2 * len(self.weights), batch_size, self.output_size)
        return for_batch(self.start, batch_size, 1)

    def sizes(self, batch_size: int) -> list[tuple[int, ...]]:
        return [(batch_size, self.output_size)] * (2 * len(self.weights))

    def hoist(self, x: Tensor) -> Tensor:
        return x @ self.weight_input + self.biases[0]

    def layers(self) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """(weight as blocks of rows, bias) of each layer as `memcore.functional.ntm_sequence` takes them."""
        first, *others = self.weights
        return list(zip([(self.weight_input, first), *((w,) for w in others)], self.biases))

    def step(self, x: Tensor, feedback: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        below, after = feedback, []
        for i, weight in enumerate(self.weights):
            h, c = state[2 * i], state[2 * i + 1]
            gates = torch.addmm(x if i == 0 else self.biases[i], torch.cat((h, below), 1), weight)
            enter, keep, out, new = gates.chunk(4, 1)
            c = torch.addcmul(torch.sigmoid(keep) * c, torch.sigmoid(enter), torch.tanh(new))
            below = torch.sigmoid(out) * torch.tanh(c)
            after += (below, c)
        return below, tuple(after)


class FeedForwardController(nn.Module):
    """Fully connected tanh layers over [x_t, reads_{t-1}], without a state of their own."""

    def __init__(self, input_size: int, feedback_size: int, size: int, layers: int, **factory):
        super().__init__()
        self.output_size = size
        self.first = nn.Linear(input_size, size, **factory)
        self.weight_feedback = nn.Parameter(torch.empty(feedback_size, size, **factory))
        self.rest = nn.ModuleList(nn.Linear(size, size, **factory) for _ in range(layers - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = math.sqrt(6 / (self.first.in_features + len(self.weight_feedback) + self.output_size))
        nn.init.uniform_(self.first.weight, -bound, bound)
        nn.init.uniform_(self.weight_feedback, -bound, bound)
        nn.init.zeros_(self.first.bias)
        for layer in self.rest:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def initial_state(self, batch_size: int) -> tuple[()]:
        return ()

    def sizes(self, batch_size: int) -> list[tuple[int, ...]]:
        return []

    def hoist(self, x: Tensor) -> Tensor:
        return self.first(x)

    def first_state(self, batch_size: int) -> Tensor:
        return self.weight_feedback.new_empty(0, batch_size, self.output_size)

    def layers(self) -> list[tuple[tuple[Tensor, ...], Tensor]]:
        """(weight as blocks of rows, bias) of each layer as `memcore.functional.ntm_sequence` takes them."""
        first = self.first.weight.t(), self.weight_feedback
        return [(first, self.first.bias), *(((layer.weight.t(),), layer.bias) for layer in self.rest)]

    def step(self, x: Tensor, feedback: Tensor, state: tuple[()]) -> tuple[Tensor, tuple[()]]:
        h = torch.tanh(torch.addmm(x, feedback, self.weight_feedback))
        for layer in self.rest:
            h = torch.tanh(layer(h))
        return h, state


class UserController(nn.Module):
    """Adapter for a module of the user's own; the protocol is told in `memcore.NTM`."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.output_size = module.output_size

    def initial_state(self, batch_size: int) -> Any:
        return self.module.initial_state(batch_size)

    def sizes(self, batch_size: int) -> None:
        return None

    def hoist(self, x: Tensor) -> Tensor:
        return x

    def step(self, x: Tensor, feedback: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.module(torch.cat((x, feedback), 1), state)


def make_controller(
    owner: str, controller: str | nn.Module, input_size: int, feedback_size: int, size: int, layers: int, **factory
) -> nn.Module:
    """The controller that `controller` names, or an adapter around the user's module."""
    if isinstance(controller, nn.Module):
        for name in ("output_size", "initial_state"):
            if not hasattr(controller, name):
                kind = type(controller).__name__
                raise TypeError(f"memcore.{owner}: 'controller' must have an attribute {name!r}, {kind} has none")
        expected = input_size + feedback_size
        found = getattr(controller, "input_size", expected)
        if found != expected:
            raise ValueError(
                f"memcore.{owner}: 'controller' must take inputs of size input_size + read_heads * slot_width = {expected}, "
                f"got one with input_size = {found}"
            )
        return UserController(controller)
    if controller not in ("lstm", "feedforward"):
        raise ValueError(
            f"memcore.{owner}: 'controller' must be 'lstm', 'feedforward' or a torch.nn.Module, got {controller!r}"
        )
    _checks.whole(owner, "controller_size", size, 1)
    _checks.whole(owner, "controller_layers", layers, 1)
    if controller == "lstm":
        return LSTMController(input_size, feedback_size, size, layers, learned_start=True, **factory)
    return FeedForwardController(input_size, feedback_size, size, layers, **factory)
