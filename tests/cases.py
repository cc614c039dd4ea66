"""The one table of operators: samples, reference, differentiable inputs, tolerances. A new operator is one entry of CASES."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import memcore

__all__ = ["CASES", "DTYPES", "TOLERANCES", "Case", "Sample", "as_tuple", "assert_close", "case"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# dtype -> (rtol, atol) against the float64 reference on the same rounded inputs, before scaling by the reduction length.
TOLERANCES = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}

Inputs = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Sample:
    """One call: sizes for the builder, keyword options of the function, a last twist on the inputs."""

    id: str
    sizes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    twist: Callable[[Inputs], None] | None = None

    def resized(self, **sizes: int) -> Sample:
        return replace(self, sizes={**self.sizes, **sizes})


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    name: str
    shapes: dict[str, str]
    """Tensor arguments in public order -> size symbols."""
    build: Callable[[SimpleNamespace, torch.Generator], Inputs]
    """(sizes, generator) -> float64 tensors (masks bool, absent ones None)."""
    samples: tuple[Sample, ...]
    differentiable: tuple[str, ...]
    length: Callable[[SimpleNamespace], int]
    """How many numbers the longest sum runs over: sqrt of it scales the forward's tolerance."""
    backward_length: Callable[[SimpleNamespace], int] | None = None
    fixed: str = ""
    """Symbols that scalar options settle, so that no tensor may choose them."""
    sharpens: bool = False

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(memcore.functional, self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        return getattr(memcore.reference, self.name)

    def __repr__(self) -> str:
        return self.name

    def inputs(self, sample: Sample, dtype: torch.dtype = torch.float64) -> Inputs:
        """The sample's tensors, made in float64 and rounded to `dtype`; the same every time."""
        g = torch.Generator().manual_seed(zlib.crc32(f"{self.name}/{sample.id}".encode()))
        x = self.build(SimpleNamespace(**{**SIZES, **sample.sizes}), g)
        if sample.twist is not None:
            sample.twist(x)
        return {k: cast(v, dtype) for k, v in x.items()}

    def tolerance(self, sample: Sample, x: Inputs, *, backward: bool = False) -> dict[str, Any]:
        """Keywords of `assert_close`: reduction length, and the largest gamma where the operator sharpens."""
        sizes = SimpleNamespace(**{**SIZES, **sample.sizes})
        length = self.length(sizes)
        if backward and self.backward_length is not None:
            length = max(length, self.backward_length(sizes))
        gamma = 1.0
        if self.sharpens:
            gamma = max([1.0, *x["gamma"].double().abs().flatten().tolist()]) if "gamma" in x else GAMMA_OF_INTERFACE
        return {"length": length, "gamma": gamma, "backward": backward}

    def ids(self) -> list[str]:
        return [s.id for s in self.samples]


def cast(v: Any, dtype: torch.dtype) -> Any:
    return v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v


def as_tuple(y: Any) -> tuple[Tensor, ...]:
    return (y,) if isinstance(y, Tensor) else tuple(y)


def assert_close(
    actual: Tensor, expected: Tensor, *, dtype: torch.dtype, length: int, gamma: float = 1.0, backward: bool = False, what: str
) -> None:
    """`actual`, computed in `dtype`, against the float64 `expected`.

    A result is rounded once to its dtype, and its sum is taken in float32 or wider whatever the dtype, so only the
    accumulator's tolerance grows with sqrt(length). Sharpening multiplies relative errors by gamma.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.dtype == torch.int64:
        assert torch.equal(actual, expected), f"{what}: {actual} != {expected}"
        return
    if expected.numel() == 0:
        return
    rtol, atol = TOLERANCES[dtype]
    rtol_sum = TOLERANCES[torch.promote_types(dtype, torch.float32)][0]
    a, e = actual.detach().double(), expected.detach().double()
    size = e.nan_to_num(0.0).abs()
    largest = size.max()
    bound = rtol * size + rtol_sum * math.sqrt(max(length, 1)) * (size + largest)
    bound = bound + (atol + rtol * largest if backward else atol * largest.clamp_max(1))
    info = torch.finfo(dtype)
    bound = bound * gamma + info.tiny * info.eps  # the last: one subnormal step
    bad = ~((a - e).abs() <= bound) & ~((a == e) | (a.isnan() & e.isnan()))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        worst = ((a - e).abs() / bound).nan_to_num(torch.inf).max()
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} wrong, first at {at}: got {a[at].item():.9g}, expected {e[at].item():.9g} "
            f"(bound {bound[at].item():.3g}; the worst error is {worst:.3g} of its bound)"
        )


# Builders -------------------------------------------------------------------------------------------------------------

SIZES = {"A": 0, "B": 2, "H": 2, "N": 20, "V": 13, "W": 7, "S": 3, "R": 1, "Hr": 2, "Hw": 1, "shared": 0, "masked": 0, "strength": 1}
GAMMA_OF_INTERFACE = 4.0  # 1 + softplus of a standard normal number stays below


def randn(g, *shape):
    return torch.randn(shape, generator=g, dtype=torch.float64)


def rand(g, *shape, low=0.0, high=1.0):
    return low + (high - low) * torch.rand(shape, generator=g, dtype=torch.float64)


def distribution(g, *shape):
    """Weights that sum to one over the last dimension."""
    return randn(g, *shape).softmax(-1)


def memory_of(s, g, scale=1.0):
    """[B, N, W], or one memory for the batch."""
    shape = (s.N, s.W) if s.shared else (s.B, s.N, s.W)
    return scale * randn(g, *shape)


def _content_addressing(s, g):
    # 1 / W keeps a dot product of two such vectors about as large as a cosine.
    return {
        "key": randn(g, s.B, s.H, s.W),
        "memory": memory_of(s, g, 1 / max(s.W, 1) ** 0.5),
        "strength": rand(g, s.B, s.H, low=0.5, high=4) if s.strength else None,
        "mask": torch.rand(s.B, s.N, generator=g) < 0.7 if s.masked else None,
    }


def _interpolate(s, g):
    return {"content": distribution(g, s.B, s.H, s.N), "previous": distribution(g, s.B, s.H, s.N), "gate": rand(g, s.B, s.H)}


def _circular_shift(s, g):
    return {"weights": distribution(g, s.B, s.H, s.N), "shift": distribution(g, s.B, s.H, s.S)}


def _sharpen(s, g):
    return {"weights": distribution(g, s.B, s.H, s.N), "gamma": rand(g, s.B, s.H, low=1, high=4)}


def _ntm_addressing(s, g):
    return {
        "key": randn(g, s.B, s.H, s.W),
        "memory": memory_of(s, g),
        "strength": rand(g, s.B, s.H, low=0.5, high=4),
        "gate": rand(g, s.B, s.H),
        "shift": distribution(g, s.B, s.H, s.S),
        "gamma": rand(g, s.B, s.H, low=1, high=4),
        "previous": distribution(g, s.B, s.H, s.N),
    }


def _read(s, g):
    return {"memory": memory_of(s, g), "weights": distribution(g, s.B, s.H, s.N)}


def _erase_add_write(s, g):
    return {
        "memory": randn(g, s.B, s.N, s.W),
        "weights": distribution(g, s.B, s.H, s.N),
        "erase": rand(g, s.B, s.H, s.W),
        "add": randn(g, s.B, s.H, s.W),
    }


def _usage_update(s, g):
    return {
        "usage": rand(g, s.B, s.N),
        "read_weights": distribution(g, s.B, s.Hr, s.N),
        "write_weights": distribution(g, s.B, s.Hw, s.N),
    }


def _least_used(s, g):
    return {"usage": rand(g, s.B, s.N)}


def _lrua_write(s, g):
    return {
        "memory": randn(g, s.B, s.N, s.W),
        "key": randn(g, s.B, s.H, s.W),
        "previous_read": distribution(g, s.B, s.H, s.N),
        "usage": rand(g, s.B, s.N),
        "gate": rand(g, s.B, s.H),
        "add": None,
    }


def interface_size(s) -> int:
    return (s.Hr + s.Hw) * (s.W + 4 + 2 * s.R) + 2 * s.W * s.Hw


def _split_interface(s, g):
    return {"interface": randn(g, s.B, interface_size(s))}


def _ntm_step(s, g):
    return {
        "memory": randn(g, s.B, s.N, s.W),
        "interface": randn(g, s.B, interface_size(s)),
        "previous": distribution(g, s.B, s.Hr + s.Hw, s.N),
    }


def _knn_search(s, g):
    """Q is the batch, D the width; A = 0: not stacked. Distances of about 1."""
    stack = (s.A,) if s.A else ()
    scale = max(s.W, 1) ** -0.5
    return {"query": scale * randn(g, *stack, s.B, s.W), "keys": scale * randn(g, *stack, s.N, s.W)}


def _knn_lookup(s, g):
    x = _knn_search(s, g)
    return {**x, "values": randn(g, *x["keys"].shape[:-1], s.V)}


# Twists ---------------------------------------------------------------------------------------------------------------


def twist(**values):
    """Overwrite inputs: a number fills the tensor, a function gets it and changes it in place or returns a new one."""

    def apply(x):
        for name, value in values.items():
            if callable(value):
                new = value(x[name])
                x[name] = x[name] if new is None else new
            else:
                x[name].fill_(value)

    return apply


def _every_other_zero(t):
    t[..., ::2] = 0


def _zero_rows(t):
    t[..., ::3, :] = 0


def _first_zero(t):
    t[0] = 0


def _one_hot(t):
    hot = torch.zeros_like(t)
    hot[..., -1] = 1
    return hot


def _hide_all_of_first(mask):
    mask[0] = False


def _ties(t):
    return (t * 3).floor()


def _one_query_for_all(x):
    x["query"] = x["query"][0]


def _query_of_keys(x):
    """Exact hits, and duplicates of them."""
    x["keys"][..., 1::2, :] = x["keys"][..., :1, :]
    x["query"][..., 0, :] = x["keys"][..., 0, :]


def _with_add(x):
    x["add"] = x["key"].flip(-1) * 0.5


def S(id: str, twist=None, options=None, **sizes) -> Sample:
    return Sample(id, sizes, options or {}, twist)


def step(id: str, Hr: int, Hw: int, shift_range: int = 1, /, *, order: str | None = None, twist=None, **sizes: int) -> Sample:
    options = {"read_heads": Hr, "write_heads": Hw, "shift_range": shift_range}
    if order is not None:
        options["order"] = order
    return Sample(id, {"Hr": Hr, "Hw": Hw, "R": shift_range, **sizes}, options, twist)


# The table ------------------------------------------------------------------------------------------------------------

CASES: tuple[Case, ...] = (
    Case(
        "content_addressing",
        {"key": "B H W", "memory": "B N W", "strength": "B H", "mask": "B N"},
        _content_addressing,
        (
            S("small"),
            S("N1_W1", B=1, H=1, N=1, W=1),
            S("N63_W3_H3", B=3, H=3, N=63, W=3),
            S("N128_W20_H5", B=2, H=5, N=128, W=20),
            S("N1000_W64", B=1, H=1, N=1000, W=64),
            S("shared_N100_W63", B=3, N=100, W=63, shared=1),
            S("masked", twist(mask=_hide_all_of_first), B=3, N=63, W=20, masked=1),
            S("no_strength_dot", options={"similarity": "dot"}, N=7, W=100, strength=0),
            S("dot_masked_shared", options={"similarity": "dot"}, B=3, N=64, W=7, shared=1, masked=1),
            S("strength_0", twist(strength=0.0), N=20),
            S("strength_1e4", twist(strength=1e4), N=20),
            S("strength_negative", twist(strength=-3.0), N=20),
            S("zero_rows", twist(memory=_zero_rows, key=_first_zero), N=20),
        ),
        ("key", "memory", "strength"),
        lambda s: max(s.N, s.W),
        lambda s: max(s.N, s.W, s.H) * (s.B if s.shared else 1),
    ),
    Case(
        "interpolate",
        {"content": "B H N", "previous": "B H N", "gate": "B H"},
        _interpolate,
        (
            S("small"),
            S("N1", B=1, H=1, N=1),
            S("N63_H5", B=3, H=5, N=63),
            S("N1000", N=1000),
            S("gate_0", twist(gate=0.0), N=7),
            S("gate_1", twist(gate=1.0), N=100),
        ),
        ("content", "previous", "gate"),
        lambda s: 2,
        lambda s: s.N,
    ),
    Case(
        "circular_shift",
        {"weights": "B H N", "shift": "B H S"},
        _circular_shift,
        (
            S("small"),
            S("N1_S5", B=1, H=1, N=1, S=5),
            S("N3_S7", N=3, S=7),
            S("N7_S1", N=7, S=1),
            S("N63_S5_H5", B=3, H=5, N=63, S=5),
            S("N128_S3", B=4, N=128),
            S("N1000_S7", N=1000, S=7),
            S("one_hot", twist(shift=_one_hot), N=20, S=3),
        ),
        ("weights", "shift"),
        lambda s: s.S,
        lambda s: max(s.S, s.N),
    ),
    Case(
        "sharpen",
        {"weights": "B H N", "gamma": "B H"},
        _sharpen,
        (
            S("small"),
            S("N1", B=1, H=1, N=1),
            S("N63_H5", B=3, H=5, N=63),
            S("N1000", N=1000),
            S("gamma_1", twist(gamma=1.0), N=100),
            S("gamma_100", twist(gamma=100.0), N=20),
            S("zeros", twist(weights=_every_other_zero), N=7),
            S("zero_row", twist(weights=_first_zero), N=20),
        ),
        ("weights", "gamma"),
        lambda s: s.N,
        sharpens=True,
    ),
    Case(
        "ntm_addressing",
        {"key": "B H W", "memory": "B N W", "strength": "B H", "gate": "B H", "shift": "B H S", "gamma": "B H", "previous": "B H N"},
        _ntm_addressing,
        (
            S("small"),
            S("N1_W1", B=1, H=1, N=1, W=1),
            S("N3_S7", N=3, S=7),
            S("N63_W20_H3", B=3, H=3, N=63, W=20),
            S("N128_W20_S5", N=128, W=20, S=5),
            S("N1000_W3", B=1, N=1000, W=3, S=1),
            S("shared_N100_W64_H5", B=3, H=5, N=100, W=64, shared=1),
            S("strength_0", twist(strength=0.0), N=7),
            S("gate_0", twist(gate=0.0), N=20),
            S("gate_1_zero_rows", twist(gate=1.0, memory=_zero_rows, key=_first_zero), N=20),
        ),
        ("key", "memory", "strength", "gate", "shift", "gamma", "previous"),
        lambda s: max(s.N, s.W, s.S),
        lambda s: max(s.N, s.W, s.S) * (s.B if s.shared else 1),
        sharpens=True,
    ),
    Case(
        "read",
        {"memory": "B N W", "weights": "B H N"},
        _read,
        (
            S("small"),
            S("N1_W1", B=1, H=1, N=1, W=1),
            S("N63_W3_H5", B=3, H=5, N=63, W=3),
            S("N128_W20", B=4, N=128, W=20),
            S("N1000_W64_H1", H=1, N=1000, W=64),
            S("N7_W100_H4", H=4, N=7, W=100),
            S("N63_W20_H9", H=9, N=63, W=20),
            S("shared_N100_W63_H3", B=3, H=3, N=100, W=63, shared=1),
        ),
        ("memory", "weights"),
        lambda s: s.N,
        lambda s: max(s.W, s.H) * (s.B if s.shared else 1),
    ),
    Case(
        "erase_add_write",
        {"memory": "B N W", "weights": "B H N", "erase": "B H W", "add": "B H W"},
        _erase_add_write,
        (
            S("small"),
            S("N1_W1", B=1, H=1, N=1, W=1),
            S("N63_W3_H5", B=3, H=5, N=63, W=3),
            S("N128_W20_H1", B=4, H=1, N=128, W=20),
            S("N1000_W64", B=1, N=1000, W=64),
            S("N7_W100_H3", H=3, N=7, W=100),
            S("no_heads", H=0, N=7, W=3),
            S("erases_all", twist(weights=_one_hot, erase=1.0), H=3, N=20, W=7),
        ),
        ("memory", "weights", "erase", "add"),
        lambda s: max(s.H, 1),
        lambda s: max(s.N, s.W, s.H),
    ),
    Case(
        "usage_update",
        {"usage": "B N", "read_weights": "B Hr N", "write_weights": "B Hw N"},
        _usage_update,
        (
            S("small", options={"decay": 0.95}),
            S("N1", options={"decay": 0.5}, B=1, N=1, Hr=1),
            S("N63_Hr5_Hw4", options={"decay": 0.99}, B=3, N=63, Hr=5, Hw=4),
            S("N1000", options={"decay": 0.95}, N=1000),
            S("no_write_heads", options={"decay": 1}, N=7, Hw=0),
            S("decay_0", options={"decay": 0.0}, N=100, Hr=0, Hw=3),
        ),
        ("usage", "read_weights", "write_weights"),
        lambda s: s.Hr + s.Hw + 1,
    ),
    Case(
        "least_used",
        {"usage": "B N"},
        _least_used,
        (
            S("small", options={"n": 3}),
            S("N1_n1", options={"n": 1}, B=1, N=1),
            S("n0", options={"n": 0}, N=7),
            S("n_all", options={"n": 64}, B=3, N=64),
            S("n_more", options={"n": 99}, N=20),
            S("N1000_n1", options={"n": 1}, N=1000),
            S("N1000_n63_ties", twist(usage=_ties), options={"n": 63}, N=1000),
        ),
        (),
        lambda s: 1,
    ),
    Case(
        "lrua_write",
        {"memory": "B N W", "key": "B H W", "previous_read": "B H N", "usage": "B N", "gate": "B H", "add": "B H W"},
        _lrua_write,
        (
            S("small"),
            S("N1_W1", B=1, H=1, N=1, W=1),
            S("N63_W3_H5", B=3, H=5, N=63, W=3),
            S("N128_W40_H4", B=4, H=4, N=128, W=40),
            S("N1000_W64_H1", B=1, H=1, N=1000, W=64),
            S("keep", options={"zero": None}, N=7, W=100),
            S("add", _with_add, H=3, N=20, W=20),
            S("add_keep_ties", lambda x: (_with_add(x), x["usage"].zero_()), {"zero": None}, N=20),
            S("gate_0", twist(gate=0.0), N=20),
            S("gate_1", twist(gate=1.0), N=20),
        ),
        ("memory", "key", "previous_read", "gate", "add"),
        lambda s: s.H + 1,
        lambda s: max(s.N, s.W, s.H),
    ),
    Case(
        "split_interface",
        {"interface": "B I"},
        _split_interface,
        (
            step("r1_w1", 1, 1),
            step("r4_w0", 4, 0, 0, W=1),
            step("r0_w1", 0, 1, B=1, W=20),
            step("r1_w3_R3", 1, 3, 3, B=3, W=63),
            step("r2_w2_W100", 2, 2, W=100),
        ),
        ("interface",),
        lambda s: 2 * s.R + 1,
    ),
    Case(
        "ntm_step",
        {"memory": "B N W", "interface": "B I", "previous": "B H N"},
        _ntm_step,
        (
            step("small", 1, 1),
            step("N1_W1", 1, 1, B=1, N=1, W=1),
            step("read_first", 1, 1, order="read_write"),
            step("N63_W20_r2_w3", 2, 3, B=3, N=63, W=20, order="write_read"),
            step("N128_W20", 1, 1, B=4, N=128, W=20),
            step("N1000_W3", 1, 1, 0, B=1, N=1000, W=3),
            step("N3_R3_r4_w1_read_first", 4, 1, 3, N=3, order="read_write"),
            step("N40_W260_r1_w2", 1, 2, B=1, N=40, W=260),  # more than a Triton block holds
            step("N512_W32", 1, 1, B=1, N=512, W=32),  # several tiles in registers
            step("no_write_heads", 2, 0, 2, N=20),
            step("no_read_heads", 0, 2, N=7, W=64),
            step("zero_rows", 1, 1, twist=twist(memory=_zero_rows), N=20),
        ),
        ("memory", "interface", "previous"),
        lambda s: max(s.N, s.W),
        fixed="I H",
        sharpens=True,
    ),
    Case(
        "knn_search",
        {"query": "A Q D", "keys": "A N D"},
        _knn_search,
        (
            S("small", options={"k": 3}, A=2),
            S("flat_cosine", options={"k": 3, "metric": "cosine"}, B=9),
            S("ip", options={"k": 3, "metric": "ip"}, A=2, B=5, W=9),
            S("shared_query", _one_query_for_all, {"k": 4}, A=3, B=3),
            S("k_of_few_rows", options={"k": 30}, A=2, N=7),
            S("k0", options={"k": 0}),
            S("count", options={"k": 5, "count": torch.tensor([4, 63, 0])}, A=3, N=63),
            S("N1000_W64_k50", options={"k": 50}, B=3, N=1000, W=64),
            S("N1000_W33_Q70", options={"k": 10}, B=70, N=1000, W=33),
            S("exact_hits", _query_of_keys, {"k": 12}, A=2, B=3),
            S("N63_W9", options={"k": 3, "metric": "cosine"}, B=5, N=63, W=9),
            S("N300_k130", options={"k": 130}, N=300),
        ),
        ("query", "keys"),
        lambda s: s.W,
        lambda s: s.W + s.A * s.B,
    ),
    Case(
        "knn_lookup",
        {"query": "A Q D", "keys": "A N D", "values": "A N V"},
        _knn_lookup,
        (
            S("small", options={"k": 3, "delta": 0.1}, A=2),
            S("softmax_cosine", options={"k": 3, "kernel": "softmax", "delta": 0.5, "metric": "cosine"}, B=9),
            S("uniform_ip", options={"k": 3, "kernel": "uniform", "metric": "ip"}, A=2, B=5),
            S("softmax_ip", options={"k": 4, "kernel": "softmax", "delta": 2.0, "metric": "ip"}, B=5),
            S("shared_query", _one_query_for_all, {"k": 4, "delta": 0.1}, A=3, B=3, V=1),
            S("k_of_few_rows", options={"k": 30, "delta": 0.1}, A=2, N=7),
            S("k0", options={"k": 0}),
            S("count", options={"k": 5, "delta": 0.1, "count": torch.tensor([4, 63, 0])}, A=3, N=63),
            S("N1000_W64_k50", options={"k": 50}, B=3, N=1000, W=64, V=1),
            S("N1000_W33_Q70", options={"k": 10, "delta": 0.1}, B=70, N=1000, W=33, V=20),
            S("exact_hits", _query_of_keys, {"k": 12, "delta": 0.1}, A=2, B=3),
            S("N63_W9", options={"k": 3, "kernel": "softmax", "metric": "cosine"}, B=5, N=63, W=9),
            S("N300_k130", options={"k": 130, "delta": 0.1}, N=300),
        ),
        ("query", "keys", "values"),
        lambda s: s.W + s.V,
        lambda s: s.W + s.V + s.A * s.B,
    ),
)

_by_name = {c.name: c for c in CASES}


def case(name: str) -> Case:
    return _by_name[name]
