"""Mutation of the CUDA source: without any one of its barriers, masks and bounds (mutants.py) a recorded call of the contract goes wrong, in its
result, in the shim, under AddressSanitizer and UndefinedBehaviorSanitizer, or under ThreadSanitizer. `--slow` tries every mutant and writes
results/gpu/cuda_mutants.json; without it, one of each kind in each file but the searches'.
"""

import json
import os
import subprocess
import zlib
from collections import defaultdict

import cuda_shim
import mutants
import pytest
import shim_build
import shim_calls
import test_cuda_sequence
import torch

from cases import CASES
from shim_calls import LIMITS, limits_of

RESULTS = shim_build.ROOT / "results" / "gpu" / "cuda_mutants.json"
MUTANTS = mutants.marked_sources()[1]
_TURN = "one turn more of a loop, in which every access is masked"
# (file, kind, text, what else its line holds): why it changes nothing.
HARMLESS = {
    ("addressing.h", "loop", "span.w0 < s.W", ""): _TURN,
    ("addressing.h", "loop", "j0 < S", ""): "one turn more of a loop, over taps that are not there",
    ("addressing.h", "guard", "j0 + j < S", ""): "sums of taps that nobody takes",
    ("circular_shift.cu", "loop", "j0 < S", ""): "one turn more of a loop, over taps that are not there",
    ("addressing.h", "loop", "h0 < s.H", ""): _TURN,
    ("addressing.h", "loop", "first < s.N", ""): _TURN,
    ("block.h", "loop", "first < N", ""): _TURN,
    ("block.h", "loop", "h0 < H", ""): _TURN,
    ("content_addressing.cu", "loop", "h0 < s.H", ""): _TURN,
    ("block.h", "loop", "part.w0 < W", ""): _TURN,
    ("block.h", "loop", "k0 < count", ""): "one turn more of a loop, over sums that are not there: only barriers",
    ("block.h", "loop", "i < HC", ""): "i < count <= HC stops it",
    ("erase_add_write.cu", "loop", "span.w0 < a.W", ""): _TURN,
    ("lrua_write.cu", "loop", "span.w0 < a.W", ""): _TURN,
    ("lrua_write.cu", "loop", "span.w0 < W", ""): _TURN,
    ("lrua_write.cu", "loop", "h0 < H", ""): _TURN,
    ("read.cu", "loop", "span.w0 < reads.W", ""): _TURN,
    ("write.h", "loop", "span.w0 < a.W", ""): _TURN,
    ("write.h", "loop", "r0 < a.R", ""): _TURN,
    ("write.h", "loop", "first < a.N", ""): _TURN,
    ("write.h", "loop", "h0 < a.Hw", ""): _TURN,
    ("block.h", "loop", "k < K", ""): "k < held or k < count, at most K, stops it",
    ("block.h", "guard", "k < count", ""): "sums nobody takes, in scratch that is there for K of them",
    ("block.h", "guard", "warps > 1", ""): "a barrier of the block where the warp's is enough",
    ("write.h", "guard", "a.R > 0", ""): "sums of no read heads: only barriers",
    ("write.h", "guard", "h0 < a.Hw", ""): "sums of no write heads: only barriers",
    ("write.h", "guard", "k < WC + RC", ""): "sums of nothing, which are zeros",
    ("ntm_step_tiles.cu", "guard", "count > 0", ""): "nothing is done for no heads: only barriers",
    ("interface.h", "loop", "j < l.S", "top = "): "at the maximum: softmax is the same from any number that is large enough; gamma, the next one, is read",
    ("ntm_sequence.cu", "loop", "n0 < N", ""): _TURN,
    ("ntm_sequence.cu", "guard", "group < groups", ""): "sums of groups that nobody adds, in scratch that is there for them",
    ("ntm_sequence.cu", "guard", "n + j < columns", ""): "numbers of the next row, or of what lies behind the matrix, in sums that nobody takes",
    **{("knn_search.cu", "loop", text, ""): _TURN for text in ("r0 < end", "q / 4 * 4 < QUERIES", "first < count", "i0 < all", "r0 < rows")},
    **{("knn_lookup.cu", "loop", text, ""): _TURN for text in ("v0 < a.V", "k0 < K", "d0 < a.D")},
    ("knn_lookup.cu", "guard", "d > 0", ""): "at an exact hit what the query and the key get of each other cancels but for rounding",
    ("read.cu", "guard", "a.H > 7", ""): "room for rows that are not staged after all",
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(tmp_path_factory, request):
    every = any(item.originalname == "test_every_mutant_is_killed" for item in request.session.items)
    return Lab(tmp_path_factory.mktemp("mutants") / "calls", [c for c in CASES if every or not c.name.startswith("knn")])


class Lab:
    """Recorded calls, the drivers, and which calls reach which mark."""

    def __init__(self, path, cases):
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True)
        more = [(c, s) for c, s in shim_calls.MORE if c in cases]
        pairs = [(c, s) for c in cases if c.name in cuda_shim.operators() for s in c.samples] + more
        self.calls = [
            call
            for case, sample in pairs
            for limit in (limits_of(case) if (case, sample) in more or sample.id.startswith(("N63", "shared", "small")) else LIMITS[:1])
            for call in shim_calls.calls_of(case, sample, torch.float32, limit)
        ]
        self.calls += test_cuda_sequence.recorded(test_cuda_sequence.MUTATED)
        if any(c.name.startswith("knn") for c in cases):
            self.calls += shim_calls.row_calls()
        self.path = path
        shim_calls.write(path, self.calls)
        self.drivers = {s: shim_build.driver(s) for s in shim_build.SANITIZERS}
        self.reached = defaultdict(list)
        said = self.run("address", -1, range(len(self.calls)))[1]
        for line in said.splitlines():
            assert line.startswith("reached"), said
            call, *marks = map(int, line.split()[1:])
            for k in marks:
                self.reached[k].append(call)

    def run(self, sanitizer, mutant, calls, order="forward"):
        command = [str(self.drivers[sanitizer]), str(self.path), "--mutant", str(mutant), *(x for c in calls for x in ("--call", str(c)))]
        env = {**os.environ, **shim_build.ENVIRONMENT, "MC_SHIM_SCHED": order}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        except subprocess.TimeoutExpired:
            return 1, "never ends"
        return done.returncode, done.stdout + done.stderr

    def killer(self, mutant) -> str:
        """What tells the mutant from the kernel; empty if nothing does."""
        calls = sorted(self.reached[mutant.number], key=lambda i: sum(b.size for b in self.calls[i].buffers))
        if not calls:
            return ""
        launchers = {self.calls[i].launcher: i for i in reversed(calls)}
        first = sorted(launchers.values())  # the smallest call of each launcher
        some = calls[:: max(1, len(calls) // 12)]
        for sanitizer, order, chosen in (
            ("address", "forward", first), ("address", "forward", calls), ("thread", "forward", first[:3]), ("thread", "forward", some),
            ("address", "reverse", calls), ("address", "random:1", calls), ("thread", "forward", calls[: len(calls) // 2 + 1]),
        ):  # fmt: skip
            code, said = self.run(sanitizer, mutant.number, chosen, order)
            if code:
                names = {
                    "ThreadSanitizer": "data race", "AddressSanitizer": "address", "runtime error": "undefined behaviour",
                    "refused": "refused by the shim", "result": "result", "never ends": "never ends",
                }  # fmt: skip
                return next((v for k, v in names.items() if k in said), f"exit status {code}") + ("" if order == "forward" else f", {order}")
        return ""


def harmless(m) -> str | None:
    return next((why for (*site, part), why in HARMLESS.items() if site == [m.file, m.kind, m.text] and part in m.source), None)


def groups():
    found = defaultdict(list)
    for m in sorted(MUTANTS, key=lambda m: zlib.crc32(str(m).encode())):
        if not harmless(m) and not m.file.startswith("knn"):  # those of the searches are slow
            found[m.file, m.kind].append(m)
    return found


GROUPS = groups()


@pytest.mark.parametrize("file, kind", GROUPS)
def test_a_mutant_is_killed(file, kind, lab):
    mutant = next(m for m in GROUPS[file, kind] if lab.reached[m.number])  # some of block.h only searches reach
    assert lab.killer(mutant), mutant


def test_what_is_harmless_is_there():
    assert {k for k in HARMLESS if any(k[:3] == (m.file, m.kind, m.text) and k[3] in m.source for m in MUTANTS)} == set(HARMLESS)


def test_committed_verdicts_are_of_these_mutants():
    told = json.loads(RESULTS.read_text())
    assert told.keys() == {str(m) for m in MUTANTS}
    assert {m for m, verdict in told.items() if verdict.startswith("harmless")} == {str(m) for m in MUTANTS if harmless(m)}
    assert all(told.values())


@pytest.mark.slow
def test_every_mutant_is_killed(lab):
    verdicts = {str(m): lab.killer(m) for m in MUTANTS}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    told = {str(m): verdicts[str(m)] or f"harmless: {harmless(m)}" for m in MUTANTS}
    RESULTS.write_text(json.dumps(told, indent=1) + "\n")
    assert [str(m) for m in MUTANTS if not verdicts[str(m)]] == [str(m) for m in MUTANTS if harmless(m)]
