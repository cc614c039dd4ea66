"""Parameters of the recurrences: weights as blocks of rows, and all of them as one vector."""

import pytest
import torch

import test_mann_sequence
import test_ntm_sequence
from memcore import backend, functional, reference
from memcore.functional import MANNParameters, NTMParameters
from memcore.kernels._parameters import vector
from memcore.kernels.mann_sequence import op as mann
from memcore.kernels.ntm_sequence import op as ntm
from paths import PATHS, use_path

KINDS = {"ntm_sequence": (test_ntm_sequence, NTMParameters), "mann_sequence": (test_mann_sequence, MANNParameters)}
each_operator = pytest.mark.parametrize("op", KINDS)


def in_blocks(kind, flat, cut):
    """(weights whole, weights in blocks of rows), of the same leaves."""
    pairs = list(zip(flat[::2], flat[1::2]))
    cut_up = [((w[:cut], w[cut:]) if cut else (w,), b) for w, b in pairs]
    return kind(pairs[:-2], pairs[-2], pairs[-1]), kind(cut_up[:-2], cut_up[-2], cut_up[-1])


@each_operator
@pytest.mark.parametrize("path", [*PATHS, "function"])
@pytest.mark.parametrize("cut", [0, 1, 4])
def test_blocks_of_rows_are_the_weight(op, path, cut):
    module, kind = KINDS[op]
    tensors, flat, options = module.draw(layers=2)
    flat = [t.requires_grad_() for t in flat]
    f = getattr(reference if path == "function" else functional, op)
    found = []
    with use_path(path) if path != "function" else backend("auto"):
        for parameters in in_blocks(kind, flat, cut):
            ys = f(*tensors.values(), parameters, **options)
            grads = torch.autograd.grad(sum(y.square().sum() for y in ys if y.requires_grad), flat)
            found.append((*(y.detach() for y in ys), *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@each_operator
def test_wrong_blocks(op):
    module, kind = KINDS[op]
    tensors, flat, options = module.draw()
    f = getattr(functional, op)
    pairs = list(zip(flat[::2], flat[1::2]))
    rows = len(flat[0])
    for blocks, got in (
        ((flat[0], flat[0]), rf"\({2 * rows}, {flat[0].shape[1]}\)"),
        ((flat[0][:2], flat[0][2:, :-1]), r"blocks of rows \[\(2, "),
        ((flat[0][0], flat[0][1:]), r"blocks of rows \[\("),
        ((), r"blocks of rows \[\]"),
    ):
        with pytest.raises(ValueError, match=rf"^memcore.{op}: weight of 'parameters.layers\[0\]' must have shape \({rows}, .*, got {got}"):
            f(*tensors.values(), kind([(blocks, pairs[0][1])], pairs[-2], pairs[-1]), **options)
    with pytest.raises(TypeError, match=f"^memcore.{op}: 'parameters' must be a tensor, got int"):
        f(*tensors.values(), kind([((flat[0][:2], 3), pairs[0][1])], pairs[-2], pairs[-1]), **options)


def test_vector_is_differentiable_to_any_order():
    parts = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64, requires_grad=True)]
    parts.append(torch.randn(3, 2, dtype=torch.float64).t().requires_grad_())
    assert torch.equal(vector(parts), torch.cat([t.reshape(-1) for t in parts]))
    assert torch.autograd.gradcheck(lambda *x: vector(x).pow(3), parts)
    assert torch.autograd.gradgradcheck(lambda *x: vector(x).pow(3), parts)
    only = [parts[0].detach(), parts[1]]
    assert torch.equal(torch.autograd.grad(vector(only).sum(), parts[1])[0], torch.ones_like(parts[1]))


RAW = {"ntm_sequence": ntm, "mann_sequence": mann}


@pytest.mark.skipif(len(PATHS) < 2, reason="needs the native library")
@each_operator
@pytest.mark.parametrize("which", range(1, 5))
def test_the_kernel_itself_looks_at_shapes_and_types(op, which, monkeypatch):
    """What comes past the public function, with another size or type, would be read past its end."""
    module, kind = KINDS[op]
    tensors, flat, options = module.draw(B=2)
    pairs, right = list(zip(flat[::2], flat[1::2])), RAW[op]._fwd
    for more, change in ((" and another type", torch.Tensor.double), ("", lambda t: torch.cat((t, t), 1))):

        def wrong(*args, change=change):
            return right(*args[:which], change(args[which]), *args[which + 1 :])

        monkeypatch.setattr(RAW[op], "_fwd", wrong)
        with pytest.raises(RuntimeError, match=rf"^memcore.{op}: '\w+' must have shape \(.*\), type and device of the memory, got shape \(.*\){more}$"):
            getattr(functional, op)(*tensors.values(), kind(pairs[:-2], pairs[-2], pairs[-1]), **options)
