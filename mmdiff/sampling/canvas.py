"""The canvas: what is known, what is to be generated, and where; and the networks that read it.

A canvas is data. A backbone is the one thing the decoding loop asks of a network: logits at given slots. Three thin
adapters make backbones of the house's networks: text over ids, text beside images, and image codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmdiff.batch import places
from mmdiff.errors import ConfigError
from mmdiff.nn.store import Store

__all__ = ["Backbone", "Canvas", "CodeBackbone", "TextBackbone", "as_backbone", "inputs", "layout", "options"]


@dataclass
class Canvas:
    """B rows of T slots.

    Attributes:
        tokens: Int64 [B, T]; ids, with the mask id at undecided slots.
        undecided: Bool [B, T]; slots to be generated.
        frozen: Bool [B, T]; prompt, scaffold, suffix: never written. Disjoint from ``undecided``.
        valid: Bool [B, T]; False = padding: not attended, not written, not counted.
        positions: Int64 [B, T]; rotary positions, consecutive over the valid slots.
        start: Number of slots before the first that was laid out for generation.
        order: Int32 [B, T]; number of the pass that wrote the slot, -1 before.
        droppable: Bool [B, T]; slots that guidance replaces by the mask id in its unconditional branch.
        null: Int64 [B, T]; what stands at droppable slots in that branch instead, for networks that learnt an empty
            prompt; None = the mask id.
        null_valid: Bool [B, T]; which slots are real there; given with ``null``.
        embeds: Float [B, T, D]; input embeddings of the slots in ``given`` (image features).
        given: Bool [B, T]; slots whose input is ``embeds`` instead of the embedding of ``tokens``.
        low: Int64 [B or 1, T]; smallest id a slot may take; None = any.
        high: Int64 [B or 1, T]; one more than the largest id; None = any.
        values: Float [B, T, C]; continuous tokens; ``tokens`` then only say which slots are decided.
        end: Int64 [B]; first slot that does not count any more, as an exit rule found it; None = none has looked.
    """

    tokens: Int[Tensor, "B T"]
    undecided: Bool[Tensor, "B T"]
    frozen: Bool[Tensor, "B T"]
    valid: Bool[Tensor, "B T"]
    positions: Int[Tensor, "B T"]
    start: int
    order: Int[Tensor, "B T"]
    droppable: Bool[Tensor, "B T"]
    null: Int[Tensor, "B T"] | None = None
    null_valid: Bool[Tensor, "B T"] | None = None
    embeds: Float[Tensor, "B T D"] | None = None
    given: Bool[Tensor, "B T"] | None = None
    low: Int[Tensor, "#B T"] | None = None
    high: Int[Tensor, "#B T"] | None = None
    values: Float[Tensor, "B T C"] | None = None
    end: Int[Tensor, "B"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Int[Tensor, "b"]) -> Canvas:
        """A copy of some rows."""
        picked: dict[str, Any] = {
            k: v if v.shape[0] != len(self) else v[rows] for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return dataclasses.replace(self, **picked)

    def write(
        self, index: Int[Tensor, "B q"], commit: Bool[Tensor, "B q"], tokens: Int[Tensor, "B q"], step: int
    ) -> None:
        """Decide the slots of ``index`` where ``commit``, in place; ``step`` goes into ``order``."""
        self.tokens.scatter_(1, index, torch.where(commit, tokens, self.tokens.gather(1, index)))
        self.order.scatter_(1, index, self.order.gather(1, index).masked_fill(commit, step))
        self.undecided.scatter_(1, index, self.undecided.gather(1, index) & ~commit)

    def write_values(
        self, index: Int[Tensor, "B q"], commit: Bool[Tensor, "B q"], values: Float[Tensor, "B q C"]
    ) -> None:
        """Continuous tokens of the slots of ``index`` where ``commit``, in place."""
        assert self.values is not None
        places = index[..., None].expand_as(values)
        self.values.scatter_(1, places, torch.where(commit[..., None], values, self.values.gather(1, places)))

    def reopen(self, index: Int[Tensor, "B q"], slots: Bool[Tensor, "B q"], mask_id: int) -> None:
        """Make masks of the slots of ``index`` where ``slots``, in place."""
        self.tokens.scatter_(1, index, self.tokens.gather(1, index).masked_fill(slots, mask_id))
        self.order.scatter_(1, index, self.order.gather(1, index).masked_fill(slots, -1))
        self.undecided.scatter_(1, index, self.undecided.gather(1, index) | slots)

    def put(self, rows: Int[Tensor, "b"], other: Canvas) -> None:
        """Write back what decoding changes, from a canvas made by `select` of the same rows."""
        for name in ("tokens", "undecided", "order", "values"):
            if getattr(self, name) is not None:
                getattr(self, name)[rows] = getattr(other, name)
        if other.end is not None:
            if self.end is None:
                self.end = torch.full((len(self),), self.tokens.shape[1], device=other.end.device)
            self.end[rows] = other.end

    def copy(self) -> Canvas:
        """The same rows, with tensors of their own where decoding writes."""
        written = {n: getattr(self, n).clone() for n in ("tokens", "undecided", "order")}
        values = None if self.values is None else self.values.clone()
        return dataclasses.replace(self, **written, values=values)

    def to(self, device: torch.device | str) -> Canvas:
        """A copy with every tensor on ``device``."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)

    def stack(self, other: Canvas) -> Canvas:
        """The rows of both, one below the other; both have the same slots."""
        tall: dict[str, Any] = {
            k: torch.cat((v, getattr(other, k)))
            for k, v in vars(self).items()
            if isinstance(v, Tensor) and len(v) == len(self)
        }
        return dataclasses.replace(self, **tall)


def layout(
    prompts: Sequence[Sequence[int]],
    generated: Sequence[Sequence[int | None]],
    *,
    mask_id: int,
    pad_id: int = 0,
    droppable: Sequence[Sequence[bool]] | None = None,
    nulls: Sequence[Sequence[int]] | None = None,
    device: torch.device | str = "cpu",
) -> Canvas:
    """Lay rows out: prompts padded on the left, then the generated part padded on the right.

    Args:
        prompts: Ids per row; may be empty.
        generated: Per row the slots after the prompt: None = to be generated, an id = fixed.
        mask_id: Id of an undecided slot.
        pad_id: Id at padding slots (never attended).
        droppable: Per row one flag per prompt id; None = all of the prompt.
        nulls: Per row the prompt that stands in the place of the whole prompt when guidance drops it.
        device: Where the tensors go.

    Raises:
        ConfigError: No rows, or lists of different lengths.
    """
    if not prompts or len(prompts) != len(generated):
        raise ConfigError(
            f"{len(prompts)} prompts for {len(generated)} rows to generate; give one per row, at least one"
        )
    start = max(len(p) for p in [*prompts, *(nulls or ())])
    width = max(len(g) for g in generated)
    tokens, valid, undecided, drop = [], [], [], []
    for row, (prompt, slots) in enumerate(zip(prompts, generated, strict=True)):
        left, right = start - len(prompt), width - len(slots)
        fill = [mask_id if s is None else s for s in slots]
        tokens.append([pad_id] * left + list(prompt) + fill + [pad_id] * right)
        valid.append([False] * left + [True] * (len(prompt) + len(slots)) + [False] * right)
        undecided.append([False] * start + [s is None for s in slots] + [False] * right)
        flags = [True] * len(prompt) if droppable is None else [bool(d) for d in droppable[row]]
        drop.append([False] * left + flags + [False] * width)
    real, masks, ids = torch.tensor(valid), torch.tensor(undecided), torch.tensor(tokens)
    null, null_valid = (None, None) if nulls is None else _nulls(nulls, ids, real, start, pad_id)
    if nulls is not None:
        drop = [[True] * start + [False] * width] * len(prompts)
    return Canvas(
        tokens=ids,
        undecided=masks,
        frozen=~masks,
        valid=real,
        positions=(real.long().cumsum(1) - 1).clamp_(min=0),
        start=start,
        order=torch.full(masks.shape, -1, dtype=torch.int32),
        droppable=torch.tensor(drop),
        null=null,
        null_valid=null_valid,
    ).to(device)


def _nulls(
    nulls: Sequence[Sequence[int]], tokens: Int[Tensor, "B T"], valid: Bool[Tensor, "B T"], start: int, pad_id: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Ids and real slots of the rows with other prompts."""
    ids, real = tokens.clone(), valid.clone()
    for row, prompt in enumerate(nulls):
        left = start - len(prompt)
        ids[row, :start] = torch.tensor([pad_id] * left + list(prompt))
        real[row, :start] = torch.arange(start) >= left
    return ids, real


@runtime_checkable
class Backbone(Protocol):
    """What the loop needs of a network.

    Attributes:
        mask_id: Id of an undecided slot.
        null_id: Id that stands for a dropped condition.
        offset: Id of the first class of the logits.
    """

    mask_id: int
    null_id: int
    offset: int

    def forward(self, canvas: Canvas, index: Int[Tensor, "B q"]) -> Float[Tensor, "B q V"]:
        """Logits of every class at the slots ``index``, reading the whole canvas.

        The result is a new tensor, which the caller may overwrite. A backbone that can be decoded with a cache also
        has ``layers`` (their number) and two more arguments: ``store``, and ``compute`` (Int64 [B, n], slots that go
        through the network, ``index`` among them; None = all).
        """
        ...


class TextBackbone:
    """Text tokens of any network with LLaDA's signature, with or without image features on the canvas.

    Args:
        model: `LLaDA`, `LLaDAV`, `Unified`, or a callable of the same signature whose ``config`` has a ``mask_id``.
    """

    offset = 0

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config
        language = getattr(config, "language", config)
        self.mask_id: int = language.mask_id
        self.null_id = self.mask_id
        self.layers: int = getattr(language, "depth", 0)

    def forward(
        self,
        canvas: Canvas,
        index: Int[Tensor, "B q"],
        store: Store | None = None,
        compute: Int[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B q V"]:
        """Text logits at ``index``; the head runs there only."""
        told = options(self.model, canvas, index, store, compute)
        if canvas.embeds is None and not hasattr(self.model, "embed_slots"):
            return self.model(canvas.tokens, **told)
        return self.model(embeds=inputs(self.model, canvas), **told)


class CodeBackbone:
    """Image codes of a `Unified` network: classes are the K codes, ids V .. V+K-1."""

    def __init__(self, model: Any) -> None:
        self.model = model
        shape = model.layout()
        self.offset: int = shape.code_offset
        self.mask_id: int = shape.code_mask_id
        self.null_id: int = model.config.language.mask_id
        self.layers: int = model.config.language.depth

    def forward(
        self,
        canvas: Canvas,
        index: Int[Tensor, "B q"],
        store: Store | None = None,
        compute: Int[Tensor, "B n"] | None = None,
    ) -> Float[Tensor, "B q K"]:
        """Code logits at ``index``; the head runs there only."""
        hidden = self.model.hidden(
            embeds=inputs(self.model, canvas), **options(self.model, canvas, index, store, compute)
        )
        return self.model.code_head(hidden)


def as_backbone(model: Any) -> Backbone:
    """``model`` itself if it is a backbone, else the text backbone around it.

    Raises:
        ConfigError: ``model`` is neither.
    """
    if isinstance(model, Backbone) and not isinstance(model, nn.Module):
        return model
    if hasattr(model, "config"):
        return TextBackbone(model)
    raise ConfigError(
        f"{type(model).__name__} is no backbone: it needs mask_id, null_id, offset and forward(canvas, index)"
    )


def options(
    model: Any,
    canvas: Canvas,
    index: Int[Tensor, "B q"],
    store: Store | None = None,
    compute: Int[Tensor, "B n"] | None = None,
) -> dict[str, Any]:
    """Arguments of a network beside its inputs; see `Backbone.forward`."""
    told: dict[str, Any] = {
        "valid": canvas.valid,
        "positions": places(model, canvas.tokens, canvas.positions),
        "head_index": index,
    }
    return told if store is None else {**told, "store": store, "index": compute}


def inputs(model: Any, canvas: Canvas) -> Float[Tensor, "B T D"]:
    """Input embeddings of a canvas."""
    embed = model.embed_slots if hasattr(model, "embed_slots") else model.embed_tokens
    looked_up = embed(canvas.tokens) if canvas.values is None else embed(canvas.tokens, values=canvas.values)
    if canvas.embeds is None or canvas.given is None:
        return looked_up
    return torch.where(canvas.given[..., None], canvas.embeds.to(looked_up.dtype), looked_up)
