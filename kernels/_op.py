"""Registration: one call makes an operator and its backward known to dispatcher, autograd, compiler and export.

An operator is a pair `memcore::<name>_fwd` and `memcore::<name>_bwd`. The reference is the kernel of both on every
device (the backward by differentiating it); the native library replaces it where it has kernels, and on GPUs `_cuda` chooses
between the native library's and Triton's. The derivative of the backward goes through the reference, so every operator can be
differentiated to any order.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _cuda

__all__ = ["accumulate", "keeps", "library", "no_autocast", "register", "register_keeping", "similar_numbers"]

KEPT_FROM = 1 << 17
"""Numbers of a memory from which on its similarities are kept for a backward: below, handling one more tensor costs more than it saves."""

library = torch.library.Library("memcore", "DEF")


def accumulate(t: Tensor) -> Tensor:
    """`t` in the dtype sums are taken in: float32, or wider if it is wider."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) else t


def no_autocast(t: Tensor) -> AbstractContextManager:
    """Keeps autocast out; meta tensors have none."""
    return nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)


@dataclass(frozen=True)
class _Argument:
    type: str
    name: str

    @property
    def tensor(self) -> bool:
        return self.type.startswith("Tensor")


def _parse(schema: str) -> list[_Argument]:
    return [_Argument(*part.split()) for part in schema.split(", ")]


def _tuple(x: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else tuple(x)


def _track(t: Tensor | None, wanted: bool) -> Tensor | None:
    """A view that can be differentiated: part of the outer graph when there is one, a fresh leaf otherwise."""
    if t is None or not wanted:
        return t
    if torch.is_grad_enabled() and t.requires_grad:
        return t.view_as(t)
    return t.detach().requires_grad_()


def _autograd_on() -> torch._C._ForceDispatchKeyGuard:
    """Lets plain PyTorch record a graph inside a kernel, which the dispatcher calls with autograd switched off."""
    off = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        off = off.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), off)


def _fresh(t: Tensor) -> Tensor:
    """A contiguous copy that aliases nothing, as registered kernels must return."""
    return torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t)


def register(
    name: str,
    inputs: str,
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    fake: Callable[..., Tensor | tuple[Tensor, ...]],
    *,
    outputs: int = 1,
    saved: int = 0,
    gpu: bool = True,
    differentiable: Sequence[str] = (),
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Define `memcore::<name>_fwd` and, if anything is differentiable, `memcore::<name>_bwd`.

    Args:
        name: the operator's public name.
        inputs: its schema, tensors first ("Tensor memory, Tensor? mask, int heads").
        reference: plain PyTorch on exactly these arguments.
        fake: shape function on exactly these arguments.
        outputs: how many tensors the forward returns.
        saved: how many more it returns, behind them, for the backward alone; the backward takes them between gradients and inputs. The
            reference has none of them and leaves them empty.
        gpu: whether GPUs have kernels of it.
        differentiable: input names that get a gradient. The backward's schema is (gradients of the outputs, each may
            be None, then the inputs) -> one gradient for each of these, empty for a None input. Nothing but the inputs and `saved`
            is kept.

    Returns:
        A function that calls the operator and returns its `outputs`. Eager autograd takes a short way (`_eager`): the registered formula costs several
        layers of Python more on every call, and serves the compiler, export and direct users of torch.ops.memcore.
    """
    args = _parse(inputs)
    diff = [i for i, a in enumerate(args) if a.name in differentiable]
    results = outputs + saved
    returns = "Tensor" if results == 1 else "(" + ", ".join(["Tensor"] * results) + ")"
    library.define(f"{name}_fwd({inputs}) -> {returns}")

    def forward(*xs):
        with torch.no_grad():
            out = tuple(_fresh(y) for y in _tuple(reference(*xs)))
        out += tuple(out[0].new_empty(0) for _ in range(saved))
        return out[0] if results == 1 else out

    library.impl(f"{name}_fwd", forward, "CompositeExplicitAutograd")
    if gpu:
        _cuda.implement(library, f"{name}_fwd", inputs, returns, forward)

    def shapes(*xs):
        out = fake(*xs)
        if saved and out[0].device.type == "cpu" and not torch._C._dispatch_has_kernel_for_dispatch_key(f"memcore::{name}_fwd", "CPU"):
            out = (*out[:outputs], *(out[0].new_empty(0) for _ in range(saved)))  # the reference runs
        return out

    torch.library.register_fake(f"memcore::{name}_fwd", shapes, lib=library)
    fwd = getattr(torch.ops.memcore, f"{name}_fwd").default
    if not diff:
        return fwd

    grads = ", ".join([f"Tensor? grad_{i}" for i in range(outputs)] + [f"Tensor saved_{i}" for i in range(saved)])
    one = len(diff) == 1
    returns = "Tensor" if one else "(" + ", ".join(["Tensor"] * len(diff)) + ")"
    library.define(f"{name}_bwd({grads}, {inputs}) -> {returns}")

    def vjp(gs, xs, create_graph):
        """Gradients of the tracked inputs xs[diff] from output gradients gs, through the reference."""
        ys = _tuple(reference(*xs))
        used = [(y, g) for y, g in zip(ys, gs) if g is not None and y.requires_grad]
        wrt = [xs[i] for i in diff if xs[i] is not None]
        if not used:
            return [torch.zeros_like(x) for x in wrt]
        return torch.autograd.grad(
            [y for y, _ in used], wrt, [g for _, g in used], create_graph=create_graph, allow_unused=True, materialize_grads=True
        )

    def spread(found, xs):
        """One entry for each differentiable input: its gradient, or an empty tensor where the input is None."""
        found = iter(found)
        some = next(x for x in xs if x is not None)
        return [some.new_empty(0) if xs[i] is None else next(found) for i in diff]

    def backward(*flat):
        gs, xs = flat[:outputs], list(flat[results:])
        tracked = list(xs)
        with _autograd_on(), torch.enable_grad():
            for i in diff:
                tracked[i] = None if xs[i] is None else xs[i].detach().requires_grad_()
            out = spread(vjp(gs, tracked, False), xs)
        out = tuple(_fresh(y.detach()) for y in out)
        return out[0] if one else out

    def fake_backward(*flat):
        xs = flat[results:]
        some = next(x for x in xs if x is not None)
        out = tuple(some.new_empty(0) if xs[i] is None else some.new_empty(xs[i].shape) for i in diff)
        return out[0] if one else out

    library.impl(f"{name}_bwd", backward, "CompositeExplicitAutograd")
    if gpu:
        _cuda.implement(library, f"{name}_bwd", f"{grads}, {inputs}", returns, backward)
    torch.library.register_fake(f"memcore::{name}_bwd", fake_backward, lib=library)
    bwd = getattr(torch.ops.memcore, f"{name}_bwd").default

    tensors = [i for i, a in enumerate(args) if a.tensor]
    n_tensors = len(tensors)
    if tensors != list(range(n_tensors)):
        raise ValueError(f"{name}: tensor arguments come first")
    n_rest = len(args) - n_tensors
    tail_grads = (None,) * n_rest

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:n_tensors], *(output[outputs:] if saved else ()))
        ctx.rest = inputs[n_tensors:]
        ctx.set_materialize_grads(False)

    def call_backward(ctx, *gs):
        kept = ctx.saved_tensors
        found = bwd(*gs[:outputs], *kept[n_tensors:], *kept[:n_tensors], *ctx.rest)
        grads = [None] * n_tensors
        for i, g in zip(diff, (found,) if one else found):
            if kept[i] is not None:
                grads[i] = g
        return (*grads, *tail_grads)

    torch.library.register_autograd(f"memcore::{name}_fwd", call_backward, setup_context=setup, lib=library)

    def setup_bwd(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:outputs], *inputs[results : results + n_tensors])
        ctx.rest = inputs[results + n_tensors :]
        ctx.set_materialize_grads(False)

    def backward_of_backward(ctx, *ggs):
        outer = torch.is_grad_enabled()
        kept = ctx.saved_tensors
        gs = [_track(g, True) for g in kept[:outputs]]
        xs = [_track(x, i in diff) for i, x in enumerate(kept[outputs:])]
        with torch.enable_grad():
            found = spread(vjp(gs, [*xs, *ctx.rest], True), xs)
            used = [(f, g) for f, g, i in zip(found, ggs, diff) if g is not None and xs[i] is not None and f.requires_grad]
            wrt = [t for t in gs if t is not None] + [xs[i] for i in diff if xs[i] is not None]
            if used:
                second = iter(
                    torch.autograd.grad(
                        [f for f, _ in used], wrt, [g for _, g in used],
                        create_graph=outer, allow_unused=True, materialize_grads=True,
                    )
                )
            else:
                second = iter([torch.zeros_like(t) for t in wrt])
        result = [None if g is None else next(second) for g in gs]
        dx = [None] * n_tensors
        for i in diff:
            if xs[i] is not None:
                dx[i] = next(second)
        return (*result, *(None,) * saved, *dx, *tail_grads)

    torch.library.register_autograd(f"memcore::{name}_bwd", backward_of_backward, setup_context=setup_bwd, lib=library)
    every = len(diff) == n_tensors and all(a.type == "Tensor" for a in args[:n_tensors])
    return _eager(name, fwd, bwd, n_tensors, n_rest, outputs if saved else None, diff, every)


def _eager(
    name: str, fwd: Callable, bwd: Callable, n_tensors: int, n_rest: int, outputs: int | None, diff: list[int], every: bool
) -> Callable:
    """Calls `fwd`; where a gradient is wanted outside the compiler, through an autograd.Function around the bare kernels."""
    below_autograd = torch._C._AutoDispatchBelowAutograd
    tail = (None,) * n_rest

    def forward(ctx, *args):
        ctx.rest = args[n_tensors:]
        ctx.set_materialize_grads(False)
        with below_autograd():
            out = fwd(*args)
        if outputs is None:
            ctx.save_for_backward(*args[:n_tensors])
            return out
        ctx.save_for_backward(*args[:n_tensors], *out[outputs:])
        return cut(out)

    def backward(ctx, *gs):
        saved = ctx.saved_tensors
        if outputs is not None:
            gs, saved = (*gs, *saved[n_tensors:]), saved[:n_tensors]
        if torch.is_grad_enabled():  # a second derivative is wanted
            found = bwd(*gs, *saved, *ctx.rest)
        else:
            with below_autograd():
                found = bwd(*gs, *saved, *ctx.rest)
        if isinstance(found, Tensor):
            found = (found,)
        if every:  # every tensor argument is differentiable and present
            return (*found, *tail)
        grads = [None] * n_tensors
        for i, g in zip(diff, found):
            if saved[i] is not None:
                grads[i] = g
        return (*grads, *tail)

    function = type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})
    apply = super(torch.autograd.Function, function).apply  # the bare one: Function.apply minds torch.func, which never comes here

    def cut(out):
        return out if outputs is None else out[0] if outputs == 1 else out[:outputs]

    def call(*args):
        if torch.compiler.is_compiling():
            return cut(fwd(*args))
        if torch.is_grad_enabled():
            for t in args[:n_tensors]:
                if t is not None and t.requires_grad:
                    return apply(*args)
        with below_autograd():
            return cut(fwd(*args))

    return call


def keeps(memory: Tensor, heads: int, *others: Tensor | None) -> bool:
    """Whether a forward on the CPU should keep the similarities of so many heads for its backward: one is wanted, and they take at most an eighth of
    the memory [B, N, W]."""
    # An exported program is for sizes and devices that are not known yet; whatever it was exported with must not decide.
    if memory.dim() != 3 or not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return False
    if memory.numel() < KEPT_FROM or memory.device.type != "cpu":
        return False
    if not memory.requires_grad and not any(t is not None and t.requires_grad for t in others):
        return False
    size = memory.element_size()
    return 8 * similar_numbers(heads, memory.shape[1]) * max(size, 4) <= memory.shape[1] * memory.shape[2] * size


def similar_numbers(heads: int, slots: int) -> int:
    """Of an element, as csrc/cpu/kept.h counts them."""
    return 16 + (heads + 1) * ((slots + 15) // 16 * 16)


def register_keeping(
    name: str, inputs: str, reference: Callable, fake: Callable, sizes: Callable[..., tuple[Tensor, int]], *, outputs: int = 1, differentiable: Sequence[str]
) -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """`register`, and again as `memcore::<name>_kept_fwd` and `_bwd`: the same operator, whose forward keeps the similarities and norms of rows as
    csrc/cpu/kept.h counts them, so that its backward need not read the memory for them. The function returned takes those where it `keeps`.

    Args:
        sizes: memory and heads of exactly these arguments.
    """

    def shapes(*args):
        memory, heads = sizes(*args)
        numbers = memory.shape[0] * similar_numbers(heads, memory.shape[1])
        return *_tuple(fake(*args)), memory.new_empty(numbers, dtype=torch.float64 if memory.dtype == torch.float64 else torch.float32)

    plain = register(name, inputs, reference, fake, outputs=outputs, differentiable=differentiable)
    keeping = register(f"{name}_kept", inputs, reference, shapes, outputs=outputs, saved=1, gpu=False, differentiable=differentiable)
    n_tensors = sum(a.tensor for a in _parse(inputs))

    def call(*args):
        return (keeping if keeps(*sizes(*args), *args[:n_tensors]) else plain)(*args)

    return call
