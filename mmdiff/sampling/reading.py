"""Reading a canvas: the forward pass, its guidance branches, and the memory of a cache policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.nn.store import LogitStore, take
from mmdiff.sampling.caches import Cache
from mmdiff.sampling.canvas import Backbone, Canvas
from mmdiff.sampling.guidance import Guidance
from mmdiff.sampling.ledger import Row
from mmdiff.sampling.trace import Drift, Pass

__all__ = ["Reader"]


class Reader:
    """Reads rows of a run.

    Args:
        backbone: The network.
        guidance: Default none.
        cache: Default none: every pass computes all slots.
        canvas: All rows, before the first pass.
        numbers: Int64 [B, T]; block numbers.

    Raises:
        ConfigError: A cache for a network without stored keys and values.
    """

    def __init__(
        self,
        backbone: Backbone,
        guidance: Guidance | None,
        cache: Cache | None,
        canvas: Canvas,
        numbers: Int[Tensor, "B T"],
    ) -> None:
        self.backbone, self.guidance, self.cache = backbone, guidance, cache
        self._numbers = numbers.masked_fill(~canvas.valid, -1)
        self._passes = 0
        self._window: tuple[tuple[int, int], ...] = ()
        self._index = torch.empty(0, 0, dtype=torch.long)
        views = [canvas] if guidance is None else guidance.branches(canvas, 0)
        self.branches = len(views)
        if cache is None:
            return
        layers = getattr(backbone, "layers", 0)
        if not layers:
            raise ConfigError(f"{type(backbone).__name__} keeps no keys and values: decode it without a cache")
        self._held = list(range(len(canvas)))
        self._store = cache.open(layers, torch.cat([v.valid for v in views]), canvas.start)
        blocks = torch.arange(max(1, int(numbers.max()) + 1), device=numbers.device)
        # Widths of all windows, read once, so that no pass has to wait for the device to say how wide it is.
        self._spans = torch.stack([cache.slots(self._numbers, b.view(1, 1)).sum(1) for b in blocks]).tolist()

    def group(self, rows: Sequence[Row]) -> tuple[list[Row], bool]:
        """Rows that share the next pass, and whether it takes all their slots through the network.

        The row that has done the fewest passes goes, with all that can go together with it.
        """
        if self.cache is None:
            return list(rows), True
        full = self.cache.full(min(rows, key=lambda r: r.passes))
        return [r for r in rows if self.cache.full(r) == full], full

    def keep(self, numbers: Sequence[int]) -> None:
        """Forget all rows of the batch but ``numbers``."""
        if self.cache is not None:
            self._store.keep(self._places(numbers, self._numbers.device))
            self._held = list(numbers)

    def read(
        self, canvas: Canvas, rows: Sequence[Row], full: bool, index: Int[Tensor, "B q"], open_: Bool[Tensor, "B q"]
    ) -> tuple[Float[Tensor, "B q V"], Pass, Drift | None]:
        """Logits at the slots ``index`` of ``canvas`` (the rows of this pass), what it cost, and the drift if watched.

        Args:
            canvas: The b rows of this pass.
            rows: Their books.
            full: What `group` said.
            index: Int64 [B, q].
            open_: Bool [B, q]; slots among ``index`` whose logits matter, for the drift.
        """
        options = self._options(canvas, rows, full, index.device)
        logits = self._forward(canvas, rows, index, options)
        slots, compute = canvas.tokens.shape[1], options.get("compute")
        computed = slots if compute is None else compute.shape[1]
        cost = Pass(
            rows=len(rows) * self.branches,
            computed=computed,
            slots=slots,
            read=computed if isinstance(options.get("store"), LogitStore) else index.shape[1],
        )
        self._passes += 1
        watched = self.cache is not None and self.cache.watch and (self._passes - 1) % self.cache.watch == 0
        drift = Drift.between(logits, self._forward(canvas, rows, index, {}), open_) if watched else None
        return logits, cost, drift

    def _options(self, canvas: Canvas, rows: Sequence[Row], full: bool, device: torch.device) -> dict[str, Any]:
        """The memory of these rows, and the slots of every branch that are computed."""
        if self.cache is None:
            return {}
        self.cache.prepare(self._store, rows[0])
        here = [r.number for r in rows]
        store = self._store if here == self._held else self._store.view(self._places(here, device))
        if full:
            return {"store": store, "compute": None}
        if isinstance(store, LogitStore):
            return {"store": store, "compute": store.least()}
        return {"store": store, "compute": self._compute(canvas, rows).repeat(self.branches, 1)}

    def _forward(self, canvas: Canvas, rows: Sequence[Row], index: Tensor, options: dict[str, Any]) -> Tensor:
        if self.guidance is None:
            return self._logits(canvas, index, options)
        views = self.guidance.branches(canvas, self.backbone.null_id)
        tall = views[0]
        for view in views[1:]:
            tall = tall.stack(view)
        logits = self._logits(tall, index.repeat(len(views), 1), options)
        now = self.guidance.at(rows) if hasattr(self.guidance, "at") else self.guidance
        return now.combine(logits.chunk(len(views)))

    def _logits(self, canvas: Canvas, index: Int[Tensor, "B q"], options: dict[str, Any]) -> Float[Tensor, "B q V"]:
        """Logits at ``index``, from the memory where it holds logits."""
        store = options.get("store")
        if not isinstance(store, LogitStore):
            return self.backbone.forward(canvas, index, **options)
        everything = torch.arange(canvas.tokens.shape[1], device=index.device).expand_as(canvas.tokens)
        computed = options["compute"]
        fresh = self.backbone.forward(canvas, everything if computed is None else computed, **options)
        return take(store.remember(computed, fresh), index)

    def _compute(self, canvas: Canvas, rows: Sequence[Row]) -> Int[Tensor, "B q"]:
        """Slots that go through the network, the same number in each row: short rows repeat their first."""
        window = tuple((r.number, r.block) for r in rows)
        if self._window != window:
            assert self.cache is not None
            here, current = (torch.tensor(x, device=canvas.tokens.device) for x in zip(*window, strict=True))
            member = self.cache.slots(self._numbers[here], current[:, None])
            width = max(self._spans[block][number] for number, block in window)
            index = member.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
            self._window, self._index = window, torch.where(member.gather(1, index), index, index[:, :1])
        return self._index

    def _places(self, numbers: Sequence[int], device: torch.device) -> Int[Tensor, "n"]:
        """Rows of the store, branch by branch."""
        at = {number: place for place, number in enumerate(self._held)}
        count = len(self._held)
        places = [branch * count + at[n] for branch in range(self.branches) for n in numbers]
        return torch.tensor(places, device=device)
