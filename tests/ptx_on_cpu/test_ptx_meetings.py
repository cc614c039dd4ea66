"""Blocks that wait for each other, in the PTX emulator: what is right passes in every order, what is not ordered is a race, what never comes is said.

A kernel of teams: x counts tickets, then a team's arrivals at each word; y takes two buffers of a word a thread, one for odd and one for even rounds,
then the sums. n is a team's size. In each round a block shows its number plus the round and sums what its team shows, a thread that of its
neighbour in every block.
"""

import numpy as np
import pytest

from ptx_machine import ORDERS, Kernel, PtxError
from test_ptx_machine import each_order, ptx, run

TEAM = """
.shared .align 4 .b8 s[4];
mov.u32 %r3, %ctaid.x;
TICKET
div.u32 %r4, %r3, %r1;
mul.lo.u32 %r5, %r4, %r1;
add.u32 %r4, %r4, 1;
mul.wide.u32 %rd5, %r4, 4;
add.s64 %rd5, %rd1, %rd5;
mov.u32 %r6, %nctaid.x;
mov.u32 %r7, %ntid.x;
setp.ne.u32 %p1, %r2, 0;
mov.u32 %r8, 0;
mov.u32 %r9, 0;
mov.u32 %r10, 0;
ROUND:
and.b32 %r11, %r8, 1;
mul.lo.u32 %r11, %r11, %r6;
add.u32 %r12, %r11, %r3;
mad.lo.u32 %r12, %r12, %r7, %r2;
mul.wide.u32 %rd6, %r12, 4;
add.s64 %rd6, %rd2, %rd6;
add.u32 %r13, %r3, %r8;
st.global.u32 [%rd6], %r13;
bar.sync 0;
add.u32 %r9, %r9, %r1;
@%p1 bra MET;
red.release.gpu.global.add.u32 [%rd5], 1;
LOOK:
ld.acquire.gpu.global.u32 %r14, [%rd5];
setp.ge.u32 %p2, %r14, %r9;
@%p2 bra MET;
nanosleep.u32 100;
bra.uni LOOK;
MET:
bar.sync 0;
mov.u32 %r15, 0;
SUM:
add.u32 %r16, %r11, %r5;
add.u32 %r16, %r16, %r15;
xor.b32 %r17, %r2, 1;
mad.lo.u32 %r16, %r16, %r7, %r17;
mul.wide.u32 %rd7, %r16, 4;
add.s64 %rd7, %rd2, %rd7;
ld.global.u32 %r18, [%rd7];
add.u32 %r10, %r10, %r18;
add.u32 %r15, %r15, 1;
setp.lt.u32 %p3, %r15, %r1;
@%p3 bra SUM;
add.u32 %r8, %r8, 1;
setp.lt.u32 %p4, %r8, 3;
@%p4 bra ROUND;
mad.lo.u32 %r19, %r6, 2, %r3;
mad.lo.u32 %r19, %r19, %r7, %r2;
mul.wide.u32 %rd8, %r19, 4;
add.s64 %rd8, %rd2, %rd8;
st.global.u32 [%rd8], %r10;
"""
TICKET = """
@%p0 bra TAKEN;
atom.global.add.u32 %r20, [%rd1], 1;
st.shared.u32 [s], %r20;
TAKEN:
bar.sync 0;
ld.shared.u32 %r3, [s];
"""


def teams(*changes, blocks=8, size=4, threads=64, ticket=False, order="lockstep", **options):
    """Runs TEAM with pieces of its text replaced; whether all sums are right, and the report."""
    body = TEAM
    for old, new in changes:
        assert old in body
        body = body.replace(old, new)
    body = body.replace("TICKET", "setp.ne.u32 %p0, %r2, 0;" + TICKET if ticket else "")
    x, y = np.zeros(1 + blocks, np.uint32), np.zeros((3, blocks, threads), np.uint32)
    report = Kernel(ptx(body)).launch((blocks,), (threads,), [x, y, size], order=order, **options)
    first = np.arange(blocks) // size * size
    want = 3 * (size * first + size * (size - 1) // 2) + 3 * size
    return (y[2] == want[:, None]).all(), report


ARRIVE, ACQUIRE, WAIT = "red.release.gpu.global.add.u32 [%rd5], 1;", "ld.acquire.gpu.global.u32 %r14, [%rd5];", "@%p2 bra MET;"
RACE = "race in global memory: a read after another thread's write"


@each_order
@pytest.mark.parametrize("races", [False, True])
@pytest.mark.parametrize("ticket", [False, True])
def test_blocks_wait_for_each_other(order, races, ticket):
    for blocks, size, threads in ((4, 4, 64), (12, 4, 64), (6, 2, 32), (3, 3, 2)):
        assert teams(blocks=blocks, size=size, threads=threads, order=order, races=races, ticket=ticket)[0]
    atomic = (ARRIVE, "atom.add.release.gpu.global.u32 %r21, [%rd5], 1;\nfence.acq_rel.gpu;\nmembar.gl;")
    assert teams(atomic, order=order, races=races, ticket=ticket)[0]


@each_order
@pytest.mark.parametrize("ticket", [False, True])
def test_an_arrival_that_never_comes(order, ticket):
    for races in (False, True):
        with pytest.raises(PtxError, match="k: blocks wait for each other for ever: a value they wait for never comes$"):
            teams((ARRIVE, ""), order=order, ticket=ticket, races=races)
    with pytest.raises(PtxError, match="for ever"):
        teams(("setp.ge.u32 %p2", "setp.gt.u32 %p2"), order=order, ticket=ticket)  # waits for one too many


@each_order
@pytest.mark.parametrize(
    "changes, message",
    [
        ([(ACQUIRE, ""), (WAIT, "bra.uni MET;")], RACE),
        ([(WAIT, "bra.uni MET;")], RACE),
        ([(ACQUIRE, ACQUIRE.replace("acquire", "relaxed"))], RACE),
        ([(ACQUIRE, ACQUIRE.replace("gpu", "cta"))], RACE),
        ([(ARRIVE, ARRIVE.replace("release", "relaxed"))], RACE),
        ([(ARRIVE, ARRIVE.replace("gpu", "cta"))], RACE),
        ([("MET:\nbar.sync 0;", "MET:")], RACE),
        ([("bar.sync 0;\nadd.u32 %r9", "add.u32 %r9")], RACE),
        ([("and.b32 %r11, %r8, 1;", "mov.u32 %r11, 0;")], "race in global memory: a write after another thread's read"),
    ],
    ids=["no wait", "one look", "no acquire", "acquire in a block", "no release", "release in a block", "no barrier after", "no barrier before", "one buffer"],
)
def test_blocks_that_meet_in_part(order, changes, message):
    for ticket in (False, True):
        with pytest.raises(PtxError, match=message):
            teams(*changes, order=order, races=True, ticket=ticket)


@each_order
def test_a_wait_for_one_arrival_too_few(order):
    """Somebody looks while one arrival is missing."""
    for ticket in (False, True):
        with pytest.raises(PtxError, match=RACE):
            teams(("setp.ge.u32 %p2", "add.u32 %r14, %r14, 1;\nsetp.ge.u32 %p2"), order=order, races=True, ticket=ticket)


def test_what_a_thread_did_after_its_arrival_is_not_ordered():
    """What it did before is, without a barrier: here one thread a block shows its word itself."""
    alone = ("bar.sync 0;\nadd.u32 %r9", "add.u32 %r9"), ("MET:\nbar.sync 0;", "MET:"), ("xor.b32 %r17, %r2, 1;", "mov.u32 %r17, %r2;")
    assert teams(*alone, threads=1, races=True)[0]
    late = ("st.global.u32 [%rd6], %r13;", ""), (ARRIVE, f"{ARRIVE}\nst.global.u32 [%rd6], %r13;")
    with pytest.raises(PtxError, match=RACE):
        teams(*alone, *late, threads=1, races=True)


def test_mutants_of_a_meeting():
    """Without its arrival it never ends, without its acquire it is a race and wrong."""
    kernel = Kernel(ptx(TEAM.replace("TICKET", "")))
    sites = {
        i.op[0]: (k, at) for k, b in enumerate(kernel.program.blocks) for at, i in enumerate(b.body) if {"acquire", "release"} & set(i.op)
    }
    assert set(sites.values()) <= teams()[1].sites
    with pytest.raises(PtxError, match="for ever"):
        teams(without=sites["red"])
    with pytest.raises(PtxError, match=RACE):
        teams(without=sites["ld"], races=True)
    assert not teams(without=sites["ld"], order="warps")[0]


def test_blocks_that_do_not_run_side_by_side(monkeypatch):
    """Teams may come one after the other; a team that is cut in two is refused."""
    monkeypatch.setattr("ptx_machine.LANES", 128)  # eight blocks of 64 threads
    for order in ORDERS:
        assert teams(blocks=24, order=order)[0]
    with pytest.raises(PtxError, match="from later blocks: no more than 8 of 64 threads"):
        teams(blocks=24, size=12)


def test_sleepers_beside_a_shuffle():
    """One lane sleeps; the others of its warp wait for it where the whole warp exchanges values."""
    body = """
    setp.ne.u32 %p1, %r2, 63;
    @%p1 bra HERE;
    red.release.gpu.global.add.u32 [%rd1], 1;
    HERE:
    setp.ne.u32 %p2, %r2, 5;
    @%p2 bra ALL;
    LOOK:
    nanosleep.u32 100;
    ld.acquire.gpu.global.u32 %r3, [%rd1];
    setp.eq.u32 %p3, %r3, 0;
    @%p3 bra LOOK;
    ALL:
    shfl.sync.idx.b32 %r4, %r3, 5, 31, -1;
    st.global.u32 [%rd4], %r4;
    """
    for order in ORDERS:
        _, y, _ = run(body, x=np.zeros(1, np.uint32), order=order)
        assert (y[:32] == 1).all()
