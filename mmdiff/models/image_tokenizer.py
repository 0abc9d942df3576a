"""What image tokenizers have in common: a codebook, a grid, and the way from pixels to codes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule

__all__ = ["FeatureTokenizer", "ImageTokenizer", "VectorTokenizer"]


class ImageTokenizer(PretrainedModule):
    """Pixels to codes and back; ``config`` tells ``codebook`` and ``grid``."""

    config: Any

    @property
    def codebook(self) -> int:
        """K, number of codes."""
        return self.config.codebook

    @property
    def grid(self) -> int:
        """Tokens per side of the images it is used for."""
        return self.config.grid

    def check_codes(self, codes: Int[Tensor, "B h w"]) -> None:
        """Make sure that codes are of this codebook.

        Raises:
            ConfigError: One lies outside.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook:
            raise ConfigError(f"codes {int(codes.min())} .. {int(codes.max())} outside 0 .. {self.codebook - 1}")

    def variety(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B"]:
        """Distinct codes in each image as a share of the most there could be: min(K, tokens)."""
        tokens = codes.flatten(1).sort(dim=1).values
        distinct = 1 + (tokens[:, 1:] != tokens[:, :-1]).sum(dim=1)
        return distinct / min(self.codebook, tokens.shape[1])


class FeatureTokenizer(ImageTokenizer, ABC):
    """A tokenizer for images of any multiple of its downsampling, whose codes follow from a map of features."""

    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What the codes are taken of, of images in [-1, 1].

        Raises:
            ConfigError: The images are no multiple of the downsampling.
        """
        factor = self.config.factor
        if pixels.shape[-2] % factor or pixels.shape[-1] % factor:
            raise ConfigError(f"images are {tuple(pixels.shape[-2:])}; the tokenizer takes multiples of {factor}")
        return self._encoded(pixels)

    @abstractmethod
    def nearest(self, z: Float[Tensor, "B C h w"]) -> Int[Tensor, "B h w"]:
        """The code at every place."""

    @abstractmethod
    def vectors(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """Vectors of codes."""

    def usage(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B"]:
        """See `variety`, of the codes that these features give."""
        return self.variety(self.nearest(z))

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Codes 0 .. K-1 of images in [-1, 1], int64, row-major."""
        return self.nearest(self.features(pixels))

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, about -1 .. 1, not clamped, of codes.

        Raises:
            ConfigError: A code lies outside the codebook.
        """
        self.check_codes(codes)
        return self._decoded(self.vectors(codes))

    @abstractmethod
    def _encoded(self, pixels: Tensor) -> Tensor:
        """Features of images whose size fits."""

    @abstractmethod
    def _decoded(self, vectors: Tensor) -> Tensor:
        """Images of vectors."""


class VectorTokenizer(FeatureTokenizer):
    """A tokenizer with a table of learnt vectors, of which the nearest is taken (VQ-VAE, arXiv 1711.00937)."""

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B C h w"]]:
        """Reconstruction, and what was compared with the codes; gradients pass straight through the codes."""
        raw = self.features(pixels)
        z = self._scaled(raw)
        return self._decoded(z + (self.vectors(self.nearest(raw)) - z).detach()), raw

    def penalty(self, raw: Float[Tensor, "B C h w"]) -> Float[Tensor, ""]:
        """Codes move to the features, and a quarter as strongly the features to their codes (arXiv 1711.00937)."""
        z, codes = self._scaled(raw), self.vectors(self.nearest(raw))
        return F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())

    def _scaled(self, z: Tensor) -> Tensor:
        """Features as they are compared."""
        return z
