"""The suites behind `memcore bench`: single operators, chained NTM steps, whole training steps, growth, the machine's limits."""

import copy
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import backend, functional
from . import baselines, measure
from .cases import CALL_STEP, CALLS, CASES, FRESH, GROWTH, GROWTH_QUICK, HELD, POWER, SHAPES, STEPS, TINY_STEP, TOLERANCE, TRAIN_GATES
from .cases import Gate, Shape, StepCase, check, close, runnable, tuples
from .measure import Timing
from .rows import FIELDS, powers
from .sequence import MODELS, recurrences, sequence

__all__ = [
    "Run", "calls", "chain", "fresh", "growth", "held", "knn", "ops", "roofline", "sequence", "step", "step_variants", "store", "train", "training_steps",
]  # fmt: skip

COPY_LENGTH = 20  # 41 time steps
# Whole sequences, whose calls are counted like those of single operators: small, since there are thousands of them.
_HELD_NTM, _HELD_MANN = StepCase(2, 1, 1, 16, 8, 5, Gate()), StepCase(2, 2, 2, 16, 8, 5, Gate())


@dataclass
class Run:
    """Settings of one `memcore bench` and the rows it has made."""

    threads: tuple[int, ...] = (1, 2)
    variants: tuple[str, ...] = ("memcore", "eager", "compile", "vectorised", "naive")
    only: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ("small", "mid", "large")
    batches: tuple[int, ...] = (1, 16, 64)
    dtype: torch.dtype = torch.float32
    seed: int = 0
    scale: float = 1.0
    quick: bool = False
    keep_freed: bool = True
    """Let malloc keep what is freed, for every variant; else it stays as it is in a user's program."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.about = {**measure.machine(), "allocator": measure.tune_allocator() if self.keep_freed else "malloc as it is"}
        torch.manual_seed(self.seed)
        self._told: set[str] = set()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def tell_once(self, text: str) -> None:
        if text and text not in self._told:
            self._told.add(text)
            self.say(text)

    def time(self, calls: Mapping[str, Callable[[], object]], threads: int, seconds: float) -> dict[str, Timing]:
        if self.quick:
            return measure.interleave(calls, wall=threads > 1, seconds=0, least=2)
        return measure.interleave(calls, wall=threads > 1, seconds=seconds * self.scale, least=5)

    def add(
        self,
        suite: str,
        op: str,
        shape: object,
        kind: str,
        threads: int,
        timings: Mapping[str, Timing],
        *,
        steps: int = 1,
        bytes: float | None = None,
        flops: float | None = None,
        saved: Mapping[str, int] | None = None,
        memory: int | None = None,
        aten: Mapping[str, int] | None = None,
        gate: Gate | None = None,
        recall: Mapping[str, float] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """One row a variant; times are divided by `steps`, bytes and flops are of one step."""
        medians = {name: t.median / steps for name, t in timings.items()}
        for name, t in timings.items():
            kept = (saved or {}).get(name)
            row: dict[str, Any] = {
                **dict.fromkeys(FIELDS),
                **self.about,
                "threads": threads,
                "clock": "wall" if threads > 1 else "cpu",
                "suite": suite,
                "op": op,
                "shape": str(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "pass": kind,
                "variant": name,
                "rounds": len(t.samples),
                "ms_median": 1e3 * medians[name],
                "p20": 1e3 * t.quantile(0.2) / steps,
                "p80": 1e3 * t.quantile(0.8) / steps,
                "min": 1e3 * min(t.samples) / steps,
                "max": 1e3 * max(t.samples) / steps,
                "GB/s": None if bytes is None else bytes / medians[name] / 1e9,
                "GFLOP/s": None if flops is None else flops / medians[name] / 1e9,
                "saved_bytes": kept,
                "saved_memories": None if kept is None or not memory else kept / steps / memory,
                "aten_calls": (aten or {}).get(name),
                "recall": (recall or {}).get(name),
            }
            for other in ("eager", "compile"):
                row[f"ratio_vs_{other}"] = medians[other] / medians[name] if other in medians and other != name else None
            if name == "memcore" and gate is not None and threads == 1 and str(gate):
                row["gate"], row["passed"] = str(gate), _passed(gate, row)
            self.rows.append(row)
        shown = ", ".join(f"{name} {1e3 * m:.4g}" for name, m in medians.items())
        self.say(f"{suite}: {op} {shape} {kind}, {threads} thread(s), ms: {shown}")
        measure.release()


def _passed(gate: Gate, row: dict[str, Any]) -> bool | None:
    """None if a baseline the gate needs was not measured."""
    verdicts: list[bool] = []
    for limit, value, more in (
        (gate.eager, row["ratio_vs_eager"], True),
        (gate.compile, row["ratio_vs_compile"], True),
        (gate.saved, row["saved_memories"], False),
        (gate.us, 1e3 * row["ms_median"], False),
    ):
        if limit is not None:
            if value is None:
                return None
            verdicts.append(value >= limit if more else value <= limit)
    return all(verdicts)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def ops(run: Run) -> None:
    """Single operators, forward and forward + backward; compile at one thread."""
    _ops(run, "ops", CASES, run.sizes)


def fresh(run: Run) -> None:
    """Operators whose outputs or gradients are memories, and steps, with malloc as it is in a user's program: where nobody keeps what was freed, large
    tensors are fresh memory, for whose pages the system takes its time."""
    _ops(run, "fresh", FRESH, [s for s in run.sizes if s != "small" or run.quick])
    _steps(run, "fresh", [s for s in run.sizes if s != "small" or run.quick])


def _ops(run: Run, suite: str, names: Iterable[str], sizes: Iterable[str]) -> None:
    for op in names:
        case = CASES[op]
        if run.only and op not in run.only:
            continue
        for size in sizes:
            if not case.gated and size == "large":
                continue
            shape: Shape = SHAPES[size]
            inputs = case.inputs(shape, run.dtype, run.seed)
            outputs = tuples(case.memcore()(*inputs))
            moved, made = _size(inputs), _size(outputs)
            grads, again = _size(inputs[i] for i in case.diff), _size(t for i, t in enumerate(inputs) if i not in case.unread)
            del outputs
            for count in run.threads:
                with measure.threads(count):
                    functions = _op_variants(run, case, shape, inputs, count)
                    saved = {}
                    if case.diff:
                        for name, f in functions.items():
                            saved[name] = measure.saved_bytes(lambda f=f: f(*inputs), inputs)
                    for backward in (False, True) if case.diff else (False,):
                        timed = {n: runnable(case, f, inputs, backward) for n, f in functions.items()}
                        timed["least"] = measure.least((moved, made), (again + made, grads) if backward else None)
                        timings = run.time(timed, count, 1.0 if count == 1 else 0.5)
                        run.add(
                            suite, op, shape, "fwd+bwd" if backward else "fwd", count, timings,
                            bytes=moved + again + 2 * made + grads if backward else moved + made,
                            flops=case.flops(shape) * (3 if backward else 1),
                            saved=saved if backward else None,
                            gate=case.gate(size, backward) if suite == "ops" else None,
                            dtype=run.dtype,
                        )  # fmt: skip


def _op_variants(run: Run, case: Any, shape: Shape, inputs: tuple[Tensor, ...], threads: int) -> dict[str, Callable]:
    """Every variant, checked against the reference."""
    made: dict[str, Callable] = {}
    for name in run.variants:
        if name == "compile":
            if threads > 1 or not case.gated:
                continue
            measure.fresh_compiler()
            function, why = measure.compiled(case.baseline("eager"), lambda f: f(*inputs))
            run.tell_once(why)
        else:
            function = case.memcore() if name == "memcore" else None if name == "vectorised" else case.baseline(name)
        if function is not None:
            check(case, shape, name, function, inputs)
            made[name] = function
    return made


def chain(case: StepCase, one: Callable, inputs: tuple[Tensor, list[Tensor], Tensor]) -> list[Tensor]:
    """T steps of `one(memory, interface, weights)`: all reads [T,B,R,W], stacked as a model does, the last memory and weights."""
    memory, interfaces, weights = inputs
    reads = []
    for interface in interfaces:
        memory, r, weights = one(memory, interface, weights)
        reads.append(r)
    return [torch.stack(reads), memory, weights]


_STEP_FORMS = {
    "vectorised": baselines.vectorised_ntm_step,
    "naive": baselines.naive_ntm_step,
    "floor": baselines.no_memory_step,
}


def _step_function(case: StepCase, variant: str) -> Callable:
    R, Hw = case.R, case.Hw
    if variant == "memcore":
        return lambda m, x, w: functional.ntm_step(m, x, w, read_heads=R, write_heads=Hw)
    form = _STEP_FORMS.get(variant, baselines.eager_ntm_step)
    return lambda m, x, w: form(m, x, w, R, Hw)


@dataclass(frozen=True)
class _Chain:
    """One variant of a chain of steps."""

    case: StepCase
    one: Callable
    inputs: tuple[Tensor, list[Tensor], Tensor]
    cotangents: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        memory, interfaces, weights = self.inputs
        return [memory, *interfaces, weights]

    def forward(self) -> list[Tensor]:
        return chain(self.case, self.one, self.inputs)

    def both(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), self.leaves, self.cotangents)

    def saved_bytes(self) -> int:
        """The first memory counts as one a step keeps; the caller's interfaces and first weights do not."""
        return measure.saved_bytes(self.forward, self.leaves[1:])


def step_variants(
    case: StepCase, names: Iterable[str], seed: int = 0, say: Callable[[str], None] = print, device: str = "cpu"
) -> dict[str, _Chain]:
    """The variants, each checked against the float64 reference (on the first two items where the chain is large)."""
    raw = case.inputs(seed, device)
    order = baselines.interface_order(case.W, case.R, case.Hw)
    mine = (raw[0], [x.detach()[:, order].requires_grad_() for x in raw[1]], raw[2])
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        cotangents = [torch.randn(y.shape, generator=g).to(y) for y in chain(case, _step_function(case, "eager"), mine)]

    some = slice(None) if case.B * case.N * case.W * (case.R + case.Hw) * case.T <= 2**25 else slice(0, 2)

    def items(output: int, t: Tensor) -> Tensor:  # the reads, output 0, have time first
        return t[:, some] if output == 0 else t[some]

    wide = [t.detach()[some].double().requires_grad_() for t in (raw[0], *raw[1], raw[2])]
    with backend("reference"):
        expected = chain(case, _step_function(case, "memcore"), (wide[0], wide[1:-1], wide[-1]))
        wanted = torch.autograd.grad(expected, wide, [items(i, c).double() for i, c in enumerate(cotangents)])

    made: dict[str, _Chain] = {}
    for name in names:
        inputs = mine if name in ("eager", "compile") else raw
        one = _step_function(case, name)
        if name == "compile":
            measure.fresh_compiler()
            one, why = measure.compiled(one, lambda f: _Chain(case, f, mine, cotangents).both())
            if one is None:
                say(why)
                continue
        variant = _Chain(case, one, inputs, cotangents)
        tolerance = 10 * TOLERANCE[torch.float32]
        for i, (a, b) in enumerate(zip(variant.forward(), expected, strict=True)):
            close(f"output {i} of {name} ntm_step {case}", items(i, a.detach()), b.detach(), tolerance)
        for i, (a, b) in enumerate(zip(variant.both(), wanted, strict=True)):
            if inputs is mine and 0 < i < len(wanted) - 1:
                b = b[:, order]
            close(f"gradient {i} of {name} ntm_step {case}", a[some], b, tolerance)
        made[name] = variant
    return made


def step(run: Run) -> None:
    """`ntm_step` chained from Python, forward and backward through time; times are of one step."""
    _steps(run, "step", run.sizes)
    calls(run)


def _steps(run: Run, suite: str, sizes: Iterable[str]) -> None:
    for size in sizes:
        case = STEPS[size]
        memory = case.memory_bytes
        for count in run.threads:
            with measure.threads(count):
                # The commonly written form keeps some ten gigabytes at the large size: once is enough for context.
                names = [v for v in run.variants if v != "naive" or count == 1]
                variants = step_variants(case, names, run.seed, run.tell_once)
                saved = {name: v.saved_bytes() for name, v in variants.items()} if count == 1 else None
                timed = {name: v.both for name, v in variants.items()} | {"products": measure.products(case.T * case.multiply_adds)}
                timings = run.time(timed, count, 10 if count == 1 else 6)
            run.add(
                suite, "ntm_step", case, "fwd+bwd", count, timings,
                steps=case.T,
                bytes=5 * memory,  # two passes forward and three backward
                flops=3 * (memory / 4) * (2 * (case.R + case.Hw + 1) + 5 * case.Hw + 2 * case.R),
                saved=saved,
                memory=memory,
                gate=case.gate if suite == "step" else None,
            )  # fmt: skip


def calls(run: Run) -> None:
    """What a step costs when there is next to nothing to do, in a chain long enough that the caller's own backward() does not count."""
    with measure.threads(1):
        variants = step_variants(TINY_STEP, [v for v in ("memcore", "eager") if v in run.variants], run.seed)
        timings = run.time({name: v.both for name, v in variants.items()}, 1, 1.5)
        run.add("calls", "ntm_step", TINY_STEP, "fwd+bwd", 1, timings, steps=TINY_STEP.T, gate=TINY_STEP.gate)
        a, b, g = torch.randn(8, requires_grad=True), torch.randn(8, requires_grad=True), torch.randn(8)
        timings = run.time({"eager": lambda: torch.autograd.grad(a * b, (a, b), g)}, 1, 0.5)
        run.add("calls", "torch.mul", "(8)", "fwd+bwd", 1, timings)


def training_steps(
    batch_size: int, variants: Iterable[str], seed: int = 0, say: Callable[[str], None] = print, device: str = "cpu"
) -> dict[str, Callable[[], float | Tensor]]:
    """variant -> one whole training step (forward, loss, backward, Adam) of one NTM on copy, 41 time steps; returns the loss.

    On a GPU the loss stays there, as a tensor: reading it would wait, and a CUDA graph could not hold it.

    N = 128, W = 20, LSTM controller of 100, one read and one write head. Every variant but "floor" (no memory work) is the same
    model: its loss and gradients are checked against float64. "compile" compiles a whole time step, controller included.
    """
    from ..models import NTM
    from ..tasks import make

    task = make("copy")
    torch.manual_seed(seed)
    model = NTM(task.input_size, task.output_size, memory_slots=128, slot_width=20, controller_size=100).to(device)
    batch = task.sample(batch_size, generator=torch.Generator().manual_seed(seed), length=COPY_LENGTH).to(device)
    wide = copy.deepcopy(model).double()
    with backend("reference"):
        loss = task.loss(wide(batch.input.double())[0], batch)
        loss.backward()

    made: dict[str, Callable[[], float]] = {}
    for name in variants:
        form = _STEP_FORMS.get(name, baselines.eager_ntm_step)
        net = copy.deepcopy(model) if name == "memcore" else baselines.eager_ntm(model, form)
        if name == "compile":
            measure.fresh_compiler()

            def attempt(f: Callable, net=net) -> None:
                net.cell.advance = f
                task.loss(net(batch.input)[0], batch).backward()

            fast, why = measure.compiled(net.cell.advance, attempt)
            if fast is None:
                say(why)
                continue
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True, capturable=device != "cpu")

        def one(net=net, optimizer=optimizer) -> float | Tensor:
            optimizer.zero_grad(set_to_none=True)
            value = task.loss(net(batch.input)[0], batch)
            value.backward()
            optimizer.step()
            return value.item() if device == "cpu" else value.detach()

        if name != "floor":
            _check_training(name, net, task, batch, wide, loss)
        made[name] = one
    return made


def _check_training(name: str, net: Any, task: Any, batch: Any, wide: Any, loss: Tensor) -> None:
    value = task.loss(net(batch.input)[0], batch)
    net.zero_grad(set_to_none=True)
    value.backward()
    close(f"the loss of {name}", value.detach(), loss.detach(), 1e-4)
    order = torch.arange(len(wide.cell.interface.bias))
    if name in ("eager", "compile"):
        order = baselines.interface_order(wide.cell.slot_width, wide.cell.read_heads, wide.cell.write_heads)
    for (key, p), q in zip(net.named_parameters(), wide.parameters(), strict=True):
        wanted = q.grad[order] if "interface" in key else q.grad
        close(f"the gradient of {key} of {name}", p.grad, wanted, 2e-3)


def train(run: Run) -> None:
    """A whole training step of the copy task; the memory's share is what lies above the floor."""
    from ..tasks import make

    for batch_size in run.batches:
        for count in run.threads:
            with measure.threads(count):
                wanted = [v for v in (*run.variants, "floor") if v != "compile" or count == 1]
                variants = training_steps(batch_size, wanted, run.seed, run.tell_once)
                aten = {n: measure.aten_calls(f) for n, f in variants.items() if n != "compile"} if count == 1 else None
                steps, one = 2 * COPY_LENGTH + 1, StepCase(batch_size, 1, 1, 128, 20, 1, Gate())
                products = measure.products(steps * MODELS["NTM"].multiply_adds(one))
                timings = run.time({**variants, "products": products}, count, 8 if count == 1 else 4)
            shape = f"copy B={batch_size} T={2 * COPY_LENGTH + 1} N=128 W=20 LSTM 100"
            run.add("train", "NTM", shape, "train step", count, timings, aten=aten, gate=TRAIN_GATES.get(batch_size))


def growth(run: Run) -> None:
    """How cost grows: time and saved bytes of chained steps with each size, and the process over thousands of calls; one thread."""
    names = [v for v in ("memcore", "eager") if v in run.variants]
    for axis, points in {} if run.only else (GROWTH_QUICK if run.quick else GROWTH).items():
        with measure.threads(1):
            chains = {(i, name): c for i, case in enumerate(points) for name, c in step_variants(case, names, run.seed).items()}
            timings = run.time({key: c.both for key, c in chains.items()}, 1, 6)  # all sizes in the same rounds
            saved = {key: c.saved_bytes() for key, c in chains.items()}
        before = len(run.rows)
        for i, case in enumerate(points):
            run.add(
                "growth", "ntm_step", case, f"fwd+bwd over {axis}", 1, {name: timings[i, name] for name in names},
                saved={name: saved[i, name] for name in names},
                memory=case.T * case.memory_bytes,
            )  # fmt: skip
        ours = [r for r in run.rows[before:] if r["variant"] == "memcore"]
        if ours and not run.quick:  # at the least sizes calls outweigh the work
            ours[-1]["gate"] = f"time, saved <= {axis}^{POWER:g}"
            ours[-1]["passed"] = all(p <= POWER for p in powers(ours, axis))
    held(run)


def held(run: Run) -> None:
    """What the process has grown by after thousands of calls of each operator, forward and backward."""
    if "memcore" not in run.variants:
        return
    made: dict[tuple[str, object, str], Callable[[], object]] = {}
    for op, case in CASES.items():
        if not run.only or op in run.only:
            inputs = case.inputs(SHAPES["small"], run.dtype, run.seed)
            function = case.memcore()
            check(case, SHAPES["small"], "memcore", function, inputs)
            call = runnable(case, function, inputs, bool(case.diff))
            made[op, SHAPES["small"], "fwd+bwd" if case.diff else "fwd"] = call
    if not run.only:
        made["ntm_step", CALL_STEP, "fwd+bwd"] = step_variants(CALL_STEP, ["memcore"], run.seed)["memcore"].both
        for kind, case in (("NTM", _HELD_NTM), ("MANN", _HELD_MANN)):
            made[kind, case, "fwd+bwd"] = recurrences(case, ["memcore"], run.seed, kind=kind)["memcore"].both
    count = CALLS // 50 if run.quick else CALLS
    for (op, shape, kind), call in made.items():
        with measure.threads(1):
            timing, grown = measure.held_bytes(call, count)
        if grown is None:
            run.tell_once("memory over many calls: not measured, this machine has no /proc/self/statm")
            return
        run.add(
            "held", op, shape, f"{kind}, {count:,} calls", 1, {"memcore": timing}, saved={"memcore": grown},
            dtype=torch.float32 if op in ("ntm_step", "NTM", "MANN") else run.dtype,
        )  # fmt: skip
        if not run.quick:  # the bound is one for all of CALLS
            run.rows[-1].update(gate=f"grown <= {HELD >> 10} KiB", passed=grown <= HELD)


def store(run: Run) -> None:
    """memcore.DND; see bench_store.py."""
    from .bench_store import store

    store(run)


def knn(run: Run) -> None:
    """Exact search; see bench_knn.py."""
    from .bench_knn import knn

    knn(run)


def roofline(run: Run) -> None:
    """Read bandwidth by level of the cache, float32 matrix products, the cost of one aten call."""
    for count in run.threads:
        with measure.threads(count):
            for level, kib, times in (("L2", 256, 64), ("L3", 8 << 10, 4), ("DRAM", 512 << 10, 2)):
                rows = torch.ones(kib * 256 // (8 if run.quick else 1)).expand(times, -1)  # each thread reads all of it
                timings = run.time({"eager": lambda rows=rows: rows.sum(1)}, count, 1.0)
                run.add("roofline", "read", f"{kib} KiB", level, count, timings, bytes=4 * rows.numel())
            size = 256 if run.quick else 1024
            a, b = torch.randn(size, size), torch.randn(size, size)
            timings = run.time({"eager": lambda: a @ b}, count, 1.0)
            run.add("roofline", "GEMM", f"{size}^3", "fp32", count, timings, flops=2 * size**3)
    with measure.threads(1):
        a, g = torch.randn(8, requires_grad=True), torch.randn(8)
        plain = a.detach()
        timings = run.time({"eager": lambda: plain * plain}, 1, 0.5)
        run.add("roofline", "aten call", "(8)", "fwd", 1, timings)
        timings = run.time({"eager": lambda: torch.autograd.grad(a * a, a, g)}, 1, 0.5)
        run.add("roofline", "aten call", "(8)", "fwd+bwd", 1, timings)
