"""LLaDA-V: vision tower, connector and LLaDA, answering in text.

Images enter the sequence as feature tokens in the place of ``IMAGE`` ids. Two ways to use it: `LLaDAV.embed` takes
ids with one placeholder per image and lists of images; `LLaDAV.embed_slots` takes a canvas in which every feature
has its own slot already, which is what batches of training hold.

Source: LLaDA-V (arXiv 2505.16933).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmdiff.batch import IMAGE, Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.models.llada import Config as LanguageConfig
from mmdiff.models.llada import LLaDA
from mmdiff.models.vision import Config as VisionConfig
from mmdiff.models.vision import SiglipTower, connector

__all__ = ["Config", "LLaDAV"]


@config
class Config:
    """Sizes of the two parts; the defaults are the published 8B model."""

    type: Literal["llada_v"] = "llada_v"
    """Family name."""
    language: LanguageConfig = Field(
        default_factory=lambda: LanguageConfig(max_length=16384, rope_full_precision=False)
    )
    """The backbone."""
    vision: VisionConfig = Field(default_factory=VisionConfig)
    """The tower."""

    def with_width(self, width: int) -> Config:
        """The same model with a backbone of another width; the tower is scaled by the same ratio."""
        tower = self.vision.with_width(self.vision.width * width // self.language.width)
        return dataclasses.replace(self, language=self.language.with_width(width), vision=tower)

    def with_depth(self, depth: int) -> Config:
        """The same model with a backbone of ``depth`` blocks."""
        return dataclasses.replace(self, language=self.language.with_depth(depth))


class LLaDAV(PretrainedModule):
    """Tower + connector + backbone.

    Args:
        config: Sizes: a `Config`, or one of a wider model with the same parts.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Any, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.vision = SiglipTower(config.vision)
        self.connector = connector(config.vision.width, config.language.width, generator=generator)
        self.newline = nn.Parameter(torch.zeros(config.language.width))
        self.language = LLaDA(config.language, generator=generator)
        if generator is not None:
            self.vision.init_(generator)
            nn.init.normal_(self.newline, 0.0, config.language.width**-0.5, generator=generator)

    def layout(self) -> Layout:
        """What this model expects of a sequence."""
        tower = self.config.vision
        return Layout(vocab_size=self.config.language.vocab_size, features=tower.tokens, image_size=tower.image_size)

    def features(self, pixels: Float[Tensor, "M 3 S S"]) -> Float[Tensor, "M N D"]:
        """Connected features of M images in [-1, 1], N per image, in the backbone's width."""
        return self.connector(self.vision(pixels))

    def embed_slots(
        self, ids: Int[Tensor, "B L"], pixels: Float[Tensor, "M 3 S S"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """Input embeddings of a canvas in which every vision feature has its own slot.

        Args:
            ids: Int64 [B, L]; `IMAGE` at the slots of features, filled in row-major order.
            pixels: Float [M, 3, S, S] in [-1, 1]; M times N equals the number of `IMAGE` slots.

        Raises:
            ConfigError: The number of slots and of features differ.
        """
        slots = ids == IMAGE
        embeds = self._embed_ids(ids.masked_fill(slots, 0))
        if pixels is None:
            return embeds
        features = self.features(pixels).flatten(0, 1)
        if int(slots.sum()) != len(features):
            raise ConfigError(f"{int(slots.sum())} image slots for {len(features)} features of {len(pixels)} images")
        return embeds.masked_scatter(slots[..., None], features.to(embeds.dtype))

    def embed(
        self, ids: Int[Tensor, "B L"], images: Sequence[Float[Tensor, "T 3 S S"]]
    ) -> tuple[Float[Tensor, "B M D"], Bool[Tensor, "B M"]]:
        """Input embeddings of a canvas with one placeholder per image.

        Args:
            ids: Int64 [B, L]; `IMAGE` where an image goes.
            images: One float [T, 3, S, S] per placeholder, in row-major order; all crops of an image follow each
                other.

        Returns:
            (embeds [B, M, D], valid [B, M]); rows are right-padded with zero vectors to the longest, M.

        Raises:
            ConfigError: The number of placeholders and of images differ.
        """
        places = int((ids == IMAGE).sum())
        if places != len(images):
            raise ConfigError(f"{places} image placeholders for {len(images)} images")
        table = iter(self.features(torch.cat(list(images))).split([len(i) for i in images]) if images else ())
        rows = []
        for row in ids:
            parts = [next(table).flatten(0, 1) if i == IMAGE else self._embed_ids(chunk) for i, chunk in _chunks(row)]
            rows.append(torch.cat(parts))
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(r) for r in rows], device=ids.device)
        return embeds, torch.arange(embeds.shape[1], device=ids.device) < lengths[:, None]

    def forward(self, ids: Tensor | None = None, **options: Any) -> Float[Tensor, "B _ V"]:
        """Text logits; arguments as in `mmdiff.models.llada.LLaDA.forward`."""
        return self.language(ids, **options)

    def hidden(self, ids: Tensor | None = None, **options: Any) -> Float[Tensor, "B _ D"]:
        """Hidden states; arguments as in `mmdiff.models.llada.LLaDA.hidden`."""
        return self.language.hidden(ids, **options)

    def text_head(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Text logits of hidden states."""
        return self.language.head(hidden)

    def _embed_ids(self, ids: Int[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
        return self.language.embed_tokens(ids)


LLaDAV.Config = Config


def _chunks(row: Int[Tensor, "L"]) -> list[tuple[int, Int[Tensor, "n"]]]:
    """Split a row at its placeholders: (IMAGE, empty) for a placeholder, (0, ids) for text between."""
    out: list[tuple[int, Tensor]] = []
    start = 0
    for place in (row == IMAGE).nonzero().flatten().tolist():
        out += [(0, row[start:place]), (IMAGE, row[place:place])]
        start = place + 1
    return [*out, (0, row[start:])]
