"""Mutation of compiled kernels: without any one of its barriers, warp barriers, waits for copies or masks of loads, a kernel fails.

A mutant counts as caught when the emulator refuses it (a race, an access out of bounds, a barrier that is never complete) or when
any order of warps gives another result.
"""

import pytest
import torch

from cases import case as case_of
from contract import run
from ptx_machine import ORDERS
from ptx_program import is_warp_sync
from ptx_suite import BACKENDS, Emulator, emulated, missing, operators

# Awkward sizes that reach every loop.
SAMPLES = {
    "content_addressing": ("N128_W20_H5", "masked", "shared_N100_W63"),
    "interpolate": ("N63_H5",),
    "circular_shift": ("N63_S5_H5",),
    "sharpen": ("N63_H5",),
    "ntm_addressing": ("N63_W20_H3", "shared_N100_W64_H5"),
    "read": ("N63_W3_H5", "N128_W20"),
    "erase_add_write": ("N63_W3_H5", "N128_W20_H1"),
    "lrua_write": ("N63_W3_H5", "N128_W40_H4"),
    "ntm_step": ("N63_W20_r2_w3", "N128_W20"),
}
# (backend, kernel's name or a part of it, what is removed): why it is caught by nothing.
HARMLESS: dict[tuple[str, str, str], str] = {}


def sites(record):
    """(what, mutant) for every synchronisation that the launch executed."""
    kernel = record.kernel_object
    for k, b in enumerate(kernel.program.blocks):
        if k not in record.report.sites:
            continue
        if b.end is not None and b.end.op[0] in ("bar", "barrier"):
            if "red" not in b.end.op:  # one with a result cannot be left out
                yield f"barrier {k}", kernel.mutant(k)
        for at, i in enumerate(b.body):
            if is_warp_sync(i) and i.op[0] in ("bar", "barrier"):
                yield f"warp barrier {k}", kernel.mutant(k, at)
            if i.op[0] == "cp" and ("wait_group" in i.op or "wait_all" in i.op):
                yield f"wait {k}", kernel.mutant(k, at)


def launches(backend, name):
    """Every launch of the operator's samples, forward and backward, once for each kernel and geometry."""
    c = case_of(name)
    emulator = Emulator(backend, 80, orders=("lockstep",), keep=True)
    for sample in c.samples:
        if sample.id in SAMPLES[name]:
            with emulated(emulator):
                run(c.function, c, sample, c.inputs(sample, torch.float32))
    return emulator.records


PAIRS = [
    pytest.param(b, op, marks=[pytest.mark.skip(reason=missing(b))] if missing(b) else [], id=f"{b}-{op}")
    for b in BACKENDS
    for op in SAMPLES
    if op in operators(b)
]


@pytest.mark.parametrize("backend, op", PAIRS)
def test_every_barrier_is_needed(backend, op):
    seen, caught = {}, {}
    for record in launches(backend, op):
        for what, mutant in sites(record):
            key = (record.kernel_object.program.name, id(record.kernel_object), what)
            seen[key] = f"{record.kernel} ({record.way}): {what}"
            if not caught.get(key):
                caught[key] = record.caught(mutant, replicas=backend == "triton")
    survivors = [text for key, text in seen.items() if not caught[key] and not any(key[0].find(k) >= 0 and b == backend and w == key[2] for b, k, w in HARMLESS)]
    assert not survivors, "\n".join(survivors)


@pytest.mark.parametrize("backend, op", [p for p in PAIRS if p.values[0] == "triton"])
def test_every_mask_of_a_load_is_needed(backend, op):
    """Triton's masks are predicates: without one that was ever false, a load leaves its array or changes the result."""
    seen, caught = {}, {}
    for record in launches(backend, op):
        kernel = record.kernel_object
        for k, b in enumerate(kernel.program.blocks):
            for at, i in enumerate(b.body):
                if i.guard and i.op[0] == "ld" and "global" in i.op:
                    key = (id(kernel), k, at)
                    seen[key] = f"{record.kernel} ({record.way}): {i.text}"
                    if not caught.get(key):
                        caught[key] = record.caught(kernel.mutant(k, at, guard=True), ORDERS[:1], replicas=True)
    survivors = [text for key, text in seen.items() if not caught[key]]
    assert len(survivors) <= len(seen) // 2, f"{len(survivors)} of {len(seen)}\n" + "\n".join(survivors)
