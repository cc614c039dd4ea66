"""The tensors of a store: keys and values of all dictionaries, and what goes with each row."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import _backend
from ._optimizers import RowOptimizer

__all__ = ["RINGS", "Rings", "drop_rows", "used_rows"]

RINGS = ("keys", "values")


def _paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that searches and writes go through: in huge pages where the system has them, which are to be asked for before anything is written."""
    t = torch.empty(*shape, dtype=dtype, device=device)
    if t.is_cpu and _backend.native is not None:
        torch.ops.memcore._ask_huge_pages(t)
    return t.zero_()


class Rings:
    """A * N rows; row a * N + n is slot n of dictionary a. Everything but `head` lies on one device."""

    def __init__(
        self, A: int, N: int, D: int, V: int, optimizer: RowOptimizer | None, *, grad_keys: bool, bf16: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        zeros = lambda *shape, of=dtype: torch.zeros(*shape, dtype=of, device=device)  # noqa: E731
        paged = lambda *shape, of=dtype: _paged(*shape, dtype=of, device=device)  # noqa: E731
        self.keys, self.values = paged(A, N, D).requires_grad_(grad_keys), paged(A, N, V).requires_grad_()
        self.norms = paged(A, N)
        self.mirror = paged(A, N, D, of=torch.bfloat16) if bf16 else None
        self.rounding = zeros(A, of=torch.float32) if bf16 else None
        self.head = torch.zeros(1 + A, dtype=torch.int64)  # an epoch, odd while rows change; the counts
        self.count = self.head[1:].to(device)
        self.stamps = None if device.type == "cpu" else zeros(A * N, of=torch.int64)  # of the last use, where the table cannot be told
        self.views()
        names = () if optimizer is None else optimizer.state
        self.state = {
            ring: {name: torch.zeros_like(flat) for name in names} for ring, flat in zip(RINGS, (self.flat_keys, self.flat_values), strict=True)
        }
        # Steps of each row's key and value. A row's state counts as zero before its first one, so that a new entry need not clear it.
        self.steps = zeros(A * N, 2, of=torch.int32) if names else None

    def views(self) -> None:
        """After the tensors of this have been replaced or moved."""
        self.flat_keys, self.flat_values = self.keys.detach().flatten(0, 1), self.values.detach().flatten(0, 1)
        self._head = self.head.numpy()
        if self.keys.device.type == "cpu":
            self.count = self.head[1:]

    @property
    def epoch(self) -> int:
        return int(self._head[0])

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Readers who look meanwhile look again."""
        self._head[0] += 1
        try:
            yield
        finally:
            self._head[0] += 1

    def set_count(self, a: int, n: int) -> None:
        self.head[1 + a] = n
        if self.count.device.type != "cpu":
            self.count[a] = n

    def state_tensors(self) -> dict[str, Tensor]:
        return {f"{ring}.{name}": t for ring, entries in self.state.items() for name, t in entries.items()}

    def set_keys(self, rows: Tensor, keys: Tensor) -> None:
        """Keys of unique rows, with norm and mirror."""
        self.flat_keys[rows] = keys
        norms = keys.double().square().sum(-1) if keys.device.type != "mps" else keys.square().sum(-1)
        self.norms.view(-1)[rows] = norms.to(keys.dtype)
        if self.mirror is not None:
            copies = keys.bfloat16()
            self.mirror.flatten(0, 1)[rows] = copies
            lost = (copies.to(norms.dtype) - keys.to(norms.dtype)).square().sum(-1)
            ratio = (lost / norms).sqrt().mul(1.001).nan_to_num(0, 0, 0).float()  # as knn_cache has it
            self.rounding.scatter_reduce_(0, rows // self.keys.shape[1], ratio, "amax")

    def clear_state(self, rows: Tensor) -> None:
        if self.steps is not None:
            self.steps[rows] = 0

    def state_of(self, ring: str, rows: Tensor) -> dict[str, Tensor]:
        """The optimizer's state of some rows of "keys" or "values"."""
        if self.steps is None:
            return {}
        started = self.steps[rows, RINGS.index(ring)][:, None] > 0
        return {name: torch.where(started, t[rows], 0) for name, t in self.state[ring].items()}

    def move(self, source: int, to: int) -> None:
        """Everything of one row into another."""
        for t in (self.flat_keys, self.flat_values, self.norms.view(-1), *self.state_tensors().values()):
            t[to] = t[source]
        if self.mirror is not None:
            mirror = self.mirror.flatten(0, 1)
            mirror[to] = mirror[source]
        for t in (self.stamps, self.steps):
            if t is not None:
                t[to] = t[source]

    def share(self) -> None:
        """Move what readers need into shared memory."""
        for t in (self.keys, self.values, self.norms, self.mirror, self.rounding, self.head):
            if t is not None and t.device.type == "cpu" and not t.is_shared():
                t.share_memory_()
        self.views()


def used_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Unique rows of a gradient [A, N, W] and what they got [U, W]: those that a sparse one names, those not zero of a dense one."""
    if grad.is_sparse:
        grad = grad.coalesce()
        at, rows = grad.indices(), grad.values()
        return at[0] * grad.shape[1] + at[1], rows
    flat = grad.flatten(0, 1)
    at = flat.ne(0).any(1).nonzero().squeeze(1)  # NaN is not 0
    return at, flat[at]


def drop_rows(ring: Tensor, rows: Tensor) -> None:
    """Forget the gradient of some rows, whose entries are gone."""
    grad = ring.grad
    if grad is None or rows.numel() == 0:
        return
    rows = rows.to(grad.device)
    if grad.is_sparse:
        grad = grad.coalesce()
        at = grad.indices()
        keep = ~torch.isin(at[0] * grad.shape[1] + at[1], rows)
        ring.grad = torch.sparse_coo_tensor(at[:, keep], grad.values()[keep], grad.shape, is_coalesced=True, check_invariants=False)
    else:
        grad.flatten(0, 1)[rows] = 0
