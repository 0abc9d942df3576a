"""The images of a sample as a model sees them: squares or the crops of their tiling, and the slots they take.

Decoding is ``mmdiff.images``'; squares, their augmentation and their memory are ``transforms``'.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmdiff.batch import Layout
from mmdiff.errors import ConfigError, SampleError
from mmdiff.images import Limits, cut, decode, views_of

from .reader import Sample
from .transforms import PixelCache, Pixels

__all__ = ["NO_PICTURE", "Picture", "PictureSizes", "Pictures"]

_ORIENTATION, _LYING = 0x0112, (5, 6, 7, 8)


@dataclass(frozen=True)
class Picture:
    """What a sequence needs to know of its images.

    Attributes:
        slots: Image tokens of each.
        given: The fields of `mmdiff.batch.Example` that hold them: ``pixels`` or ``images``.
    """

    slots: tuple[int, ...]
    given: dict[str, Any]


NO_PICTURE = Picture((), {})
"""Of a sequence without images."""


class Pictures:
    """Makes the pictures of a sample.

    Args:
        options: A task's configuration with ``fit``, ``augment`` and perhaps ``crops``.
        layout: What the model expects.
        cache: Where decoded squares are kept, None for nowhere.

    Raises:
        ConfigError: Random changes of an image that is cut into tiles.
    """

    def __init__(self, options: Any, layout: Layout, cache: PixelCache | None) -> None:
        self.layout = layout
        self.tiling = None if getattr(options, "crops", "model") == "square" else layout.tiling
        if self.tiling is not None and options.augment is not None:
            raise ConfigError(f"task {options.type!r}: augment is for squares; leave it out, or set crops: square")
        self._pixels = Pixels(layout.image_size, options.fit, options.augment, cache)

    def square(self, sample: Sample, generator: torch.Generator) -> Tensor:
        """The first image as one square, [1, 3, S, S].

        Raises:
            SampleError: No image, or one that cannot be decoded.
        """
        return self._pixels(sample, generator)

    def __call__(self, sample: Sample, generator: torch.Generator, numbers: Sequence[int] = (0,)) -> Picture:
        """Images of the given numbers, counted from 0, as the model reads them.

        Raises:
            SampleError: Fewer images, or one that cannot be decoded.
        """
        images = images_of(sample, numbers)
        if self.tiling is None:
            squares = [self._pixels(sample, generator, number) for number in numbers]
            return Picture((self.layout.features,) * len(numbers), {"pixels": torch.cat(squares)})
        try:
            crops = cut([decode(data) for data in images], self.layout.image_size, self.tiling)
        except SampleError as error:
            raise SampleError(error.reason, f"{sample}: {error}") from None
        grid = math.isqrt(self.layout.features)
        return Picture(tuple(c.view.tokens(grid) for c in crops), {"images": tuple(crops)})

    def sizes(self) -> PictureSizes:
        """What tells the slots of the same pictures without decoding them."""
        return PictureSizes(self)


class PictureSizes:
    """Takes the place of `Pictures` where only lengths are asked for: slots from the images' headers, no pixels.

    Args:
        pictures: What it stands for.
    """

    def __init__(self, pictures: Pictures) -> None:
        self._layout, self._tiling = pictures.layout, pictures.tiling

    @property
    def reads_headers(self) -> bool:
        """Whether the slots depend on the images at all."""
        return self._tiling is not None

    def square(self, sample: Sample, generator: torch.Generator) -> None:
        """Nothing; a square has no length."""

    def __call__(self, sample: Sample, generator: torch.Generator, numbers: Sequence[int] = (0,)) -> Picture:
        """Slots of the same images; errors as in `Pictures`, as far as headers tell."""
        if self._tiling is None:
            return Picture((self._layout.features,) * len(numbers), {})
        sizes = [_upright_size(sample, data) for data in images_of(sample, numbers)]
        grid = math.isqrt(self._layout.features)
        return Picture(tuple(v.tokens(grid) for v in views_of(sizes, self._layout.image_size, self._tiling)), {})


def images_of(sample: Sample, numbers: Sequence[int]) -> list[bytes]:
    """Bytes of the images of these numbers.

    Raises:
        SampleError: Reason ``"missing_image"``: there are fewer.
    """
    images = [sample.image()] if max(numbers) == 0 else sample.images()
    if len(images) <= max(numbers):
        raise SampleError("missing_image", f"{sample}: {max(numbers) + 1} images are asked for, it holds {len(images)}")
    return [images[number] for number in numbers]


def _upright_size(sample: Sample, data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=Limits().formats) as image:
            lying = image.getexif().get(_ORIENTATION) in _LYING
            return (image.height, image.width) if lying else (image.width, image.height)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SampleError("undecodable_image", f"{sample}: {type(error).__name__}: {error}") from None
