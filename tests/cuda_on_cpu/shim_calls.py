"""Calls of the CUDA launchers as a file, for drivers (shim_driver.cpp): sanitizers and mutants run outside Python."""

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cuda_shim
import test_ntm_sequence
from cases import Case, S, case, step, twist
from contract import run

__all__ = ["LIMITS", "MORE", "SEQUENCES", "Call", "calls_of", "limits_of", "row_calls", "sequence_calls", "write"]

_TYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3, torch.int64: 4}
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)

# What the cases of ntm_sequence leave out: more sums than a block has threads. And small ones that reach every line of the kernel, for mutants.
SEQUENCES = {
    **test_ntm_sequence.CASES,
    "wide_controller": {"K": 260, "B": 1, "T": 1},
    "many_inputs": {"X": 270, "B": 1, "T": 2, "lstm": False, "layers": 2},
    "small_lengths": {"T": 3, "B": 2, "lengths": [3, 1], "checkpoint_every": 2},
    "small_heads": {"T": 2, "B": 1, "R": 5, "Hw": 2, "layers": 2, "clip": 0.5},
}


def _some_zeros(t: Tensor) -> None:
    t[..., ::2] = 0


# Shared memory of a block: all fits, the memory does not, next to nothing does. A search's blocks have no other form.
LIMITS = (cuda_shim.LIMIT, 9 * 1024 + 512, 128)
ONE_FORM = ("knn_search", "knn_lookup")

def _coarse(x: dict) -> None:
    """Many ties, exact in every type; zeros on both sides."""
    for k in x:
        x[k] = (3 * x[k]).round()
    x["query"][0], x["keys"][:2] = 0, 0


def _no_numbers(x: dict) -> None:
    x["query"][0, 2], x["keys"][1, 0], x["keys"][3, 1], x["keys"][5] = math.nan, math.nan, math.inf, 0


def _huge(x: dict) -> None:
    """Norms that overflow in float32, of the nearest too."""
    x["keys"][::2] *= 1e22


def _one_sphere(x: dict) -> None:
    """The first rows are as near as each other to float32 sums, but not to exact ones, and more than a list keeps; the others are far away."""
    x["query"][:] = 0
    x["keys"] /= x["keys"].norm(dim=-1, keepdim=True)
    x["keys"][x["keys"].shape[0] // 2 :] *= 3


# Ties beyond what a list keeps, several shards, lists that are cut, several tiles of queries, columns in chunks; at the end no columns at all.
SEARCHES = [
    *(S(f"coarse_{m}", _coarse, {"k": 4, "metric": m}, B=2, N=150, W=3) for m in ("l2", "ip", "cosine")),
    *(S(f"many_{m}", None, {"k": 8, "metric": m}, B=9, N=350, W=5) for m in ("l2", "ip", "cosine")),
    S("N700_W40", None, {"k": 3}, A=2, B=5, N=700, W=40),
    S("few_N900_k40", None, {"k": 40}, B=3, N=900, W=3),
    S("many_tiles", None, {"k": 3}, B=34, N=60, W=2),
    S("few_tiles", None, {"k": 100}, B=6, N=150, W=3),
    *(S(f"huge_{m}", _huge, {"k": 3, "metric": m}, B=2, N=60) for m in ("ip", "cosine")),
    S("no_numbers", _no_numbers, {"k": 12, "metric": "cosine"}, B=3, N=10),
    S("W0", None, {"k": 3}, B=2, N=60, W=0),
    # Lists that fill: of a warp, of a block, the finish's, and that of all rows.
    S("full_many", None, {"k": 3}, A=133, B=5, N=300, W=1),
    S("full_few", None, {"k": 3}, A=133, B=1, N=600, W=1),
    S("full_finish", None, {"k": 3}, B=5, N=7700, W=1),
    S("full_again", _coarse, {"k": 3}, B=1, N=2200, W=1),
    S("one_sphere", _one_sphere, {"k": 3}, B=1, N=512, W=100),
]

# What the contract's samples leave out: more heads than a kernel takes at a time, nothing to choose from, powers below zero.
MORE = [
    *((case(op), S("H9", H=9, N=20)) for op in ("content_addressing", "ntm_addressing", "read", "erase_add_write", "lrua_write")),
    (case("ntm_step"), step("r9_w5", 9, 5)),
    (case("ntm_step"), step("r3_w2_W130", 3, 2, B=2, N=200, W=130)),  # four blocks meet, one of them without a head
    (case("ntm_step"), step("N1900_W31", 1, 1, B=1, N=1900, W=31)),  # more than a block's shared memory: in launches
    (case("lrua_write"), S("N0", N=0)),
    (case("sharpen"), S("gamma_negative", twist(weights=_some_zeros, gamma=-2.0), N=7)),
    *((case("knn_search"), s) for s in SEARCHES),
]


def limits_of(case: Case) -> tuple[int, ...]:
    return LIMITS[:1] if case.name in ONE_FORM else LIMITS


@dataclass
class Buffer:
    """A tensor's bytes before (b"" for 0xFF throughout) and after, and the number of its type; -1 where the call does not return it."""

    size: int
    type: int
    start: bytes
    wanted: bytes = b""


@dataclass
class Call:
    """One call of a launcher: its argument struct, in which (offset, buffer, offset into it) are addresses."""

    label: str
    op: str
    launcher: str
    limit: int
    argument: bytes
    links: list[tuple[int, int, int]] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)


class _Made(TorchDispatchMode):
    """The tensors that appear inside: outputs, workspaces, dense copies."""

    def __init__(self):
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.tensors.append(out)
        return out


def _bytes(t: Tensor) -> bytes:
    return t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def _outputs(found) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _record(label: str, limit: int, op: str, way: str, args: tuple) -> Call | None:
    """The call, or None where it launches nothing."""
    kernel = cuda_shim.kernels(op, way)
    with cuda_shim.recorded() as launches, _Made() as made:
        outputs = _outputs(kernel.redispatch(_CPU, *args))  # a redispatch passes the mode by, what it allocates does not
    if not launches:
        return None
    # A launch's struct begins with what the launcher was given.
    call = Call(f"{label} {way}", op, f"mc_{op}_{'bwd' if way == 'rows' else way}", limit, launches[0].argument)
    known: dict[int, tuple[int, int]] = {}  # address -> (size, buffer)
    with _Made() as again:
        wanted = _outputs(kernel.redispatch(_CPU, *args))
    results = {t.data_ptr(): y for t, y in zip(outputs, wanted, strict=True)}
    # What has rows and is no output is a result for the products after the launch; a workspace has none.
    for t, y in zip(made.tensors, again.tensors, strict=True):
        if t.dim() == 2 and t.numel() and t.isnan().all():
            results.setdefault(t.data_ptr(), y)  # not the views of it that follow
    for t in [*(a for a in args if isinstance(a, Tensor)), *made.tensors]:
        if not t.numel() or not t.is_contiguous() or t.data_ptr() in known:
            continue
        known[t.data_ptr()] = (t.nbytes, len(call.buffers))
        wanted = results.get(t.data_ptr())
        empty = t.is_floating_point() and bool(t.isnan().all())
        start = b"" if empty else _bytes(t)  # an output may hold zeros for what the kernel leaves out
        call.buffers.append(Buffer(t.nbytes, -1, start) if wanted is None else Buffer(t.nbytes, _TYPES[t.dtype], start, _bytes(wanted)))
    for at in range(0, len(call.argument) - 7, 8):
        value = struct.unpack_from("<q", call.argument, at)[0]
        for address, (size, buffer) in known.items():
            if address <= value < address + size:
                call.links.append((at, buffer, value - address))
    given = {buffer for _, buffer, _ in call.links}
    for i, buffer in enumerate(call.buffers):  # what is made of the kernel's results is nothing of its own
        if i not in given:
            buffer.type, buffer.start, buffer.wanted = -1, b"", b""
    return call


def _recorded(label: str, limit: int, f: Callable[[], object]) -> list[Call]:
    """The launches that f makes, on a device whose blocks have `limit` bytes of shared memory."""
    found: list[Call | None] = []
    label += f"-shared_{limit}" if limit != cuda_shim.LIMIT else ""
    with cuda_shim.use(), cuda_shim.shared_limit(limit), cuda_shim.watched(lambda op, way, args: found.append(_record(label, limit, op, way, args))):
        f()
    return [c for c in found if c is not None]


def sequence_calls(name: str, limit: int = cuda_shim.LIMIT) -> list[Call]:
    """Forward and backward of `ntm_sequence` on one of its own cases."""
    drawn = test_ntm_sequence.draw(**SEQUENCES[name])
    return _recorded(f"ntm_sequence-{name}", limit, lambda: test_ntm_sequence.gradients(test_ntm_sequence.ntm_sequence, *drawn))


def row_calls() -> list[Call]:
    """The row-sparse backwards of searches, of dictionaries that have no row for some neighbours."""
    g = torch.Generator().manual_seed(0)
    query, keys, values, output = (torch.randn(2, n, 5, generator=g) for n in (3, 9, 9, 3))
    indices = torch.tensor([[[4, 0, 7], [0, 4, 1], [8, 4, 0]], [[1, 0, -1], [0, 1, -1], [-1, -1, -1]]])
    distances = torch.randn(indices.shape, generator=g)
    cuda_shim.load()
    made = [
        ("padded", "knn_lookup", (output, None, distances, indices, query, keys, values, 0, 0, 0.1)),
        ("nothing", "knn_lookup", (output, None, distances, torch.full_like(indices, -1), query, keys, values, 0, 0, 0.1)),
        ("flat", "knn_search", (distances[0], indices[0], query[0], keys[0], 2)),
    ]
    return [_record(f"{op}-{name}", cuda_shim.LIMIT, op, "rows", args) for name, op, args in made]


def calls_of(case, sample, dtype: torch.dtype, limit: int = cuda_shim.LIMIT) -> list[Call]:
    """Forward and backward of one sample, on a device whose blocks have `limit` bytes of shared memory."""
    label = f"{case.name}-{sample.id}-{str(dtype)[6:]}"
    return _recorded(label, limit, lambda: run(case.function, case, sample, case.inputs(sample, dtype)))


def write(path: Path, calls: Iterable[Call]) -> None:
    """The file that shim_driver.cpp reads."""
    n = lambda *values: struct.pack(f"<{len(values)}q", *values)
    text = lambda b: n(len(b)) + b
    calls = list(calls)
    with open(path, "wb") as f:
        f.write(n(len(calls)))
        for c in calls:
            f.write(text(c.label.encode()) + text(c.launcher.encode()) + n(c.limit) + text(c.argument))
            f.write(n(len(c.links)) + b"".join(n(*link) for link in c.links))
            f.write(n(len(c.buffers)) + b"".join(n(b.size, b.type) + text(b.start) + text(b.wanted) for b in c.buffers))
