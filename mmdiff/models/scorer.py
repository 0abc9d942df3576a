"""Images and texts into one space: a small judge, or a vision tower in the making.

With a convolutional image encoder it is the judge for machines without published feature networks: its features stand
in for Inception's in KID and FID, its similarities for CLIP's in retrieval. Numbers from it compare models judged by
the same scorer and nothing else; every report says so. With a SigLIP tower it is how such a tower is trained before a
language model learns to read it.

Source: trained with SigLIP's sigmoid loss (arXiv 2303.15343, section 3).
"""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.batch import Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.models.vision import Config as VisionConfig
from mmdiff.models.vision import SiglipTower

__all__ = ["Config", "Scorer"]


@config
class Config:
    """Shape of the scorer."""

    type: Literal["scorer"] = "scorer"
    """Family name."""
    vocab_size: int = Field(gt=0)
    """Number of text ids."""
    image_size: int = Field(64, gt=0)
    """Side of the square images, pixels."""
    stem: int = Field(4, gt=0)
    """Pixels per side that are folded into channels before the first convolution."""
    widths: tuple[int, ...] = Field((64, 128, 256), min_length=1)
    """Channels of each level; every level after the first halves the resolution."""
    tower: VisionConfig | None = None
    """A SigLIP tower as the image encoder; null: the convolutions of ``stem`` and ``widths``."""
    width: int = Field(128, gt=0)
    """Size of the shared space."""

    def __post_init__(self) -> None:
        if self.tower is not None:
            if self.tower.image_size != self.image_size:
                raise ConfigError(f"image_size {self.image_size} differs from the tower's {self.tower.image_size}")
        elif self.image_size % (self.stem * 2 ** (len(self.widths) - 1)):
            raise ConfigError(f"image_size {self.image_size} does not divide by the levels of the scorer")


class Scorer(PretrainedModule):
    """Image encoder and bag-of-words text encoder.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        if config.tower is None:
            self.image = _image_encoder(config)
        else:
            self.vision = SiglipTower(config.tower)
        features = config.widths[-1] if config.tower is None else config.tower.width
        self.image_head = nn.Linear(features, config.width)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.text_head = nn.Sequential(
            nn.Linear(config.width, 2 * config.width), nn.GELU(), nn.Linear(2 * config.width, config.width)
        )
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))
        if generator is not None:
            self.init_(generator)

    def layout(self) -> Layout:
        """What this model expects of a sequence: text ids only."""
        return Layout(vocab_size=self.config.vocab_size, image_size=self.config.image_size)

    def forward(
        self, pixels: Float[Tensor, "B 3 S S"], ids: Int[Tensor, "B L"], valid: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B B"]:
        """Logits that image i (row) and text j (column) belong together."""
        return self.similarity(self.embed_image(pixels), self.embed_text(ids, valid))

    def similarity(self, images: Float[Tensor, "B E"], texts: Float[Tensor, "M E"]) -> Float[Tensor, "B M"]:
        """Logits that image i (row) and text j (column) belong together, from their unit vectors."""
        return images @ texts.T * self.scale.exp() + self.bias

    def image_features(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B F"]:
        """Features of images in [-1, 1] before the shared space, for KID and FID.

        Raises:
            ConfigError: The images have another size than the scorer.
        """
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            raise ConfigError(f"images are {tuple(pixels.shape[-2:])}, the scorer takes ({size}, {size})")
        if self.config.tower is not None:
            return self.vision(pixels).mean(dim=1)
        return self.image(pixels).mean(dim=(2, 3))

    def embed_image(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B E"]:
        """Unit vectors of images in [-1, 1]."""
        return F.normalize(self.image_head(self.image_features(pixels)), dim=-1)

    def embed_text(self, ids: Int[Tensor, "B L"], valid: Bool[Tensor, "B L"]) -> Float[Tensor, "B E"]:
        """Unit vectors of texts."""
        weight = valid[..., None].float()
        mean = (self.words(ids) * weight).sum(1) / weight.sum(1).clamp_min(1)
        return F.normalize(self.text_head(mean), dim=-1)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> Scorer:
        """Draw initial weights: Kaiming-normal convolutions, Xavier-uniform matrices, N(0, 1/E) words."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                nn.init.zeros_(cast("Tensor", module.bias))
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.words.weight, 0.0, self.config.width**-0.5, generator=generator)
        if self.config.tower is not None:
            self.vision.init_(generator)
        return self


Scorer.Config = Config


def _image_encoder(c: Config) -> nn.Sequential:
    parts: list[nn.Module] = [nn.PixelUnshuffle(c.stem)]
    before = 3 * c.stem**2
    for i, width in enumerate(c.widths):
        parts += [nn.Conv2d(before, width, 3, stride=1 if i == 0 else 2, padding=1), nn.GroupNorm(8, width), nn.GELU()]
        parts += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
        before = width
    return nn.Sequential(*parts)
