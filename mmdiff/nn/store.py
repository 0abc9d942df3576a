"""Stored keys and values: the common form of every cache.

A `Store` holds T slots per row and layer. A pass computes some of them; the others are read as they were left.
`FeatureStore` keeps the outputs of every layer as well, so that a pass may reuse a layer's work slot by slot. Which
slots are computed in which pass is a cache policy's business (`mmdiff.sampling.caches`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

__all__ = ["FeatureStore", "LogitStore", "Store", "take"]


class Store:
    """Keys (rotated) and values of every layer for T slots per row. For inference: writes are in place.

    The tensors are allocated at the first write, in the dtype and on the device of what is written. A slot that was
    never written is not attended.

    Args:
        layers: Number of attention layers.
        batch: B rows.
        slots: T slots per row.

    Attributes:
        slots: T.
    """

    def __init__(self, layers: int, batch: int, slots: int) -> None:
        self.slots = slots
        self._rows: Tensor | None = None
        # Lists, so that views share what they hold.
        self._age = [torch.full((batch, slots), -1, dtype=torch.int32)]
        self._whole = [False]
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    @property
    def age(self) -> Int[Tensor, "B T"]:
        """Passes since each slot was computed; -1 = never."""
        return self._age[0] if self._rows is None else self._age[0][self._rows]

    @property
    def filled(self) -> Bool[Tensor, "B T"] | None:
        """Slots that were ever computed; None if that is known to be all of them."""
        return None if self._whole[0] else self.age >= 0

    def view(self, rows: Int[Tensor, "b"]) -> Store:
        """The same memory, some of its rows."""
        part = copy.copy(self)
        part._rows = rows
        return part

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Drop all other rows."""
        self._age[0] = self._age[0].to(rows.device)[rows]
        for held in (self._keys, self._values):
            held[:] = [None if x is None else x[rows] for x in held]

    def mark(self, index: Int[Tensor, "B q"] | None, device: torch.device) -> None:
        """Note that the slots ``index`` (None = all) are computed in this pass."""
        whole = self._age[0] = self._age[0].to(device)
        age = self.age
        age = torch.where(age >= 0, age + 1, age)
        age = torch.zeros_like(age) if index is None else age.scatter(1, index, 0)
        if self._rows is None:
            self._age[0], self._whole[0] = age, self._whole[0] or index is None
        else:
            whole[self._rows] = age

    def write(
        self, layer: int, index: Int[Tensor, "B q"] | None, k: Float[Tensor, "B q H K"], v: Float[Tensor, "B q H K"]
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T H K"]]:
        """Write the slots ``index`` (None = all T) of one layer; returns keys and values of all T slots."""
        return self._put(self._keys, layer, index, k), self._put(self._values, layer, index, v)

    def _put(self, held: list[Tensor | None], layer: int, index: Tensor | None, x: Tensor) -> Tensor:
        """Write rows of ``x`` [B, q, ...] into a tensor [B, T, ...] that is held for every layer."""
        if index is None and self._rows is None:
            held[layer] = x
            return x
        old = held[layer]
        if old is None:
            old = held[layer] = x.new_zeros(self._age[0].shape[0], self.slots, *x.shape[2:])
        if index is None:
            assert self._rows is not None
            old.index_copy_(0, self._rows, x)
            return x
        rows = torch.arange(len(x), device=x.device) if self._rows is None else self._rows
        place = (rows[:, None] * self.slots + index).flatten()
        old.view(-1, *x.shape[2:]).index_copy_(0, place, x.flatten(0, 1))
        return old if self._rows is None else old[self._rows]


class FeatureStore(Store):
    """Also the attention and feed-forward outputs of every layer: layers run only at the slots that are refreshed.

    The canvas is cut into two parts, the prompt and the answer. Before a pass, `plan` says which of them is refreshed
    as a whole. Of an answer that is not, the slots whose values have turned furthest away from the stored ones are
    refreshed in every layer. The residual stream is always that of the current pass.

    Args:
        layers: Number of attention layers.
        answer: Bool [B, T]; real slots behind the prompt.
        start: Slots of the prompt, the same in all rows.
        ratio: Share of the answer that is refreshed in passes that do not refresh all of it; 0 = none.
        first_layer: Refresh the first layer at every slot in every pass.
        all_values: Store the values that were computed for the comparison, also where nothing else is refreshed.

    Attributes:
        updated: Per layer the answer slots [B, n] that the last pass refreshed by the comparison.

    Source: dLLM-Cache (arXiv 2506.06295) and its published hooks.
    """

    def __init__(
        self,
        layers: int,
        answer: Bool[Tensor, "B T"],
        *,
        start: int,
        ratio: float,
        first_layer: bool,
        all_values: bool,
    ) -> None:
        super().__init__(layers, *answer.shape)
        self.updated: dict[int, Tensor] = {}
        self._start, self._answer = start, answer[:, start:]
        lengths = self._answer.sum(1)
        self._counts = torch.tensor([int(n * ratio) for n in lengths.tolist()], device=answer.device)
        self._count = int(self._counts.max())
        self._first_layer, self._all_values = first_layer, all_values
        self._refresh = (True, True)
        self._attended: list[Tensor | None] = [None] * layers
        self._fed: list[Tensor | None] = [None] * layers

    def plan(self, prompt: bool, answer: bool) -> None:
        """What the next pass refreshes as a whole."""
        self._refresh = (prompt, answer)

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Drop all other rows."""
        super().keep(rows)
        self._answer, self._counts = self._answer[rows], self._counts[rows]
        for held in (self._attended, self._fed):
            held[:] = [None if x is None else x[rows] for x in held]

    def run(
        self, layer: int, block: Any, x: Float[Tensor, "B T D"], rope: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Float[Tensor, "B T D"]:
        """One block (`mmdiff.models.llada.Block`) at the slots whose turn it is, stored outputs at the others."""
        normed = block.input_layernorm(x)
        index = self._choose(layer, block.self_attn.v_proj, normed)
        if index is None or index.shape[1]:
            if index is not None:
                rope = (take(rope[0], index), take(rope[1], index))
                mask = mask if mask is None or mask.shape[2] == 1 else take(mask[:, 0], index)[:, None]
            inner = normed if index is None else take(normed, index)
            attended = block.self_attn(inner, rope, mask, store=self, layer=layer, index=index)
            entered = (x if index is None else take(x, index)) + attended
            self._put(self._attended, layer, index, attended)
            self._put(self._fed, layer, index, block.mlp(block.post_attention_layernorm(entered)))
        attended, fed = self._attended[layer], self._fed[layer]
        assert attended is not None
        assert fed is not None
        return x + attended + fed

    def _choose(self, layer: int, v_proj: Any, normed: Tensor) -> Int[Tensor, "B n"] | None:
        """Slots that are computed in this layer; None = all."""
        prompt, answer = self._refresh
        self.updated.pop(layer, None)
        if (prompt and answer) or (layer == 0 and self._first_layer):
            return None
        slots = torch.arange(self.slots, device=normed.device).expand(len(normed), -1)
        parts = [slots[:, : self._start]] if prompt else []
        if answer:
            parts.append(slots[:, self._start :])
        elif self._count:
            parts.append(self._furthest(layer, v_proj(normed[:, self._start :])))
        return torch.cat(parts, 1) if parts else slots[:, :0]

    def _furthest(self, layer: int, fresh: Float[Tensor, "B G kD"]) -> Int[Tensor, "B n"]:
        values = self._values[layer]
        assert values is not None
        stored = values[:, self._start :]
        near = F.cosine_similarity(fresh.float(), stored.flatten(2).float(), dim=-1).masked_fill(~self._answer, 2.0)
        index = near.topk(self._count, dim=1, largest=False).indices + self._start
        # A row with fewer slots to refresh than another has padding at its end, which may be computed in their place.
        spare = torch.arange(self._count, device=index.device) >= self._counts[:, None]
        index = index.masked_fill(spare, self.slots - 1)
        if self._all_values:
            stored.copy_(fresh.view_as(stored))
        self.updated[layer] = index
        return index


class LogitStore(Store):
    """Also the logits of every slot, and which slots are to be computed again: those of the smallest largest logit.

    Args:
        layers: Number of attention layers.
        valid: Bool [B, T]; real slots.
        share: Share of the real slots that `least` gives.

    Source: Lumina-DiMOO (arXiv 2510.06308), published max-logit cache.
    """

    def __init__(self, layers: int, valid: Bool[Tensor, "B T"], share: float) -> None:
        super().__init__(layers, *valid.shape)
        self._share = share
        self._valid: list[Tensor | None] = [valid]
        self._logits: list[Tensor | None] = [None]

    def keep(self, rows: Int[Tensor, "b"]) -> None:
        """Drop all other rows."""
        super().keep(rows)
        for held in (self._valid, self._logits):
            held[:] = [None if x is None else x[rows] for x in held]

    def remember(self, index: Int[Tensor, "B q"] | None, logits: Float[Tensor, "B q V"]) -> Float[Tensor, "B T V"]:
        """Store the logits of the slots ``index`` (None = all T); returns those of all slots."""
        return self._put(self._logits, 0, index, logits)

    def least(self) -> Int[Tensor, "B q"]:
        """The slots to compute again, as many columns in each row: short rows repeat their first."""
        logits, valid, rows = self._logits[0], self._valid[0], self._rows
        assert logits is not None
        assert valid is not None
        if rows is not None:
            logits, valid = logits[rows], valid[rows]
        largest = logits.amax(-1).float().masked_fill(~valid, torch.nan)
        chosen = largest <= largest.nanquantile(self._share, dim=1, keepdim=True)
        index = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, : int(chosen.sum(1).max())]
        return torch.where(chosen.gather(1, index), index, index[:, :1])


def take(x: Shaped[Tensor, "#B L *D"], index: Int[Tensor, "B q"]) -> Shaped[Tensor, "B q *D"]:
    """Rows of ``x`` at the slots ``index``."""
    x = x.expand(len(index), *x.shape[1:])
    return x.gather(1, index.view(*index.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
