"""Tasks that draw batches and score outputs: `make(name, **options)`."""

from collections.abc import Callable
from typing import Any

from ._base import Batch, Task, known_options
from .algorithmic import (
    AssociativeRecall,
    Copy,
    DynamicNGrams,
    PrioritySort,
    RepeatCopy,
    ngram_optimum,
    small_priority_sort,
)
from .catch import Catch
from .omniglot import OmniglotEpisodes

__all__ = [
    "AssociativeRecall",
    "Batch",
    "Catch",
    "Copy",
    "DynamicNGrams",
    "OmniglotEpisodes",
    "PrioritySort",
    "RepeatCopy",
    "Task",
    "make",
    "names",
    "ngram_optimum",
]

_TASKS: dict[str, tuple[Callable[..., Task], Callable]] = {  # name -> factory, whose parameters are the options
    "copy": (Copy, Copy),
    "repeat-copy": (RepeatCopy, RepeatCopy),
    "associative-recall": (AssociativeRecall, AssociativeRecall),
    "dynamic-ngrams": (DynamicNGrams, DynamicNGrams),
    "priority-sort": (PrioritySort, PrioritySort),
    "priority-sort-small": (small_priority_sort, PrioritySort),
    "omniglot": (OmniglotEpisodes, OmniglotEpisodes),
}


def names() -> list[str]:
    """The names that `make` knows."""
    return list(_TASKS)


def make(name: str, **options: Any) -> Task:
    """The task called `name`, with the options of its class.

    Raises:
        ValueError: for an unknown name or option, or an option out of range.
        memcore.data.DataNotFound, memcore.data.DataDamaged: for "omniglot" without its drawings.

    Example:
        >>> task = make("copy", max_length=10)
        >>> batch = task.sample(4, length=5)
        >>> batch.input.shape, batch.target.shape
        (torch.Size([11, 4, 9]), torch.Size([11, 4, 8]))
    """
    if name not in _TASKS:
        raise ValueError(f"memcore.tasks.make: unknown task {name!r}; known: {', '.join(_TASKS)}")
    factory, owner = _TASKS[name]
    known_options(f"tasks.{name}", "option", owner, options)
    return factory(**options)
