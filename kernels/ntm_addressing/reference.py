"""The NTM's addressing in plain PyTorch."""

from torch import Tensor

from .._op import accumulate
from ..circular_shift.reference import circular_shift
from ..content_addressing.reference import content_addressing
from ..interpolate.reference import interpolate
from ..sharpen.reference import sharpen

__all__ = ["ntm_addressing"]


def ntm_addressing(
    key: Tensor, memory: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, gamma: Tensor, previous: Tensor
) -> Tensor:
    """Content addressing, interpolation, circular shift, sharpening; see memcore.functional.ntm_addressing."""
    wide = [accumulate(t) for t in (key, memory, strength, gate, shift, gamma, previous)]
    k, m, beta, g, s, sharpness, w = wide
    content = content_addressing(k, m, beta)
    return sharpen(circular_shift(interpolate(content, w, g), s), sharpness).to(key.dtype)
