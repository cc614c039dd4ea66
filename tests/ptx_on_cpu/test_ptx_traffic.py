"""Counted traffic: memory moves as seldom as it may, and the committed table is what is counted now."""

import json

import pytest
import torch

from cases import case as case_of
from ptx_suite import missing
from ptx_traffic import COMMITTED, PAGE, bars, least, measured, moved, page, plain, row, text, times, tuned, versions

TABLE = json.loads(COMMITTED.read_text())


MEETING = ("ntm_step", "medium", "cuda")  # whose blocks wait for each other


def plan():
    for c, backend, name in measured():
        why = missing(backend)
        marks = [pytest.mark.skip(reason=why)] if why else []
        # The copy task's memory in every run, and the operators of which the bars speak beyond shared memory.
        if name not in ("copy", "heads") and not (name == "large" and c.name in ("content_addressing", "ntm_step")) and (c.name, name, backend) != MEETING:
            marks.append(pytest.mark.slow)
        yield pytest.param(backend, c, name, id=f"{backend}-{c.name}-{name}".replace(" ", "_"), marks=marks)


@pytest.mark.parametrize("backend, case, name", list(plan()))
def test_traffic(backend, case, name):
    made = row(backend, case, name)
    wrong = bars(case, name, made)
    assert not wrong, "\n".join(wrong)
    key = f"{case.name}/{name}/{backend}"
    if key not in TABLE["rows"]:
        pytest.skip("the bars hold; not in the committed table yet: python tests/ptx_on_cpu/ptx_traffic.py")
    for what, version in versions().items():
        if TABLE["versions"][what] != version:
            pytest.skip(f"the bars hold; the committed counts are of {what} {TABLE['versions'][what]}, this is {version}")
    assert json.loads(json.dumps(made)) == TABLE["rows"][key], "other counts: python tests/ptx_on_cpu/ptx_traffic.py"


def test_the_page_is_drawn_from_the_table():
    """And the table has nothing that is not there any more."""
    assert PAGE.read_text() == page(TABLE) and COMMITTED.read_text() == text(TABLE)
    assert set(TABLE["rows"]) <= {f"{c.name}/{name}/{backend}" for c, backend, name in measured()}


def test_committed_rows_meet_the_bars():
    for key, made in TABLE["rows"].items():
        op, name, _ = key.split("/")
        assert not bars(case_of(op), name, made), key
        if "keys" not in case_of(op).shapes:  # a search touches the values that it found alone
            for way in made.values():
                assert moved(way) >= 0.98 * least(way), key  # lrua_write leaves out the row that it zeroes


def test_a_second_pass_over_memory_is_seen():
    """The bars can fail: of the committed counts, with one pass more."""
    for key, made in TABLE["rows"].items():
        op, name, _ = key.split("/")
        if "memory" in case_of(op).shapes and name == "copy":
            changed = json.loads(json.dumps(made))
            counts = changed["fwd"]["tensors"]["memory"]
            counts[1] += counts[0]
            assert any("memory is read 2.0" in w or "memory is read 1.9" in w for w in bars(case_of(op), name, changed)), key


def test_blocks_that_meet_read_a_memory_once():
    """One launch, after that of the counters."""
    made = TABLE["rows"]["/".join(MEETING)]["fwd"]
    assert made["launches"] == 2 and times(made, "memory", "read") <= 1.05


def test_pytorch_is_counted():
    """Reads of a [2, 5, 3] memory with [2, 4, 5] weights: one product forward, two backward; views are free."""
    c = case_of("read")
    x = {"memory": torch.randn(2, 5, 3), "weights": torch.randn(2, 4, 5)}
    memory, weights, out = 4 * 30, 4 * 40, 4 * 24
    assert plain(tuned(c), c, c.samples[0], x) == {"fwd": memory + weights + out, "bwd": 2 * (memory + weights + out)}
    x["memory"] = torch.randn(5, 3).expand(2, 5, 3).transpose(1, 2).transpose(1, 2)
    assert plain(lambda memory, weights: memory * 1, c, c.samples[0], x)["fwd"] == memory // 2 + memory
