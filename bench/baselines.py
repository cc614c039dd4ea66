"""What memcore is compared with: each operator, the NTM and the MANN as a good engineer writes them in PyTorch, and as commonly written.

`eager[op]` is tuned: all heads in one bmm, products divided by norms instead of a normalised copy of the memory, lerp and
softmax where they save a pass, no power with a tensor exponent. `naive[op]` goes head by head through
`cosine_similarity`, outer products and powers. Both assume ordinary inputs: no masks, positive weights, nonzero norms.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import MANN, NTM
from ..models.mann import MANNCell, MANNState
from ..models.ntm import NTMCell, NTMState

__all__ = [
    "eager", "eager_mann", "eager_mann_step", "eager_ntm", "eager_ntm_step", "interface_order", "naive", "naive_ntm_step",
    "no_mann_memory_step", "no_memory_step", "vectorised_ntm_step",
]  # fmt: skip

EPS = 1e-8
TINY = 1e-30


def _heads(*tensors: Tensor):
    return zip(*(t.unbind(1) for t in tensors), strict=True)


def content_addressing(key: Tensor, memory: Tensor, strength: Tensor | None = None) -> Tensor:
    norms = torch.linalg.vector_norm(key, dim=-1, keepdim=True) * torch.linalg.vector_norm(memory, dim=-1).unsqueeze(1)
    similarity = torch.bmm(key, memory.mT) / norms.clamp_min(EPS)
    return torch.softmax(similarity if strength is None else similarity * strength.unsqueeze(-1), -1)


def interpolate(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    return torch.lerp(previous, content, gate.unsqueeze(-1))


def circular_shift(weights: Tensor, shift: Tensor) -> Tensor:
    R = shift.shape[-1] // 2
    parts = shift.split(1, -1)
    out = weights * parts[R]
    for j in (*range(-R, 0), *range(1, R + 1)):
        out = out + weights.roll(j, -1) * parts[j + R]
    return out


def sharpen(weights: Tensor, gamma: Tensor) -> Tensor:
    return torch.softmax(weights.clamp_min(TINY).log() * gamma.unsqueeze(-1), -1)


def ntm_addressing(
    key: Tensor, memory: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, gamma: Tensor, previous: Tensor
) -> Tensor:
    focus = interpolate(content_addressing(key, memory, strength), previous, gate)
    return sharpen(circular_shift(focus, shift), gamma)


def read(memory: Tensor, weights: Tensor) -> Tensor:
    return torch.bmm(weights, memory)


def erase_add_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    if weights.shape[1] == 1:  # memory + w (add - memory * erase): two passes
        return torch.addcmul(memory, weights.mT, torch.addcmul(add, memory, erase, value=-1))
    for w, e in _heads(weights, erase):
        memory = torch.addcmul(memory, memory * e.unsqueeze(1), w.unsqueeze(2), value=-1)
    return torch.baddbmm(memory, weights.mT, add)


def usage_update(usage: Tensor, read_weights: Tensor, write_weights: Tensor, decay: float) -> Tensor:
    return torch.add(read_weights.sum(1), usage, alpha=decay) + write_weights.sum(1)


def least_used(usage: Tensor, n: int) -> Tensor:
    return torch.topk(usage, n, largest=False).indices


def lrua_write(memory: Tensor, key: Tensor, previous_read: Tensor, usage: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    g = gate.unsqueeze(-1)
    slot = usage.argmin(-1, keepdim=True)  # [B, 1]
    weights = (g * previous_read).scatter_add(2, slot.unsqueeze(1).expand(-1, g.shape[1], -1), 1 - g)
    cleared = memory.scatter(1, slot.unsqueeze(-1).expand(-1, -1, memory.shape[-1]), 0)
    return torch.baddbmm(cleared, weights.mT, key), weights


def split_interface(interface: Tensor, read_heads: int, write_heads: int, shift_range: int = 1) -> tuple[Tensor, ...]:
    H, S = read_heads + write_heads, 2 * shift_range + 1
    W = (interface.shape[1] - H * (3 + S)) // (H + 2 * write_heads)
    head = W + 3 + S
    reads, writes = interface.split([read_heads * head, write_heads * (head + 2 * W)], 1)
    reads, writes = reads.unflatten(1, (read_heads, head)), writes.unflatten(1, (write_heads, head + 2 * W))
    mine, erase, add = writes.split([head, W, W], 2)
    key, strength, gate, shift, gamma = torch.cat((reads, mine), 1).split([W, 1, 1, S, 1], 2)
    return (
        key,
        F.softplus(strength.squeeze(2)),
        torch.sigmoid(gate.squeeze(2)),
        torch.softmax(shift, 2),
        F.softplus(gamma.squeeze(2)) + 1,
        torch.sigmoid(erase),
        add,
    )


def interface_order(width: int, read_heads: int, write_heads: int, shift_range: int = 1) -> Tensor:
    """Where memcore keeps each entry of the layout that suits eager PyTorch best: `mine = theirs[:, interface_order(...)]`.

    All keys, strengths, gammas, gates, erase and add vectors, shifts: every activation is one call on adjacent columns.
    """
    S, H = 2 * shift_range + 1, read_heads + write_heads
    head = width + 3 + S
    first = [h * head for h in range(read_heads)]
    first += [read_heads * head + h * (head + 2 * width) for h in range(write_heads)]
    pieces = [[f + i for f in first for i in range(width)]]
    pieces += [[f + width for f in first], [f + width + 2 + S for f in first], [f + width + 1 for f in first]]
    pieces += [[f + head + i for f in first[read_heads:] for i in range(width)]]
    pieces += [[f + head + width + i for f in first[read_heads:] for i in range(width)]]
    pieces += [[f + width + 2 + i for f in first for i in range(S)]]
    order = torch.tensor([i for piece in pieces for i in piece])
    assert len(order) == H * head + 2 * write_heads * width
    return order


def eager_ntm_step(
    memory: Tensor, interface: Tensor, previous: Tensor, read_heads: int, write_heads: int, shift_range: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One tuned NTM step, reads after the write: (memory, reads, weights). `interface` is laid out by `interface_order`."""
    H, W, S = read_heads + write_heads, memory.shape[2], 2 * shift_range + 1
    key, positive, unit, add, shift = interface.split([H * W, 2 * H, H + write_heads * W, write_heads * W, H * S], 1)
    strength, sharpness = F.softplus(positive).split(H, 1)
    gate, erase = torch.sigmoid(unit).split([H, write_heads * W], 1)
    weights = ntm_addressing(
        key.unflatten(1, (H, W)),
        memory,
        strength,
        gate,
        torch.softmax(shift.unflatten(1, (H, S)), 2),
        sharpness + 1,
        previous,
    )
    reading, writing = weights.split([read_heads, write_heads], 1)
    written = erase_add_write(memory, writing, erase.unflatten(1, (write_heads, W)), add.unflatten(1, (write_heads, W)))
    return written, torch.bmm(reading, written), weights


def vectorised_ntm_step(
    memory: Tensor, interface: Tensor, previous: Tensor, read_heads: int, write_heads: int, shift_range: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One vectorised NTM step written formula by formula, on memcore's interface layout: (memory, reads, weights).

    All heads at once: one bmm, `roll` for the shift, products divided by norms, erasures by bmm where one write head is all there is.
    Unlike `eager_ntm_step` it neither reorders the controller's columns to activate several pieces in one call nor folds passes
    into `lerp` and `addcmul`.
    """
    key, strength, gate, shift, gamma, erase, add = split_interface(interface, read_heads, write_heads, shift_range)
    norms = torch.linalg.vector_norm(key, dim=-1, keepdim=True) * torch.linalg.vector_norm(memory, dim=-1).unsqueeze(1)
    content = torch.softmax(strength.unsqueeze(-1) * (torch.bmm(key, memory.mT) / norms.clamp_min(EPS)), -1)
    gate = gate.unsqueeze(-1)
    focus = gate * content + (1 - gate) * previous
    turned = sum(shift[:, :, j : j + 1] * focus.roll(j - shift_range, -1) for j in range(2 * shift_range + 1))
    weights = torch.softmax(gamma.unsqueeze(-1) * turned.clamp_min(TINY).log(), -1)
    reading, writing = weights.split([read_heads, write_heads], 1)
    if write_heads == 1:
        kept = 1 - torch.bmm(writing.mT, erase)
    else:
        kept = (1 - writing.unsqueeze(-1) * erase.unsqueeze(2)).prod(1)
    written = memory * kept + torch.bmm(writing.mT, add)
    return written, torch.bmm(reading, written), weights


def _naive_content(key: Tensor, memory: Tensor, strength: Tensor) -> Tensor:
    rows = [
        torch.softmax(b.unsqueeze(1) * F.cosine_similarity(memory, k.unsqueeze(1), dim=-1), 1) for k, b in _heads(key, strength)
    ]
    return torch.stack(rows, 1)


def _naive_interpolate(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    return gate.unsqueeze(-1) * content + (1 - gate.unsqueeze(-1)) * previous


def _naive_shift(weights: Tensor, shift: Tensor) -> Tensor:
    R = shift.shape[-1] // 2
    rows = []
    for w, s in _heads(weights, shift):
        around = torch.cat([w[:, -R:], w, w[:, :R]], 1) if R else w
        windows = around.unfold(1, 2 * R + 1, 1)  # [B, N, S]
        rows.append((windows * s.flip(1).unsqueeze(1)).sum(-1))
    return torch.stack(rows, 1)


def _naive_sharpen(weights: Tensor, gamma: Tensor) -> Tensor:
    power = weights ** gamma.unsqueeze(-1)
    return power / (power.sum(-1, keepdim=True) + 1e-16)


def _naive_addressing(
    key: Tensor, memory: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, gamma: Tensor, previous: Tensor
) -> Tensor:
    focus = _naive_interpolate(_naive_content(key, memory, strength), previous, gate)
    return _naive_sharpen(_naive_shift(focus, shift), gamma)


def _naive_read(memory: Tensor, weights: Tensor) -> Tensor:
    return torch.stack([torch.matmul(w.unsqueeze(1), memory).squeeze(1) for w in weights.unbind(1)], 1)


def _naive_write(memory: Tensor, weights: Tensor, erase: Tensor, add: Tensor) -> Tensor:
    for w, e in _heads(weights, erase):
        memory = memory * (1 - torch.matmul(w.unsqueeze(-1), e.unsqueeze(1)))
    for w, a in _heads(weights, add):
        memory = memory + torch.matmul(w.unsqueeze(-1), a.unsqueeze(1))
    return memory


def _naive_usage(usage: Tensor, read_weights: Tensor, write_weights: Tensor, decay: float) -> Tensor:
    return decay * usage + read_weights.sum(1) + write_weights.sum(1)


def _naive_least_used(usage: Tensor, n: int) -> Tensor:
    return torch.sort(usage, dim=-1).indices[:, :n]


def _naive_lrua(memory: Tensor, key: Tensor, previous_read: Tensor, usage: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    chosen = F.one_hot(torch.topk(usage, 1, largest=False).indices.squeeze(1), usage.shape[1]).to(memory.dtype)  # [B, N]
    g = gate.unsqueeze(-1)
    weights = g * previous_read + (1 - g) * chosen.unsqueeze(1)
    memory = memory * (1 - chosen).unsqueeze(-1)
    for w, k in _heads(weights, key):
        memory = memory + w.unsqueeze(-1) * k.unsqueeze(1)
    return memory, weights


def naive_ntm_step(
    memory: Tensor, interface: Tensor, previous: Tensor, read_heads: int, write_heads: int, shift_range: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """One NTM step as commonly written, on memcore's interface layout: (memory, reads, weights)."""
    x = split_interface(interface, read_heads, write_heads, shift_range)
    weights = _naive_addressing(x[0], memory, *x[1:5], previous)
    written = _naive_write(memory, weights[:, read_heads:], *x[5:])
    return written, _naive_read(written, weights[:, :read_heads]), weights


def no_memory_step(
    memory: Tensor, interface: Tensor, previous: Tensor, read_heads: int, write_heads: int, shift_range: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """A step without any memory work: the floor of a training step whose controller is outside."""
    W = memory.shape[2]
    return memory, interface[:, : read_heads * W].unflatten(1, (read_heads, W)), previous


eager: dict[str, Callable[..., Any]] = {
    "content_addressing": content_addressing,
    "interpolate": interpolate,
    "circular_shift": circular_shift,
    "sharpen": sharpen,
    "ntm_addressing": ntm_addressing,
    "read": read,
    "erase_add_write": erase_add_write,
    "usage_update": usage_update,
    "least_used": least_used,
    "lrua_write": lrua_write,
    "split_interface": split_interface,
}
naive: dict[str, Callable[..., Any]] = {
    "content_addressing": _naive_content,
    "interpolate": _naive_interpolate,
    "circular_shift": _naive_shift,
    "sharpen": _naive_sharpen,
    "ntm_addressing": _naive_addressing,
    "read": _naive_read,
    "erase_add_write": _naive_write,
    "usage_update": _naive_usage,
    "least_used": _naive_least_used,
    "lrua_write": _naive_lrua,
}


class _EagerCell(NTMCell):
    """An NTM's cell on a plain PyTorch step."""

    memory_step: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def sequence(self, *_) -> None:
        """Step by step, as PyTorch has it."""

    def advance(self, x: Tensor, state: NTMState) -> tuple[Tensor, NTMState, Tensor]:
        h, controller = self.controller.step(x, state.reads.flatten(1), state.controller)
        interface = self.interface(h)
        memory, reads, weights = self.memory_step(
            state.memory, interface, state.weights, self.read_heads, self.write_heads, self.shift_range
        )
        return h, NTMState(memory, reads, weights, controller), interface


def eager_ntm(model: NTM, memory_step: Callable[..., tuple[Tensor, Tensor, Tensor]] = eager_ntm_step) -> NTM:
    """A copy of `model` (same controller, loop, parameters) whose memory runs on `memory_step`, in plain PyTorch.

    For `eager_ntm_step` the rows of the interface layer are reordered by `interface_order`.
    """
    twin = copy.deepcopy(model)
    cell = twin.cell
    cell.__class__ = _EagerCell
    cell.memory_step = memory_step
    if memory_step is eager_ntm_step:
        order = interface_order(cell.slot_width, cell.read_heads, cell.write_heads, cell.shift_range)
        with torch.no_grad():
            for p in cell.interface.parameters():
                p.copy_(p[order])
    return twin


def eager_mann_step(
    memory: Tensor, key: Tensor, gate: Tensor, read_weights: Tensor, usage: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(memory, reads, read weights, usage) after a step of a MANN in its standard form."""
    memory, write_weights = lrua_write(memory, key, read_weights, usage, gate)
    read_weights = content_addressing(key, memory)
    usage = usage_update(usage, read_weights.detach(), write_weights.detach(), decay)
    return memory, read(memory, read_weights), read_weights, usage


def no_mann_memory_step(
    memory: Tensor, key: Tensor, gate: Tensor, read_weights: Tensor, usage: Tensor, decay: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A step of a MANN without any memory work."""
    return memory, key * gate.unsqueeze(2), read_weights, usage


class _EagerMANNCell(MANNCell):
    """A MANN's cell on a plain PyTorch step."""

    memory_step: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]

    def sequence(self, *_) -> None:
        """Step by step, as PyTorch has it."""

    def advance(self, x: Tensor, state: MANNState) -> tuple[Tensor, MANNState, Tensor]:
        h, controller = self.controller.step(x, state.reads.flatten(1), state.controller)
        key, gate = self.interface(h).tensor_split((-self.read_heads,), 1)
        key = torch.tanh(key).unflatten(1, (self.read_heads, self.slot_width))
        after = self.memory_step(state.memory, key, torch.sigmoid(gate), state.read_weights, state.usage, self.decay)
        return h, MANNState(*after, controller), key


def eager_mann(model: MANN, memory_step: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = eager_mann_step) -> MANN:
    """A copy of a standard `model` (same controller, loop, parameters) whose memory runs on `memory_step`, in plain PyTorch."""
    twin = copy.deepcopy(model)
    twin.cell.__class__ = _EagerMANNCell
    twin.cell.memory_step = memory_step
    return twin
