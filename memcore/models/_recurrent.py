"""What the recurrent models share: argument checks, the loop over time, padded batches, streaming and traces."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MemoryCell", "MemoryNetwork", "check_input", "check_lengths", "check_state", "map_state", "one_of"]


def map_state(fn: Callable[..., Tensor], *states: Any) -> Any:
    """`fn` over the tensors of equally nested (named) tuples."""
    first = states[0]
    if isinstance(first, Tensor):
        return fn(*states)
    parts = (map_state(fn, *leaves) for leaves in zip(*states))
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)


def one_of(owner: str, name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed[:-1]) + f" or {allowed[-1]!r}"
        raise ValueError(f"memcore.{owner}: {name!r} must be {listed}, got {value!r}")


def check_input(owner: str, x: Tensor, like: Tensor, size: int, forms: tuple[str, ...]) -> None:
    """`x` has one of `forms` (as "T, B, X"), its last size is `size`, and it fits the parameter `like`."""
    if not isinstance(x, Tensor):
        raise TypeError(f"memcore.{owner}: 'input' must be a tensor, got {type(x).__name__}")
    if x.dim() not in {len(form.split(", ")) for form in forms} or x.shape[-1] != size:
        listed = " or ".join(f"({form})" for form in forms)
        raise ValueError(f"memcore.{owner}: 'input' must have shape {listed} with X = {size}, got {tuple(x.shape)}")
    if x.device != like.device:
        raise RuntimeError(f"memcore.{owner}: 'input' must be on the device of the parameters ({like.device}), got {x.device}")
    if not x.is_floating_point() or (x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise TypeError(f"memcore.{owner}: 'input' must have the dtype of the parameters ({like.dtype}), got {x.dtype}")


def check_state(owner: str, state: Any, kind: type, sizes: dict[str, tuple[int, ...] | None], batched: bool) -> None:
    """`state` is a `kind` whose tensors have these sizes; keys name a field, or an entry of one ("controller[0]").

    A size None leaves the field unchecked.
    """
    if not isinstance(state, kind):
        raise TypeError(f"memcore.{owner}: 'state' must be a {kind.__name__}, got {type(state).__name__}")
    found = {}
    for name, value in zip(state._fields, state):
        if sizes.get(name, ()) is None:
            continue
        found.update({name: value} if isinstance(value, Tensor) else {f"{name}[{i}]": leaf for i, leaf in enumerate(value)})
    expected = {name: size if batched else size[1:] for name, size in sizes.items() if size is not None}
    for name in expected | found:
        got = tuple(found[name].shape) if name in found else "nothing"
        if got != expected.get(name):
            raise ValueError(f"memcore.{owner}: 'state.{name}' must have shape {expected.get(name, 'nothing')}, got {got}")


def check_lengths(owner: str, lengths: Any, steps: int, batch_size: int, batched: bool) -> list[int]:
    """`lengths` as a list of ints in 0..T. Reads them on the host, which waits for a GPU that holds them."""
    if not batched:
        raise ValueError(f"memcore.{owner}: 'lengths' must be None for an unbatched input, got {lengths!r}")
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"memcore.{owner}: 'lengths' must hold integers, got {lengths.dtype}")
    if lengths.shape != (batch_size,):
        raise ValueError(f"memcore.{owner}: 'lengths' must have shape (B) = ({batch_size},), got {tuple(lengths.shape)}")
    found = lengths.tolist()
    for length in found:
        if not 0 <= length <= steps:
            raise ValueError(f"memcore.{owner}: 'lengths' must lie in 0..T = 0..{steps}, got {length}")
    return found


class MemoryCell(nn.Module):
    """One time step of a memory network: `features, state = cell(input, state)`.

    A subclass sets `input_size`, `feedback_size` (of all reads, flattened), `controller`, `interface` and `kind` (the
    class of its state), and defines `initial_state(batch_size)`, `sizes(batch_size)`, `advance(x, state) -> (h, state,
    extra)` and `watch(state, extra)`, which names what a trace shows.
    """

    input_size: int
    feedback_size: int
    controller: nn.Module
    interface: nn.Linear
    kind: type

    @property
    def output_size(self) -> int:
        """Size of the features: the controller's output and the reads, flattened."""
        return self.controller.output_size + self.feedback_size

    def forward(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One step: input [B,X] or [X] -> (features [B, output_size], state)."""
        return self.step(type(self).__name__, input, state)

    def step(self, owner: str, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        """`forward`, with the name that errors shall carry."""
        check_input(owner, input, self.interface.weight, self.input_size, ("B, X", "X"))
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        h, state, _ = self.advance(self.controller.hoist(x), self.enter(owner, state, len(x), batched))
        features = torch.cat((h, state.reads.flatten(1)), 1)
        return (features, state) if batched else (features[0], map_state(lambda t: t[0], state))

    def sequence(self, x: Tensor, state: Any, lengths: list[int] | None, output: nn.Linear) -> tuple[Tensor, Any] | None:
        """All steps and the output layer in one operator, from `state` or (None) the model's own: (output [T,B,O], state). None: there is none, go
        step by step."""
        return None

    def enter(self, owner: str, state: Any, batch_size: int, batched: bool) -> Any:
        """The batched state to begin with: the model's own, or the checked one of the caller."""
        if state is None:
            return self.initial_state(batch_size)
        check_state(owner, state, self.kind, self.sizes(batch_size), batched)
        return state if batched else map_state(lambda t: t.unsqueeze(0), state)


class MemoryNetwork(nn.Module):
    """A `MemoryCell` run over time, with a linear layer on its features."""

    def __init__(self, cell: MemoryCell, output_size: int, batch_first: bool, **factory):
        super().__init__()
        self.cell = cell
        self.output = nn.Linear(cell.output_size, output_size, **factory)
        self.batch_first = batch_first
        nn.init.xavier_uniform_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first step, batch first in every tensor."""
        return self.cell.initial_state(batch_size)

    def forward(self, input: Tensor, state: Any = None, lengths: Any = None) -> tuple[Tensor, Any]:
        """Run over a sequence.

        Args:
            input: [T,B,X], [B,T,X] if `batch_first`, or [T,X] without a batch.
            state: what an earlier call returned; None begins with `initial_state`. Without a batch its tensors have none.
            lengths: [B] integers in 0..T for padded batches, on the CPU if no wait for a GPU is wanted. Every item comes
                out as if run alone; what the padding holds does not matter.

        Returns:
            (output, state): logits shaped as the input with O for X, 0 past an item's length; the state after each
            item's last valid step.

        Raises:
            ValueError, TypeError, RuntimeError: for input, state or lengths that do not fit, before anything runs.
        """
        x, state, batched = self._enter(input, state)
        steps = len(x)
        shortest, alive = steps, None
        if lengths is not None:
            lengths = check_lengths(self._name, lengths, steps, x.shape[1], batched)
        whole = self.cell.sequence(x, state, lengths, self.output)
        if whole is not None:
            return self._leave(*whole, batched)
        if state is None:
            state = self.cell.initial_state(x.shape[1])
        if lengths is not None:
            shortest, longest = min(lengths, default=steps), max(lengths, default=steps)
            if shortest < steps:
                x = x[: max(longest, 1)]
                alive = torch.arange(len(x)).unsqueeze(1) < torch.tensor(lengths)
                alive = alive.to(x.device, non_blocking=True)
                x = torch.where(alive.unsqueeze(2), x, 0)

        hidden, reads = [], []
        for t, x_t in enumerate(self.cell.controller.hoist(x).unbind(0)):
            h, after, _ = self.cell.advance(x_t, state)
            hidden.append(h)
            reads.append(after.reads)
            state = after if t < shortest else map_state(_keeper(alive[t]), after, state)
        output = self._project(hidden, reads)
        if alive is not None:
            output = torch.where(alive.unsqueeze(2), output, 0)
            output = nn.functional.pad(output, (0, 0, 0, 0, 0, steps - len(x)))
        return self._leave(output, state, batched)

    def _leave(self, output: Tensor, state: Any, batched: bool) -> tuple[Tensor, Any]:
        if not batched:
            return output.squeeze(1), map_state(lambda t: t.squeeze(0), state)
        return (output.transpose(0, 1) if self.batch_first else output), state

    def step(self, input: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """One time step, for streaming: input [B,X] or [X] -> (logits [B,O] or [O], state)."""
        features, state = self.cell.step(self._name, input, state)
        return self.output(features), state

    @torch.no_grad()
    def trace(self, input: Tensor, state: Any = None) -> dict[str, Tensor]:
        """Run over a sequence without gradients and keep what the memory did, for plots.

        Returns:
            Tensors over time, time first whatever `batch_first` ([T,...] without the batch for an unbatched input):
            "output" [T,B,O], "memory" [T,B,N,W], "reads" [T,B,R,W], "read_weights" [T,B,R,N], "write_weights"
            [T,B,Hw,N], "add" [T,B,Hw,W]; of the NTM also "erase" [T,B,Hw,W], of the MANN "usage" [T,B,N].
        """
        x, state, batched = self._enter(input, state)
        if state is None:
            state = self.cell.initial_state(x.shape[1])
        hidden, rows = [], []
        for x_t in self.cell.controller.hoist(x).unbind(0):
            h, state, extra = self.cell.advance(x_t, state)
            hidden.append(h)
            rows.append(self.cell.watch(state, extra))
        traced = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        traced["output"] = self._project(hidden, [row["reads"] for row in rows])
        return traced if batched else {name: t.squeeze(1) for name, t in traced.items()}

    def _enter(self, input: Tensor, state: Any) -> tuple[Tensor, Any, bool]:
        """Input as [T,B,X], the caller's state with a batch or None, and whether the input had one."""
        form = "B, T, X" if self.batch_first else "T, B, X"
        check_input(self._name, input, self.output.weight, self.cell.input_size, (form, "T, X"))
        batched = input.dim() == 3
        x = input.unsqueeze(1) if not batched else input.transpose(0, 1) if self.batch_first else input
        if len(x) == 0:
            raise ValueError(f"memcore.{self._name}: 'input' must have at least one time step, got shape {tuple(input.shape)}")
        return x, None if state is None else self.cell.enter(self._name, state, x.shape[1], batched), batched

    def _project(self, hidden: list[Tensor], reads: list[Tensor]) -> Tensor:
        return self.output(torch.cat((torch.stack(hidden), torch.stack(reads).flatten(2)), 2))

    @property
    def _name(self) -> str:
        return type(self).__name__


def _keeper(alive: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Selects the new tensor where an item is alive [B] and the old one where it has ended."""
    return lambda new, old: torch.where(alive.view(-1, *[1] * (new.dim() - 1)), new, old)
