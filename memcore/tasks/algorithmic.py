"""The five tasks of Graves, Wayne and Danihelka, "Neural Turing Machines" (2014), section 4."""

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import whole
from ._base import Batch, BitTask

__all__ = ["AssociativeRecall", "Copy", "DynamicNGrams", "PrioritySort", "RepeatCopy", "ngram_optimum"]


def _settings(ntm: tuple[int, int, int], feedforward: tuple[int, int], lstm: int, lr: float, lstm_lr: float) -> dict:
    """`defaults`: heads, width, layers of the LSTM controller; heads, width of the feed-forward one; LSTM width; rates."""
    memory = {"memory_slots": 128, "slot_width": 20}
    heads, width, layers = ntm
    paper = {"optimizer": "rmsprop", "decay": 0.95, "momentum": 0.9, "clip_value": 10.0, "batch_size": 1}
    return {
        "ntm": {
            **memory,
            "controller": "lstm",
            "controller_size": width,
            "controller_layers": layers,
            "read_heads": heads,
            "write_heads": heads,
        },
        "ntm-feedforward": {
            **memory,
            "controller": "feedforward",
            "controller_size": feedforward[1],
            "read_heads": feedforward[0],
            "write_heads": feedforward[0],
        },
        "lstm": {"hidden_size": lstm, "num_layers": 3},
        "paper": {**paper, "lr": lr, "lstm_lr": lstm_lr},
        "cpu": {"optimizer": "adam", "lr": 1e-3, "lstm_lr": 1e-3, "clip_norm": 50.0, "batch_size": 16},
    }


def _bits(*size: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(0, 2, size, generator=generator).float()


def _share(where: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"memcore.{where}: '{name}' must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"memcore.{where}: '{name}' must lie in 0..1, got {value}")
    return float(value)


def _sizes(
    fixed: int | None, least: int, most: int, batch_size: int, ragged: bool, generator: torch.Generator | None
) -> Tensor:
    """[B] sizes: `fixed`, else U{least..most}, drawn once for the batch or, if `ragged`, for each item."""
    if fixed is not None:
        return torch.full((batch_size,), fixed)
    return torch.randint(least, most + 1, (batch_size if ragged else 1,), generator=generator).expand(batch_size)


def _take(vectors: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """out[t, b] = vectors[index[t, b], b] where `valid`, else 0: [M, B, n] by [T, B] -> [T, B, n]."""
    index = index.clamp(0, vectors.shape[0] - 1).unsqueeze(-1).expand(-1, -1, vectors.shape[-1])
    return vectors.gather(0, index) * valid.unsqueeze(-1)


def _batch(channels: list[Tensor], target: Tensor, mask: Tensor, lengths: Tensor, ragged: bool) -> Batch:
    return Batch(torch.cat(channels, -1), target, mask.float(), lengths.clone() if ragged else None)


class Copy(BitTask):
    """T vectors of fair bits, a delimiter on its own channel, then zeros while the T vectors are due.

    Args:
        bits: width of a vector.
        min_length, max_length: T ~ U{min_length..max_length} in training.

    `sample` takes `length` (a fixed T) and `ragged` (a T for each item, padded, with `Batch.lengths`).
    """

    name = "copy"
    optimum = 0.0

    def __init__(self, bits: int = 8, min_length: int = 1, max_length: int = 20) -> None:
        whole("tasks.copy", "bits", bits, 1)
        whole("tasks.copy", "min_length", min_length, 1)
        whole("tasks.copy", "max_length", max_length, min_length)
        self.bits, self.min_length, self.max_length = bits, min_length, max_length
        self.input_size, self.output_size = bits + 1, bits
        self.guess = bits * (min_length + max_length) / 2
        self.defaults = _settings((1, 100, 1), (1, 100), 256, 1e-4, 3e-5)
        self.test_settings = {str(n): {"length": n} for n in (10, 20, 30, 40, 50, 80, 120)}

    def _draw(
        self, batch_size: int, generator: torch.Generator | None, length: int | None = None, ragged: bool = False
    ) -> Batch:
        if length is not None:
            whole("tasks.copy", "length", length, 1)
        n = _sizes(length, self.min_length, self.max_length, batch_size, ragged, generator)
        longest = int(n.max())
        vectors = _bits(longest, batch_size, self.bits, generator=generator)
        t = torch.arange(2 * longest + 1).unsqueeze(1)  # [T, 1]
        answer = t - n - 1
        mask = (answer >= 0) & (answer < n)
        channels = [_take(vectors, t.expand_as(mask), t < n), (t == n).float().unsqueeze(-1)]
        return _batch(channels, _take(vectors, answer, mask), mask, 2 * n + 1, ragged)


class RepeatCopy(BitTask):
    """T vectors of fair bits, then a count R on its own channel; due are the vectors R times, then an end marker.

    The count is normalised to mean 0 and variance 1 over 1..`max_repeats`. The end marker has its own output channel,
    0 while the copies are due; the bits are 0 in the step of the marker.

    Args:
        bits: width of a vector.
        max_length, max_repeats: T ~ U{1..max_length} and R ~ U{1..max_repeats} in training.
        blank: share of the vectors that training sets to zero. Fair bits make one vector of 256 look like the zeros that stand while
            the copies are due, too few to learn from; the test settings have fair bits alone.

    `sample` takes `length`, `repeats` (fixed T, R), `blank` and `ragged` (T and R for each item, padded, with `Batch.lengths`).
    """

    name = "repeat-copy"
    optimum = 0.0

    def __init__(self, bits: int = 8, max_length: int = 10, max_repeats: int = 10, blank: float = 0.0) -> None:
        whole("tasks.repeat-copy", "bits", bits, 1)
        whole("tasks.repeat-copy", "max_length", max_length, 1)
        whole("tasks.repeat-copy", "max_repeats", max_repeats, 2)
        self.bits, self.max_length, self.max_repeats = bits, max_length, max_repeats
        self.blank = _share("tasks.repeat-copy", "blank", blank)
        self.input_size, self.output_size = bits + 1, bits + 1
        self.guess = bits * (1 + max_length) / 2 * (1 + max_repeats) / 2
        self.defaults = _settings((1, 100, 1), (1, 100), 512, 1e-4, 3e-5)
        self.test_settings = {
            "in range": {"ragged": True, "blank": 0.0},  # a T and an R for each sequence
            **{f"T={n},R={r}": {"length": n, "repeats": r, "blank": 0.0} for n, r in ((10, 10), (20, 10), (10, 20))},
        }

    def _draw(
        self,
        batch_size: int,
        generator: torch.Generator | None,
        length: int | None = None,
        repeats: int | None = None,
        ragged: bool = False,
        blank: float | None = None,
    ) -> Batch:
        for option, value in (("length", length), ("repeats", repeats)):
            if value is not None:
                whole("tasks.repeat-copy", option, value, 1)
        blank = self.blank if blank is None else _share("tasks.repeat-copy", "blank", blank)
        n = _sizes(length, 1, self.max_length, batch_size, ragged, generator)
        r = _sizes(repeats, 1, self.max_repeats, batch_size, ragged, generator)
        vectors = _bits(int(n.max()), batch_size, self.bits, generator=generator)
        if blank > 0:
            vectors *= torch.rand(*vectors.shape[:2], 1, generator=generator) >= blank
        lengths = n + 1 + n * r + 1
        t = torch.arange(int(lengths.max())).unsqueeze(1)
        answer = t - n - 1
        copying = (answer >= 0) & (answer < n * r)
        end = answer == n * r
        count = (r - (self.max_repeats + 1) / 2) / ((self.max_repeats**2 - 1) / 12) ** 0.5
        target = torch.cat([_take(vectors, answer % n, copying), end.float().unsqueeze(-1)], -1)
        channels = [_take(vectors, t.expand_as(copying), t < n), ((t == n) * count).unsqueeze(-1)]
        return _batch(channels, target, copying | end, lengths, ragged)


class AssociativeRecall(BitTask):
    """K items of three vectors, a delimiter before each; one of them, not the last, as a query; the next item is due.

    Two delimiter channels follow the bits: one before each item, one before and after the query.

    Args:
        bits: width of a vector.
        vectors: vectors of an item.
        min_items, max_items: K ~ U{min_items..max_items} in training.

    `sample` takes `items` (a fixed K) and `ragged` (a K for each sequence, padded, with `Batch.lengths`).
    """

    name = "associative-recall"
    optimum = 0.0

    def __init__(self, bits: int = 6, vectors: int = 3, min_items: int = 2, max_items: int = 6) -> None:
        whole("tasks.associative-recall", "bits", bits, 1)
        whole("tasks.associative-recall", "vectors", vectors, 1)
        whole("tasks.associative-recall", "min_items", min_items, 2)
        whole("tasks.associative-recall", "max_items", max_items, min_items)
        self.bits, self.vectors, self.min_items, self.max_items = bits, vectors, min_items, max_items
        self.input_size, self.output_size = bits + 2, bits
        self.guess = float(bits * vectors)
        self.defaults = _settings((1, 100, 1), (4, 256), 256, 1e-4, 1e-4)
        self.test_settings = {str(k): {"items": k} for k in (6, 10, 12, 15, 20)}

    def _draw(
        self, batch_size: int, generator: torch.Generator | None, items: int | None = None, ragged: bool = False
    ) -> Batch:
        if items is not None:
            whole("tasks.associative-recall", "items", items, 2)
        k = _sizes(items, self.min_items, self.max_items, batch_size, ragged, generator)
        v = self.vectors
        vectors = _bits(int(k.max()) * v, batch_size, self.bits, generator=generator)
        query = (torch.rand(batch_size, generator=generator) * (k - 1)).long().minimum(k - 2)  # U{0..K-2}
        lengths = k * (v + 1) + (v + 2) + v
        t = torch.arange(int(lengths.max())).unsqueeze(1)
        asked = t - k * (v + 1)  # 0: delimiter, 1..v: query, v + 1: delimiter, then the answer
        answer = asked - (v + 2)
        item, place = t // (v + 1), t % (v + 1) - 1
        listing, asking = (asked < 0) & (place >= 0), (asked > 0) & (asked <= v)
        mask = (answer >= 0) & (answer < v)
        shown = torch.where(listing, item * v + place, query * v + asked - 1)
        item_delimiter = (asked < 0) & (place < 0)
        query_delimiter = (asked == 0) | (asked == v + 1)
        channels = [_take(vectors, shown, listing | asking), torch.stack([item_delimiter, query_delimiter], -1).float()]
        return _batch(channels, _take(vectors, (query + 1) * v + answer, mask), mask, lengths, ragged)


class DynamicNGrams(BitTask):
    """Predict each next bit of a sequence from a fresh 6-gram table.

    The table holds P(1) for each value of the last five bits, iid Beta(1/2, 1/2); the first five bits are fair. The
    input is the previous bit (0 at the first step), the target the bit of this step, due at every step: `optimum` is
    the expected cost of the best estimator (`ngram_optimum`) over the 195 predictable bits, plus the first five.

    Args:
        length: bits of a sequence, more than 5.
    """

    name = "dynamic-ngrams"
    context = 5

    def __init__(self, length: int = 200) -> None:
        whole("tasks.dynamic-ngrams", "length", length, self.context + 1)
        self.length = length
        self.input_size = self.output_size = 1
        self.optimum = 133.2 if length == 200 else None  # mean of 300,000 sequences, standard error 0.07
        self.guess = float(length)
        self.defaults = _settings((1, 100, 1), (1, 100), 128, 3e-5, 1e-4)
        self.test_settings = {str(length): {}}

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        k, contexts = self.context, 2**self.context
        # sin^2 of a uniform angle is Beta(1/2, 1/2)
        table = torch.rand(batch_size, contexts, generator=generator).mul_(torch.pi / 2).sin_().square_()
        first = torch.randint(0, contexts, (batch_size,), generator=generator)
        u = torch.rand(self.length - k, batch_size, 1, generator=generator)
        # maps[t]: the context after step t for each context before it; composed by doubling instead of step by step
        maps = (2 * torch.arange(contexts) + (u < table)) % contexts
        width = 1
        while width < len(maps):
            maps[width:] = maps[width:].gather(-1, maps[:-width])
            width *= 2
        after = maps.gather(-1, first.view(1, -1, 1).expand(len(maps), -1, 1))[..., 0]  # [T - k, B]
        head = (first >> torch.arange(k - 1, -1, -1).unsqueeze(1)) & 1
        target = torch.cat([head, after & 1]).float().unsqueeze(-1)
        previous = torch.cat([torch.zeros(1, batch_size, 1), target[:-1]])
        return Batch(previous, target, torch.ones(self.length, batch_size))

    def metrics(self, output: Tensor, batch: Batch) -> dict[str, float]:
        """Those of the other tasks, and `bits_over_optimum`: the excess over the best estimator on the same bits."""
        figures = super().metrics(output, batch)
        best = ngram_optimum(batch).mean().item() + self.context
        return {**figures, "bits_over_optimum": figures["bits"] - best}


def ngram_optimum(batch: Batch) -> Tensor:
    """Cost [B], in bits, of the best estimator on the predictable bits of a batch of `DynamicNGrams` (all but five).

    P(1) = (N1 + 1/2) / (N1 + N0 + 1), N0 and N1 the zeros and ones seen so far after the same five bits: the Bayesian
    estimate for the prior Beta(1/2, 1/2) (Graves et al. 2014, equation 10). The product of these over the visits of a
    context depends on its last counts alone, Gamma(N1 + 1/2) Gamma(N0 + 1/2) / (pi Gamma(N1 + N0 + 1)); in float64.
    """
    k, contexts = DynamicNGrams.context, 2**DynamicNGrams.context
    bits = batch.target[..., 0].long()  # [T, B]
    steps = len(bits) - k
    context = sum(bits[i : i + steps] << (k - 1 - i) for i in range(k))  # [T - k, B]
    ones = torch.zeros(contexts, bits.shape[1], dtype=torch.float64, device=bits.device)
    visits = ones.scatter_add(0, context, torch.ones_like(context, dtype=torch.float64))
    ones = ones.scatter_add(0, context, bits[k:].double())
    nats = torch.lgamma(visits + 1) + math.log(math.pi) - torch.lgamma(ones + 0.5) - torch.lgamma(visits - ones + 0.5)
    return nats.sum(0) / math.log(2)


class PrioritySort(BitTask):
    """Vectors of fair bits, each with a priority ~ U(-1, 1) on its own channel; due are those of highest priority, descending.

    Args:
        items: vectors given.
        answers: vectors due.
        bits: width of a vector.
    """

    name = "priority-sort"
    optimum = 0.0

    def __init__(self, items: int = 20, answers: int = 16, bits: int = 8) -> None:
        whole("tasks.priority-sort", "items", items, 1)
        whole("tasks.priority-sort", "answers", answers, 1)
        whole("tasks.priority-sort", "bits", bits, 1)
        if answers > items:
            raise ValueError(f"memcore.tasks.priority-sort: 'answers' must be at most 'items' ({items}), got {answers}")
        self.items, self.answers, self.bits = items, answers, bits
        self.input_size, self.output_size = bits + 1, bits
        self.guess = float(answers * bits)
        self.defaults = _settings((5, 100, 2), (8, 512), 128, 3e-5, 3e-5)
        self.test_settings = {str(items): {}}

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        vectors = _bits(self.items, batch_size, self.bits, generator=generator)
        priority = 2 * torch.rand(self.items, batch_size, generator=generator) - 1
        order = priority.argsort(dim=0, descending=True, stable=True)[: self.answers]
        answers = vectors.gather(0, order.unsqueeze(-1).expand(-1, -1, self.bits))
        given = torch.cat([vectors, priority.unsqueeze(-1)], -1)
        mask = torch.cat([torch.zeros(self.items, batch_size), torch.ones(self.answers, batch_size)])
        return Batch(
            torch.cat([given, torch.zeros(self.answers, batch_size, self.bits + 1)]),
            torch.cat([torch.zeros(self.items, batch_size, self.bits), answers]),
            mask,
        )


def small_priority_sort(**options: Any) -> PrioritySort:
    """Priority sort cut down to what two CPU cores can train: the 6 best of 8 vectors of 6 bits; 4 heads, width 128."""
    task = PrioritySort(**{"items": 8, "answers": 6, "bits": 6, **options})
    task.name = "priority-sort-small"
    task.defaults = _settings((4, 128, 1), (4, 128), 128, 3e-5, 3e-5)
    return task
