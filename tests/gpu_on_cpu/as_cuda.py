"""CPU tensors treated as a GPU's: memcore's operators go to what is registered at key CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memcore import _backend
from paths import standing_in_for_a_gpu

__all__ = ["as_cuda"]

CUDA = torch._C.DispatchKey.CUDA


class _Mode(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "memcore" and torch._C._dispatch_has_kernel_for_dispatch_key(func._schema.name, CUDA.name):
            self.calls.append(func._schema.name.removeprefix("memcore::"))
            return func.redispatch(torch._C.DispatchKeySet(CUDA), *args)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_cuda(backend: str = "auto") -> Iterator[list[str]]:
    """Inside, memcore.functional sees a GPU and `backend` is asked for; yields the names of the operators that were called."""
    takes = _backend.takes_kernel
    _backend.takes_kernel = lambda op, device: takes(op, torch.device("cuda", 0))
    try:
        with _backend.backend(backend), standing_in_for_a_gpu(), _Mode() as mode:
            yield mode.calls
    finally:
        _backend.takes_kernel = takes
