"""The recurrence on a GPU: against float64, from a busy stream without waiting, in a CUDA graph; sizes that fit a block and one that does not."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpu_device import Graph, busy_stream, no_synchronisation, through

import memcore
from memcore import reference
from memcore.kernels.ntm_sequence import cuda

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))

from test_ntm_sequence import CASES, call, draw, gradients, ntm_sequence  # noqa: E402

BEYOND = {"N": 3000, "W": 64, "T": 3}  # steps of `ntm_step`


def on(device, drawn):
    tensors, flat, options = drawn
    move = lambda v: v.to(device) if isinstance(v, Tensor) else v  # noqa: E731
    return {k: move(v) for k, v in tensors.items()}, [move(t) for t in flat], {k: move(v) for k, v in options.items()}


@pytest.mark.parametrize("name", [*CASES, "beyond"])
def test_matches_float64(name, device):
    drawn = draw(**CASES.get(name, BEYOND))
    tensors, flat, options = drawn
    wide = {k: v.double() for k, v in tensors.items()}, [t.double() for t in flat], options
    with through("native", device):
        ys, grads = gradients(ntm_sequence, *on(device, drawn))
    expected, expected_grads = gradients(reference.ntm_sequence, *wide)
    for y, e in zip((*ys, *grads), (*expected, *expected_grads), strict=True):
        scale = max(1.0, e.abs().max().item() if e.numel() else 0)
        torch.testing.assert_close(y.cpu().double(), e, rtol=2e-4, atol=2e-4 * scale)


def test_where_it_runs(device):
    """A card of 2020 and later holds these."""
    if device == "cuda":
        sizes = cuda.Sizes(9, 100, 8, 128, 64, True, 1, 1, 1, 1)
        with through("native", device):
            assert cuda.fits(torch.empty(2, 128, 64, device=device), sizes)
            assert not cuda.fits(torch.empty(2, 3000, 64, device=device), sizes._replace(slots=3000))


def leaves_of(drawn, device):
    tensors, flat, options = on(device, drawn)
    return [t.requires_grad_() for t in (*tensors.values(), *flat)], list(tensors), options


def both(leaves, names, options):
    """Outputs and gradients, without a random number."""
    ys = call(ntm_sequence, dict(zip(names, leaves)), leaves[len(names) :], options)
    return [*(y.detach() for y in ys), *torch.autograd.grad(list(ys), leaves, [torch.ones_like(y) for y in ys])]


def test_no_wait_and_the_current_stream(device):
    leaves, names, options = leaves_of(draw(lengths=[5, 0, 3]), device)
    with through("native", device):
        wanted = both(leaves, names, options)
        with no_synchronisation(device):
            both(leaves, names, options)
        late = torch.full_like(leaves[0], torch.nan)
        with busy_stream(device):
            late.copy_(leaves[0].detach())
            found = both([late.requires_grad_(), *leaves[1:]], names, options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_graph_is_captured_and_replayed(device):
    leaves, names, options = leaves_of(draw(lengths=[5, 0, 3], layers=2), device)
    with through("native", device):
        graph = Graph(lambda: both(leaves, names, options), device)
        with torch.no_grad():
            leaves[0].mul_(0.5)
        wanted = both(leaves, names, options)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(graph.replay(), wanted, strict=True))


def test_a_model_beyond_a_block_trains_through_a_graph(device):
    """Steps of `ntm_step`, captured by torch.cuda.make_graphed_callables: one replay forward, one backward, on new inputs."""
    torch.manual_seed(0)
    model = memcore.NTM(5, 4, memory_slots=3000, slot_width=64, controller_size=16).to(device)
    x = torch.randn(6, 2, 5, device=device)

    def losses(net):
        found = []
        for turn in range(3):
            model.zero_grad(set_to_none=True)
            loss = net(x.roll(turn, 0))[0].square().mean()
            loss.backward()
            found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters())]
        return found

    with through("native", device):
        wanted = losses(model)
        graphed = torch.cuda.make_graphed_callables(model, (x,)) if device == "cuda" else model
        found = losses(graphed)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
