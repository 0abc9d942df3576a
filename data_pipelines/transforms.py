"""Image bytes to pixels for training: decoding, fitting, optional augmentation, and a memory of decoded images.

Decoding itself is ``mmdiff.images``'; every random choice comes from the generator of the example.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff import rng
from mmdiff.config import Field, config
from mmdiff.errors import SampleError
from mmdiff.images import decode, to_pixels

from .reader import Sample

__all__ = ["AugmentConfig", "Fit", "PixelCache", "Pixels", "augment"]

Fit = Literal["square", "crop", "pad"]


@config
class AugmentConfig:
    """Random changes of a training image."""

    flip: bool = False
    """Mirror left and right, half of the time. Not for texts that name sides, nor for images with writing."""
    shift_px: int = Field(default=0, ge=0)
    """Move by up to this many pixels in each direction; white comes in from outside."""
    color: float = Field(default=0.0, ge=0, lt=1)
    """Scale brightness, contrast and saturation by up to 1 plus or minus this. Not for questions about colours."""


CacheKey = tuple[str, str, int, int, str]
"""Shard, key, number of the image, side, fit."""


class PixelCache:
    """Decoded images kept as uint8, up to a number of bytes; when full, nothing more is added.

    Nothing is ever thrown out: over epochs of a set larger than the cache, a part that stays beats one that turns over.

    Args:
        max_bytes: Bytes of pixels.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes
        self._images: dict[CacheKey, Tensor] = {}

    def __len__(self) -> int:
        return len(self._images)

    def get(self, key: CacheKey) -> Float[Tensor, "3 S S"] | None:
        """The pixels, exactly as they were added, or None."""
        image = self._images.get(key)
        return None if image is None else image.float().div_(127.5).sub_(1.0)

    def add(self, key: CacheKey, pixels: Float[Tensor, "3 S S"]) -> None:
        """Keep an image that came from 8-bit values."""
        if pixels.numel() <= self._left:
            self._left -= pixels.numel()
            # Truncating x + 0.5 rounds; torch.round would wake the thread pool for every small image.
            self._images[key] = pixels.add(1.0).mul_(127.5).add_(0.5).to(torch.uint8)


class Pixels:
    """Makes the pixels of a sample.

    Args:
        size: S, side of the result.
        fit: How a rectangle becomes a square, as in `mmdiff.images.to_pixels`.
        augmentation: Random changes, None for none.
        cache: Where decoded images are kept, None for nowhere.
    """

    def __init__(
        self,
        size: int,
        fit: Fit = "square",
        augmentation: AugmentConfig | None = None,
        cache: PixelCache | None = None,
    ) -> None:
        self.size, self.fit, self.augmentation, self.cache = size, fit, augmentation, cache

    def __call__(self, sample: Sample, generator: torch.Generator, number: int = 0) -> Float[Tensor, "1 3 S S"]:
        """Decoded, fitted and augmented image in [-1, 1]; ``number`` counts the sample's images from 0.

        Raises:
            SampleError: No image, or one that cannot be decoded.
        """
        key = (sample.url, sample.key, number, self.size, self.fit)
        pixels = self.cache.get(key) if self.cache is not None else None
        if pixels is None:
            pixels = self._decode(sample, number)
            if self.cache is not None:
                self.cache.add(key, pixels)
        return (pixels if self.augmentation is None else augment(pixels, self.augmentation, generator))[None]

    def _decode(self, sample: Sample, number: int) -> Float[Tensor, "3 S S"]:
        try:
            data = sample.images()[number] if number else sample.image()
            return to_pixels(decode(data), self.size, self.fit)
        except SampleError as error:
            text = str(error)
            raise SampleError(error.reason, text if text.startswith(str(sample)) else f"{sample}: {text}") from None


def augment(
    pixels: Float[Tensor, "3 S S"], options: AugmentConfig, generator: torch.Generator
) -> Float[Tensor, "3 S S"]:
    """One random variant of an image; the draws do not depend on which options are on."""
    u = rng.uniform(generator, (6,)).tolist()
    if options.flip and u[0] < 0.5:
        pixels = pixels.flip(-1)
    if options.shift_px:
        span = 2 * options.shift_px + 1
        pixels = _shift(pixels, int(u[1] * span) - options.shift_px, int(u[2] * span) - options.shift_px)
    if options.color:
        brightness, contrast, saturation = (1 + options.color * (2 * x - 1) for x in u[3:])
        unit = (pixels + 1) / 2 * brightness
        unit = unit.mean() + (unit - unit.mean()) * contrast
        gray = unit.mean(0, keepdim=True)
        pixels = (gray + (unit - gray) * saturation).clamp(0, 1) * 2 - 1
    return pixels


def _shift(pixels: Tensor, down: int, right: int) -> Tensor:
    out = torch.ones_like(pixels)
    height, width = pixels.shape[-2:]
    kept_h, kept_w = height - abs(down), width - abs(right)
    if kept_h > 0 and kept_w > 0:
        to_y, to_x, from_y, from_x = max(down, 0), max(right, 0), max(-down, 0), max(-right, 0)
        kept = pixels[:, from_y : from_y + kept_h, from_x : from_x + kept_w]
        out[:, to_y : to_y + kept_h, to_x : to_x + kept_w] = kept
    return out
