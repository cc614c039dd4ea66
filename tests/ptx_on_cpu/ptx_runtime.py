"""Functions of the generated code (ptx_code.py): PTX's arithmetic on NumPy vectors where NumPy's own operators differ."""

from __future__ import annotations

import numpy as np

__all__ = ["RUNTIME", "every", "fma", "from_bf16", "some", "to_bf16", "to_integer"]


def some(b) -> bool:
    """Whether any is true; NumPy's own any takes ten times as long on the few lanes of a block."""
    return b"\1" in b.tobytes()


def every(b) -> bool:
    return b"\0" not in b.tobytes()


def from_bf16(h):
    return (h.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(f, toward_zero=False):
    x = np.ascontiguousarray(f, np.float32).view(np.uint32)
    if toward_zero:
        r = x >> np.uint32(16)
    else:
        r = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(f), np.uint32(0x7FFF), r).astype(np.uint16)


def flush(x):
    """Subnormal numbers to zero."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def saturate(x):
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1)).astype(x.dtype)


def rounded(exact, kind, dtype):
    """A float64 result in `dtype`, rounded to nearest, down, up or towards zero."""
    r = exact.astype(dtype)
    if kind in ("rn", ""):
        return r
    back = r.astype(np.float64)
    down, up = np.nextafter(r, dtype(-np.inf)), np.nextafter(r, dtype(np.inf))
    if kind == "rm":
        return np.where(back > exact, down, r)
    if kind == "rp":
        return np.where(back < exact, up, r)
    return np.where(np.abs(back) > np.abs(exact), np.where(exact > 0, down, up), r)


def fma(a, b, c, kind="rn"):
    if a.dtype == np.float64:
        return a * b + c
    exact = np.add(np.multiply(a, b, dtype=np.float64), c, dtype=np.float64)
    return exact.astype(np.float32) if kind == "rn" else rounded(exact, kind, np.float32)


def add(a, b, kind):
    return a + b if kind in ("rn", "") or a.dtype == np.float64 else rounded(np.add(a, b, dtype=np.float64), kind, np.float32)


def mul(a, b, kind):
    return a * b if kind in ("rn", "") or a.dtype == np.float64 else rounded(np.multiply(a, b, dtype=np.float64), kind, np.float32)


def shift_left(a, n):
    bits = a.dtype.itemsize * 8
    k = np.minimum(n, bits - 1).astype(a.dtype)
    return np.where(n >= bits, a.dtype.type(0), a << k)


def shift_right(a, n):
    bits = a.dtype.itemsize * 8
    k = np.minimum(n, bits - 1).astype(a.dtype)
    return a >> k if a.dtype.kind == "i" else np.where(n >= bits, a.dtype.type(0), a >> k)


def divide(a, b):
    """Towards zero; x / 0 is all ones, as on a GPU."""
    if a.dtype.kind == "u":
        return np.where(b == 0, ~a.dtype.type(0), a // np.where(b == 0, b.dtype.type(1), b))
    safe = np.where(b == 0, b.dtype.type(1), b)
    q = a // safe
    q = q + ((q * safe != a) & ((a < 0) != (safe < 0))).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(-1), q)


def remainder(a, b):
    safe = np.where(b == 0, b.dtype.type(1), b)
    return np.where(b == 0, a, np.where(b == 0, a, a - divide(a, safe) * safe))


def high(a, b):
    """Upper half of the product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}").type
        return ((a.astype(wide) * np.asarray(b).astype(wide)) >> wide(bits)).astype(a.dtype)
    signed = a.dtype.kind == "i"
    x, y = a.view(np.uint64), np.broadcast_to(np.asarray(b), a.shape).astype(a.dtype).view(np.uint64)
    m32 = np.uint64(0xFFFFFFFF)
    s = np.uint64(32)
    xl, xh, yl, yh = x & m32, x >> s, y & m32, y >> s
    mid = (xl * yl >> s) + (xh * yl & m32) + (xl * yh & m32)
    r = xh * yh + (xh * yl >> s) + (xl * yh >> s) + (mid >> s)
    if signed:
        r = r - np.where(x >> np.uint64(63) != 0, y, np.uint64(0)) - np.where(y >> np.uint64(63) != 0, x, np.uint64(0))
    return r.view(a.dtype)


def extract(a, at, n):
    """bfe"""
    bits = a.dtype.itemsize * 8
    at, n = np.minimum(at & np.uint32(255), bits).astype(np.int64), np.minimum(n & np.uint32(255), bits).astype(np.int64)
    x = [int(v) & ((1 << bits) - 1) for v in a]
    at, n = np.broadcast_to(at, a.shape), np.broadcast_to(n, a.shape)
    out = []
    for v, p, k in zip(x, at.tolist(), n.tolist()):
        r = (v >> p) & ((1 << k) - 1)
        if a.dtype.kind == "i" and k:
            top = v >> min(p + k - 1, bits - 1) & 1
            if top:
                r |= ((1 << bits) - 1) & ~((1 << k) - 1)
        out.append(r)
    return np.array(out, f"u{a.dtype.itemsize}").view(a.dtype)


def insert(a, b, at, n):
    """bfi: the low n bits of a into b"""
    bits = b.dtype.itemsize * 8
    at, n = np.minimum(at & np.uint32(255), bits).astype(np.uint64), np.minimum(n & np.uint32(255), bits).astype(np.uint64)
    ones = np.where(n >= 64, np.uint64(2**64 - 1), (np.uint64(1) << np.minimum(n, np.uint64(63))) - np.uint64(1))
    shift = np.minimum(at, np.uint64(63))
    m = np.where(at >= bits, np.uint64(0), ones << shift)
    return ((b.astype(np.uint64) & ~m) | ((a.astype(np.uint64) << shift) & m)).astype(b.dtype)


def permute(a, b, sel):
    """prmt, default mode"""
    whole = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    sel = np.broadcast_to(np.asarray(sel), np.broadcast_shapes(np.shape(a), np.shape(b)))
    out = np.zeros(whole.shape, np.uint64)
    for k in range(4):
        s = (sel.astype(np.uint64) >> np.uint64(4 * k)) & np.uint64(15)
        byte = (whole >> ((s & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        byte = np.where(s & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        out |= byte << np.uint64(8 * k)
    return out.astype(np.uint32)


def logic3(a, b, c, table):
    r = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b), np.shape(c)), np.uint32)
    for k in range(8):
        if table >> k & 1:
            r |= (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
    return r


def funnel(lo, hi, n, left, clamp):
    n = np.asarray(n).astype(np.uint64)
    n = np.minimum(n, np.uint64(32)) if clamp else n & np.uint64(31)
    whole = lo.astype(np.uint64) | hi.astype(np.uint64) << np.uint64(32)
    r = (whole << n) >> np.uint64(32) if left else whole >> n
    return r.astype(np.uint32)


def bits_set(a):
    return np.bitwise_count(a).astype(np.uint32)


def leading_zeros(a):
    bits = a.dtype.itemsize * 8
    return np.array([bits - int(v).bit_length() for v in a.view(f"u{a.dtype.itemsize}")], np.uint32)


def reverse_bits(a):
    bits = a.dtype.itemsize * 8
    return np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in a], a.dtype)


def find_top(a, shift_amount):
    bits = a.dtype.itemsize * 8
    x = np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a
    n = np.array([int(v).bit_length() - 1 for v in x], np.int64)
    r = np.where(n < 0, 0xFFFFFFFF, bits - 1 - n if shift_amount else n)
    return r.astype(np.uint32)


def to_integer(a, kind, dtype):
    """Float to integer: rounded, clamped, NaN is 0."""
    x = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[kind](a.astype(np.float64))
    i = np.iinfo(dtype)
    inside = np.where((x > i.min) & (x < float(i.max)), x, 0.0).astype(dtype)
    return np.where(np.isnan(x), dtype(0), np.where(x >= float(i.max), i.max, np.where(x <= i.min, i.min, inside))).astype(dtype)


RUNTIME = {
    f.__name__: f
    for f in (
        from_bf16, to_bf16, flush, saturate, rounded, fma, add, mul, shift_left, shift_right, divide, remainder, high, extract, insert,
        permute, logic3, funnel, bits_set, leading_zeros, reverse_bits, find_top, to_integer,
    )
} | {"np": np, "where": np.where}  # fmt: skip
