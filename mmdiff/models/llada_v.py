"""LLaDA-V: vision tower, connector and LLaDA, answering in text.

Images enter the sequence as image tokens in the place of ``IMAGE`` ids; how many a picture has and how they are
arranged is its view (`mmdiff.images`). Two ways to use it: `LLaDAV.embed` takes ids with one placeholder per image;
`LLaDAV.embed_slots` takes a canvas in which every image token has its own slot already, which is what batches hold.

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
from mmdiff.images import Crops, Flat, Tiling
from mmdiff.models.base import PretrainedModule
from mmdiff.models.llada import Config as LanguageConfig
from mmdiff.models.llada import LLaDA
from mmdiff.models.vision import Config as VisionConfig
from mmdiff.models.vision import SiglipTower, connector
from mmdiff.text import VISION_SYSTEM

__all__ = ["Config", "Images", "LLaDAV"]

Images = Tensor | Sequence[Tensor | Crops]
"""Float [M, 3, S, S], one crop per image; or one `Crops` per image (a tensor [T, 3, S, S] has a flat view)."""

EMBEDDING_STD = 0.7
"""Of text embeddings beside image features in one sequence."""

_CROPS_AT_ONCE = 16


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
    tiling: Tiling | None = Field(default_factory=Tiling)
    """How pictures become crops and image tokens; null: every picture is one square."""
    system: str = VISION_SYSTEM
    """System message of conversations that have none of their own; empty: none."""
    max_tokens: int | None = Field(None, gt=0)
    """Longest sequence after images are expanded; longer ones are cut. Null: never."""

    def __post_init__(self) -> None:
        if self.tiling is not None:
            self.tiling.canvases(self.vision.image_size)

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
            self._lift_text()

    @torch.no_grad()
    def _lift_text(self) -> None:
        """Bring fresh text embeddings to the scale of image features, beside which 1/sqrt(D) would be drowned."""
        if not self.config.language.tied:
            self.language.embed_tokens.weight.mul_(EMBEDDING_STD * self.config.language.width**0.5)

    def layout(self) -> Layout:
        """What this model expects of a sequence."""
        tower = self.config.vision
        return Layout(
            vocab_size=self.config.language.vocab_size,
            features=tower.tokens,
            image_size=tower.image_size,
            tiling=self.config.tiling,
            system=self.config.system,
        )

    def features(self, pixels: Float[Tensor, "M 3 S S"]) -> Float[Tensor, "M N D"]:
        """Connected features of M crops in [-1, 1], N per crop, in the backbone's width."""
        return torch.cat([self.connector(self.vision(part)) for part in pixels.split(_CROPS_AT_ONCE)])

    def image_tokens(self, images: Images) -> list[Float[Tensor, "_ D"]]:
        """The image tokens of each image, newlines included.

        Args:
            images: Crops of each image, on any device and of any floating dtype.
        """
        if not len(images):
            return []
        crops = [_as_crops(image) for image in images]
        pixels = torch.cat([c.pixels for c in crops]).to(self.newline)
        features = self.features(pixels).split([len(c.pixels) for c in crops])
        return [c.view.arrange(f, self.newline) for c, f in zip(crops, features, strict=True)]

    def embed_slots(self, ids: Int[Tensor, "B L"], images: Images | None = None) -> Float[Tensor, "B L D"]:
        """Input embeddings of a canvas in which every image token has its own slot.

        Args:
            ids: Int64 [B, L]; `IMAGE` at the slots of image tokens, filled in row-major order.
            images: The images of all rows in order; their tokens are as many as the slots.

        Raises:
            ConfigError: The number of slots and of image tokens differ.
        """
        slots = ids == IMAGE
        embeds = self._embed_ids(ids.masked_fill(slots, 0))
        if images is None:
            return embeds
        tokens = torch.cat(self.image_tokens(images))
        if int(slots.sum()) != len(tokens):
            raise ConfigError(f"{int(slots.sum())} image slots for {len(tokens)} features of {len(images)} images")
        return embeds.masked_scatter(slots[..., None], tokens.to(embeds.dtype))

    def embed(
        self, ids: Int[Tensor, "B L"], images: Images, valid: Bool[Tensor, "B L"] | None = None
    ) -> tuple[Float[Tensor, "B M D"], Bool[Tensor, "B M"]]:
        """Input embeddings of a canvas with one placeholder per image.

        Args:
            ids: Int64 [B, L]; `IMAGE` where an image goes.
            images: One image per placeholder, in row-major order. A row without a placeholder may have one as well,
                which is not used: so batches are published.
            valid: Bool [B, L]; ids that are False are removed first.

        Returns:
            (embeds [B, M, D], valid [B, M]); rows are cut to the configuration's ``max_tokens`` and right-padded with
            zero vectors to the longest, M.

        Raises:
            ConfigError: The number of placeholders and of images differ.
        """
        kept = list(ids) if valid is None else [row[keep] for row, keep in zip(ids, valid, strict=True)]
        rows = [self._splice(row, mine) for row, mine in zip(kept, self._share(kept, images), strict=True)]
        embeds = nn.utils.rnn.pad_sequence([r[: self.config.max_tokens] for r in rows], batch_first=True)
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

    def _share(self, rows: list[Tensor], images: Images) -> list[list[Tensor]]:
        """The image tokens that each row uses."""
        places = [int((row == IMAGE).sum()) for row in rows]
        if len(images) not in (sum(places), sum(max(1, n) for n in places)):
            raise ConfigError(f"{sum(places)} image placeholders for {len(images)} images")
        spare = len(images) != sum(places)
        tokens = iter(self.image_tokens(images))
        return [[next(tokens) for _ in range(max(n, spare))][:n] for n in places]

    def _splice(self, row: Int[Tensor, "n"], images: list[Tensor]) -> Float[Tensor, "_ D"]:
        """A row with image tokens in the place of its placeholders."""
        cuts = (row == IMAGE).nonzero().flatten().tolist()
        texts = [row[a + 1 : b] for a, b in zip([-1, *cuts], [*cuts, len(row)], strict=True)]
        parts = [self._embed_ids(texts[0])]
        for image, text in zip(images, texts[1:], strict=True):
            parts += [image.to(parts[0].dtype), self._embed_ids(text)]
        return torch.cat(parts)


LLaDAV.Config = Config


def _as_crops(image: Tensor | Crops) -> Crops:
    if isinstance(image, Crops):
        return image
    pixels = image if image.ndim == 4 else image[None]
    return Crops(pixels, Flat(len(pixels)))
