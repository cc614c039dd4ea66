"""NEC's read in plain PyTorch."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._op import no_autocast
from ..knn_search.reference import Neighbours, as_count

__all__ = ["KnnLookup", "knn_lookup"]


class KnnLookup(NamedTuple):
    """What `knn_lookup` returns: output [.., Q, V]; weights, indices and distances [.., Q, K]."""

    output: Tensor
    weights: Tensor
    indices: Tensor
    distances: Tensor


def _weights(found: Neighbours, kernel: str, delta: float) -> Tensor:
    """Kernels of the distances over their sum, 0 where the distance is not finite."""
    d = found.near.double() if found.near.device.type != "mps" else found.near
    nearest = torch.where(found.finite, d.detach(), torch.inf)[..., :1]  # a common factor of the kernels, which keeps them in range
    nearest = torch.where(nearest.isfinite(), nearest, 0)
    if kernel == "inverse_distance":
        k = (nearest + delta) / (d + delta)
    elif kernel == "softmax":
        k = torch.exp((nearest - d) / delta)
    else:
        k = torch.ones_like(d) + 0 * d  # requires a gradient where the others do
    k = torch.where(found.finite, k, 0)
    total = k.sum(-1, keepdim=True)
    return torch.where(found.lost, torch.nan, k / torch.where(total == 0, 1, total))


def knn_lookup(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    kernel: str = "inverse_distance",
    delta: float = 1e-3,
    metric: str = "l2",
    count: Tensor | int | None = None,
    sparse: bool = False,
) -> KnnLookup:
    """Weighted values of the k nearest keys; see memcore.functional.knn_lookup."""
    with no_autocast(query):
        found = Neighbours(query, keys, k, metric, as_count(count, keys), sparse)
        weights = _weights(found, kernel, delta)
        w = torch.where(found.lost, 0, weights)
        output = torch.where(found.lost, torch.nan, (w[..., None] * found.rows(values)).sum(-2))
        return KnnLookup(*(found.out(t) for t in (output, weights, found.indices, found.distances)))
