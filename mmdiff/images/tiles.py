"""Crops: a picture of any shape, several pictures, or a video, as the squares that a vision tower reads.

Source: LLaVA-NeXT's any-resolution scheme as LLaDA-V publishes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.images.decoding import DEFAULT_LIMITS, ImageInput, open_image, to_pixels
from mmdiff.images.views import Flat, Frames, Newlines, Tiles, View

__all__ = [
    "Crops",
    "Size",
    "Tiling",
    "best_canvas",
    "crop_sizes",
    "cut",
    "film",
    "sample_frames",
    "to_shape",
    "views_of",
]

Size = tuple[int, int]
"""Width and height in pixels."""

_GREY = (127, 127, 127)
_BLACK = (0, 0, 0)


@config
class Tiling:
    """How pictures become crops and image tokens; the defaults are LLaDA-V's ``anyres_max_4``."""

    crops: Literal["anyres", "pad", "square"] = "anyres"
    """A picture alone in its prompt. anyres: squeezed to a square, and cut into tiles at a larger size; pad: one square
    with grey bars; square: squeezed. Several pictures in a prompt are padded in any case."""
    pinpoints: tuple[tuple[int, int], ...] | None = None
    """Sizes [width, height] in pixels that a picture may be fitted into before it is cut, in the order in which equal
    ones are preferred; null: all products of 1 to 6 tiles."""
    limit: int | None = Field(4, gt=0)
    """N of ``anyres_max_N``: a map of tiles much larger than N crops is scaled down to their number of tokens; null:
    never."""
    newlines: bool = True
    """End the rows of tiles, and every padded picture, with the newline token (``spatial_unpad``); False: none, and
    tiles keep their padding (``flat``)."""
    video_newlines: Newlines = "grid"
    """Where a video has newline tokens: after every row (grid), after every frame, once at the end, or nowhere."""

    def __post_init__(self) -> None:
        for width, height in self.pinpoints or ():
            if min(width, height) < 1 or width * height > DEFAULT_LIMITS.max_pixels:
                raise ConfigError(
                    f"pinpoint {width} x {height}: sides must be at least 1 pixel and the area at most "
                    f"{DEFAULT_LIMITS.max_pixels:,}"
                )
        if self.pinpoints == ():
            raise ConfigError("pinpoints is empty; leave it out for all products of 1 to 6 tiles")

    def canvases(self, size: int) -> tuple[Size, ...]:
        """The pinpoints for tiles of ``size`` pixels.

        Raises:
            ConfigError: One of them is no multiple of the tile.
        """
        if self.pinpoints is None:
            return tuple((size * i, size * j) for i in range(1, 7) for j in range(1, 7))
        if odd := [p for p in self.pinpoints if p[0] % size or p[1] % size]:
            raise ConfigError(f"pinpoint {list(odd[0])} is no multiple of the {size} pixels of a tile")
        return self.pinpoints


@dataclass(frozen=True)
class Crops:
    """What one placeholder in a text shows.

    Attributes:
        pixels: Float32 [T, 3, S, S] in [-1, 1].
        view: How their features become image tokens.
    """

    pixels: Float[Tensor, "T 3 S S"]
    view: View

    def to(self, target: Any) -> Crops:
        """The same with pixels on a device, or of the device and dtype of a tensor."""
        return Crops(self.pixels.to(target), self.view)


def cut(
    pictures: Sequence[ImageInput], size: int, tiling: Tiling | None = None, *, compat: str | None = None
) -> list[Crops]:
    """The pictures of one prompt as crops.

    Args:
        pictures: Anything `open_image` takes.
        size: Side of a crop in pixels.
        tiling: How; None: every picture squeezed to one square, without newline tokens.
        compat: ``"reference"``: pictures of one crop get no newline token, as in LLaDA-V's published evaluation; in its
            training, and here by default, they do.

    Returns:
        One `Crops` per picture.

    Raises:
        ConfigError: A picture of a kind that is not taken, or pinpoints that do not fit ``size``.
        SampleError: A picture that is too large, empty or damaged.
    """
    if tiling is None:
        return [Crops(to_pixels(p, size)[None], Flat()) for p in pictures]
    opened = [open_image(p) for p in pictures]
    if len(opened) == 1 and tiling.crops == "anyres":
        return [_tiled(opened[0], size, tiling)]
    if len(opened) > 1 or tiling.crops == "pad":
        opened = [_padded(p) for p in opened]
    newline = tiling.newlines and compat != "reference"
    return [Crops(to_pixels(p, size)[None], Flat(newline=newline)) for p in opened]


def crop_sizes(patches: int, patch: int, max_ratio: float = 4.0) -> list[Size]:
    """Sizes of at most so many patches, from wide to high, that pictures of any shape are cut to.

    Args:
        patches: Most patches of a picture.
        patch: Side of a patch in pixels.
        max_ratio: Largest ratio of the longer to the shorter side.

    >>> crop_sizes(4, 16)
    [(64, 16), (32, 16), (32, 32), (16, 32), (16, 64)]

    Source: Lumina-DiMOO (arXiv 2510.06308), published data code.
    """
    out, wide, high = [], patches, 1
    while wide:
        if max(wide, high) <= max_ratio * min(wide, high):
            out.append((wide * patch, high * patch))
        if (high + 1) * wide <= patches:
            high += 1
        else:
            wide -= 1
    return out


def to_shape(image: ImageInput, sizes: Sequence[Size]) -> Float[Tensor, "3 H W"]:
    """A picture at the size whose shape is most like its own: scaled to cover it, and cut around the centre."""
    rgb = image if isinstance(image, Image.Image) and image.mode == "RGB" else open_image(image)
    width, height = max(
        sizes, key=lambda s: min(s[0] / s[1] / (rgb.width / rgb.height), rgb.width / rgb.height / (s[0] / s[1]))
    )
    scale = max(width / rgb.width, height / rgb.height)
    grown = (max(width, round(rgb.width * scale)), max(height, round(rgb.height * scale)))
    left, top = (grown[0] - width) // 2, (grown[1] - height) // 2
    cut_out = rgb.resize(grown, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    return torch.from_numpy(np.array(cut_out)).permute(2, 0, 1).float() / 127.5 - 1


def views_of(sizes: Sequence[Size], size: int, tiling: Tiling | None = None) -> list[Flat | Tiles]:
    """The views that `cut` gives pictures of these sizes (width, height), without their pixels.

    Args:
        sizes: Of the pictures of one prompt, upright.
        size: Side of a crop in pixels.
        tiling: As in `cut`.

    Raises:
        ConfigError: Pinpoints that do not fit ``size``.
    """
    if tiling is None:
        return [Flat() for _ in sizes]
    if len(sizes) > 1 or tiling.crops != "anyres":
        return [Flat(newline=tiling.newlines) for _ in sizes]
    canvas = best_canvas(sizes[0], tiling.canvases(size))
    columns, rows = canvas[0] // size, canvas[1] // size
    return [Tiles(columns, rows, sizes[0], tiling.limit) if tiling.newlines else Flat(1 + columns * rows)]


def film(frames: Sequence[ImageInput], size: int, tiling: Tiling) -> Crops:
    """The frames of a video, each squeezed to one crop; arguments and errors as in `cut`."""
    return Crops(torch.stack([to_pixels(f, size) for f in frames]), Frames(len(frames), tiling.video_newlines))


def sample_frames(total: int, count: int) -> list[int]:
    """Numbers of ``count`` frames spread evenly over ``total``; all if there are no more.

    Source: LLaVA's published choice, linspace truncated to integers.
    """
    if total <= count:
        return list(range(total))
    return [int(i) for i in np.linspace(0, total - 1, count)]


def best_canvas(picture: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that keeps most pixels of a picture, of equal ones the smallest, of these the first."""
    width, height = picture

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def _tiled(image: Image.Image, size: int, tiling: Tiling) -> Crops:
    canvas = best_canvas(image.size, tiling.canvases(size))
    sheet = Image.new("RGB", canvas, _BLACK)
    inner = _fitted(image.size, canvas)
    offset = ((canvas[0] - inner[0]) // 2, (canvas[1] - inner[1]) // 2)
    sheet.paste(image.resize(inner, Image.Resampling.BICUBIC), offset)
    columns, rows = canvas[0] // size, canvas[1] // size
    corners = [(size * column, size * row) for row in range(rows) for column in range(columns)]
    tiles = [sheet.crop((x, y, x + size, y + size)) for x, y in corners]
    pixels = torch.stack([to_pixels(crop, size) for crop in (image, *tiles)])
    if not tiling.newlines:
        return Crops(pixels, Flat(len(pixels)))
    return Crops(pixels, Tiles(columns, rows, image.size, tiling.limit))


def _fitted(picture: Size, canvas: Size) -> Size:
    """The largest size of the same shape inside a canvas."""
    (w, h), (width, height) = picture, canvas
    if width / w < height / h:
        return width, min(math.ceil(h * (width / w)), height)
    return min(math.ceil(w * (height / h)), width), height


def _padded(image: Image.Image) -> Image.Image:
    """The picture in the middle of a grey square."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), _GREY)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
