"""What Triton compiles to runs right in the emulator: kernels of all kinds, those of our operators apart."""

import numpy as np
import pytest

from ptx_suite import missing

if missing("triton"):
    pytest.skip(missing("triton"), allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptx_machine import ORDERS, Kernel, PtxError


@triton.jit
def softmax(x, o, n, B: tl.constexpr):
    r, i = tl.program_id(0), tl.arange(0, B)
    v = tl.load(x + r * n + i, mask=i < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, axis=0))
    tl.store(o + r * n + i, e / tl.sum(e, axis=0), mask=i < n)


@triton.jit
def scatter(idx, val, out, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(out + tl.load(idx + i, mask=i < n, other=0), tl.load(val + i, mask=i < n), mask=i < n)


@triton.jit
def matmul(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    tl.store(c + i[:, None] * N + j, tl.dot(tl.load(a + i[:, None] * K + k), tl.load(b + k[:, None] * N + j)))


@triton.jit
def ordered(x, low, sums, first, B: tl.constexpr):
    """Sorted values, running sums and the least value's place."""
    i = tl.arange(0, B)
    v = tl.load(x + i)
    tl.store(low + i, tl.sort(v))
    tl.store(sums + i, tl.cumsum(v, 0))
    tl.store(first, tl.argmin(v, 0))


def ptx(fn, sig, const, cc):
    sig = dict(sig, **{k: "constexpr" for k in const})
    r = triton.compile(ASTSource(fn, sig, constexprs=const), target=GPUTarget("cuda", cc, 32), options={"num_warps": 4})
    return r.asm["ptx"], r.metadata.shared


@pytest.mark.parametrize("cc", [80, 90])
@pytest.mark.parametrize("ty", ["fp16", "bf16", "fp32"])
def test_softmax(cc, ty):
    src, sh = ptx(softmax, {"x": "*" + ty, "o": "*fp32", "n": "i32"}, {"B": 512}, cc)
    R, n = 3, 300
    f = np.random.default_rng(0).standard_normal((R, n), dtype=np.float32)
    x = {"fp32": f, "fp16": f.astype(np.float16), "bf16": (f.view(np.uint32) >> 16).astype(np.uint16)}[ty]
    v = (x.astype(np.uint32) << 16).view(np.float32) if ty == "bf16" else x.astype(np.float64)
    e = np.exp(v - v.max(1, keepdims=True))
    for order in ORDERS:
        o = np.full((R, n), np.nan, np.float32)
        Kernel(src).launch((R, 1, 1), (128, 1, 1), [x, o, n], sh, order=order, races=True, replicas=True)
        np.testing.assert_allclose(o, e / e.sum(1, keepdims=True), rtol=2e-6)


def test_out_of_bounds_is_refused():
    src, sh = ptx(softmax, {"x": "*fp32", "o": "*fp32", "n": "i32"}, {"B": 512}, 80)
    with pytest.raises(PtxError, match="outside every buffer"):
        Kernel(src).launch((1, 1, 1), (128, 1, 1), [np.zeros(100, np.float32), np.zeros(512, np.float32), 101], sh)


@pytest.mark.parametrize("cc", [80, 90])
def test_atomics(cc):
    src, sh = ptx(scatter, {"idx": "*i32", "val": "*fp32", "out": "*fp32", "n": "i32"}, {"B": 256}, cc)
    g = np.random.default_rng(0)
    ix, v, o = g.integers(0, 50, 700).astype(np.int32), g.standard_normal(700, dtype=np.float32), np.zeros(50, np.float32)
    Kernel(src).launch((3, 1, 1), (128, 1, 1), [ix, v, o, 700], sh)
    np.testing.assert_allclose(o, np.bincount(ix, v, 50), atol=1e-5)


@pytest.mark.parametrize("cc", [80, 90])
def test_sort_scan_argmin(cc):
    src, sh = ptx(ordered, {"x": "*fp32", "low": "*fp32", "sums": "*fp32", "first": "*i32"}, {"B": 256}, cc)
    x = np.random.default_rng(0).standard_normal(256, dtype=np.float32)
    for order in ORDERS:
        low, sums, first = np.zeros_like(x), np.zeros_like(x), np.zeros(1, np.int32)
        Kernel(src).launch((1, 1, 1), (128, 1, 1), [x, low, sums, first], sh, order=order)
        assert (low == np.sort(x)).all() and first[0] == x.argmin()
        np.testing.assert_allclose(sums, x.astype(float).cumsum(), atol=1e-5)


@pytest.mark.parametrize("ty, cc, tol", [("fp16", 80, 1e-4), ("bf16", 80, 1e-4), ("fp32", 80, 0.1)])
def test_tensor_cores(ty, cc, tol):  # fp32 on sm_80 is TF32
    src, sh = ptx(matmul, {"a": "*" + ty, "b": "*" + ty, "c": "*fp32"}, {"M": 32, "N": 32, "K": 64}, cc)
    assert "mma.sync" in src
    g = np.random.default_rng(0)
    a, b = g.standard_normal((32, 64), dtype=np.float32), g.standard_normal((64, 32), dtype=np.float32)
    if ty == "bf16":
        a, b = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b)]
    elif ty == "fp16":
        a, b = a.astype(np.float16), b.astype(np.float16)
    wide = (lambda x: (x.astype(np.uint32) << 16).view(np.float32).astype(float)) if ty == "bf16" else (lambda x: x.astype(float))
    for order in ORDERS:
        c = np.zeros((32, 32), np.float32)
        Kernel(src).launch((1, 1, 1), (128, 1, 1), [a, b, c], sh, order=order)
        np.testing.assert_allclose(c, wide(a) @ wide(b), atol=tol)
