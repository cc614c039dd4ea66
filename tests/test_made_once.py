"""Test processes that want one file."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from made_once import made_once


def test_one_makes_it_and_the_others_wait(tmp_path):
    made = []

    def make(to):
        made.append(to)
        to.write_text("half")
        time.sleep(0.2)
        to.write_text("whole")

    (tmp_path / "it.old.o").write_text("old")
    with ThreadPoolExecutor(4) as pool:  # each takes the lock by a file of its own, as processes do
        texts = list(pool.map(lambda _: made_once(tmp_path / "it.new.o", "it.*.o", make).read_text(), range(4)))
    assert texts == ["whole"] * 4 and len(made) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["it.new.o", "it.new.o.lock"]


def test_a_failure_leaves_nothing_that_looks_made(tmp_path):
    with pytest.raises(RuntimeError):
        made_once(tmp_path / "it.o", "it.*", lambda to: exec("raise RuntimeError"))
    assert not (tmp_path / "it.o").exists()
