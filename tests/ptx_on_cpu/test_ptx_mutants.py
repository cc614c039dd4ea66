"""Each barrier, mask and shuffle of Triton's compiled kernels is needed, or proved to change nothing (ptx_mutants.py says how)."""

import json

import pytest

from cases import CASES
from ptx_suite import COMPOSED, missing, operators

if missing("triton"):
    pytest.skip(missing("triton"), allow_module_level=True)

from ptx_mutants import COMMITTED, SEARCHES, quick, tally, unproved, verdicts, versions, whole

TABLE = json.loads(COMMITTED.read_text())
HAVE = [pytest.param(c, id=c.name) for c in CASES if c.name in operators("triton")]
SLOW = [pytest.param(*p.values, id=p.id, marks=[pytest.mark.slow] if p.id in (*SEARCHES, *COMPOSED) else []) for p in HAVE]


def test_the_committed_verdicts_are_of_all_operators_and_leave_nothing_unproved():
    assert set(TABLE["operators"]) <= {p.values[0].name for p in HAVE}
    for op, found in TABLE["operators"].items():
        assert found["unproved"] == [], op


def check(case, which, total):
    for kind in {k[1] for k in total}:
        assert sum(n for k, n in total.items() if k[1:] == (kind, "killed")), f"no {kind} was killed"
    if TABLE["versions"] != versions():
        pytest.skip(f"the committed verdicts are of {TABLE['versions']}, this is {versions()}")
    if case.name not in TABLE["operators"]:
        pytest.skip(f"not in the committed table yet: python tests/ptx_on_cpu/ptx_mutants.py {case.name}")
    assert verdicts(total) == TABLE["operators"][case.name][which], "other verdicts: python tests/ptx_on_cpu/ptx_mutants.py"


@pytest.mark.parametrize("case", SLOW)
def test_some_mutants(case):
    check(case, "quick", tally(case, quick(case), thin=True)[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", HAVE)
def test_every_mutant(case):
    total, places = tally(case, whole(case))
    assert unproved(case, places) == []
    check(case, "all", total)
