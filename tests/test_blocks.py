"""Blocks of memory that large CPU tensors give back and the next ones take (csrc/blocks.h): nothing alive is ever overwritten, what is kept has a
limit, and the tensors are like others."""

import pickle
import random
import sys
import threading

import pytest
import torch

import memcore
from memcore import _backend
from memcore.functional import content_addressing, erase_add_write, read
from test_packaging import python

blocks = torch.ops.memcore
MIB = 1 << 20
pytestmark = [
    pytest.mark.skipif(_backend.native is None, reason="the native library is not built"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="blocks are Linux's"),
]


@pytest.fixture(autouse=True)
def as_users_have_it():
    """Outputs from blocks, none of them kept at first."""
    limit = blocks._block_limit()
    if limit == 0:
        pytest.skip("nothing is kept: MEMCORE_CACHE_MB=0, or a build for AddressSanitizer, which watches every array by itself")
    before = blocks._set_allocate_by_aten(False)
    memcore.empty_cache()
    yield
    blocks._limit_blocks(limit)
    memcore.empty_cache()
    blocks._set_allocate_by_aten(before)


def write(B=1, N=1024, W=512, dtype=torch.float32, fill=1.0):
    """A memory of B x N x W numbers `fill`, written by the operator: 2 MiB by default."""
    return erase_add_write(torch.full((B, N, W), fill, dtype=dtype), torch.zeros(B, 1, N, dtype=dtype), *torch.zeros(2, B, 1, W, dtype=dtype))


def test_a_block_given_back_is_taken_again():
    first = write()
    at = first.data_ptr()
    assert at % (2 * MIB) == 0  # a huge page
    view = first[0, 5]
    del first
    second = write(fill=2.0)
    assert second.data_ptr() != at and view.eq(1).all()  # the view holds it
    del view
    assert blocks._kept_blocks() == 2 * MIB
    third = write(fill=3.0)
    assert third.data_ptr() == at and third.eq(3).all() and second.eq(2).all()
    assert blocks._kept_blocks() == 0


def test_sizes_of_a_step_share_blocks_and_others_do_not():
    at = write(N=1000).data_ptr()
    assert write(N=1023).data_ptr() == at  # both in eighths of a MiB
    assert write(N=1025).data_ptr() != at
    assert write(N=1000, W=1024, dtype=torch.bfloat16).data_ptr() == at


def test_small_tensors_have_none():
    write(N=511)
    assert blocks._kept_blocks() == 0


def test_the_backward_takes_blocks_too():
    memory, weights = torch.randn(2, 4096, 64, requires_grad=True), torch.randn(2, 1, 4096).softmax(-1).requires_grad_()
    for _ in range(2):
        (found,) = torch.autograd.grad(read(memory, weights).sum(), memory)
        at = found.data_ptr()
        assert torch.allclose(found, weights.mT.expand_as(memory))
        del found
    assert at == torch.autograd.grad(read(memory, weights).sum(), memory)[0].data_ptr()


def test_scratch_takes_blocks():
    """An element of a million slots needs more than a MiB of it."""
    key, memory = torch.randn(1, 1, 4), torch.randn(1, 1 << 20, 4)
    content_addressing(key, memory)
    kept = blocks._kept_blocks()
    assert kept > 8 * MIB
    content_addressing(key, memory)
    assert blocks._kept_blocks() == kept


def test_what_is_kept_has_a_limit():
    blocks._limit_blocks(5 * MIB)
    held = [write(fill=float(i)) for i in range(4)]
    at = [t.data_ptr() for t in held]
    while held:
        held.pop(0)
    assert blocks._kept_blocks() == 4 * MIB
    again = [write(), write()]
    assert [t.data_ptr() for t in again] == [at[3], at[2]]  # the last ones given back
    del again
    write(N=4096)  # 8 MiB: more than may be kept
    assert blocks._kept_blocks() == 4 * MIB
    write(N=1536)  # 3 MiB push the first of two out
    assert blocks._kept_blocks() == 5 * MIB
    assert blocks._limit_blocks(0) == 5 * MIB and blocks._kept_blocks() == 0
    assert write().eq(1).all() and blocks._kept_blocks() == 0
    write().resize_(1 << 20)  # malloc's: one of a block could not grow


def test_empty_cache():
    held = write(fill=7.0)
    write()
    assert memcore.empty_cache() == 2 * MIB and memcore.empty_cache() == blocks._kept_blocks() == 0
    assert held.eq(7).all()


def test_nothing_alive_is_overwritten():
    """Threads that make tensors of a few sizes, keep them for a while and look whether they still hold what they were made of."""
    blocks._limit_blocks(12 * MIB)
    wrong = []

    def work(seed):
        draw, alive = random.Random(seed), []
        for i in range(150):
            fill = seed * 1000.0 + i
            alive.append((write(N=draw.choice((512, 1024, 1536)), fill=fill), fill))
            if len(alive) > 4 or draw.random() < 0.3:
                tensor, fill = alive.pop(draw.randrange(len(alive)))
                if not tensor.eq(fill).all():
                    wrong.append((seed, i))
        wrong.extend((seed, fill) for tensor, fill in alive if not tensor.eq(fill).all())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and blocks._kept_blocks() <= 12 * MIB


def test_tensors_are_like_others():
    t = write(N=1000)
    assert t.device == torch.device("cpu") and t.is_contiguous() and t.untyped_storage().nbytes() == 1000 * 512 * 4
    assert torch.equal(pickle.loads(pickle.dumps(t)), t)
    array = t.numpy()
    del t
    assert blocks._kept_blocks() == 0 and (array == 1).all()  # the array holds it
    shared = write().share_memory_()
    assert shared.is_shared() and shared.eq(1).all()
    small = write()
    small.resize_(3)
    assert small.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="not resizable"):
        small.resize_(1 << 20)


def test_a_forked_process_has_blocks_of_its_own():
    """Also when another thread of the parent's is busy with blocks as it forks."""
    code = """
import os, signal, threading, torch
from memcore.functional import erase_add_write
torch.set_num_threads(1)
def write(fill): return erase_add_write(torch.full((1, 1024, 512), fill), torch.zeros(1, 1, 1024), *torch.zeros(2, 1, 1, 512))
stop, held = False, write(5.0)
write(0.0)
def churn():
    while not stop: write(1.0)
threads = [threading.Thread(target=churn) for _ in range(2)]
for t in threads: t.start()
for i in range(30):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        fresh = torch.ops.memcore._kept_blocks() == 0
        mine = write(2.0)
        os._exit(0 if fresh and mine.eq(2).all() and held.eq(5).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
for t in threads: t.join()
assert held.eq(5).all()
print("all well")
"""
    assert python("-W", "ignore", "-c", code, OMP_NUM_THREADS="1").stdout == "all well\n"


def test_the_limit_from_the_environment():
    code = "import memcore, torch\nprint(torch.ops.memcore._block_limit())\ntorch.ops.memcore._cpu_isa()"
    assert python("-c", code, MEMCORE_CACHE_MB="3").stdout == f"{3 * MIB}\n"
    assert python("-c", code, MEMCORE_CACHE_MB="0").stdout == "0\n"
    for wrong in ("-1", "1GB"):
        said = python("-c", code, fails=True, MEMCORE_CACHE_MB=wrong).stderr
        assert f"RuntimeError: memcore: MEMCORE_CACHE_MB must be a whole number of MiB, 0 or more, got '{wrong}'" in said
