"""Discrete image tokenizer: convolutional autoencoder with finite scalar quantisation.

Finite scalar quantisation has no codebook to collapse and no auxiliary loss, which is what makes a tokenizer that
trains in minutes possible.

Source: FSQ (arXiv 2309.15505); the residual blocks are VQGAN's (arXiv 2012.09841).
"""

from __future__ import annotations

import math
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.image_tokenizer import ImageTokenizer

__all__ = ["VQ", "Config", "FiniteScalar"]


@config
class Config:
    """Shape of the tokenizer."""

    type: Literal["vq"] = "vq"
    """Family name."""
    image_size: int = Field(64, gt=0)
    """Side of the square images, pixels."""
    stem: int = Field(2, gt=0)
    """Pixels per side that are folded into channels before the first convolution."""
    widths: tuple[int, ...] = Field((64, 128, 128), min_length=1)
    """Channels of each level; every level after the first halves the resolution."""
    blocks: int = Field(1, ge=0)
    """Residual blocks per level, in the encoder and in the decoder."""
    levels: tuple[int, ...] = Field((8, 5, 5, 5), min_length=1)
    """Steps of each quantised channel; the codebook is their product."""

    def __post_init__(self) -> None:
        if self.image_size % self.factor:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of the downsampling {self.factor}")
        if min(self.levels) < 2:
            raise ConfigError(f"levels {self.levels}: every channel needs at least 2 steps")
        if any(w % 8 for w in self.widths):
            raise ConfigError(f"widths {self.widths} must be multiples of 8 (group norm)")

    @property
    def factor(self) -> int:
        """Pixels per token and side."""
        return self.stem * 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // self.factor

    @property
    def codebook(self) -> int:
        """Number of codes."""
        return math.prod(self.levels)

    @property
    def channels(self) -> int:
        """Channels of the quantised values, for networks that draw those."""
        return len(self.levels)


class FiniteScalar(nn.Module):
    """Round every channel to one of a few evenly spaced values; gradients pass straight through.

    Args:
        levels: Steps per channel.
    """

    steps: Tensor
    place: Tensor

    def __init__(self, levels: tuple[int, ...]) -> None:
        super().__init__()
        steps = torch.tensor(levels)
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("place", torch.cumprod(torch.tensor([1, *levels[:-1]]), 0), persistent=False)

    def forward(self, z: Float[Tensor, "B C h w"]) -> tuple[Float[Tensor, "B C h w"], Int[Tensor, "B h w"]]:
        """Quantised values in [-1, 1] and the codes they stand for."""
        steps = self.steps.view(1, -1, 1, 1)
        half = (steps - 1) * 1.001 / 2
        offset = torch.where(steps % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z + torch.atanh(offset / half)) * half - offset
        digits = bounded + (bounded.round() - bounded).detach()
        # Whole numbers: half precision has too few bits for the number of a code.
        code = ((digits.detach().round().long() + steps // 2) * self.place.view(1, -1, 1, 1)).sum(1)
        return digits / (steps // 2), code

    def codes(self, values: Float[Tensor, "B C h w"]) -> Int[Tensor, "B h w"]:
        """The codes whose values are nearest."""
        steps = self.steps.view(1, -1, 1, 1)
        digits = (values * (steps // 2)).round().long() + steps // 2
        return (digits.clamp_min(0).minimum(steps - 1) * self.place.view(1, -1, 1, 1)).sum(1)

    def values(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """The quantised values of codes."""
        digits = codes[:, None] // self.place.view(1, -1, 1, 1) % self.steps.view(1, -1, 1, 1)
        half = self.steps.view(1, -1, 1, 1) // 2
        return (digits - half) / half


class Residual(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width, eps=1e-6), nn.GroupNorm(8, width, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Shape is kept."""
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


class VQ(ImageTokenizer):
    """Image tokenizer: pixels to codes and back.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.quantizer = FiniteScalar(config.levels)
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        if generator is not None:
            self.init_(generator)

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> tuple[Float[Tensor, "B 3 S S"], Int[Tensor, "B h w"]]:
        """Reconstruction and codes of images in [-1, 1].

        Raises:
            ConfigError: The images have another size than the tokenizer.
        """
        values, codes = self.quantizer(self._encode(pixels))
        return self.decoder(values), codes

    def usage(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B"]:
        """See `variety`."""
        return self.variety(codes)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Int[Tensor, "B h w"]:
        """Codes 0 .. K-1 of images in [-1, 1], int64, row-major."""
        return self.quantizer(self._encode(pixels))[1]

    @torch.no_grad()
    def latents(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B C h w"]:
        """Quantised values in [-1, 1] of images in [-1, 1], for networks that draw continuous latents."""
        return self.quantizer(self._encode(pixels))[0]

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B h w"] | Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 S S"]:
        """Images in [-1, 1] of codes, or of latents, which are moved to the nearest code.

        Raises:
            ConfigError: A code lies outside the codebook.
        """
        codes = self.quantizer.codes(codes) if codes.is_floating_point() else codes
        self.check_codes(codes)
        values = self.quantizer.values(codes).to(next(self.decoder.parameters()).dtype)
        return self.decoder(values).float().clamp(-1, 1)

    def _encode(self, pixels: Tensor) -> Tensor:
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            raise ConfigError(f"images are {tuple(pixels.shape[-2:])}, the tokenizer takes ({size}, {size})")
        return self.encoder(pixels.to(next(self.encoder.parameters()).dtype))

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> VQ:
        """Draw initial weights: Kaiming-normal convolutions, zero second convolution of each residual block."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
                nn.init.zeros_(cast("Tensor", module.bias))
        for module in self.modules():
            if isinstance(module, Residual):
                nn.init.zeros_(module.conv2.weight)
        return self


VQ.Config = Config


def _encoder(c: Config) -> nn.Sequential:
    parts: list[nn.Module] = [nn.PixelUnshuffle(c.stem), nn.Conv2d(3 * c.stem**2, c.widths[0], 3, padding=1)]
    for i, width in enumerate(c.widths):
        if i:
            parts.append(nn.Conv2d(c.widths[i - 1], width, 4, stride=2, padding=1))
        parts += [Residual(width) for _ in range(c.blocks)]
    last = c.widths[-1]
    return nn.Sequential(*parts, nn.GroupNorm(8, last, eps=1e-6), nn.SiLU(), nn.Conv2d(last, len(c.levels), 1))


def _decoder(c: Config) -> nn.Sequential:
    widths = c.widths[::-1]
    parts: list[nn.Module] = [nn.Conv2d(len(c.levels), widths[0], 3, padding=1)]
    for i, width in enumerate(widths):
        if i:
            parts += [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(widths[i - 1], width, 3, padding=1)]
        parts += [Residual(width) for _ in range(c.blocks)]
    out = nn.Conv2d(widths[-1], 3 * c.stem**2, 3, padding=1)
    return nn.Sequential(*parts, nn.GroupNorm(8, widths[-1], eps=1e-6), nn.SiLU(), out, nn.PixelShuffle(c.stem))
