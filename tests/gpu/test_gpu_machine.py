"""How the operators live with the machine: streams, CUDA graphs, several devices, more than 2^31 elements, torch.compile, a model in training."""

import pytest
import torch
from torch import Tensor

import memcore
from cases import as_tuple, assert_close
from contract import expected, run
from gpu_device import BACKENDS, Graph, busy_stream, call, each_operator, moved, no_synchronisation, settled, through

F = memcore.functional


@each_operator
def test_the_current_stream_is_used(backend, case, device):
    """Inputs that a busy stream has yet to write: on any other stream the kernels would see NaN."""
    sample = case.samples[0]
    real = moved(case.inputs(sample, torch.float32), device)
    with through(backend, device):
        call(case, sample, real)  # compiled
        late = {k: torch.full_like(v, torch.nan) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in real.items()}
        settled(device)
        with busy_stream(device):
            for k, v in late.items():
                if isinstance(v, Tensor) and v is not real[k]:
                    v.copy_(real[k])
            found = call(case, sample, late)
        wanted = call(case, sample, real)
    for a, e in zip(found, wanted, strict=True):
        assert torch.equal(a, e)


@each_operator
def test_nothing_waits_for_the_gpu(backend, case, device):
    """No synchronisation, forward or backward."""
    sample = case.samples[0]
    x = moved(case.inputs(sample, torch.float32), device)
    leaves = [x[k].requires_grad_() for k in case.differentiable if x[k] is not None]

    def both():
        ys = [y for y in as_tuple(case.function(**x, **sample.options)) if y.requires_grad]
        return torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys], allow_unused=True)

    with through(backend, device):
        both()
        with no_synchronisation(device):
            both()


@pytest.mark.parametrize("sizes", [{}, {"N": 1000, "W": 64}], ids=["small", "tiles"])
@each_operator
def test_graphs_are_captured_and_replayed(backend, case, sizes, device):
    """Forward and backward in one graph; replayed on other inputs it gives what a call gives, bit for bit, every time."""
    sample = case.samples[0].resized(**(sizes if device == "cuda" else {}))
    first = moved(case.inputs(sample, torch.float32), device)
    x = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in first.items()}
    leaves = [x[k].requires_grad_() for k in case.differentiable if x[k] is not None]
    with torch.no_grad():
        cotangents = [torch.randn_like(y) for y in as_tuple(case.function(**x, **sample.options)) if y.is_floating_point()]

    def both():
        ys = as_tuple(case.function(**x, **sample.options))
        floats = [y for y in ys if y.is_floating_point()]
        return [*(y.detach() for y in ys), *torch.autograd.grad(floats, leaves, cotangents, allow_unused=True, materialize_grads=True)]

    with through(backend, device):
        graph = Graph(both, device)
        for turn in range(3):
            with torch.no_grad():
                for k, v in first.items():
                    if isinstance(v, Tensor) and v.is_floating_point():
                        x[k].copy_(v.roll(turn, 0))
            found = graph.replay()
            settled(device)
            for a, e in zip(found, both(), strict=True):
                assert torch.equal(a, e)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@each_operator
def test_the_second_device_while_the_first_is_current(backend, case):
    sample = case.samples[0]
    x = case.inputs(sample, torch.float32)
    with torch.cuda.device(0), memcore.backend(backend):
        found = call(case, sample, moved(x, "cuda:1"))
        assert torch.cuda.current_device() == 0
        wanted = call(case, sample, moved(x, "cuda:0"))
    for a, e in zip(found, wanted, strict=True):
        assert a.device.index == 1 and torch.equal(a.cpu(), e.cpu())


def room(bytes_: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < bytes_:
        pytest.skip(f"needs {bytes_ / 2**30:.0f} GiB of free GPU memory, there are {free / 2**30:.0f}")


@each_operator
def test_a_batch_of_more_than_2_31_elements(backend, case, device):
    """The same two elements over and over, until the largest tensor has passed 2^31: all repetitions come out alike, and right."""
    sample = case.samples[0].resized(N=1000, W=64)
    small = case.inputs(sample, torch.float16)
    largest = max(v[0].numel() for v in small.values() if isinstance(v, Tensor))
    times = 2**30 // largest + 1 if device == "cuda" else 3
    if device == "cuda":
        room(12 * 2 * 2 * times * largest)
    big = sample.resized(B=2 * times)
    x = {k: v.to(device).repeat(times, *[1] * (v.dim() - 1)) if isinstance(v, Tensor) else v for k, v in small.items()}
    leaves = {k: x[k].requires_grad_() for k in case.differentiable if x[k] is not None}
    wanted, wanted_grads = expected(case, sample, torch.float16)
    g = torch.Generator().manual_seed(1)
    draws = [torch.randn(y.shape, generator=g, dtype=torch.float64).half() if y.is_floating_point() else None for y in wanted]  # as contract.cotangents
    with through(backend, device):
        ys = as_tuple(case.function(**x, **big.options))
        pairs = [(y, d.to(device).repeat(times, *[1] * (d.dim() - 1))) for y, d in zip(ys, draws) if d is not None]
        grads = torch.autograd.grad([y for y, _ in pairs], list(leaves.values()), [d for _, d in pairs])
    settled(device)
    for what, y, e in [*((f"output {i}", *p) for i, p in enumerate(zip(ys, wanted))), *((k, d, wanted_grads[k]) for k, d in zip(leaves, grads))]:
        y = y.detach().reshape(times, 2, -1)
        assert_close(y[-1].cpu().view(e.shape), e, dtype=torch.float16, **case.tolerance(sample, small, backward=True), what=what)
        for part in y.split(256):
            assert torch.equal(part, y[-1:].expand_as(part)), f"{what}: repetitions differ"


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_memory_of_more_than_2_31_elements(backend, device):
    """A single memory [1, N, W]: its last slot is read, found, written, and gets its gradient."""
    W = 64
    N = 2**25 + 3 if device == "cuda" else 100
    if device == "cuda":
        room(8 * 2 * N * W)
    memory = torch.zeros(1, N, W, dtype=torch.float16, device=device)
    memory[..., 0] = 1
    word = torch.arange(W, device=device).sub(20).half()
    memory[0, -1] = word
    hot = torch.zeros(1, 1, N, dtype=torch.float16, device=device)
    hot[..., -1] = 1
    with through(backend, device):
        out = F.read(memory.requires_grad_(), hot)
        assert torch.equal(out[0, 0], word)
        (grad,) = torch.autograd.grad(out, memory, word[None, None])
        assert torch.equal(grad[0, -1], word) and grad[0, :-1].abs().max() == 0
        del grad, out
        memory.requires_grad_(False)
        weights = F.content_addressing(word[None, None], memory, torch.full((1, 1), 40.0, dtype=torch.float16, device=device))
        assert weights[0, 0].argmax() == N - 1 and weights[0, 0, -1] > 0.9
        del weights
        ones = torch.ones(1, 1, W, dtype=torch.float16, device=device)
        written = F.erase_add_write(memory, hot, ones, 3 * ones)
    assert (written[0, -1] == 3).all() and torch.equal(written[0, :-1], memory[0, :-1])


@pytest.mark.slow
@each_operator
def test_compile(backend, case, device):
    """torch.compile with its default compiler, in one graph."""
    sample = case.samples[0]
    x = moved(case.inputs(sample, torch.float32), device)
    torch._dynamo.reset()
    with through(backend, device):
        ys, grads = run(torch.compile(case.function, fullgraph=True), case, sample, x)
        wanted, wanted_grads = run(case.function, case, sample, x)
    for a, e in [*zip(ys, wanted, strict=True), *((grads[k], e) for k, e in wanted_grads.items())]:
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_a_model_trains_as_on_the_cpu(backend, device):
    """A few updates of an NTM on copy: losses as on the CPU, whatever the kernels."""
    from memcore.tasks import make

    task = make("copy")
    torch.manual_seed(0)
    model = memcore.NTM(task.input_size, task.output_size, memory_slots=32, slot_width=8, controller_size=20)
    start = {k: v.clone() for k, v in model.state_dict().items()}

    def losses(where):
        model.load_state_dict(start)
        net = model.to(where)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        found = []
        for i in range(5):
            batch = task.sample(4, generator=torch.Generator().manual_seed(i), length=5).to(where)
            optimizer.zero_grad()
            loss = task.loss(net(batch.input)[0], batch)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    wanted = losses("cpu")
    with through(backend, device):
        assert losses(device) == pytest.approx(wanted, rel=1e-3)
