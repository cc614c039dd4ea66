"""Mutants of Triton's compiled kernels: `python tests/ptx_on_cpu/ptx_mutants.py` judges them all and writes
results/gpu/mutants.json; with names of operators, those anew.

Mutants of a program: without one barrier or warp barrier; with one predicate of a load or store forced to true; with one shuffle that
gives every lane its own value. A mutant is *killed* if a launch that the contract's samples make shows another result, a race, an
access out of bounds or a barrier that is never complete. What is not killed must be proved to change nothing:

- *ordered*, a barrier: without it no two threads touch the same word, one of them writing, with no other barrier between them (all orders of
  execution, by the race detector), in any launch, and every loop around it went round again in one of them. Triton puts barriers in by a
  rule that knows intervals of shared memory, not threads.
- *once*, a barrier: the same, but a loop around it never went round again, as in programs whose tile holds all slots.
- *idle*, a mask: no launch has a lane that it keeps away; the program was compiled for sizes that fill its tile.
- *unused*, a mask or shuffle: the lanes kept away from stay inside the array and no bit of a result changes: rows or columns of padding.

Once, idle and unused depend on sizes, so one more thing must hold: every place in the sources from which such instructions come has a mutant
that was killed (or barriers that are ordered) in some program. `EXCEPT` lists the places that have none, each with its reason.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
for p in (HERE.parents[1], HERE.parent, HERE):
    if str(p) not in sys.path:
        sys.path.insert(0, str(p))

import torch

from cases import CASES, Case, S, Sample, step
from contract import run
from ptx_machine import Site
from ptx_program import Instruction, Program, is_warp_sync
from ptx_suite import ROOT, Emulator, Record, emulated, missing, operators

__all__ = ["COMMITTED", "EXCEPT", "SEARCHES", "Mutant", "judge", "launches", "mutants", "quick", "tally", "unproved", "verdicts", "versions", "whole"]

COMMITTED = ROOT / "results" / "gpu" / "mutants.json"
_SCALAR = "one thread stores what every thread holds: the compiler's predicate saves stores"
_NO_HEADS = "the only program that has it was compiled for a step without write heads, whose loop over them never runs"
_NO_READS = "the only program that has it was compiled for a step without read heads, which stores nothing of this sum"
_ONE_ROUND = "its program's tile holds all slots (BL = power(N) up to 1024), so that the loop never goes round again in any launch"
_BESIDE = (
    "the compiler's barriers for the sums beside it keep the same accesses apart; what never went round again is the way past a loop inside that "
    "always has a turn"
)
_SAME_LIST = "past the candidates it reads other places of the same list, and what is made of them is masked"
_OWN_SCRATCH = (
    "shared with kernels of fewer stages, which give it tensors and kill it; ntm_step gives it scratch of its own, where padding heads, slots "
    "and columns read other numbers in range, and what they become is stored nowhere"
)
EXCEPT: dict[tuple[str, str, str], str] = {
    ("content_addressing", "mask", "triton.py:111"): _SCALAR,
    ("lrua_write", "mask", "triton.py:44"): _SCALAR,
    ("content_addressing", "barrier", "triton.py:206"): _ONE_ROUND,
    ("ntm_step", "barrier", "_triton.py<triton.py:296"): _NO_HEADS,
    ("ntm_step", "warp", "_triton.py<triton.py:296"): _NO_HEADS,
    ("ntm_step", "warp", "_triton.py<triton.py:305"): _NO_HEADS,
    ("ntm_step", "shuffle", "triton.py:223"): _NO_READS,
    ("content_addressing", "warp", "triton.py:206"): _ONE_ROUND,
    # address and address_bwd: strength, similarities, gate, gamma; erased: erase vectors; ntm_step's similarities.
    **{("ntm_step", "mask", f"_triton.py<_triton.py:{n}"): _OWN_SCRATCH for n in (364, 365, 367, 374, 412, 413, 415, 417, 477, 554)},
    ("ntm_step", "mask", "_triton.py<triton.py:351"): _OWN_SCRATCH,
    # A search's cuts.
    **{("knn_search", "barrier", f"triton.py:{n}"): _BESIDE for n in (266, 309, 313, 331, 334)},
    **{("knn_search", "mask", f"triton.py:{n}"): _SAME_LIST for n in (327, 342)},
}
"""(operator, kind, place) -> why none of its mutants can be killed."""


def _copies(x):
    """One key again and again, and two late ones that are nearer."""
    x["keys"][..., :, :] = x["keys"][..., :1, :]
    x["keys"][..., [270, 290], :] *= 0.5
    x["query"][..., :1, :] = 0.4 * x["keys"][..., :1, :]


def _lost(x):
    x["query"][..., 0, :] = float("nan")


# Sizes beside the contract's that reach a mask: rows that do not fill their block, parts of an awkward length.
EXTRA: dict[str, tuple[Sample, ...]] = {
    "content_addressing": (S("masked_shared_N63", B=3, N=63, W=7, shared=1, masked=1), S("N100_W100_H3", B=1, H=3, N=100, W=100)),
    "ntm_step": (step("N5_W1100_r3_w3", 3, 3, B=1, N=5, W=1100), step("N7_W64_r2_w2", 2, 2, B=1, N=7, W=64)),
    "knn_search": (
        S("N1200_k2", options={"k": 2}, N=1200, W=20),  # several shards, whose lists are cut, as is that of the finish
        *(S(f"copies_{m}", _copies, {"k": 3, "metric": m}, N=300, W=20) for m in ("l2", "cosine")),  # more than are kept
    ),
    "knn_lookup": (S("lost", _lost, {"k": 3, "delta": 0.1}),),
    "erase_add_write": (S("N150_W63", B=1, N=150, W=63), S("N7_W3_H16", H=16, N=7, W=3)),
}


# Searches have thousands of mutants. Of knn_lookup's kernels those of the search are judged as knn_search's.
SEARCHES = {"knn_search": (), "knn_lookup": ("knn_search_fwd_kernel_scan", "knn_search_fwd_kernel_finish")}


@dataclass(frozen=True, eq=False)
class Mutant:
    kind: str
    """barrier, warp, mask or shuffle."""
    site: Site
    instruction: Instruction

    @property
    def place(self) -> str:
        """Where in the sources: the calling line, and the file of the device function that it calls."""
        inner, *outer = self.instruction.line.split("<")
        return "<".join([inner.split(":")[0] if outer else inner, *outer[-1:]])


def mutants(program: Program) -> Iterator[Mutant]:
    for k, b in enumerate(program.blocks):
        for at, i in enumerate(b.body):
            if i.op[0] in ("shfl", "redux"):
                yield Mutant("shuffle", (k, at), i)
            elif i.op[0] in ("bar", "barrier") and is_warp_sync(i):
                yield Mutant("warp", (k, at), i)
            elif i.guard and i.op[0] in ("ld", "st"):
                yield Mutant("mask", (k, at), i)
            elif i.op[0] in ("vote", "match", "elect", "cp"):
                raise NotImplementedError(f"no mutant of {i.text}")
        if b.end is not None and b.end.op[0] in ("bar", "barrier"):
            yield Mutant("barrier", (k, -1), b.end)


def launches(case: Case, samples: list[Sample]) -> list[list[Record]]:
    """The launches of every program that the samples run, forward and backward."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # NaN in fresh tensors, as in the tests
    torch.use_deterministic_algorithms(True)
    found: dict[int, list[Record]] = defaultdict(list)
    for sample in samples:
        emulator = Emulator("triton", 80, orders=("lockstep",), keep=True)
        with emulated(emulator):
            run(case.function, case, sample, case.inputs(sample, torch.float32))
        for r in emulator.records:
            if r.kernel not in SEARCHES.get(case.name, ()):
                found[id(r.kernel_object)].append(r)
    return list(found.values())


def loops(program: Program, block: int) -> set[int]:
    """The branches back of the loops around a block."""
    ends = [(k, program.labels[b.end.operands[0]]) for k, b in enumerate(program.blocks) if b.end is not None and b.end.op[0] == "bra"]
    return {k for k, target in ends if target <= block <= k}


def judge(mutant: Mutant, records: list[Record]) -> str:
    """killed, ordered, once, idle, unused or skipped (no launch gets there)."""
    here = [r for r in records if mutant.site in r.report.sites]
    if not here:
        return "skipped"
    if mutant.kind == "mask":
        masked = [r for r in here if mutant.site in r.report.masked]
        store = mutant.instruction.op[0] == "st"
        return "idle" if not masked else "killed" if any(r.caught(mutant.site, ("lockstep",), store) for r in masked) else "unused"
    if mutant.kind == "shuffle":
        return "killed" if any(r.caught(mutant.site, ("lockstep",), False) for r in here) else "unused"
    if any(r.caught(mutant.site, ("lockstep",)) for r in here) or any(r.caught(mutant.site, ("warps", "warps-reverse")) for r in here):
        return "killed"
    again = set().union(*(r.report.repeated for r in here))
    return "ordered" if loops(here[0].kernel_object.program, mutant.site[0]) <= again else "once"


def versions() -> dict[str, str]:
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}


def tally(case: Case, samples: list[Sample], thin: bool = False) -> tuple[Counter, dict[tuple[str, str], Counter]]:
    """Verdicts by (kernel, kind, verdict), and by (kind, place). `thin`: of each kind at a place the first one."""
    total: Counter = Counter()
    places: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for records in launches(case, samples):
        found = list(mutants(records[0].kernel_object.program))
        first = {(m.kind, m.place): m for m in reversed(found)}
        for m in first.values() if thin else found:
            verdict = judge(m, records)
            total[records[0].kernel, m.kind, verdict] += 1
            places[m.kind, m.place][verdict] += 1
    return total, places


def unproved(case: Case, places: dict[tuple[str, str], Counter]) -> list[str]:
    """Places whose mutants were neither killed nor proved to change nothing whatever the sizes."""
    return [
        f"{kind} at {place}: {dict(verdicts)}"
        for (kind, place), verdicts in sorted(places.items())
        if not verdicts["killed"] and not verdicts["ordered"] and (case.name, kind, place) not in EXCEPT
    ]


def quick(case: Case) -> list[Sample]:
    """What every run of the tests judges, thinned out: the first sample, and the first one with several warps in a block."""
    return [case.samples[0], *[s for s in case.samples if s.sizes.get("N") == 63 and s.sizes.get("W", 0) != 3][:1]]


def whole(case: Case) -> list[Sample]:
    return [*(s for s in case.samples if case.name not in SEARCHES or s.sizes.get("N", 0) < 1000), *EXTRA.get(case.name, ())]


def verdicts(total: Counter) -> dict[str, int]:
    return {" ".join(k): n for k, n in sorted(total.items())}


def main() -> None:
    if missing("triton"):
        raise SystemExit(missing("triton"))
    torch.set_num_threads(1)
    only = sys.argv[1:]
    table = json.loads(COMMITTED.read_text()) if only else {"versions": versions(), "operators": {}}
    if table["versions"] != versions() and not table["operators"].keys() <= set(only):
        raise SystemExit(f"the table is of {table['versions']}, this is {versions()}: name all of {', '.join(table['operators'])}")
    table["versions"] = versions()
    for case in CASES:
        if case.name in operators("triton") and (not only or case.name in only):
            every, places = tally(case, whole(case))
            some, _ = tally(case, quick(case), thin=True)
            wrong = unproved(case, places)
            table["operators"][case.name] = {"all": verdicts(every), "quick": verdicts(some), "unproved": wrong}
            kinds: Counter = Counter()
            for (_, kind, verdict), n in every.items():
                kinds[kind, verdict] += n
            print(case.name, *(f"{kind} {verdict} {n}," for (kind, verdict), n in sorted(kinds.items())), *wrong, sep="\n  ", flush=True)
    COMMITTED.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
