"""`memcore bench --device cuda`: operators, chained NTM steps, whole sequences, training steps and searches on a GPU, timed by CUDA events.

Variants: memcore (what `auto` chooses), native and triton (each backend alone), memcore graph (its calls in a CUDA graph), eager (tuned
PyTorch), compile (torch.compile of it), eager graph (its calls in a CUDA graph). Every variant is checked against the float64 reference
first; all are timed in turn, round after round. GB/s are the bytes that must move at the least, divided by the median time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _backend, backend, functional
from . import bench_knn, measure, runner, sequence
from .cases import CASES, SHAPES, STEPS, Shape, StepCase, check, runnable, tuples
from .measure import Timing

__all__ = ["SUITES", "VARIANTS", "Cuda", "environment", "markdown", "measure_all"]

VARIANTS = ("memcore", "native", "triton", "memcore graph", "eager", "compile", "eager graph")
SUITES = ("ops", "step", "sequence", "train", "knn")
HUGE = Shape(64, 4, 16384, 64)  # a memory past every second-level cache
KEYS = {"tiny": (300, 8), "small": (10_000, 64), "mid": (100_000, 64), "large": (500_000, 64), "huge": (2_000_000, 128)}  # size -> (N, D) of knn
QUERIES = (1, 32, 512)
SAMPLE_SECONDS = 1e-3  # a sample repeats a call until it takes about this long


class Cuda:
    """The device: its clock, its graphs."""

    def __init__(self, name: str) -> None:
        if not torch.cuda.is_available():
            raise ValueError(f"memcore bench: '--device' must be there, got {name!r} without a CUDA device")
        self.name = name
        torch.cuda.set_device(torch.device(name).index or 0)

    def sample(self, call: Callable[[], object], times: int) -> float:
        """Seconds a call, by events around `times` of them."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """The call's kernels, captured once; what comes back replays them."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay(kept=kept) -> None:
            graph.replay()

        return replay

    def settle(self) -> None:
        with contextlib.suppress(RuntimeError):  # after a fault every call fails: told at each, not here
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def interleave(device: Any, calls: Mapping[str, Callable[[], object]], *, seconds: float, least: int, most: int = 100) -> dict[str, Timing]:
    """Time the calls in turn, round after round."""
    times, total = {}, 0.0
    for name, call in calls.items():
        device.sample(call, 2)
        each = max(device.sample(call, 3), 1e-7)
        times[name] = max(1, math.ceil(SAMPLE_SECONDS / each))
        total += times[name] * each
    rounds = max(least, min(most, int(seconds / max(total, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                samples[name].append(device.sample(calls[name], times[name]))
    finally:
        gc.enable()
    return {name: Timing(tuple(s)) for name, s in samples.items()}


# What can be made of a call -------------------------------------------------------------------------------------------


def _through(name: str, function: Callable) -> Callable:
    """`function` under memcore.backend(name)."""

    def call(*args: Any) -> Any:
        with backend(name):
            return function(*args)

    return call


class Bench:
    """Settings of one run and the rows it has made."""

    def __init__(self, device: Any, *, variants: Sequence[str] = VARIANTS, scale: float = 1.0, quick: bool = False, seed: int = 0, say=None) -> None:
        self.device, self.variants, self.scale, self.quick, self.seed = device, tuple(variants), scale, quick, seed
        self.rows: list[dict[str, Any]] = []
        self.missing: list[str] = []
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))

    def attempt(self, what: str, make: Callable[[], Any]) -> Any:
        """What `make` returns; None, and a note, where it cannot be had here or is wrong: a rare machine's other numbers are kept."""
        try:
            return make()
        except Exception as e:
            self.device.settle()
            self.missing.append(f"{what}: {type(e).__name__}: {' '.join(str(e).split())[:300]}")
            self.say(self.missing[-1])
            return None

    def time(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        return interleave(self.device, calls, seconds=0 if self.quick else 2 * self.scale, least=3 if self.quick else 10)

    def add(self, suite: str, op: str, shape: object, dtype: torch.dtype, kind: str, timings: Mapping[str, Timing], *, steps: int = 1, bytes_: float | None = None) -> None:
        medians = {name: t.median / steps for name, t in timings.items()}
        for name, t in timings.items():
            row = {
                "suite": suite, "op": op, "shape": str(shape), "dtype": str(dtype).removeprefix("torch."), "pass": kind, "variant": name,
                "rounds": len(t.samples), "us_median": 1e6 * medians[name], "us_p20": 1e6 * t.quantile(0.2) / steps, "us_p80": 1e6 * t.quantile(0.8) / steps,
                "bytes": bytes_, "GB/s": None if bytes_ is None else bytes_ / medians[name] / 1e9,
            }  # fmt: skip
            for other in ("eager", "compile", "eager graph"):
                row[f"times faster than {other}"] = medians[other] / medians[name] if other in medians and other != name else None
            self.rows.append(row)
        self.say(f"{suite}: {op} {shape} {kind}, us: " + ", ".join(f"{name} {1e6 * m:.4g}" for name, m in medians.items()))

    def calls(self, what: str, plain: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
        """The plain calls, and those of memcore and eager as graphs."""
        made = dict(plain)
        for name in ("memcore", "eager"):
            if f"{name} graph" in self.variants and name in plain:
                graph = self.attempt(f"{name} graph of {what}", lambda: self.device.graph(plain[name]))
                if graph is not None:
                    made[f"{name} graph"] = graph
        return {name: made[name] for name in self.variants if name in made}


def _tensors_bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def ops(run: Bench, shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], only: Sequence[str] = ()) -> None:
    """Single operators, forward and forward + backward."""
    for op, case in CASES.items():
        if only and op not in only:
            continue
        for shape in shapes:
            for dtype in dtypes:
                what = f"{op} {shape} {dtype}"
                run.attempt(what, lambda: _op(run, case, shape, dtype, what))
                run.device.settle()


def _op(run: Bench, case: Any, shape: Shape, dtype: torch.dtype, what: str) -> None:
    inputs = case.inputs(shape, dtype, run.seed, run.device.name)

    def variant(name: str) -> Callable | None:
        if name in ("eager", "compile"):
            function = case.baseline("eager")
            if name == "compile":
                measure.fresh_compiler()
                function = torch.compile(function, dynamic=False, fullgraph=True)
        else:
            function = case.memcore()
        with backend(_inner(name)[1]):
            check(case, shape, name, function, inputs)
        return function

    functions = {n: run.attempt(f"{n} of {what}", lambda n=n: variant(n)) for n in run.variants if "graph" not in n}
    functions = {n: f for n, f in functions.items() if f is not None}
    if not functions:
        return
    with torch.no_grad():
        made = _tensors_bytes(tuples(next(iter(functions.values()))(*inputs)))
    moved, grads = _tensors_bytes(inputs), _tensors_bytes(inputs[i] for i in case.diff)
    for backward in (False, True) if case.diff else (False,):
        plain = {n: runnable(case, f, inputs, backward) for n, f in functions.items()}
        calls = run.calls(what, {n: _through(_inner(n)[1], f) for n, f in plain.items()})  # the backward, too
        kind = "fwd+bwd" if backward else "fwd"
        run.add("ops", case.op, shape, dtype, kind, run.time(calls), bytes_=2 * moved + 3 * made + grads if backward else moved + made)


def _inner(name: str) -> tuple[str, str]:
    """Variant -> (what the CPU's suites call it, memcore's backend)."""
    return name if name in ("eager", "compile") else "memcore", name if name in ("native", "triton") else "auto"


def _variants(run: Bench, what: str, make: Callable[[str], Callable[[], object] | None]) -> dict[str, Callable[[], object]]:
    """variant -> its call, of those that can be had here: `make(name)` checks it and gives the call, under the variant's backend."""
    calls: dict[str, Callable[[], object]] = {}
    for name in run.variants:
        if "graph" in name:
            continue
        inner, chosen = _inner(name)

        def one(inner: str = inner, chosen: str = chosen) -> Callable[[], object] | None:
            with backend(chosen):
                call = make(inner)
            return None if call is None else _through(chosen, call)

        call = run.attempt(f"{name} of {what}", one)
        if call is not None:
            calls[name] = call
    return calls


def step(run: Bench, cases: Sequence[StepCase]) -> None:
    """`ntm_step` chained from Python, forward and backward through time; times are of one step."""
    for case in cases:
        what = f"ntm_step {case}"

        def make(inner: str, case: StepCase = case) -> Callable[[], object] | None:
            made = runner.step_variants(case, [inner], run.seed, run.say, run.device.name)
            return made[inner].both if inner in made else None

        chains = _variants(run, what, make)

        def timed(case: StepCase = case, what: str = what, chains: Mapping = chains) -> None:
            # the least bytes: forward the memory in and out, backward the memory and its gradient in, a gradient out
            run.add("step", "ntm_step", case, torch.float32, "fwd+bwd", run.time(run.calls(what, chains)), steps=case.T, bytes_=5 * case.memory_bytes)

        if chains:
            run.attempt(what, timed)
        run.device.settle()


def sequences(run: Bench, cases: Sequence[StepCase]) -> None:
    """A whole NTM, LSTM controller included, over a sequence, forward and backward; times are of one time step."""
    for case in cases:
        what = f"NTM {case}"

        def make(inner: str, case: StepCase = case) -> Callable[[], object] | None:
            made = sequence.recurrences(case, [inner], run.seed, run.say, device=run.device.name)
            return made[inner].both if inner in made else None

        both = _variants(run, what, make)

        def timed(case: StepCase = case, what: str = what, both: Mapping = both) -> None:
            run.add("sequence", "NTM sequence", case, torch.float32, "fwd+bwd", run.time(run.calls(what, both)), steps=case.T)

        if both:
            run.attempt(what, timed)
        run.device.settle()


def train(run: Bench, batches: Sequence[int]) -> None:
    """A whole training step of an NTM on copy, 41 time steps, Adam included."""
    for size in batches:
        what = f"training step, batch {size}"

        def make(inner: str, size: int = size) -> Callable[[], object] | None:
            return runner.training_steps(size, [inner], run.seed, run.say, run.device.name).get(inner)

        steps = _variants(run, what, make)
        if steps:
            shape = f"copy B={size} T={2 * runner.COPY_LENGTH + 1} N=128 W=20 LSTM 100"
            run.attempt(what, lambda: run.add("train", "NTM", shape, torch.float32, "train step", run.time(run.calls(what, steps))))
        run.device.settle()


def knn(run: Bench, sizes: Sequence[tuple[int, int]], queries: Sequence[int]) -> None:
    """Exact search of the 50 nearest keys with known norms; eager is one matrix product and topk. Bytes: the keys once."""
    for N, D in sizes:
        drawn = bench_knn.gaussian(N, D, max(queries), run.seed)
        keys, asked, k = drawn.keys.to(run.device.name), drawn.query.to(run.device.name), min(bench_knn.K, N)
        cache = functional.knn_cache(keys)
        for Q in queries:
            query, what = asked[:Q].contiguous(), f"knn_search (N={N},D={D},Q={Q},K={k})"

            def plain(query: Tensor = query) -> tuple[Tensor, Tensor]:
                near = torch.addmm(cache.norms, query, keys.T, alpha=-2).topk(k, largest=False, sorted=True)
                return near.values + query.square().sum(1, keepdim=True), near.indices

            def make(inner: str, query: Tensor = query, what: str = what, plain: Callable = plain) -> Callable[[], object]:
                call = plain if inner == "eager" else lambda: functional.knn_search(query, keys, k, cache=cache)
                if inner == "compile":
                    measure.fresh_compiler()
                    call = torch.compile(plain, dynamic=False, fullgraph=True)
                bench_knn.check(inner, what, call()[0], query, keys)
                return call

            with torch.no_grad():
                calls = _variants(run, what, make)
                if calls:
                    run.attempt(what, lambda: run.add("knn", "knn_search", what.partition(" ")[2], torch.float32, "fwd", run.time(run.calls(what, calls)), bytes_=keys.nbytes))
            run.device.settle()


def bandwidth(run: Bench) -> dict[str, float | None]:
    """Measured by copying a gibibyte: bytes read plus bytes written a second; and the data sheet's, where the driver tells clock and width."""
    n = 2**10 if run.quick else 2**28
    a = torch.ones(n, device=run.device.name)
    b = torch.empty_like(a)
    timing = interleave(run.device, {"copy": lambda: b.copy_(a)}, seconds=1, least=5)["copy"]
    found: dict[str, float | None] = {"copy GB/s": 2 * a.nbytes / timing.median / 1e9, "nominal GB/s": None}
    if run.device.name != "cpu":
        p = torch.cuda.get_device_properties(run.device.name)
        clock, width = getattr(p, "memory_clock_rate", 0), getattr(p, "memory_bus_width", 0)  # kHz, bits
        if clock and width:
            found["nominal GB/s"] = 2 * clock * 1e3 * width / 8 / 1e9
    return found


def environment(device: str) -> dict[str, Any]:
    """Where it ran: the card, its driver and clocks, versions, memcore's revision and what its operators ran on."""
    found: dict[str, Any] = {
        "commit": measure.machine()["commit"], "date": measure.machine()["date"], "python": platform.python_version(), "system": platform.platform(),
        "torch": torch.__version__, "cuda of torch": torch.version.cuda, "hip of torch": torch.version.hip, "device": device,
    }  # fmt: skip
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if nvcc := shutil.which("nvcc"):
        found["nvcc"] = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-1]
    found["memcore"] = json.loads(json.dumps(_backend.describe(), default=str))
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        p = torch.cuda.get_device_properties(device)
        found["card"] = {"name": p.name, "capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count, "memory": p.total_memory}
        found["cards"] = torch.cuda.device_count()
        if smi := shutil.which("nvidia-smi"):
            fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,ecc.mode.current"
            done = subprocess.run([smi, f"--query-gpu={fields}", "--format=csv"], capture_output=True, text=True)
            found["nvidia-smi"] = done.stdout.strip().splitlines()
    return found


def measure_all(
    device: Any,
    suites: Sequence[str],
    *,
    sizes: Sequence[str] = ("small", "mid", "large", "huge"),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    batches: Sequence[int] = (1, 16, 64),
    only: Sequence[str] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Everything as plain data: environment, bandwidth, rows, what could not be measured and why."""
    run = Bench(device, **settings)
    report: dict[str, Any] = {"environment": environment(device.name), "bandwidth": bandwidth(run)}
    if "ops" in suites:
        ops(run, [HUGE if s == "huge" else SHAPES[s] for s in sizes], dtypes, only)
    if "step" in suites:
        step(run, [STEPS[s] for s in sizes if s in STEPS])
    if "sequence" in suites:
        sequences(run, [{**STEPS, **sequence.SEQUENCES}[s] for s in sizes if s in STEPS])
    if "train" in suites:
        train(run, batches)
    if "knn" in suites:
        knn(run, [KEYS[s] for s in sizes], QUERIES[:1] if run.quick else QUERIES)
    return {**report, "rows": run.rows, "missing": run.missing}


def markdown(report: Mapping[str, Any]) -> str:
    """The rows as a table: microseconds of every variant, how many times faster memcore is, its share of the card's bandwidth."""
    rows, card = report["rows"], report["environment"].get("card", {}).get("name", report["environment"]["device"])
    copy = report["bandwidth"]["copy GB/s"]
    shown = [v for v in VARIANTS if any(r["variant"] == v for r in rows)]
    head = ["what", "pass", *(f"{v}, us" for v in shown), "vs eager", "vs compile", "vs eager graph", "GB/s", "of copy"]
    lines = [f"{card}, torch {report['environment']['torch']}; a copy moves {copy:.0f} GB/s; medians.", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["op"], r["shape"], r["dtype"], r["pass"]), {})[r["variant"]] = r
    for (op, shape, dtype, kind), by in groups.items():
        ours = by.get("memcore", {})
        best = min((by[v]["us_median"] for v in ("memcore", "memcore graph") if v in by), default=None)
        against = {
            "eager": ours.get("times faster than eager"),
            "compile": ours.get("times faster than compile"),
            # graph against graph
            "eager graph": by["eager graph"]["us_median"] / best if "eager graph" in by and best else None,
        }
        cells = [f"{op} {shape}{'' if dtype == 'float32' else ' ' + dtype}", kind, *(f"{by[v]['us_median']:.4g}" if v in by else "" for v in shown)]
        cells += ["" if x is None else f"{x:.1f}x" for x in against.values()]
        rate = next((r["bytes"] / best / 1e3 for r in by.values() if r["bytes"] and best), None)
        cells += ["", ""] if rate is None else [f"{rate:.0f}", f"{100 * rate / copy:.0f} %"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"not measured: {m}" for m in report["missing"])] if report["missing"] else []
    return "\n".join(lines) + "\n"


TITLES = {"train": "A training step", "sequence": "A whole sequence", "step": "One time step", "ops": "Single operators", "knn": "Exact search"}


def page(folder: Path) -> str:
    """docs/gpu-benchmarks.md, from the reports of a card in `folder`."""
    lines = [
        "# Benchmarks on a GPU", "",
        "Made by `python -m memcore.bench.gpu` from [results/gpu/h200](../results/gpu/h200). Microseconds, CUDA events, median of interleaved rounds in one process;",
        "every variant was checked against float64 first. memcore: what `auto` chooses; native, triton: one backend alone; graph: the calls in a CUDA graph, where",
        "the host costs nothing; eager: tuned PyTorch; compile: torch.compile of it. GB/s: the bytes that must move at the least, over the better time of memcore.", "",
    ]  # fmt: skip
    for name, title in TITLES.items():
        report = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        driver = report["environment"]["nvidia-smi"][1].split(", ")[1]
        lines += [f"## {title}", "", f"{report['note']} {report['environment']['date'][:10]}, driver {driver}.", "", markdown(report)]
    times = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))
    lines += ["## Kernels by backend", "", times["note"], "", "| operator | (B, H, N, W) | native, us | triton, us | native / triton |", "|" + " --- |" * 5]
    for op, shapes in times["us"].items():
        for shape, by in shapes.items():
            native, triton = (sum(by[b].values()) for b in ("native", "triton"))
            lines.append(f"| {op} | {shape} | {native:.1f} | {triton:.1f} | {native / triton:.2f} |")
    profile = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    columns = ("what", "kernel", "blocks", "us", "cycles", "warp instructions", "issued a cycle and scheduler", "warps a scheduler", "registers", "DRAM, % of peak")
    lines += ["", "## A profile", "", f"{profile['note']} {profile['date']}, driver {profile['driver']}.", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    keys = ("what", "kernel", "blocks", "us", "cycles", "instructions", "issued", "warps", "registers", "dram %")
    lines += ["| " + " | ".join(f"{row[k]:,}" if isinstance(row[k], int) else str(row[k]) for k in keys) + " |" for row in profile["rows"]]
    return "\n".join(lines) + "\n"


def main(args: Any, suites: Sequence[str], folder: str | Path) -> dict[str, Any]:
    """`memcore bench SUITES --device cuda`: print the table, keep the report as gpu.json in `folder` (unless None)."""
    wrong = [s for s in suites if s not in SUITES]
    if wrong:
        raise ValueError(f"memcore bench: 'SUITE' must be one of {', '.join(SUITES)} with --device cuda, got {wrong[0]!r}")
    sizes = tuple(args.size or (("small",) if args.quick else ("small", "mid", "large", "huge")))
    report = measure_all(
        Cuda(args.device), suites, sizes=sizes, dtypes=(getattr(torch, args.dtype),), batches=args.batch[:1] if args.quick else args.batch,
        only=tuple(args.op), scale=args.time, quick=args.quick, seed=args.seed,
        variants=[v for v in VARIANTS if not (args.no_compile and v == "compile")],
    )  # fmt: skip
    print(markdown(report), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(report, indent=1))
    if folder is not None:
        path = Path(folder) / "gpu.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}", file=sys.stderr)
    return report


if __name__ == "__main__":
    _root = Path(__file__).resolve().parents[1]
    (_root / "docs" / "gpu-benchmarks.md").write_text(page(_root / "results" / "gpu" / "h200"), encoding="utf-8")
