"""What a launch is told of and tells: arrays of which only pieces exist, traffic, what was executed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["Launch", "Site", "Sparse", "Traffic"]


Site = tuple[int, int]
"""An instruction: its block, its place there; -1 for the one that ends the block."""


@dataclass(frozen=True)
class Sparse:
    """A huge array of which only pieces exist: byte offset -> array. For offsets past 2^31 elements."""

    nbytes: int
    pieces: dict[int, np.ndarray]


@dataclass
class Traffic:
    """What one buffer saw. A request is one instruction of one warp."""

    nbytes: int = 0
    load_requests: int = 0
    load_bytes: int = 0
    """Different bytes of each request, added up."""
    load_sectors: int = 0
    """32-byte pieces a request touches, added up."""
    store_requests: int = 0
    store_bytes: int = 0
    store_sectors: int = 0
    atomics: int = 0


@dataclass
class Launch:
    """What a launch did."""

    traffic: dict[str, Traffic] = field(default_factory=dict)
    """By parameter name."""
    shared_requests: int = 0
    shared_wavefronts: int = 0
    instructions: int = 0
    """Thread instructions issued, predicated off or not."""
    barriers: int = 0
    races: list[str] = field(default_factory=list)
    sites: set[Site] = field(default_factory=set)
    """Barriers, warp barriers, waits for copies, shuffles and accesses under a predicate that were executed."""
    masked: set[Site] = field(default_factory=set)
    """Accesses that a predicate kept some lane from."""
    repeated: set[int] = field(default_factory=set)
    """Blocks whose branch back was taken: loops that went round again."""
