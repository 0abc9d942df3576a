"""One training sample and one batch, as tensors: the common tongue of data, objectives and models.

A sequence is one row of ids in which these kinds of slots stand side by side:

* text: ids 0 .. V-1 of the tokenizer;
* vision features: `IMAGE` (-200), one slot per feature token of the vision tower, filled in row-major order;
* image codes: ids V .. V+K-1 for code 0 .. K-1, and V+K for a masked code (`Layout.code_offset` is V);
* continuous image tokens: id V, and V+1 for a masked one (K is 1); their values are beside the ids.

`Example.labels` says what is to be learnt where (`IGNORE` elsewhere). Nothing here draws, masks or decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "IGNORE",
    "IMAGE",
    "Batch",
    "Example",
    "Layout",
    "PackedRows",
    "Packing",
    "collate",
    "expand",
    "fill",
    "places",
]

IMAGE = -200
"""Placeholder id of a vision feature (published code of LLaVA and LLaDA-V)."""
IGNORE = -100
"""Label of a position that is never masked and never learnt."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a model expects of a sequence; tasks build examples from it.

    Attributes:
        vocab_size: V, number of text ids; also the id of image code 0.
        features: Feature tokens per image, 0 if the model does not see images.
        image_size: Side of the square input of the vision tower, pixels.
        codes: Image tokens per image, 0 if the model does not draw.
        codebook: K, number of image codes.
        code_mask: Id of a masked image code where it is not the id behind the last code.
        reads_codes: Whether the model reads images as codes of its image tokenizer.
        script: How such a model's sequences are built: a `mmdiff.text.mmada.Scripts` or `mmdiff.text.lumina.Scripts`.
        latents: (C, h, w) of the latents of a model with continuous image tokens; empty for others.
        classes: Number of classes of a class-conditional model, 0 for others.
        tiling: How pictures become crops, an `mmdiff.images.Tiling`; None: every picture is one square.
        system: System message of conversations that have none of their own.
    """

    vocab_size: int = 0
    features: int = 0
    image_size: int = 64
    codes: int = 0
    codebook: int = 0
    code_mask: int | None = None
    reads_codes: bool = False
    script: Any = None
    latents: tuple[int, ...] = ()
    classes: int = 0
    tiling: Any = None
    system: str = ""

    @property
    def code_offset(self) -> int:
        """Id of image code 0."""
        return self.vocab_size

    @property
    def code_mask_id(self) -> int:
        """Id of a masked image code."""
        return self.vocab_size + self.codebook if self.code_mask is None else self.code_mask


@dataclass(frozen=True, kw_only=True)
class Example:
    """One sample of one task.

    Attributes:
        key: Name of the sample in its shard, for messages.
        task: Name of the task, for per-task losses.
        ids: Int64 [L]; see the module's text. May be empty.
        labels: Int64 [L]; the id to predict, `IGNORE` where nothing is learnt.
        weights: Float32 [L]; weight of a labelled position in the loss.
        droppable: Bool [L]; prompt positions that are masked when the condition is dropped (for guidance).
        pixels: Float32 [M, 3, S, S] in [-1, 1]: the images of the `IMAGE` slots, in order, or the image to learn.
        latents: Float32 [C, h, w], or int64 codes [1, h, w]: the image of a class-conditional model, encoded, or the
            values of the slots of continuous tokens.
        cls: Number of the image's class; None if it has none.
        images: `mmdiff.images.Crops` of each image of the `IMAGE` slots instead, for models with a tiling.
        text: What is said of the image, for a text encoder beside the network.
    """

    key: str
    task: str
    ids: Int[Tensor, "L"]
    labels: Int[Tensor, "L"]
    weights: Float[Tensor, "L"]
    droppable: Bool[Tensor, "L"]
    pixels: Float[Tensor, "M 3 S S"] | None = None
    latents: Tensor | None = None
    cls: int | None = None
    images: tuple[Any, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class PackedRows:
    """Where every slot of packed rows comes from; each packed row holds several samples that do not see each other.

    Attributes:
        place: Int64 [R, P], slot of the batch counted over all its rows; -1 for padding.
        segments: Int64 [R, P], number of the sample within its packed row, for `mmdiff.nn.masks.document_mask`; padding
            has a number of its own.
        positions: Int64 [R, P], places within the sample: they start again at every sample.
    """

    place: Int[Tensor, "R P"]
    segments: Int[Tensor, "R P"]
    positions: Int[Tensor, "R P"]

    def gather(self, values: Tensor) -> Tensor:
        """[B, L, ...] as [R, P, ...]; padding repeats the first slot, which nobody sees."""
        return values.flatten(0, 1)[self.place.clamp_min(0)]

    def scatter(self, values: Tensor, rows: int, length: int) -> Tensor:
        """[R, P, ...] back to [rows, length, ...], zeros at the batch's padding."""
        out = values.new_zeros(rows * length, *values.shape[2:])
        real = self.place >= 0
        return out.index_put((self.place[real],), values[real]).unflatten(0, (rows, length))


@dataclass(frozen=True)
class Packing:
    """Which rows of a batch run through a network side by side.

    Loss, noise and labels stay with the rows of the batch; only what the network computes is arranged otherwise, so
    what is learnt is the same.

    Attributes:
        rows: Numbers of the batch's rows in each packed row, each in one of them.
        lengths: Real slots of each row of the batch; they come before its padding.
    """

    rows: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    def __getitem__(self, part: slice) -> Packing:
        """The packing of consecutive rows of the batch."""
        kept = range(len(self.lengths))[part]
        rows = (tuple(i - kept.start for i in row if i in kept) for row in self.rows)
        return Packing(tuple(row for row in rows if row), self.lengths[part])

    @property
    def share(self) -> float:
        """Real slots among all slots of the packed rows."""
        sizes = [sum(self.lengths[i] for i in row) for row in self.rows]
        return sum(sizes) / max(len(sizes) * max(sizes, default=0), 1)

    def twice(self) -> Packing:
        """The packing of the batch followed by itself."""
        again = tuple(tuple(i + len(self.lengths) for i in row) for row in self.rows)
        return Packing(self.rows + again, self.lengths * 2)

    def layout(self, length: int, device: torch.device | str = "cpu") -> PackedRows:
        """The packed rows as tensors.

        Args:
            length: L, slots of the batch's rows with their padding.
            device: Where the tensors live.
        """
        width = max(sum(self.lengths[i] for i in row) for row in self.rows)
        place = torch.full((len(self.rows), width), -1)
        segments = torch.full((len(self.rows), width), -1)
        positions = torch.zeros((len(self.rows), width), dtype=torch.int64)
        for r, row in enumerate(self.rows):
            start = 0
            for number, i in enumerate(row):
                here = slice(start, start + self.lengths[i])
                positions[r, here] = torch.arange(self.lengths[i])
                place[r, here] = i * length + positions[r, here]
                segments[r, here] = number
                start = here.stop
        return PackedRows(place.to(device), segments.to(device), positions.to(device))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples of one step, right-padded.

    Attributes:
        keys: B names.
        tasks: B task names.
        ids: Int64 [B, L]; padding holds 0.
        labels: Int64 [B, L]; padding holds `IGNORE`.
        weights: Float32 [B, L].
        droppable: Bool [B, L].
        valid: Bool [B, L]; True = real slot.
        pixels: Float32 [M, 3, S, S], the images of all rows in order; None if there are none.
        latents: Float32 [B, C, h, w] or int64 [B, 1, h, w], the encoded images, zeros in rows that have none; None if
            there are none at all.
        classes: Int64 [B], numbers of their classes; None if there are none.
        images: Per row its images as `mmdiff.images.Crops`, instead of ``pixels``; empty if there are none at all.
        t: Float32 [B], times of the rows if they were drawn for a whole step; None if the objective draws them.
        masked: Bool [B, N], masked image tokens if they were drawn for a whole step; None if the objective draws them.
        packing: Which rows run through the network side by side in one longer row; None: each by itself.
        texts: B texts, for a text encoder beside the network; empty if there are none.
    """

    keys: tuple[str, ...]
    tasks: tuple[str, ...]
    ids: Int[Tensor, "B L"]
    labels: Int[Tensor, "B L"]
    weights: Float[Tensor, "B L"]
    droppable: Bool[Tensor, "B L"]
    valid: Bool[Tensor, "B L"]
    pixels: Float[Tensor, "M 3 S S"] | None = None
    latents: Tensor | None = None
    classes: Int[Tensor, "B"] | None = None
    images: tuple[tuple[Any, ...], ...] = ()
    t: Float[Tensor, "B"] | None = None
    masked: Bool[Tensor, "B N"] | None = None
    packing: Packing | None = None
    texts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, Tensor)}
        moved: dict[str, Any] = {k: v.to(device, non_blocking=True) for k, v in tensors.items()}
        images = tuple(tuple(image.to(device) for image in row) for row in self.images)
        return replace(self, **moved, images=images)


def places(model: Any, ids: Int[Tensor, "B L"], positions: Int[Tensor, "B L"] | None = None) -> Any:
    """Rotary positions of a canvas, for networks that place image tokens on a grid; else ``positions``.

    Args:
        model: The network.
        ids: Int64 [B, L].
        positions: Int64 [B, L], running numbers of the slots; None = 0 .. L-1.
    """
    own = getattr(model, "places", None)
    return positions if own is None else own(ids, positions)


def collate(examples: Sequence[Example]) -> Batch:
    """Right-pad examples to the longest and stack them; images are joined in row order."""
    length = max(len(e.ids) for e in examples)

    def stack(rows: list[Tensor], fill: float) -> Tensor:
        out = rows[0].new_full((len(rows), length), fill)
        for i, row in enumerate(rows):
            out[i, : len(row)] = row
        return out

    pixels = [e.pixels for e in examples if e.pixels is not None]
    like = next((e.latents for e in examples if e.latents is not None), None)
    latents = [] if like is None else [torch.zeros_like(like) if e.latents is None else e.latents for e in examples]
    classes = [e.cls for e in examples if e.cls is not None]
    texts = [e.text for e in examples if e.text is not None]
    return Batch(
        keys=tuple(e.key for e in examples),
        tasks=tuple(e.task for e in examples),
        ids=stack([e.ids for e in examples], 0),
        labels=stack([e.labels for e in examples], IGNORE),
        weights=stack([e.weights for e in examples], 0),
        droppable=stack([e.droppable for e in examples], False),
        valid=stack([torch.ones(len(e.ids), dtype=torch.bool) for e in examples], False),
        pixels=torch.cat(pixels) if pixels else None,
        latents=torch.stack(latents) if latents else None,
        classes=torch.tensor(classes) if classes else None,
        images=tuple(e.images for e in examples) if any(e.images for e in examples) else (),
        texts=tuple(texts),
    )


def fill(examples: Sequence[Example], pad_id: int) -> list[Example]:
    """Examples as long as the longest, the end of each filled with an id that is learnt with weight 1.

    Source: LLaDA's published fine-tuning and LLaDA-V's first stage.
    """
    length = max(len(e.ids) for e in examples)

    def longer(row: Tensor, value: float) -> Tensor:
        return torch.cat([row, row.new_full((length - len(row),), value)])

    return [
        replace(
            e,
            ids=longer(e.ids, pad_id),
            labels=longer(e.labels, pad_id),
            weights=longer(e.weights, 1.0),
            droppable=longer(e.droppable, False),
        )
        for e in examples
    ]


def expand(ids: Sequence[int], labels: Sequence[int], slots: Sequence[int]) -> tuple[list[int], list[int]]:
    """Give every image its slots: each `IMAGE` becomes as many, with nothing to learn there.

    Args:
        ids: One `IMAGE` per image.
        labels: As many as ids.
        slots: Image tokens of each image, in order.

    Returns:
        The longer ids and labels.

    Raises:
        ValueError: Another number of images than ``slots``, or of labels than ids.
    """
    out: tuple[list[int], list[int]] = ([], [])
    left = iter(slots)
    for i, label in zip(ids, labels, strict=True):
        count = next(left, None) if i == IMAGE else 1
        if count is None:
            raise ValueError(f"more image placeholders than the {len(slots)} images")
        out[0].extend([i] * count)
        out[1].extend([IGNORE if i == IMAGE else label] * count)
    if unused := list(left):
        raise ValueError(f"{len(unused)} of {len(slots)} images have no placeholder")
    return out
