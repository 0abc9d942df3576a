"""What is the same for every process of a step: draws for all rows, lengths, numbers of summands, sums of losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.training.parallel.group import Group

__all__ = ["Tally", "drawn", "row_sources", "totals", "widened"]


def row_sources(seed: int, first: int, rows: int) -> list[torch.Generator]:
    """A generator for each of ``rows`` samples from number ``first`` of the run on."""
    return [rng.generator(seed, "objective", first + row) for row in range(rows)]


def drawn(objective: Any, model: nn.Module, batch: Batch, group: Group, generator: torch.Generator) -> Batch:
    """The batch with what an objective draws for all rows of a step at once; every process draws it all, and cuts."""
    together = getattr(objective, "together", None)
    if together is None:
        return batch
    rows = len(batch)
    fields = together(model, batch, rows * group.world, generator)
    own = {name: value[group.rank * rows : (group.rank + 1) * rows] for name, value in fields.items()}
    return replace(batch, **own)


def widened(batch: Batch, length: int, fill_id: int | None) -> Batch:
    """A batch whose rows were filled to its own longest, filled to the longest of all processes."""
    more = length - batch.ids.shape[1]
    if fill_id is None or more <= 0:
        return batch

    def wider(rows: Tensor, value: float) -> Tensor:
        return torch.cat([rows, rows.new_full((len(rows), more), value)], dim=1)

    return replace(
        batch,
        ids=wider(batch.ids, fill_id),
        labels=wider(batch.labels, fill_id),
        weights=wider(batch.weights, 1),
        droppable=wider(batch.droppable, False),
        valid=wider(batch.valid, True),
    )


def totals(
    objective: Any, model: nn.Module, parts: Sequence[Batch], sources: Sequence[rng.Source], group: Group
) -> dict[str, float]:
    """Numbers of summands of an objective's sums in the global batch; of rows, if it says nothing."""
    count = getattr(objective, "counts", lambda model, part, source: {"rows": float(len(part))})
    each = [count(model, part, source) for part, source in zip(parts, sources, strict=True)]
    names = sorted({name for counts in each for name in counts})
    return dict(zip(names, group.sum([sum(counts.get(n, 0.0) for counts in each) for n in names]), strict=True))


class Tally:
    """Adds up named sums over processes, each of which may know other names (the tasks of its rows).

    Args:
        group: The processes.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._names: list[str] = []

    def __call__(
        self, terms: Mapping[str, tuple[float, float]], others: Sequence[float]
    ) -> tuple[dict[str, tuple[float, float]], list[float]]:
        """Sums over all processes.

        Args:
            terms: Name -> (sum, number of summands).
            others: Further numbers, equally many everywhere.
        """
        if self._group.world == 1:
            return dict(terms), list(others)
        unknown = not set(terms) <= set(self._names)
        flat = [x for name in self._names for x in terms.get(name, (0.0, 0.0))]
        count, *summed = self._group.sum([float(unknown), *others, *flat])
        if count:
            self._names = sorted({*self._names, *(n for names in self._group.gather(sorted(terms)) for n in names)})
            return self(terms, others)
        values = summed[len(others) :]
        pairs = zip(self._names, values[::2], values[1::2], strict=True)
        return {name: (total, n) for name, total, n in pairs if n}, summed[: len(others)]
