"""Neural Turing Machine."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from .. import functional as F
from ..kernels.ntm_sequence.op import runs_whole
from ._controllers import FeedForwardController, LSTMController, for_batch, make_controller
from ._recurrent import MemoryCell, MemoryNetwork, map_state, one_of

__all__ = ["NTM", "NTMCell", "NTMState"]


class NTMState(NamedTuple):
    """Everything an NTM carries from one step to the next; batch first in every tensor.

    memory [B,N,W]; reads [B,R,W], what the read heads found last; weights [B,R+Hw,N], read heads first; controller, the
    controller's own state: (h, c) of every LSTM layer as a flat tuple of [B,K], () for a feed-forward controller, or
    whatever a module of the user's own returns.
    """

    memory: Tensor
    reads: Tensor
    weights: Tensor
    controller: Any

    def detach(self) -> "NTMState":
        """The same state cut off from the graph, for truncated back-propagation through time."""
        return map_state(Tensor.detach, self)


class NTMCell(MemoryCell):
    """One step of a Neural Turing Machine without an output layer: `features, state = cell(input, state)`.

    h_t = controller([x_t, reads_{t-1}]); interface = W h_t + b; memory, reads, weights = `memcore.functional.ntm_step`;
    features = [h_t, reads_t]. Arguments as in `memcore.NTM`.
    """

    kind = NTMState

    def __init__(
        self,
        input_size: int,
        *,
        memory_slots: int = 128,
        slot_width: int = 20,
        controller: str | nn.Module = "lstm",
        controller_size: int = 100,
        controller_layers: int = 1,
        read_heads: int = 1,
        write_heads: int = 1,
        shift_range: int = 1,
        memory_init: str = "constant",
        first_weighting: str = "learned",
        order: str = "write_read",
        controller_clip: float | None = None,
        read_gate_bias: float = -2.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _checks.whole("NTM", "input_size", input_size, 1)
        _checks.whole("NTM", "memory_slots", memory_slots, 1)
        _checks.whole("NTM", "slot_width", slot_width, 1)
        _checks.whole("NTM", "read_heads", read_heads, 0)
        _checks.whole("NTM", "write_heads", write_heads, 0)
        _checks.whole("NTM", "shift_range", shift_range, 0)
        heads = read_heads + write_heads
        if heads == 0:
            raise ValueError("memcore.NTM: 'read_heads' + 'write_heads' must be at least 1, got 0")
        one_of("NTM", "memory_init", memory_init, ("constant", "learned", "random"))
        one_of("NTM", "first_weighting", first_weighting, ("learned", "onehot", "uniform"))
        one_of("NTM", "order", order, ("write_read", "read_write"))
        if memory_init == "constant" and first_weighting == "uniform":
            raise ValueError(
                "memcore.NTM: 'first_weighting' must be 'learned' or 'onehot' with memory_init='constant' (all slots would "
                "stay equal for ever), got 'uniform'"
            )
        if controller_clip is not None and not controller_clip > 0:
            raise ValueError(f"memcore.NTM: 'controller_clip' must be positive or None, got {controller_clip}")
        _checks.finite_number("NTM", "read_gate_bias", read_gate_bias)
        factory = {"device": device, "dtype": dtype}
        self.input_size, self.memory_slots, self.slot_width = input_size, memory_slots, slot_width
        self.read_heads, self.write_heads, self.shift_range = read_heads, write_heads, shift_range
        self.memory_init, self.first_weighting, self.order = memory_init, first_weighting, order
        self.controller_clip, self.read_gate_bias = controller_clip, float(read_gate_bias)
        self.feedback_size = read_heads * slot_width
        self.controller = make_controller(
            "NTM", controller, input_size, self.feedback_size, controller_size, controller_layers, **factory
        )
        size = heads * (slot_width + 3 + 2 * shift_range + 1) + write_heads * 2 * slot_width
        self.interface = nn.Linear(self.controller.output_size, size, **factory)
        self.first_reads = nn.Parameter(torch.empty(read_heads, slot_width, **factory)) if read_heads else None
        self.first_logits = nn.Parameter(torch.empty(heads, memory_slots, **factory)) if first_weighting == "learned" else None
        first_memory = None if memory_init == "constant" else torch.empty(memory_slots, slot_width, **factory)
        if memory_init == "learned":
            self.first_memory = nn.Parameter(first_memory)
        else:
            # A constant of the model, drawn once: the same input gives the same output at every call.
            self.register_buffer("first_memory", first_memory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform weights, biases and first reads 0, drawn memories normal; the heads start focused on slot 0.

        A focus is what a shift can move: the first weighting's logit of slot 0 is 8 (others 0, together 4 % at 128 slots) and
        the gates' biases are -2 (of the read heads: `read_gate_bias`), so that a head keeps 88 % of its last weighting. Copy is
        then learned in about 2,000 updates;
        from scattered weightings and gates of 1/2 the focus dissolves within a few steps and little is learned.
        """
        if hasattr(self.controller, "reset_parameters"):
            self.controller.reset_parameters()
        nn.init.xavier_uniform_(self.interface.weight)
        nn.init.zeros_(self.interface.bias)
        with torch.no_grad():
            for head, gate in enumerate(self._gates()):
                self.interface.bias[gate] = self.read_gate_bias if head < self.read_heads else -2.0
        if self.first_reads is not None:
            nn.init.zeros_(self.first_reads)
        if self.first_logits is not None:
            nn.init.zeros_(self.first_logits)
            with torch.no_grad():
                self.first_logits[:, 0] = 8.0
        if self.first_memory is not None:
            nn.init.normal_(self.first_memory, std=1 / math.sqrt(self.slot_width))

    def _gates(self) -> list[int]:
        """Where the heads' gates lie in the interface (the layout of `memcore.functional.split_interface`)."""
        head = self.slot_width + 4 + 2 * self.shift_range
        starts = [h * head for h in range(self.read_heads)]
        starts += [self.read_heads * head + h * (head + 2 * self.slot_width) for h in range(self.write_heads)]
        return [start + self.slot_width + 1 for start in starts]

    def initial_state(self, batch_size: int) -> NTMState:
        """The state before the first step."""
        return NTMState(*self._first(batch_size), self.controller.initial_state(batch_size))

    def _first(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """(memory, reads, weights) before the first step."""
        heads, like = self.read_heads + self.write_heads, self.interface.weight
        if self.first_memory is None:
            memory = like.new_full((batch_size, self.memory_slots, self.slot_width), 1e-6)
        else:
            memory = for_batch(self.first_memory, batch_size)
        if self.first_reads is None:
            reads = like.new_zeros(batch_size, 0, self.slot_width)
        else:
            reads = for_batch(self.first_reads, batch_size)
        if self.first_logits is not None:
            weights = for_batch(self.first_logits.softmax(1), batch_size)
        elif self.first_weighting == "uniform":
            weights = like.new_full((batch_size, heads, self.memory_slots), 1 / self.memory_slots)
        else:
            weights = like.new_zeros(batch_size, heads, self.memory_slots)
            weights[:, :, 0] = 1
        return memory, reads, weights

    def sizes(self, batch_size: int) -> dict[str, tuple[int, ...] | None]:
        heads = self.read_heads + self.write_heads
        controller = self.controller.sizes(batch_size)
        return {
            "memory": (batch_size, self.memory_slots, self.slot_width),
            "reads": (batch_size, self.read_heads, self.slot_width),
            "weights": (batch_size, heads, self.memory_slots),
            **({"controller": None} if controller is None else {f"controller[{i}]": s for i, s in enumerate(controller)}),
        }

    def advance(self, x: Tensor, state: NTMState) -> tuple[Tensor, NTMState, Tensor]:
        """One step on the controller's hoisted input: (h, state, interface)."""
        h, controller = self.controller.step(x, state.reads.flatten(1), state.controller)
        interface = self.interface(h)
        if self.controller_clip is not None:
            interface = interface.clamp(-self.controller_clip, self.controller_clip)
        memory, reads, weights = F.ntm_step(
            state.memory,
            interface,
            state.weights,
            read_heads=self.read_heads,
            write_heads=self.write_heads,
            shift_range=self.shift_range,
            order=self.order,
        )
        return h, NTMState(memory, reads, weights, controller), interface

    def sequence(
        self, x: Tensor, state: NTMState | None, lengths: list[int] | None, output: nn.Linear
    ) -> tuple[Tensor, NTMState] | None:
        controller = self.controller
        lstm = isinstance(controller, LSTMController)
        standard = lstm or isinstance(controller, FeedForwardController)
        if not standard or torch.is_autocast_enabled(x.device.type):
            return None
        memory, reads, weights = self._first(x.shape[1]) if state is None else state[:3]
        layers, heads = controller.layers(), (self.read_heads, self.write_heads, self.shift_range)
        if not runs_whole(memory, self.input_size, controller.output_size, output.out_features, lstm, len(layers), *heads):
            return None
        start = torch.stack(state.controller) if lstm and state is not None else controller.first_state(x.shape[1])
        found = F.ntm_sequence(
            x,
            memory,
            reads,
            weights,
            start,
            F.NTMParameters(layers, (self.interface.weight, self.interface.bias), (output.weight, output.bias)),
            read_heads=self.read_heads,
            write_heads=self.write_heads,
            shift_range=self.shift_range,
            order=self.order,
            lstm=lstm,
            clip=self.controller_clip,
            lengths=None if lengths is None else torch.tensor(lengths),
        )
        return found.output, NTMState(found.memory, found.reads, found.weights, found.controller.unbind(0) if lstm else ())

    def watch(self, state: NTMState, interface: Tensor) -> dict[str, Tensor]:
        pieces = F.split_interface(
            interface, read_heads=self.read_heads, write_heads=self.write_heads, shift_range=self.shift_range
        )
        return {
            "memory": state.memory,
            "reads": state.reads,
            "read_weights": state.weights[:, : self.read_heads],
            "write_weights": state.weights[:, self.read_heads :],
            "add": pieces.add,
            "erase": pieces.erase,
        }

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, memory_slots={self.memory_slots}, slot_width={self.slot_width}, read_heads={self.read_heads}, "
            f"write_heads={self.write_heads}, shift_range={self.shift_range}, memory_init={self.memory_init!r}, "
            f"first_weighting={self.first_weighting!r}, order={self.order!r}, controller_clip={self.controller_clip}, "
            f"read_gate_bias={self.read_gate_bias}"
        )


class NTM(MemoryNetwork):
    """Neural Turing Machine (Graves, Wayne, Danihelka 2014, arXiv:1410.5401), with the conventions of `torch.nn.LSTM`.

    Each step: h_t = controller([x_t, reads_{t-1}]); one linear layer on h_t makes every head's raw parameters;
    `memcore.functional.ntm_step` addresses the memory by content and location (eqs. 5-9), erases and adds (eqs. 3-4) and
    reads (eq. 2); y_t = W_o [h_t, reads_t] + b_o are logits. Gradients flow through all of it, the first state's learned
    parts included.

    Args:
        input_size: X.
        output_size: O, the number of logits.
        memory_slots: N.
        slot_width: W.
        controller: "lstm", "feedforward" (tanh), or a module of your own: `module(x, state) -> (h, state)` with x
            [B, X + read_heads * W] and h [B, output_size], its attribute `output_size`, and `initial_state(batch_size)`;
            its state is a tensor or a nested tuple of tensors, batch first (`()` for none). `controller_size` and
            `controller_layers` then do not matter; an attribute `input_size`, if there is one, is checked.
        controller_size: K, units of each controller layer.
        controller_layers: number of controller layers.
        read_heads, write_heads: head counts; either may be 0, not both.
        shift_range: a head may shift its focus by -shift_range..shift_range slots.
        memory_init: first memory: "constant" (1e-6), "learned", or "random" (drawn once, kept in the `state_dict`).
        first_weighting: weights before the first step: "learned" (softmax of one row of logits for each head), "onehot"
            (slot 0) or "uniform". "uniform" with "constant" raises: nothing would ever tell two slots apart.
        order: "write_read" (the paper: reads see the new memory) or "read_write".
        controller_clip: clamp the heads' raw parameters to -controller_clip..controller_clip; None does not.
        read_gate_bias: where the read heads' gates start, before the sigmoid: -2 keeps 88 % of the last weighting at each step, 2 takes
            88 % from content. The write heads start at -2.
        batch_first: input and output are [B,T,...].
        device, dtype: of the parameters.

    Returns (on call):
        (output, state): see `forward`; state is an `NTMState`, and nothing of it stays in the module.

    Raises:
        ValueError, TypeError: for arguments that do not fit, when the model is made.

    Example:
        >>> model = memcore.NTM(9, 8)
        >>> output, state = model(torch.rand(41, 16, 9))              # [41, 16, 8]
        >>> output, state = model(torch.rand(5, 16, 9), state)        # goes on from there
        >>> y, state = model.step(torch.rand(16, 9), state)           # one step
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        memory_slots: int = 128,
        slot_width: int = 20,
        controller: str | nn.Module = "lstm",
        controller_size: int = 100,
        controller_layers: int = 1,
        read_heads: int = 1,
        write_heads: int = 1,
        shift_range: int = 1,
        memory_init: str = "constant",
        first_weighting: str = "learned",
        order: str = "write_read",
        controller_clip: float | None = None,
        read_gate_bias: float = -2.0,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        _checks.whole("NTM", "output_size", output_size, 1)
        cell = NTMCell(
            input_size,
            memory_slots=memory_slots,
            slot_width=slot_width,
            controller=controller,
            controller_size=controller_size,
            controller_layers=controller_layers,
            read_heads=read_heads,
            write_heads=write_heads,
            shift_range=shift_range,
            memory_init=memory_init,
            first_weighting=first_weighting,
            order=order,
            controller_clip=controller_clip,
            read_gate_bias=read_gate_bias,
            device=device,
            dtype=dtype,
        )
        super().__init__(cell, output_size, batch_first, device=device, dtype=dtype)
