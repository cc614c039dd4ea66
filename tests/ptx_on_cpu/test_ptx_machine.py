"""The PTX emulator itself: right kernels give right results, wrong ones are caught, what it does not know it refuses."""

import struct

import numpy as np
import pytest

from ptx_machine import ORDERS, Kernel, PtxError, Sparse
from ptx_program import Module
from ptx_runtime import fma, from_bf16, to_bf16, to_integer

each_order = pytest.mark.parametrize("order", ORDERS)


def ptx(body: str, params: str = ".param .u64 x, .param .u64 y, .param .u32 n", before: str = "", directives: str = "") -> str:
    """A kernel k with x and y in %rd1, %rd2 (global), n in %r1, the thread in %r2, and room to work."""
    names = [p.split()[-1] for p in params.split(",")]
    loads = "".join(
        f"ld.param.u64 %rd{i + 1}, [{n}];\ncvta.to.global.u64 %rd{i + 1}, %rd{i + 1};\n" for i, n in enumerate(names) if "u64" in params.split(",")[i]
    )
    if "n" in names:
        loads += "ld.param.u32 %r1, [n];\n"
    return f"""
.version 8.0
.target sm_80
.address_size 64
{before}
.visible .entry k({params}) {directives}
{{
.reg .pred %p<20>;
.reg .b16 %rs<20>;
.reg .b32 %r<40>;
.reg .f32 %f<20>;
.reg .b64 %rd<20>;
{loads}
mov.u32 %r2, %tid.x;
mul.wide.u32 %rd9, %r2, 4;
add.s64 %rd3, %rd1, %rd9;
add.s64 %rd4, %rd2, %rd9;
{body}
ret;
}}
"""


def floats(n, seed=0):
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def run(body, n=64, order="lockstep", x=None, y=None, **options):
    """Launch one block of n threads; (x, y, report)."""
    shared = options.pop("shared", 0)
    blocks = options.pop("grid", (1, 1, 1))
    x = np.arange(n, dtype=np.uint32) if x is None else x
    y = np.zeros(n, np.uint32) if y is None else y
    kernel = Kernel(ptx(body, **{k: options.pop(k) for k in ("before", "directives") if k in options}))
    report = kernel.launch(blocks, (n, 1, 1), [x, y, n], shared, order=order, **options)
    return x, y, report


# Right programs -------------------------------------------------------------------------------------------------------

REVERSE = """
.shared .align 4 .b8 s[256];
ld.global.u32 %r3, [%rd3];
mov.u32 %r4, s;
mad.lo.u32 %r5, %r2, 4, %r4;
st.shared.u32 [%r5], %r3;
bar.sync 0;
sub.u32 %r6, 63, %r2;
mad.lo.u32 %r5, %r6, 4, %r4;
ld.shared.u32 %r7, [%r5];
st.global.u32 [%rd4], %r7;
"""


@each_order
def test_shared_memory_and_a_barrier(order):
    x, y, _ = run(REVERSE, order=order, races=True)
    assert (y == x[::-1]).all()


@each_order
def test_divergence_loops_and_votes(order):
    body = """
    mov.u32 %r3, 0;
    mov.u32 %r4, 0;
    LOOP:
    setp.ge.u32 %p1, %r3, %r2;
    @%p1 bra DONE;
    add.u32 %r4, %r4, %r3;
    add.u32 %r3, %r3, 1;
    bra.uni LOOP;
    DONE:
    and.b32 %r5, %r2, 1;
    setp.eq.u32 %p2, %r5, 1;
    vote.sync.ballot.b32 %r6, %p2, 0xffffffff;
    @!%p2 mov.u32 %r6, 7;
    add.u32 %r4, %r4, %r6;
    st.global.u32 [%rd4], %r4;
    """
    _, y, _ = run(body, order=order)
    t = np.arange(64, dtype=np.uint32)
    assert (y == t * (t - 1) // 2 + np.where(t % 2 == 1, np.uint32(0xAAAAAAAA), np.uint32(7))).all()


@each_order
def test_shuffles(order):
    for kind, b, c, want in (
        ("bfly", "1", "31", lambda t: t ^ 1),
        ("up", "2", "0", lambda t: np.where(t % 32 >= 2, t - 2, t)),
        ("down", "3", "31", lambda t: np.where(t % 32 < 29, t + 3, t)),
        ("idx", "5", "31", lambda t: t // 32 * 32 + 5),
        ("idx", "1", "0x1c1f", lambda t: t // 4 * 4 + 1),
    ):
        _, y, _ = run(f"shfl.sync.{kind}.b32 %r3|%p1, %r2, {b}, {c}, -1;\nst.global.u32 [%rd4], %r3;", order=order)
        assert (y == want(np.arange(64))).all(), kind


@each_order
def test_local_memory_calls_and_tables(order):
    """An array indexed at run time, a function with a stack frame of arguments, a jump table."""
    before = """
    .func (.param .b32 out) twice_plus(.param .b32 a, .param .b32 b)
    {
    .reg .b32 %r<5>;
    ld.param.u32 %r1, [a];
    ld.param.u32 %r2, [b];
    setp_free: add.u32 %r3, %r1, %r1;
    add.u32 %r4, %r3, %r2;
    st.param.b32 [out], %r4;
    ret;
    }
    """
    body = """
    .local .align 4 .b8 frame[16];
    mov.u64 %rd5, frame;
    and.b32 %r3, %r2, 3;
    mul.wide.u32 %rd6, %r3, 4;
    add.s64 %rd7, %rd5, %rd6;
    st.local.u32 [%rd5], 10;
    st.local.u32 [%rd5+4], 11;
    st.local.u32 [%rd5+8], 12;
    st.local.u32 [%rd5+12], 13;
    cvta.local.u64 %rd8, %rd7;
    ld.u32 %r4, [%rd8];
    { .param .b32 p0; st.param.b32 [p0], %r4; .param .b32 p1; st.param.b32 [p1], %r2; .param .b32 r0;
    call.uni (r0), twice_plus, (p0, p1);
    ld.param.b32 %r5, [r0]; }
    TABLE: .branchtargets A, B;
    and.b32 %r6, %r2, 1;
    brx.idx %r6, TABLE;
    A: add.u32 %r5, %r5, 100;
    B: st.global.u32 [%rd4], %r5;
    """
    _, y, _ = run(body, order=order, before=before)
    t = np.arange(64)
    assert (y == 2 * (10 + t % 4) + t + np.where(t % 2 == 0, 100, 0)).all()


@each_order
def test_named_barriers(order):
    """Two pairs of warps, each with a barrier of its own."""
    body = """
    .shared .align 4 .b8 s[512];
    mov.u32 %r4, s;
    mad.lo.u32 %r5, %r2, 4, %r4;
    shr.u32 %r8, %r2, 6;
    st.shared.u32 [%r5], %r2;
    add.u32 %r9, %r8, 1;
    barrier.sync %r9, 64;
    xor.b32 %r6, %r2, 32;
    mad.lo.u32 %r5, %r6, 4, %r4;
    ld.shared.u32 %r7, [%r5];
    st.global.u32 [%rd4], %r7;
    """
    _, y, _ = run(body, n=128, order=order, races=order == "lockstep")
    assert (y == (np.arange(128) ^ 32)).all()


@each_order
def test_barrier_with_a_reduction(order):
    body = """
    setp.eq.u32 %p1, %r2, %r1;
    setp.lt.u32 %p2, %r2, 40;
    barrier.cta.red.or.pred %p3, 0, %p2;
    bar.red.and.pred %p4, 0, %p2;
    bar.red.popc.u32 %r3, 0, %p2;
    selp.u32 %r4, 1000, 0, %p3;
    selp.u32 %r5, 2000, 0, %p4;
    add.u32 %r6, %r3, %r4;
    add.u32 %r6, %r6, %r5;
    st.global.u32 [%rd4], %r6;
    """
    _, y, _ = run(body, order=order)
    assert (y == 1040).all()


def test_parameters_by_value():
    """A struct of a pointer, a float and an int; the pointer leads into an array of `memory`."""
    body = "ld.param.u64 %rd1, [s+8];\nld.param.f32 %f1, [s];\nmov.b64 %rd2, s;\nld.param.u32 %r3, [%rd2+4];\n" + (
        "mul.wide.u32 %rd9, %r2, 4;\nadd.s64 %rd3, %rd1, %rd9;\ncvt.rn.f32.u32 %f2, %r3;\nadd.f32 %f1, %f1, %f2;\nst.global.f32 [%rd3], %f1;"
    )
    text = f""".visible .entry k(.param .align 8 .b8 s[16]) {{ .reg .b64 %rd<10>; .reg .b32 %r<5>; .reg .f32 %f<4>;
    mov.u32 %r2, %tid.x; {body} ret; }}"""
    out = np.zeros(32, np.float32)
    Kernel(text).launch((1,), (32,), [struct.pack("<fIQ", 1.5, 2, out.ctypes.data)], memory=[out])
    assert (out == 3.5).all()


def test_arithmetic():
    assert to_bf16(np.array([1.0, np.nan, 3.14159, -np.inf], np.float32)).tolist() == [0x3F80, 0x7FFF, 0x4049, 0xFF80]
    assert (from_bf16(np.array([0x3F80], np.uint16)) == 1).all()
    a, b = np.float32(12582912.0), np.array([1.7, -1.2], np.float32)
    assert fma(b, np.float32(1), a, "rm").tolist() == [12582913.0, 12582910.0]
    x = np.array([np.nan, 3e9, -3e9, -2.5, 2.5], np.float32)
    assert to_integer(x, "rni", np.int32).tolist() == [0, 2**31 - 1, -(2**31), -2, 2]
    body = """
    cvt.rn.f32.u32 %f1, %r2;
    sub.f32 %f2, %f1, 0f42000000;
    div.rn.f32 %f3, %f2, 0f40400000;
    cvt.rzi.s32.f32 %r3, %f3;
    mul.hi.u32 %r4, %r2, 0xAAAAAAAB;
    shr.u32 %r4, %r4, 1;
    add.s32 %r5, %r3, %r4;
    bfe.u32 %r6, %r2, 1, 3;
    lop3.b32 %r7, %r2, %r6, 5, 0x96;
    prmt.b32 %r8, %r7, %r5, 0x5410;
    st.global.u32 [%rd4], %r8;
    """
    _, y, _ = run(body)
    t = np.arange(64)
    low = (t ^ (t >> 1 & 7) ^ 5) & 0xFFFF
    high = (np.trunc((t - 32) / 3).astype(int) + t // 3) & 0xFFFF
    assert (y == (low | high << 16)).all()


MATRIX = """
.shared .align 16 .b8 s[256];
mov.u32 %r4, s;
shr.u32 %r5, %r2, 5;
mad.lo.u32 %r4, %r5, 128, %r4;
and.b32 %r6, %r2, 31;
mad.lo.u32 %r7, %r6, 4, %r4;
st.shared.u32 [%r7], %r2;
bar.sync 0;
and.b32 %r8, %r2, 7;
mad.lo.u32 %r8, %r8, 16, %r4;
mov.u32 %r3, 99;
setp.ge.u32 %p1, %r2, LEAST;
@!%p1 bra END;
ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r3}, [%r8];
stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r8], {%r3};
END:
bar.sync 0;
ld.shared.u32 %r9, [%r7];
st.global.u32 [%rd4], %r9;
st.global.u32 [%rd3], %r3;
"""


@pytest.mark.parametrize("kind, halves", [("f16x2", lambda x: x.view(np.float16)), ("bf16x2", lambda x: from_bf16(x.view(np.uint16)))])
@pytest.mark.parametrize("sign, compare", [("ge", np.greater_equal), ("lt", np.less), ("neu", np.not_equal)])
def test_packed_comparisons(kind, halves, sign, compare):
    """The low halves are compared into the first predicate, the high halves into the second; NaN, infinities and both zeros among them."""
    special = np.array([0x0000, 0x8000, 0x3C00, 0x3F80, 0xBC00, 0x7C00, 0x7F80, 0x7FFF], np.uint16)
    a = np.repeat(special, 8) | np.tile(special, 8).astype(np.uint32) << 16
    body = f"""
    ld.global.u32 %r3, [%rd3];
    mov.b32 %r4, 0x3C000000;
    setp.{sign}.{kind} %p1|%p2, %r3, %r4;
    selp.u32 %r5, 1, 0, %p1;
    selp.u32 %r6, 2, 0, %p2;
    or.b32 %r7, %r5, %r6;
    st.global.u32 [%rd4], %r7;
    """
    _, y, _ = run(body, x=a)
    with np.errstate(invalid="ignore"):
        low, high = compare(halves(a).reshape(-1, 2), halves(np.array([0x3C000000], np.uint32))).T
    assert (y == low + 2 * high).all()


@each_order
def test_matrices_of_some_warps(order):
    """A matrix of halves is turned over by the second of two warps alone; the first keeps its own. Part of a warp may not."""
    x, y, _ = run(MATRIX.replace("LEAST", "32"), order=order, races=True)
    turned = np.arange(32, 64, dtype=np.uint32).view(np.uint16).reshape(8, 8).T.copy().view(np.uint32).reshape(-1)
    assert (y[:32] == np.arange(32)).all() and (y[32:] == turned).all()
    assert (x[:32] == 99).all() and (x[32:] == turned).all()
    with pytest.raises(PtxError, match="by a part of a warp"):
        run(MATRIX.replace("LEAST", "33"), order=order)


def test_blocks_side_by_side_and_alone():
    """Results do not depend on how many blocks run together; a chosen block runs alone."""
    body = "mov.u32 %r3, %ctaid.x;\nmad.lo.u32 %r4, %r3, 64, %r2;\nmul.wide.u32 %rd5, %r4, 4;\nadd.s64 %rd6, %rd2, %rd5;\nst.global.u32 [%rd6], %r4;"
    y = np.zeros(64 * 300, np.uint32)
    run(body, y=y, grid=(300, 1, 1))
    assert (y == np.arange(64 * 300)).all()
    y[:] = 0
    run(body, y=y, grid=(300, 1, 1), blocks=[(299, 0, 0)])
    assert (y[-64:] == np.arange(64 * 299, 64 * 300)).all() and not y[:-64].any()


def test_huge_arrays_of_which_only_pieces_exist():
    """Element 2^33 is reached with 64-bit arithmetic; with 32-bit arithmetic the access is outside."""
    piece = np.arange(64, dtype=np.uint32)
    far = 2**33
    body = f"add.s64 %rd5, %rd3, {4 * far};\nld.global.u32 %r3, [%rd5];\nst.global.u32 [%rd4], %r3;"
    x = Sparse(4 * (far + 64), {4 * far: piece})
    _, y, _ = run(body, x=x)
    assert (y == piece).all()
    narrow = f"mov.u32 %r5, {far & 0xFFFFFFFF};\nmul.wide.u32 %rd6, %r5, 4;\nadd.s64 %rd5, %rd3, %rd6;\nld.global.u32 %r3, [%rd5];\nst.global.u32 [%rd4], %r3;"
    with pytest.raises(PtxError, match="outside every buffer"):
        run(narrow, x=x)


# Counting -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address, sectors, bytes_", [("%rd3", 4, 128), ("%rd1", 1, 4), ("%rd10", 5, 128)], ids=["neighbours", "one word", "misaligned"]
)
def test_sectors_per_request(address, sectors, bytes_):
    body = f"add.s64 %rd10, %rd3, 4;\nld.global.u32 %r3, [{address}];\nst.global.u32 [%rd4], %r3;"
    _, _, report = run(body, x=np.zeros(128, np.uint32), count=True)
    t = report.traffic["x"]
    assert (t.load_requests, t.load_sectors, t.load_bytes) == (2, 2 * sectors, 2 * bytes_)
    assert report.traffic["y"].store_bytes == 256 and report.traffic["y"].store_sectors == 8


@pytest.mark.parametrize("stride, waves", [(1, 1), (2, 2), (32, 32), (0, 1), (33, 1)])
def test_bank_conflicts(stride, waves):
    body = f".shared .align 4 .b8 s[8192];\nmov.u32 %r4, s;\nmad.lo.u32 %r5, %r2, {4 * stride}, %r4;\nld.shared.u32 %r3, [%r5];"
    _, _, report = run(body, n=32, count=True)
    assert (report.shared_requests, report.shared_wavefronts) == (1, waves)


# Wrong programs -------------------------------------------------------------------------------------------------------


def test_a_missing_barrier_is_seen():
    """The orders of warps give a wrong result, whole-block lockstep does not; the race detector names it in any."""
    broken = REVERSE.replace("bar.sync 0;", "")
    x, y, _ = run(broken)
    assert (y == x[::-1]).all()
    for order in ORDERS[1:]:
        x, y, _ = run(broken, order=order)
        assert not (y == x[::-1]).all()
    for order in ORDERS:
        with pytest.raises(PtxError, match="race in shared memory"):
            run(broken, order=order, races=True)


def test_a_write_after_a_read_needs_a_barrier():
    """No schedule shows this one: every reader has read before anyone writes, in lockstep and warp by warp."""
    body = REVERSE.replace("st.global", "bar.sync 0;\nld.shared.u32 %r8, [%r4];\nBARRIER\nsetp.eq.u32 %p1, %r2, 63;\n@%p1 st.shared.u32 [%r4], 5;\nst.global")
    run(body.replace("BARRIER", "bar.sync 0;"), races=True)
    with pytest.raises(PtxError, match="a write after another thread's read"):
        run(body.replace("BARRIER", ""), races=True)


def test_a_race_within_a_warp():
    body = REVERSE.replace("bar.sync 0;", "SYNC").replace("sub.u32 %r6, 63", "sub.u32 %r6, 31").replace("s[256]", "s[128]")
    x, y, _ = run(body.replace("SYNC", "bar.warp.sync -1;"), n=32, races=True)
    assert (y == x[::-1]).all()
    with pytest.raises(PtxError, match="race in shared memory"):
        run(body.replace("SYNC", ""), n=32, races=True)


def test_a_race_between_blocks():
    with pytest.raises(PtxError, match="race in global memory"):
        run("mov.u32 %r3, %ctaid.x;\nst.global.u32 [%rd4], %r3;", grid=(2, 1, 1), races=True)
    run("mov.u32 %r3, 1;\nst.global.u32 [%rd4], %r3;", grid=(2, 1, 1), races=True)  # the same value


@pytest.mark.parametrize(
    "body, message",
    [
        ("ld.global.u32 %r3, [%rd3+4];", "byte 256 of 'x'.*thread 63"),
        ("ld.global.u32 %r3, [%rd3+2];", "misaligned 4-byte global load"),
        ("st.global.u32 [%rd4+-4], %r2;", "store of 4 bytes outside every buffer"),
        (".shared .align 4 .b8 s[16];\nmov.u32 %r4, s;\nld.shared.u32 %r3, [%r4+16];", "load outside 16 bytes of shared memory"),
        (".local .align 4 .b8 s[16];\nmov.u64 %rd5, s;\nld.local.u32 %r3, [%rd5+16];", "load outside 16 bytes of local memory"),
        ("setp.lt.u32 %p1, %r2, 8;\n@%p1 bra A;\nbra.uni B;\nA: shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1;\nB:", "mask 0xffffffff, but lanes 0xff"),
        ("setp.lt.u32 %p1, %r2, 32;\n@%p1 bra A;\nbar.sync 0;\nbra.uni B;\nA: bar.sync 0;\nB:", "different bar.sync"),
        ("setp.lt.u32 %p1, %r2, 32;\n@%p1 bra A;\nbar.sync 1;\nbra.uni B;\nA: bar.sync 2;\nB:", "a barrier is never complete"),
        ("LOOP: bra.uni LOOP;", "does not end"),
        ("trap;", "stops itself"),
    ],
)
def test_wrong_programs_are_caught(body, message, monkeypatch):
    monkeypatch.setattr("ptx_machine.FUEL", 1000)
    with pytest.raises(PtxError, match=message):
        run(body)


ORDERED = [
    "nanosleep.u64 %rd1;", "ld.acquire.vague.global.u32 %r3, [%rd3];", "red.release.gpu.vague.add.u32 [%rd3], 1;",
    "ld.acquire.gpu.global.v2.u32 {%r3, %r4}, [%rd3];", "st.release.gpu.global.v2.u32 [%rd3], {%r3, %r4};",
]  # fmt: skip


@pytest.mark.parametrize("line", ["wgmma.fence.sync.aligned;", "frobnicate.u32 %r3, %r2;", "add.cc.u32 %r3, %r2, 1;", "tex.1d.v4.f32.s32 {%f1,%f2,%f3,%f4}, [x, {%r2}];", "cp.async.bulk.commit_group;", *ORDERED])
def test_unknown_instructions_raise(line):
    with pytest.raises(NotImplementedError):
        run(line)


def test_launches_that_no_gpu_takes():
    with pytest.raises(PtxError, match="block"):
        run("", n=2048)
    with pytest.raises(PtxError, match="block"):
        run("", n=64, directives=".maxntid 32, 1, 1")
    with pytest.raises(PtxError, match="shared memory"):
        run("", shared=300_000)
    with pytest.raises(PtxError, match="no entry point"):
        Module(ptx("")).program("other")


def test_memory_starts_as_poison():
    _, y, _ = run(".shared .align 4 .b8 s[256];\nmov.u32 %r4, s;\nld.shared.u32 %r3, [%r4];\nst.global.u32 [%rd4], %r3;")
    assert (y == 0xFFFFFFFF).all()
    _, y, _ = run("st.global.u32 [%rd4], %r30;")
    assert (y == 0xFFFFFFFF).all()


def test_a_copy_arrives_at_its_wait():
    body = """
    .shared .align 16 .b8 s[256];
    mov.u32 %r4, s;
    mad.lo.u32 %r5, %r2, 4, %r4;
    cp.async.ca.shared.global [%r5], [%rd3], 4;
    cp.async.commit_group;
    WAIT
    ld.shared.u32 %r3, [%r5];
    st.global.u32 [%rd4], %r3;
    """
    x, y, _ = run(body.replace("WAIT", "cp.async.wait_group 0;"), races=True)
    assert (y == x).all()
    _, y, _ = run(body.replace("WAIT", ""))
    assert (y == 0xFFFFFFFF).all()


def test_atomics():
    body = "and.b32 %r3, %r2, 1;\nmul.wide.u32 %rd5, %r3, 4;\nadd.s64 %rd6, %rd2, %rd5;\natom.global.add.u32 %r4, [%rd6], %r2;\nred.global.max.u32 [%rd2+8], %r2;"
    _, y, _ = run(body)
    assert y[:3].tolist() == [sum(range(0, 64, 2)), sum(range(1, 64, 2)), 63]
