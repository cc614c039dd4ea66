"""The suite `sequence`: a whole recurrence, controller and output layer included, forward and backward through time."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..kernels.mann_sequence.op import saved_numbers as mann_saved_numbers
from ..kernels.ntm_sequence.op import copies_every, saved_numbers
from . import baselines, measure
from .cases import Gate, StepCase, close

__all__ = ["ALONE", "MANN_SEQUENCES", "MODELS", "SCALING", "SCALING_QUICK", "SEQUENCES", "Recurrence", "recurrences", "sequence"]

SEQUENCES = {
    "small": StepCase(16, 1, 1, 128, 20, 40, Gate(12, 5, saved=0.45)),
    "mid": StepCase(64, 4, 1, 512, 64, 40, Gate(12, 5, saved=0.45)),
    "large": StepCase(32, 4, 1, 4096, 64, 8, Gate(10, 5, saved=0.45)),
}
ALONE = StepCase(1, 4, 1, 4096, 64, 16, Gate())  # one large memory: threads share its steps
MANN_SEQUENCES = {"small": StepCase(16, 4, 4, 128, 40, 50, Gate())}  # the paper's model on its 5-class episodes
_BASE = StepCase(16, 1, 1, 128, 20, 40, Gate())
_SIZES = {"B": (1, 4, 16, 64), "N": (32, 128, 512, 2048), "W": (8, 20, 64, 128), "T": (16, 64, 256, 1024)}
SCALING = {axis: tuple(replace(_BASE, **{axis: n}) for n in sizes) for axis, sizes in _SIZES.items()}
_LEAST = StepCase(2, 1, 1, 16, 8, 2, Gate())
SCALING_QUICK = {axis: tuple(replace(_LEAST, **{axis: n * getattr(_LEAST, axis)}) for n in (1, 2)) for axis in _SIZES}


@dataclass(frozen=True)
class Recurrence:
    """One variant of a model over a sequence."""

    net: nn.Module
    input: Tensor
    cotangent: Tensor

    def forward(self) -> Tensor:
        return self.net(self.input)[0]

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), list(self.net.parameters()), self.cotangent)


@dataclass(frozen=True)
class _Model:
    """What the suite has to know of a model: sizes of its input and output, itself, its twins, what it keeps of its controller."""

    X: int
    O: int
    make: Callable[[StepCase], nn.Module]
    eager: Callable[[nn.Module], nn.Module]
    floor: Callable[[nn.Module], nn.Module]
    order: Callable[[StepCase], Tensor] | None  # of the eager twin's interface
    kept: Callable[[StepCase], int]
    multiply_adds: Callable[[StepCase], int]  # of one step, forward and backward, controller included


def _lstm(X: int, C: int, reads: int, interface: int, O: int) -> int:
    """Multiply-adds of one element's controller, interface and output: of weights forward, of their gradients, and of inputs' but the sequence's."""
    own = (reads + C) * 4 * C + C * interface + (C + reads) * O
    return 3 * own + 2 * X * 4 * C


def _ntm_multiply_adds(case: StepCase) -> int:
    interface = (case.R + case.Hw) * (case.W + 6) + 2 * case.Hw * case.W
    return case.multiply_adds + case.B * _lstm(9, 100, case.R * case.W, interface, 8)


def _mann_multiply_adds(case: StepCase) -> int:
    R = case.R
    memory = 3 * R + 1 + 6 * R + 1  # similarities, reads and writes of each head, norms; then of two factors each
    return case.B * (case.N * case.W * memory + _lstm(405, 200, R * case.W, R * (case.W + 1), 5))


def _ntm(case: StepCase) -> nn.Module:
    from ..models import NTM

    return NTM(9, 8, memory_slots=case.N, slot_width=case.W, read_heads=case.R, write_heads=case.Hw, controller_size=100)


def _mann(case: StepCase) -> nn.Module:
    from ..models import MANN

    return MANN(405, 5, memory_slots=case.N, slot_width=case.W, read_heads=case.R, controller_size=200)


MODELS = {
    "NTM": _Model(  # on the copy task, with the paper's LSTM controller
        9, 8, _ntm, baselines.eager_ntm, lambda net: baselines.eager_ntm(net, baselines.no_memory_step),
        lambda c: baselines.interface_order(c.W, c.R, c.Hw),
        lambda c: saved_numbers(c.T, c.B, 9, 100, c.N, c.W, True, 1, c.R, c.Hw, 1, copies_every(c.T))["controller"],
        _ntm_multiply_adds,
    ),
    "MANN": _Model(
        405, 5, _mann, baselines.eager_mann, lambda net: baselines.eager_mann(net, baselines.no_mann_memory_step), None,
        lambda c: mann_saved_numbers(c.T, c.B, 200, c.N, c.W, 1, c.R, False, c.T)["controller"],
        _mann_multiply_adds,
    ),
}  # fmt: skip


def recurrences(
    case: StepCase, names: Iterable[str], seed: int = 0, say: Callable[[str], None] = print, kind: str = "NTM", device: str = "cpu"
) -> dict[str, Recurrence]:
    """The variants, each checked against float64 (on the first two items where the case is large)."""
    about = MODELS[kind]
    torch.manual_seed(seed)
    model = about.make(case).to(device)
    g = torch.Generator().manual_seed(seed)
    x, cotangent = (torch.randn(case.T, case.B, size, generator=g).to(device) for size in (about.X, about.O))
    some = slice(None) if case.B * case.N * case.W * case.T <= 2**23 else slice(0, 2)
    wide = copy.deepcopy(model).double()
    with backend("reference"):
        expected = wide(x[:, some].double())[0]
        wanted = torch.autograd.grad(expected, list(wide.parameters()), cotangent[:, some].double())

    made: dict[str, Recurrence] = {}
    for name in names:
        net = copy.deepcopy(model) if name == "memcore" else about.floor(model) if name == "floor" else about.eager(model)
        found = Recurrence(net, x, cotangent)
        if name == "compile":
            measure.fresh_compiler()

            def attempt(f: Callable, net: Any = net, found: Recurrence = found) -> None:
                net.cell.advance = f
                found.both()

            fast, why = measure.compiled(net.cell.advance, attempt)
            if fast is None:
                say(why)
                continue
        if name != "floor":
            part = Recurrence(net, x[:, some], cotangent[:, some])
            close(f"the output of {name} {kind} {case}", part.forward().detach(), expected.detach(), 1e-3)
            for (key, _), a, b in zip(net.named_parameters(), part.both(), wanted, strict=True):
                if about.order is not None and "interface" in key and name != "memcore":
                    b = b[about.order(case)]
                close(f"the gradient of {key} of {name} {kind} {case}", a, b, 5e-3)
        made[name] = found
    return made


def _saved(case: StepCase, variants: dict[str, Recurrence], kind: str = "NTM") -> dict[str, int]:
    """Bytes kept for the backward beside the controller's own: its activations and one copy of the parameters; of PyTorch's variants, what
    steps without memory keep."""
    kept = {name: measure.saved_bytes(v.forward, [v.input, *v.net.parameters()]) for name, v in variants.items()}
    floor = kept.pop("floor", 0)
    own = MODELS[kind].kept(case) + sum(p.numel() for p in next(iter(variants.values())).net.parameters())
    return {name: n - (4 * own if name == "memcore" else floor) for name, n in kept.items()}


def sequence(run: Any) -> None:
    """A whole NTM over a sequence at three sizes and a MANN, then how the NTM's cost goes with B, N, W and T; times are of one step."""
    wanted = [v for v in run.variants if v in ("memcore", "eager", "compile")]
    cases = [(kind, table[size]) for kind, table in (("NTM", SEQUENCES), ("MANN", MANN_SEQUENCES)) for size in run.sizes if size in table]
    cases += [("NTM", ALONE)] if "large" in run.sizes else []
    for kind, case in [] if run.only else cases:
        for count in run.threads:
            with measure.threads(count):
                names = [v for v in wanted if v != "compile" or count == 1]
                variants = recurrences(case, [*names, *(["floor"] if count == 1 else [])], run.seed, run.tell_once, kind)
                saved = _saved(case, variants, kind) if count == 1 else None
                variants.pop("floor", None)
                calls = {name: v.both for name, v in variants.items()} | {"products": measure.products(case.T * MODELS[kind].multiply_adds(case))}
                timings = run.time(calls, count, 8 if count == 1 else 4)
            run.add("sequence", kind, case, "fwd+bwd", count, timings, steps=case.T, saved=saved, memory=case.memory_bytes, gate=case.gate)
    for axis, points in (SCALING_QUICK if run.quick else SCALING).items():
        for case in points:
            with measure.threads(1):
                variants = recurrences(case, [*wanted, "floor"], run.seed, run.tell_once)
                saved = _saved(case, variants)
                variants.pop("floor")
                timings = run.time({name: v.both for name, v in variants.items()}, 1, 1)
            run.add("scaling", "NTM", case, f"fwd+bwd over {axis}", 1, timings, steps=case.T, saved=saved, memory=case.memory_bytes)
