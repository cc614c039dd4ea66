"""What is measured: shapes, inputs, gates. One table serves the runner, the tests and pytest-benchmark."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional, reference
from . import baselines

__all__ = [
    "CASES", "CALLS", "CALL_STEP", "Case", "FRESH", "GROWTH", "Gate", "HELD", "POWER", "SHAPES", "STEPS", "Shape", "StepCase", "TRAIN_GATES",
    "TINY_STEP", "benchmark_op", "check",
]  # fmt: skip


class Shape(NamedTuple):
    """Sizes of one operator's inputs."""

    B: int
    H: int
    N: int
    W: int

    def __str__(self) -> str:
        return f"({self.B},{self.H},{self.N},{self.W})"


SHAPES = {"small": Shape(16, 1, 128, 20), "mid": Shape(64, 4, 512, 64), "large": Shape(32, 4, 4096, 64), "tiny": Shape(3, 2, 8, 5)}
DECAY = 0.95
S = 3  # shifts


class Gate(NamedTuple):
    """What memcore has to reach: times faster than eager and than compile, memories saved a step, microseconds."""

    eager: float | None = None
    compile: float | None = None
    saved: float | None = None
    us: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.eager:g}x eager" if self.eager else "", f"{self.compile:g}x compile" if self.compile else ""]
        parts += [f"saved <= {self.saved:g}" if self.saved else "", f"<= {self.us:g} us" if self.us else ""]
        return ", ".join(p for p in parts if p)


OP_GATES = {"small": (Gate(2), Gate(3)), "mid": (Gate(2), Gate(5)), "large": (Gate(2), Gate(5))}  # forward, forward + backward


def _weights(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=g).softmax(-1)


def _addressing(s: Shape, g: torch.Generator) -> tuple[Tensor, ...]:
    """key, memory, strength."""
    return (
        torch.randn(s.B, s.H, s.W, generator=g),
        torch.randn(s.B, s.N, s.W, generator=g),
        1 + torch.rand(s.B, s.H, generator=g),
    )


def _focus(s: Shape, g: torch.Generator) -> tuple[Tensor, ...]:
    """gate, shift, gamma, previous."""
    return (
        torch.rand(s.B, s.H, generator=g),
        _weights((s.B, s.H, S), g),
        1 + torch.rand(s.B, s.H, generator=g),
        _weights((s.B, s.H, s.N), g),
    )


def _write(s: Shape, g: torch.Generator) -> tuple[Tensor, ...]:
    return (
        torch.randn(s.B, s.N, s.W, generator=g),
        _weights((s.B, s.H, s.N), g),
        torch.rand(s.B, s.H, s.W, generator=g),
        torch.randn(s.B, s.H, s.W, generator=g),
    )


def _lrua(s: Shape, g: torch.Generator) -> tuple[Tensor, ...]:
    return (
        torch.randn(s.B, s.N, s.W, generator=g),
        torch.randn(s.B, s.H, s.W, generator=g),
        _weights((s.B, s.H, s.N), g),
        torch.rand(s.B, s.N, generator=g),
        torch.rand(s.B, s.H, generator=g),
    )


@dataclass(frozen=True)
class Case:
    """One operator: inputs, which of them are differentiated, operations of the forward (2 a multiply-add), inputs the backward has no need of."""

    op: str
    make: Callable[[Shape, torch.Generator], tuple[Tensor, ...]]
    diff: tuple[int, ...]
    flops: Callable[[Shape], float]
    options: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = True
    unread: tuple[int, ...] = ()

    def inputs(self, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
        """Fresh inputs; those that are differentiated require grad. The same numbers on every device."""
        made = [t.to(device, dtype) for t in self.make(shape, torch.Generator().manual_seed(seed))]
        return tuple(t.requires_grad_(i in self.diff) for i, t in enumerate(made))

    def _bound(self, function: Callable) -> Callable[..., tuple[Tensor, ...]]:
        if not self.options:
            return function
        return lambda *xs: function(*xs, **self.options)

    def memcore(self) -> Callable:
        return self._bound(getattr(functional, self.op))

    def reference(self) -> Callable:
        return self._bound(getattr(reference, self.op))

    def baseline(self, variant: str) -> Callable | None:
        """The `eager` or `naive` form; None where there is none."""
        function = getattr(baselines, variant).get(self.op)
        return None if function is None else self._bound(function)

    def gate(self, size: str, backward: bool) -> Gate | None:
        return OP_GATES[size][backward] if self.gated and size in OP_GATES else None


def _content_flops(s: Shape) -> float:
    return 2 * s.B * s.N * s.W * (s.H + 1)



CASES = {
    case.op: case
    for case in (
        Case("content_addressing", _addressing, (0, 1, 2), _content_flops),
        Case(
            "interpolate",
            lambda s, g: (_weights((s.B, s.H, s.N), g), _weights((s.B, s.H, s.N), g), torch.rand(s.B, s.H, generator=g)),
            (0, 1, 2),
            lambda s: 3 * s.B * s.H * s.N,
        ),
        Case(
            "circular_shift",
            lambda s, g: (_weights((s.B, s.H, s.N), g), _weights((s.B, s.H, S), g)),
            (0, 1),
            lambda s: 2 * S * s.B * s.H * s.N,
        ),
        Case(
            "sharpen",
            lambda s, g: (_weights((s.B, s.H, s.N), g), 1 + torch.rand(s.B, s.H, generator=g)),
            (0, 1),
            lambda s: 5 * s.B * s.H * s.N,
        ),
        Case(
            "ntm_addressing",
            lambda s, g: (*_addressing(s, g), *_focus(s, g)),
            tuple(range(7)),
            lambda s: _content_flops(s) + 14 * s.B * s.H * s.N,
        ),
        Case(
            "read",
            lambda s, g: (torch.randn(s.B, s.N, s.W, generator=g), _weights((s.B, s.H, s.N), g)),
            (0, 1),
            lambda s: 2 * s.B * s.H * s.N * s.W,
        ),
        Case("erase_add_write", _write, (0, 1, 2, 3), lambda s: 5 * s.B * s.H * s.N * s.W),
        Case("lrua_write", _lrua, (0, 1, 2, 4), lambda s: 2 * s.B * s.H * s.N * s.W, unread=(0,)),
        Case(
            "usage_update",
            lambda s, g: (torch.rand(s.B, s.N, generator=g), _weights((s.B, s.H, s.N), g), _weights((s.B, s.H, s.N), g)),
            (0, 1, 2),
            lambda s: 2 * s.B * (s.H + 1) * s.N,
            {"decay": DECAY},
            gated=False,
            unread=(0, 1, 2),
        ),
        Case("least_used", lambda s, g: (torch.rand(s.B, s.N, generator=g),), (), lambda s: s.B * s.N, {"n": 1}, gated=False),
    )
}
FRESH = ("content_addressing", "read", "erase_add_write", "lrua_write")  # whose outputs or gradients are memories
# H heads of which one writes: what a step of these shapes has to cut.
CASES["split_interface"] = Case(
    "split_interface",
    lambda s, g: (torch.randn(s.B, 2 * (s.W + 3 + S) + 2 * s.W, generator=g),),
    (0,),
    lambda s: 4 * s.B * (2 * (s.W + 3 + S) + 2 * s.W),
    {"read_heads": 1, "write_heads": 1},
    gated=False,
)


@dataclass(frozen=True)
class StepCase:
    """A chain of NTM steps, forward and backward through time."""

    B: int
    R: int
    Hw: int
    N: int
    W: int
    T: int
    gate: Gate

    def __str__(self) -> str:
        return f"({self.B},{self.R}/{self.Hw},{self.N},{self.W}) T={self.T}"

    @property
    def memory_bytes(self) -> int:
        return 4 * self.B * self.N * self.W

    @property
    def multiply_adds(self) -> int:
        """Of one step, forward and backward, on the memory: at the least, with everything kept and nothing computed twice."""
        H = self.R + self.Hw
        forward = H + 1 + self.R + 2 * self.Hw  # similarities, norms, reads; a write is memory + w (add - erase memory)
        backward = 2 * H + 1 + 2 * self.R + 5 * self.Hw  # of two factors each; a write: add - erase memory again, w x gradient, and of w, erase and memory
        return self.B * self.N * self.W * (forward + backward)

    def inputs(self, seed: int = 0, device: str = "cpu") -> tuple[Tensor, list[Tensor], Tensor]:
        """memory, one interface a step in memcore's layout, first weights; leaves that require grad."""
        g = torch.Generator().manual_seed(seed)
        H = self.R + self.Hw
        size = H * (self.W + 3 + S) + 2 * self.W * self.Hw
        memory = torch.randn(self.B, self.N, self.W, generator=g).to(device)
        interfaces = [torch.randn(self.B, size, generator=g).to(device).requires_grad_() for _ in range(self.T)]
        return memory.requires_grad_(), interfaces, _weights((self.B, H, self.N), g).to(device).requires_grad_()


STEPS = {
    "small": StepCase(16, 1, 1, 128, 20, 40, Gate(6, 3, saved=1.2)),
    "mid": StepCase(64, 4, 1, 512, 64, 40, Gate(8, 3.5, saved=1.2)),
    "large": StepCase(32, 4, 1, 4096, 64, 8, Gate(6, 3, saved=1.2)),
    "tiny": StepCase(2, 2, 1, 8, 5, 3, Gate()),
}
TINY_STEP = StepCase(1, 1, 1, 8, 4, 40, Gate(us=60))  # nothing but the call
# How cost grows: one size at a time from a chain whose memories are past the caches, so that work outweighs calls.
_GROWN = StepCase(16, 1, 1, 512, 64, 10, Gate())
_QUICK = StepCase(2, 1, 1, 16, 8, 2, Gate())
_SIZES = {"B": (8, 16, 32, 64), "T": (5, 10, 20, 40), "N": (256, 512, 1024, 2048), "W": (16, 32, 64, 128)}
GROWTH = {axis: tuple(replace(_GROWN, **{axis: n}) for n in sizes) for axis, sizes in _SIZES.items()}
GROWTH_QUICK = {axis: tuple(replace(_QUICK, **{axis: n * getattr(_QUICK, axis)}) for n in (1, 2)) for axis in _SIZES}
POWER = 1.1  # what counts as linear
CALLS, CALL_STEP = 10_000, StepCase(16, 1, 1, 128, 20, 1, Gate())
HELD = 1 << 20  # bytes the process may have grown by after CALLS calls: a leak of 105 bytes a call is told
TRAIN_GATES = {1: Gate(20, 6), 16: Gate(12, 6), 64: Gate(8, 4)}  # the whole recurrence in one operator


def tuples(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def close(what: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    if got.dtype == torch.int64:
        if not torch.equal(got, expected):
            raise RuntimeError(f"memcore bench: {what} is wrong; nothing is timed")
        return
    error, scale = (got.double() - expected.double()).norm().item(), expected.double().norm().item()
    if not error <= tolerance * max(scale, 1e-30):
        raise RuntimeError(f"memcore bench: {what} differs from memcore.reference by {error / max(scale, 1e-30):.2g}; nothing is timed")


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
WHOLE = 2**24  # numbers B*H*N*W up to which all of a batch is checked, else its first two and last two items


def check(case: Case, shape: Shape, variant: str, function: Callable, inputs: tuple[Tensor, ...]) -> None:
    """Compare outputs and gradients (relative norm) with the float64 reference.

    Raises:
        RuntimeError: they differ. No speed-up from a red gate.
    """
    name = f"{variant} {case.op} {shape}"
    items = slice(None) if shape.B * shape.H * shape.N * shape.W <= WHOLE or shape.B < 4 else [0, 1, -2, -1]
    wide = [t.detach()[items].double().requires_grad_(i in case.diff) for i, t in enumerate(inputs)]
    tolerance = TOLERANCE[inputs[0].dtype]
    got, expected = tuples(function(*inputs)), tuples(case.reference()(*wide))
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        close(f"output {i} of {name}", a.detach()[items], b.detach(), tolerance)
    if not case.diff:
        return
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(a.shape, generator=g, dtype=torch.float64).to(a) for a in got]
    found = torch.autograd.grad(got, [inputs[i] for i in case.diff], cotangents)
    wanted = torch.autograd.grad(expected, [wide[i] for i in case.diff], [c[items].double() for c in cotangents])
    for i, a, b in zip(case.diff, found, wanted, strict=True):
        close(f"gradient {i} of {name}", a[items], b, tolerance)


def benchmark_op(op: str) -> Callable:
    """A pytest-benchmark test of `op`: sizes x (memcore, eager) x (forward, forward + backward), one thread."""
    import pytest

    from .measure import threads

    case = CASES[op]

    @pytest.mark.parametrize("backward", [False, True] if case.diff else [False], ids=lambda b: "fwd+bwd" if b else "fwd")
    @pytest.mark.parametrize("variant", ["memcore", "eager"])
    @pytest.mark.parametrize("size", ["small", "mid"])
    def test(benchmark, size: str, variant: str, backward: bool) -> None:
        function = case.memcore() if variant == "memcore" else case.baseline("eager")
        inputs = case.inputs(SHAPES[size])
        check(case, SHAPES[size], variant, function, inputs)
        benchmark.group = f"{op} {SHAPES[size]} {'fwd+bwd' if backward else 'fwd'}"
        with threads(1):
            benchmark(runnable(case, function, inputs, backward))

    test.__doc__ = f"{op} against tuned eager PyTorch."
    return test


def runnable(case: Case, function: Callable, inputs: tuple[Tensor, ...], backward: bool) -> Callable[[], object]:
    """The call that is timed: the forward without a graph, or forward and backward to every differentiable input."""
    if not backward:
        plain = [t.detach() for t in inputs]

        def forward() -> object:
            with torch.no_grad():
                return function(*plain)

        return forward
    wanted = [inputs[i] for i in case.diff]
    g = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=g).to(y) for y in tuples(function(*inputs))]

    def both() -> object:
        return torch.autograd.grad(tuples(function(*inputs)), wanted, cotangents)

    return both
