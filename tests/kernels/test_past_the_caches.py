"""Memories whose successor or gradient is stored past the caches, by rows (csrc/cpu/rows_stream.h): a batch of them beside its items alone, which are small
enough for the other forms of the kernels. Nothing may differ by a bit."""

import re
from pathlib import Path

import pytest
import torch

from memcore import functional
from memcore.kernels import _op
from paths import PATHS, use_path

# A batch past the caches, of items within them, of whole vectors: even and odd numbers of AVX2's, AVX-512's, the baseline's; blocks that end with one row,
# with 15; items that are gone over back and forth; rows of which a block has fewer than there may be heads.
F32, F64 = torch.float32, torch.float64
MAIN = [(20, 1009, 64, F32), (20, 1009, 56, F32), (20, 1009, 32, F64), (9, 1903, 64, F32)]
MORE = [(9, 2545, 48, F32), (9, 6001, 20, F32), (9, 401, 320, F32)]
SHAPES = [(H, *shape) for shape in MAIN for H in range(1, 7)] + [(H, *shape) for shape in MORE for H in (2, 5)]
STREAMED = int(re.search(r"kStreamBytes = (\d+) << 20", Path(__file__).parents[2].joinpath("csrc/cpu/rows.h").read_text())[1]) << 20


def draw(B, H, N, W, dtype):
    g = torch.Generator().manual_seed(H)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    usage = torch.rand(B, N, generator=g, dtype=dtype)
    least = [(0, 1, 7, 14, 15, 16, 300, N - 2, N - 1)[b % 9] for b in range(B)]  # at the ends of blocks, and within them
    usage[range(B), least] = -1
    return {
        "memory": normal(B, N, W), "key": normal(B, H, W), "strength": 1 + normal(B, H).abs(), "weights": normal(B, H, N).softmax(-1),
        "erase": normal(B, H, W).sigmoid(), "add": normal(B, H, W), "gate": normal(B, H).sigmoid(), "shift": normal(B, H, 3).softmax(-1),
        "gamma": 1 + normal(B, H).abs(), "usage": usage, "interface": normal(B, H * (W + 6) + 2 * W),
    }  # fmt: skip


def step(order):
    return lambda memory, interface, weights: functional.ntm_step(memory, interface, weights, read_heads=weights.shape[1] - 1, write_heads=1, order=order)


def lrua_write(zero):
    return lambda *args: functional.lrua_write(*args, zero=zero)


WRITTEN = "memory weights erase add"
CALLS = {
    "content_addressing": (functional.content_addressing, "key memory strength"),
    "ntm_addressing": (functional.ntm_addressing, "key memory strength gate shift gamma weights"),
    "read": (functional.read, "memory weights"),
    "erase_add_write": (functional.erase_add_write, WRITTEN),
    "lrua_write": (lrua_write("least_used"), "memory add weights usage gate"),
    "lrua_write, nothing zeroed": (lrua_write(None), "memory add weights usage gate"),
    "ntm_step": (step("write_read"), "memory interface weights"),
    "ntm_step, read first": (step("read_write"), "memory interface weights"),
}


def run(call, inputs, cotangents):
    """Outputs and gradients, in one list."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = call(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    found = torch.autograd.grad(out, inputs, cotangents[: len(out)], allow_unused=True)
    return [*out, *(g for g in found if g is not None)]


@pytest.mark.parametrize("path", [p for p in PATHS if p != "reference"])
@pytest.mark.parametrize("H, B, N, W, dtype", SHAPES)
@pytest.mark.parametrize("name", CALLS)
def test_an_item_of_a_batch_is_the_same_alone(name, H, B, N, W, dtype, path, monkeypatch):
    if name.startswith("ntm_step") and H == 1:
        pytest.skip("one head reads, one writes")
    call, names = CALLS[name]
    made = draw(B, H, N, W, dtype)
    inputs = [made[n] for n in names.split()]
    assert made["memory"].nbytes >= STREAMED > made["memory"][:1].nbytes
    for kept in (False, True) if name in ("content_addressing", "ntm_addressing", "ntm_step") else (False,):
        monkeypatch.setattr(_op, "keeps", lambda *_: kept)
        with use_path(path):
            out = call(*inputs)
            cotangents = [torch.randn_like(y) for y in (out if isinstance(out, tuple) else (out,))]
            whole = run(call, inputs, cotangents)
            for b in range(B):
                alone = run(call, [x[b : b + 1] for x in inputs], [c[b : b + 1] for c in cotangents])
                for one, all_ in zip(alone, whole, strict=True):
                    assert torch.equal(one[0], all_[b]), (b, one.shape)


@pytest.mark.parametrize("path", [p for p in PATHS if p != "reference"])
@pytest.mark.parametrize("name", [*CALLS, "knn_search", "knn_search, bf16 copy"])
def test_asking_for_rows_changes_no_bit(name, path):
    """Kernels ask for the rows that come next, or leave that to a processor which reads ahead: both, whatever this one does."""
    made = draw(9, 2, 1903, 64, F32)
    if name in CALLS:
        call, names = CALLS[name]
        inputs, found = [made[n] for n in names.split()], []
    else:
        keys = torch.cat([made["memory"].flatten(0, 1)] * 4)  # 17 MB, more than what is kept for the third cache
        cache = functional.knn_cache(keys, bf16=name.endswith("copy"))
        call, inputs, found = lambda query: functional.knn_search(query, keys, 9, cache=cache)[0], [made["key"][0, :1]], []
    with use_path(path):
        out = call(*inputs)
        cotangents = [torch.randn_like(y) for y in (out if isinstance(out, tuple) else (out,))]
        for does in (False, True):
            before = torch.ops.memcore._set_reads_ahead(does)
            try:
                found.append(run(call, inputs, cotangents))
            finally:
                torch.ops.memcore._set_reads_ahead(before)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", [p for p in PATHS if p != "reference"])
@pytest.mark.parametrize("H", range(1, 7))
@pytest.mark.parametrize("offset", (0, 1))
def test_in_place(H, offset, path):
    """Also where rows do not lie at whole vectors."""
    made = draw(20, H, 1009, 64, F32)
    memory, *rest = (made[n] for n in WRITTEN.split())
    memory = torch.cat([torch.zeros(offset), memory.flatten()])[offset:].view_as(memory)
    with use_path(path):
        wanted = functional.erase_add_write(memory, *rest)
        functional.erase_add_write_(memory, *rest)
    assert torch.equal(memory, wanted)
