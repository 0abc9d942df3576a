"""The image of a sample as a model sees it: one square or the crops of its tiling, and the slots they take.

Decoding is ``mmdiff.images``'; squares, their augmentation and their memory are ``transforms``'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdiff.batch import Layout
from mmdiff.errors import ConfigError, SampleError
from mmdiff.images import cut, decode

from .reader import Sample
from .transforms import PixelCache, Pixels

__all__ = ["Picture", "Pictures"]


@dataclass(frozen=True)
class Picture:
    """What a sequence needs to know of an image.

    Attributes:
        slots: Image tokens it takes.
        given: The fields of `mmdiff.batch.Example` that hold it: ``pixels`` or ``images``.
    """

    slots: int
    given: dict[str, Any]


class Pictures:
    """Makes the picture of a sample.

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
        """The image as one square, [1, 3, S, S].

        Raises:
            SampleError: No image, or one that cannot be decoded.
        """
        return self._pixels(sample, generator)

    def __call__(self, sample: Sample, generator: torch.Generator) -> Picture:
        """The image as the model reads it; errors as in `square`."""
        if self.tiling is None:
            return Picture(self.layout.features, {"pixels": self.square(sample, generator)})
        try:
            (crops,) = cut([decode(sample.image())], self.layout.image_size, self.tiling)
        except SampleError as error:
            raise SampleError(error.reason, f"{sample}: {error}") from None
        return Picture(crops.view.tokens(math.isqrt(self.layout.features)), {"images": (crops,)})
