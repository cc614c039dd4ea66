"""Memory-augmented network with least-recently-used access."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from .. import functional as F
from ..kernels.mann_sequence.op import runs_whole
from ._controllers import LSTMController
from ._recurrent import MemoryCell, MemoryNetwork, map_state, one_of

__all__ = ["MANN", "MANNCell", "MANNState"]


class MANNState(NamedTuple):
    """Everything a MANN carries from one step to the next; batch first in every tensor.

    memory [B,N,W]; reads [B,R,W]; read_weights [B,R,N]; usage [B,N], which never carries a gradient; controller, the
    LSTM's (h, c), each [B,K].
    """

    memory: Tensor
    reads: Tensor
    read_weights: Tensor
    usage: Tensor
    controller: tuple[Tensor, ...]

    def detach(self) -> "MANNState":
        """The same state cut off from the graph, for truncated back-propagation through time."""
        return map_state(Tensor.detach, self)


class MANNCell(MemoryCell):
    """One step of a MANN without an output layer: `features, state = cell(input, state)`, features = [h_t, reads_t].

    Equations and arguments as in `memcore.MANN`.
    """

    kind = MANNState

    def __init__(
        self,
        input_size: int,
        *,
        memory_slots: int = 128,
        slot_width: int = 40,
        controller_size: int = 200,
        read_heads: int = 4,
        decay: float = 0.95,
        strength: float = 1.0,
        order: str = "write_read",
        add: str = "key",
        zero: str | None = "least_used",
        slots: str = "one",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _checks.whole("MANN", "input_size", input_size, 1)
        _checks.whole("MANN", "memory_slots", memory_slots, 1)
        _checks.whole("MANN", "slot_width", slot_width, 1)
        _checks.whole("MANN", "controller_size", controller_size, 1)
        _checks.whole("MANN", "read_heads", read_heads, 1)
        if not 0 <= decay <= 1:
            raise ValueError(f"memcore.MANN: 'decay' must lie in 0..1, got {decay}")
        _checks.finite_number("MANN", "strength", strength)
        one_of("MANN", "order", order, ("write_read", "read_write"))
        one_of("MANN", "add", add, ("key", "separate"))
        one_of("MANN", "zero", zero, ("least_used", None))
        one_of("MANN", "slots", slots, ("one", "n_shared", "per_head"))
        if slots != "one" and memory_slots < read_heads:
            raise ValueError(
                f"memcore.MANN: 'memory_slots' must be at least read_heads = {read_heads} with slots={slots!r}, "
                f"got {memory_slots}"
            )
        factory = {"device": device, "dtype": dtype}
        self.input_size, self.memory_slots, self.slot_width = input_size, memory_slots, slot_width
        self.read_heads, self.decay, self.strength, self.order = read_heads, float(decay), float(strength), order
        self.add, self.zero, self.slots = add, zero, slots
        self.feedback_size = read_heads * slot_width
        self.controller = LSTMController(
            input_size, self.feedback_size, controller_size, layers=1, learned_start=False, **factory
        )
        words = self.feedback_size * (1 if add == "key" else 2)
        self.interface = nn.Linear(controller_size, words + read_heads, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform weights, biases 0 (the LSTM's forget gate: 1)."""
        self.controller.reset_parameters()
        nn.init.xavier_uniform_(self.interface.weight)
        nn.init.zeros_(self.interface.bias)

    def initial_state(self, batch_size: int) -> MANNState:
        """The state before the first step: memory 1e-6, read weights and usage one-hot on slot 0, the rest 0."""
        return MANNState(*self._first(batch_size), self.controller.initial_state(batch_size))

    def _first(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(memory, reads, read weights, usage) before the first step."""
        like = self.interface.weight
        memory = like.new_full((batch_size, self.memory_slots, self.slot_width), 1e-6)
        reads = like.new_zeros(batch_size, self.read_heads, self.slot_width)
        read_weights = like.new_zeros(batch_size, self.read_heads, self.memory_slots)
        read_weights[:, :, 0] = 1
        usage = like.new_zeros(batch_size, self.memory_slots)
        usage[:, 0] = 1
        return memory, reads, read_weights, usage

    def sizes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        return {
            "memory": (batch_size, self.memory_slots, self.slot_width),
            "reads": (batch_size, self.read_heads, self.slot_width),
            "read_weights": (batch_size, self.read_heads, self.memory_slots),
            "usage": (batch_size, self.memory_slots),
            **{f"controller[{i}]": size for i, size in enumerate(self.controller.sizes(batch_size))},
        }

    def advance(self, x: Tensor, state: MANNState) -> tuple[Tensor, MANNState, tuple[Tensor, Tensor]]:
        """One step on the controller's hoisted input: (h, state, (write weights, written words))."""
        h, controller = self.controller.step(x, state.reads.flatten(1), state.controller)
        words, gate = self.interface(h).tensor_split((-self.read_heads,), 1)
        words = torch.tanh(words).unflatten(1, (-1, self.slot_width))
        key, word = (words, None) if self.add == "key" else words.chunk(2, 1)
        memory, write_weights = self._write(state, key, word, torch.sigmoid(gate))
        source = memory if self.order == "write_read" else state.memory
        beta = None if self.strength == 1 else key.new_full(key.shape[:2], self.strength)
        read_weights = F.content_addressing(key, source, beta)
        reads = F.read(source, read_weights)
        # Usage only ranks the slots, which has no gradient.
        usage = F.usage_update(state.usage, read_weights.detach(), write_weights.detach(), self.decay)
        return h, MANNState(memory, reads, read_weights, usage, controller), (write_weights, key if word is None else word)

    def sequence(
        self, x: Tensor, state: MANNState | None, lengths: list[int] | None, output: nn.Linear
    ) -> tuple[Tensor, MANNState] | None:
        standard = self.slots == "one" and isinstance(self.controller, LSTMController)
        if not standard or torch.is_autocast_enabled(x.device.type) or not runs_whole(x.device):
            return None
        first = self._first(x.shape[1]) if state is None else state[:4]
        start = self.controller.first_state(x.shape[1]) if state is None else torch.stack(state.controller)
        found = F.mann_sequence(
            x,
            *first,
            start,
            F.MANNParameters(self.controller.layers(), (self.interface.weight, self.interface.bias), (output.weight, output.bias)),
            decay=self.decay,
            strength=self.strength,
            zero=self.zero,
            add=self.add,
            order=self.order,
            lengths=None if lengths is None else torch.tensor(lengths),
        )
        return found.output, MANNState(*found[1:5], found.controller.unbind(0))

    def _write(self, state: MANNState, key: Tensor, word: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor]:
        if self.slots == "one":
            return F.lrua_write(state.memory, key, state.read_weights, state.usage, gate, zero=self.zero, add=word)
        memory, previous = state.memory, state.read_weights
        slots = F.least_used(state.usage, self.read_heads)
        if self.slots == "n_shared":
            fresh = torch.zeros_like(state.usage).scatter(1, slots, 1).unsqueeze(1).expand_as(previous)
        else:
            fresh = torch.zeros_like(previous).scatter(2, slots.unsqueeze(2), 1)
        weights = F.interpolate(previous, fresh, gate)
        if self.zero is not None:
            memory = memory.scatter(1, slots[:, :1, None].expand(-1, -1, self.slot_width), 0)
        # Not baddbmm, which under autocast would round the memory itself.
        return memory + torch.bmm(weights.transpose(1, 2), key if word is None else word), weights

    def watch(self, state: MANNState, extra: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        write_weights, words = extra
        return {
            "memory": state.memory,
            "reads": state.reads,
            "read_weights": state.read_weights,
            "write_weights": write_weights,
            "add": words,
            "usage": state.usage,
        }

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, memory_slots={self.memory_slots}, slot_width={self.slot_width}, read_heads={self.read_heads}, "
            f"decay={self.decay}, strength={self.strength}, order={self.order!r}, add={self.add!r}, zero={self.zero!r}, slots={self.slots!r}"
        )


class MANN(MemoryNetwork):
    """Memory-augmented network for one-shot learning (Santoro et al. 2016, arXiv:1605.06065), used like `torch.nn.LSTM`.

    Each step: h_t = LSTM([x_t, reads_{t-1}]); key k_t = tanh(W_k h_t + b_k) and gate alpha_t = W_a h_t + b_a for every
    head; write weights sigmoid(alpha_t) w^r_{t-1} + (1 - sigmoid(alpha_t)) w^lu, where w^lu marks the least-used slot; that
    slot is zeroed, then the keys are added (eqs. 5-8); w^r_t = softmax_n strength cos(k_t, M_t(n)) (eqs. 2-3); reads are sums
    of slots under w^r_t (eq. 4); usage_t = decay usage_{t-1} + sum w^r_t + sum w^w_t (eq. 5); y_t = W_o [h_t, reads_t] + b_o are
    logits. On the CPU a sequence runs in `memcore.functional.mann_sequence` (with slots="one"), elsewhere step by step on
    `lrua_write`. Choosing the slot has no gradient, all else has.

    In the papers' tasks the input is [x_t, label of the previous step]; the caller joins them.

    Args:
        input_size: X.
        output_size: O, the number of logits.
        memory_slots: N.
        slot_width: W.
        controller_size: K, units of the LSTM.
        read_heads: R; each head reads and writes.
        decay: of the usage.
        strength: of the read keys, one number for all. The paper has none, which is 1: no read weight is then more than e^2
            times another, and a read is close to the mean of all slots.
        order: "write_read" (the paper) or "read_write" (weights and reads from the memory before the write).
        add: what is written: "key", or "separate", a tanh projection of its own.
        zero: "least_used" zeroes the one least-used slot before the write, None does not.
        slots: "one" least-used slot shared by all heads; "n_shared": the R least used, all marked for every head (the
            paper's w^lu); "per_head": head h has its own, the h-th least used.
        batch_first: input and output are [B,T,...].
        device, dtype: of the parameters.

    Returns (on call):
        (output, state): see `forward`; state is a `MANNState`, and nothing of it stays in the module.

    Raises:
        ValueError, TypeError: for arguments that do not fit, when the model is made.

    Example:
        >>> model = memcore.MANN(405, 5)
        >>> output, state = model(torch.rand(50, 16, 405))            # [50, 16, 5]
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        memory_slots: int = 128,
        slot_width: int = 40,
        controller_size: int = 200,
        read_heads: int = 4,
        decay: float = 0.95,
        strength: float = 1.0,
        order: str = "write_read",
        add: str = "key",
        zero: str | None = "least_used",
        slots: str = "one",
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        _checks.whole("MANN", "output_size", output_size, 1)
        cell = MANNCell(
            input_size,
            memory_slots=memory_slots,
            slot_width=slot_width,
            controller_size=controller_size,
            read_heads=read_heads,
            decay=decay,
            strength=strength,
            order=order,
            add=add,
            zero=zero,
            slots=slots,
            device=device,
            dtype=dtype,
        )
        super().__init__(cell, output_size, batch_first, device=device, dtype=dtype)
