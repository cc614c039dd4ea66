"""What the CUDA kernel of the recurrence keeps, and where it fits: the sizes of csrc/cuda/ntm_sequence.h, which tests compare."""

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _backend

__all__ = ["Sizes", "fits", "saved_numbers", "shared_bytes"]

READ_HEADS = 8
"""What a block reads at a time while it writes over its memory (kReadHeads)."""


class Sizes(NamedTuple):
    """Of a network; `shift_range` is R of 2R + 1 shifts."""

    inputs: int
    units: int
    outputs: int
    slots: int
    width: int
    lstm: bool
    layers: int
    read_heads: int
    write_heads: int
    shift_range: int

    @property
    def heads(self) -> int:
        return self.read_heads + self.write_heads

    @property
    def sums(self) -> int:
        """Of a controller layer."""
        return 4 * self.units if self.lstm else self.units

    @property
    def interface(self) -> int:
        return self.heads * (self.width + 4 + 2 * self.shift_range) + 2 * self.write_heads * self.width

    def layer(self, i: int) -> int:
        """Inputs of controller layer i."""
        return (self.units if self.lstm else 0) + (self.inputs + self.read_heads * self.width if i == 0 else self.units)


def saved_numbers(s: Sizes, steps: int, batch: int, every: int) -> dict[str, int]:
    """How many numbers the forward keeps for the backward, by kind: of the controller, the addressing, and copies of the memory."""
    cells = s.units if s.lstm else 0
    controller = sum(s.layer(i) + 1 + s.sums + cells for i in range(s.layers)) + s.units + s.read_heads * s.width + 1
    return {
        "controller": steps * batch * controller,
        "addressing": steps * batch * (s.interface + s.heads * s.slots),
        "memory": -(-steps // every) * batch * s.slots * s.width,
    }


def shared_bytes(s: Sizes) -> tuple[int, int]:
    """Shared memory that a block has at least, forward and backward."""
    F, H, Hw, N, W, S = s.read_heads * s.width, s.heads, s.write_heads, s.slots, s.width, 2 * s.shift_range + 1
    common = [16, 8 * 256, H, H, H, H * S, H, H * W, N, H * N, H * N]  # slots, scratch, parameters of heads, keys, rows of slots
    common += [Hw * W, Hw * W, s.interface, s.sums, s.layers * s.units, s.layers * s.units if s.lstm else 0, H * N]
    forward = [max(s.layer(0), s.layer(min(1, s.layers - 1))), s.units + F, N * W + 4]
    backward = [2 * H, 2 * H, H, H * S, H * N, H * N, H * N, s.interface, s.outputs, F, N * W]
    size = lambda arrays: sum((4 * n + 15) // 16 * 16 for n in (*common, *arrays))  # noqa: E731
    return size(forward), size(backward)


def limit(device: torch.device) -> int:
    """Shared memory that a block may have; without a driver (fake tensors) the least of the GPUs the kernels are compiled for."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if torch.cuda.is_available() else 99 << 10


def fits(memory: Tensor, s: Sizes) -> bool:
    """Whether the kernel takes the recurrence: a block has one element's memory, its gradient if there is one, and the controller's state in
    shared memory. What it does not take, `ntm_step` runs step by step."""
    call = _backend.Call(memory.dtype, memory.device, len(memory), s.slots, s.width)
    if s.read_heads > READ_HEADS or not _backend.takes_native("ntm_sequence_fwd", call):
        return False
    forward, backward = shared_bytes(s)
    return (max(forward, backward) if torch.is_grad_enabled() else forward) <= limit(memory.device)
