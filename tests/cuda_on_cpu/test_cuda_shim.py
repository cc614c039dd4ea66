"""The shim sees what it is there to see: each kernel of wrong_kernels.cpp makes one mistake, which a mode must tell; the right one passes."""

import os
import subprocess

import pytest
import shim_build

SHIM = {
    "divergent_barrier": "stuck",
    "two_barriers": "different barriers",
    "divergent_shuffle": "stuck",
    "not_in_own_mask": "not in its own mask",
    "lane_outside_mask": "not in the mask",
    "uninitialised_shared": "wrong result: 1 of 128",
    "missing_barrier": "wrong result",
    "missing_wait": "wrong result: 64 of 128",
    "blocks_never_arrive": "waits for other blocks",
    "blocks_do_not_wait": "wrong result",
    "blocks_go_on_too_soon": "wrong result",
}
SEEN = {
    None: SHIM,
    "address": SHIM
    | {
        "past_global": "heap-buffer-overflow",
        "before_global": "heap-buffer-overflow",
        "past_shared": "heap-buffer-overflow",
        "past_array": "heap-buffer-overflow",
        "array_past_shared": "heap-buffer-overflow",
        "past_local": "stack-buffer-overflow|out of bounds",
        "misaligned": "misaligned address",
    },
    "thread": SHIM
    | {
        "missing_barrier": "data race",
        "write_after_read": "data race",
        "missing_syncwarp": "data race",
        "shuffle_for_syncwarp": "data race",
        "blocks_write_one_place": "data race",
        "block_reads_anothers": "data race",
        "blocks_do_not_wait": "data race",
        "blocks_arrive_too_soon": "data race",
        "blocks_go_on_too_soon": "data race",
    },
}


def run(sanitizer, name, order="forward"):
    done = subprocess.run(
        [str(shim_build.wrong_kernels(sanitizer)), name], capture_output=True, text=True, timeout=120,
        env={**os.environ, **shim_build.ENVIRONMENT, "MC_SHIM_SCHED": order},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("sanitizer, name", [(s, n) for s in SEEN for n in SEEN[s]])
def test_mistake_is_seen(sanitizer, name):
    code, said = run(sanitizer, name)
    assert code != 0
    assert any(words in said for words in SEEN[sanitizer][name].split("|")), said


@pytest.mark.parametrize("order", ["forward", "reverse", "random:1"])
@pytest.mark.parametrize("sanitizer", SEEN)
@pytest.mark.parametrize("name", ["right", "blocks_meet"])
def test_right_kernel_passes(name, sanitizer, order):
    assert run(sanitizer, name, order) == (0, "")
