"""The suite `sequence`: a whole recurrence, controller and output layer included, forward and backward through time."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import backend
from ..kernels.ntm_sequence.op import copies_every, saved_numbers
from . import baselines, measure
from .cases import Gate, StepCase, close

__all__ = ["SCALING", "SCALING_QUICK", "SEQUENCES", "Recurrence", "recurrences", "sequence"]

X, O, K = 9, 8, 100  # those of the copy task, with the paper's LSTM controller
SEQUENCES = {
    "small": StepCase(16, 1, 1, 128, 20, 40, Gate(12, 5, saved=0.45)),
    "mid": StepCase(64, 4, 1, 512, 64, 40, Gate(12, 5, saved=0.45)),
    "large": StepCase(32, 4, 1, 4096, 64, 8, Gate(10, 5, saved=0.45)),
}
_BASE = StepCase(16, 1, 1, 128, 20, 40, Gate())
_SIZES = {"B": (1, 4, 16, 64), "N": (32, 128, 512, 2048), "W": (8, 20, 64, 128), "T": (16, 64, 256, 1024)}
SCALING = {axis: tuple(replace(_BASE, **{axis: n}) for n in sizes) for axis, sizes in _SIZES.items()}
_LEAST = StepCase(2, 1, 1, 16, 8, 2, Gate())
SCALING_QUICK = {axis: tuple(replace(_LEAST, **{axis: n * getattr(_LEAST, axis)}) for n in (1, 2)) for axis in _SIZES}


@dataclass(frozen=True)
class Recurrence:
    """One variant of an NTM over a sequence."""

    net: nn.Module
    input: Tensor
    cotangent: Tensor

    def forward(self) -> Tensor:
        return self.net(self.input)[0]

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), list(self.net.parameters()), self.cotangent)


def recurrences(case: StepCase, names: Iterable[str], seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Recurrence]:
    """The variants, each checked against float64 (on the first two items where the case is large)."""
    from ..models import NTM

    torch.manual_seed(seed)
    model = NTM(X, O, memory_slots=case.N, slot_width=case.W, read_heads=case.R, write_heads=case.Hw, controller_size=K)
    g = torch.Generator().manual_seed(seed)
    x, cotangent = torch.randn(case.T, case.B, X, generator=g), torch.randn(case.T, case.B, O, generator=g)
    some = slice(None) if case.B * case.N * case.W * case.T <= 2**23 else slice(0, 2)
    wide = copy.deepcopy(model).double()
    with backend("reference"):
        expected = wide(x[:, some].double())[0]
        wanted = torch.autograd.grad(expected, list(wide.parameters()), cotangent[:, some].double())
    order = baselines.interface_order(case.W, case.R, case.Hw)

    made: dict[str, Recurrence] = {}
    for name in names:
        net = copy.deepcopy(model) if name == "memcore" else baselines.eager_ntm(model, *([baselines.no_memory_step] if name == "floor" else []))
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
            close(f"the output of {name} NTM {case}", part.forward().detach(), expected.detach(), 1e-3)
            for (key, _), a, b in zip(net.named_parameters(), part.both(), wanted, strict=True):
                if "interface" in key and name != "memcore":
                    b = b[order]
                close(f"the gradient of {key} of {name} NTM {case}", a, b, 5e-3)
        made[name] = found
    return made


def _saved(case: StepCase, variants: dict[str, Recurrence]) -> dict[str, int]:
    """Bytes kept for the backward beside the controller's own: its activations and one copy of the parameters; of PyTorch's variants, what
    steps without memory keep."""
    kept = {name: measure.saved_bytes(v.forward, [v.input, *v.net.parameters()]) for name, v in variants.items()}
    floor = kept.pop("floor", 0)
    own = saved_numbers(case.T, case.B, X, K, case.N, case.W, True, 1, case.R, case.Hw, 1, copies_every(case.T))["controller"]
    own += sum(p.numel() for p in next(iter(variants.values())).net.parameters())
    return {name: n - (4 * own if name == "memcore" else floor) for name, n in kept.items()}


def sequence(run: Any) -> None:
    """A whole NTM over a sequence at three sizes, then how its cost goes with B, N, W and T; times are of one step."""
    wanted = [v for v in run.variants if v in ("memcore", "eager", "compile")]
    for size in () if run.only else run.sizes:
        case = SEQUENCES[size]
        for count in run.threads:
            with measure.threads(count):
                names = [v for v in wanted if v != "compile" or count == 1]
                variants = recurrences(case, [*names, *(["floor"] if count == 1 else [])], run.seed, run.tell_once)
                saved = _saved(case, variants) if count == 1 else None
                variants.pop("floor", None)
                timings = run.time({name: v.both for name, v in variants.items()}, count, 8 if count == 1 else 4)
            run.add(
                "sequence", "NTM", case, "fwd+bwd", count, timings, steps=case.T, saved=saved, memory=case.memory_bytes, gate=case.gate
            )
    for axis, points in (SCALING_QUICK if run.quick else SCALING).items():
        for case in points:
            with measure.threads(1):
                variants = recurrences(case, [*wanted, "floor"], run.seed, run.tell_once)
                saved = _saved(case, variants)
                variants.pop("floor")
                timings = run.time({name: v.both for name, v in variants.items()}, 1, 1)
            run.add("scaling", "NTM", case, f"fwd+bwd over {axis}", 1, timings, steps=case.T, saved=saved, memory=case.memory_bytes)
