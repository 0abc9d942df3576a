"""Views: how the features of a picture's crops become its image tokens.

A view is plain numbers, so the length of a sequence is known before any network runs; `View.arrange` does the same to
features. Which crops a picture has is ``tiles``'.

Source: LLaVA-NeXT's and LLaDA-V's published splicing of image features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Flat", "Frames", "Newlines", "Tiles", "View"]

Newlines = Literal["grid", "frame", "one_token", "no_token"]
"""Where a video gets the newline token: after every row, after every frame, once at the end, nowhere."""

_SLACK = 1.1
"""A map is scaled down only if its side is more than this many times too long."""


@runtime_checkable
class View(Protocol):
    """What one placeholder in a text stands for."""

    @property
    def crops(self) -> int:
        """Number of crops that the network reads."""
        ...

    def tokens(self, side: int) -> int:
        """Number of image tokens, for crops of ``side`` x ``side`` features."""
        ...

    def arrange(self, features: Float[Tensor, "T N D"], newline: Float[Tensor, "D"]) -> Float[Tensor, "n D"]:
        """The image tokens of the features of all crops; N is a square number."""
        ...


@dataclass(frozen=True)
class Flat:
    """The features of every crop in row-major order.

    Attributes:
        crops: Number of crops.
        newline: Whether the newline token ends them.
    """

    crops: int = 1
    newline: bool = False

    def tokens(self, side: int) -> int:
        """All features, and the newline."""
        return self.crops * side**2 + self.newline

    def arrange(self, features: Float[Tensor, "T N D"], newline: Float[Tensor, "D"]) -> Float[Tensor, "n D"]:
        """Crop after crop."""
        flat = features.flatten(0, 1)
        return torch.cat([flat, newline[None]]) if self.newline else flat


@dataclass(frozen=True)
class Tiles:
    """The whole picture as one crop, then the map of its tiles: without their padding, scaled down if it is large.

    Attributes:
        columns: Tiles side by side.
        rows: Tiles below each other.
        size: Width and height of the picture in pixels.
        limit: The map is scaled down to about as many features as this many crops have; None: never.
    """

    columns: int
    rows: int
    size: tuple[int, int]
    limit: int | None = None

    @property
    def crops(self) -> int:
        """The whole picture and every tile."""
        return 1 + self.columns * self.rows

    def tokens(self, side: int) -> int:
        """The first crop, and every row of the map with its newline."""
        height, width = self._scaled(self._kept(side), side)
        return side**2 + height * (width + 1)

    def arrange(self, features: Float[Tensor, "T N D"], newline: Float[Tensor, "D"]) -> Float[Tensor, "n D"]:
        """The first crop as it is; the map row by row, each row ended by the newline."""
        side = math.isqrt(features.shape[1])
        grid = features[1:].unflatten(0, (self.rows, self.columns)).unflatten(2, (side, side))
        grid = grid.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)  # D, rows of features, columns of features
        kept = self._kept(side)
        top, left = (grid.shape[1] - kept[0]) // 2, (grid.shape[2] - kept[1]) // 2
        grid = grid[:, top : top + kept[0], left : left + kept[1]]
        scaled = self._scaled(kept, side)
        if scaled != kept:
            grid = F.interpolate(grid[None], scaled, mode="bilinear")[0]
        return torch.cat([features[0], _with_newlines(grid, newline)])

    def _kept(self, side: int) -> tuple[int, int]:
        """Rows and columns of the map that show the picture and not the padding around it."""
        width, height = self.size
        rows, columns = self.rows * side, self.columns * side
        if width / height > columns / rows:
            spare = rows - int(height * (columns / width))
            return rows - spare // 2 * 2, columns  # an odd rest leaves one row of padding
        spare = columns - int(width * (rows / height))
        return rows, columns - spare // 2 * 2

    def _scaled(self, kept: tuple[int, int], side: int) -> tuple[int, int]:
        height, width = kept
        if self.limit is None:
            return kept
        times = math.sqrt(height * width / (self.limit * side**2))
        if times <= _SLACK:
            return kept
        return max(1, int(height // times)), max(1, int(width // times))  # a line of a picture keeps its one row


@dataclass(frozen=True)
class Frames:
    """The frames of a video, each scaled down to half its side.

    Attributes:
        crops: Number of frames.
        newline: Where the newline token goes.
    """

    crops: int
    newline: Newlines = "grid"

    def tokens(self, side: int) -> int:
        """All features after the scaling, and the newlines."""
        side = _halved(side)
        newlines = {"grid": self.crops * side, "frame": self.crops, "one_token": 1, "no_token": 0}
        return self.crops * side**2 + newlines[self.newline]

    def arrange(self, features: Float[Tensor, "T N D"], newline: Float[Tensor, "D"]) -> Float[Tensor, "n D"]:
        """Frame after frame."""
        side = math.isqrt(features.shape[1])
        grid = features.transpose(1, 2).unflatten(2, (side, side))
        grid = F.interpolate(grid, (_halved(side), _halved(side)), mode="bilinear")
        if self.newline == "grid":
            return _with_newlines(grid.transpose(0, 1).flatten(1, 2), newline)
        frames = grid.flatten(2).transpose(1, 2)
        if self.newline == "frame":
            frames = torch.cat([frames, newline.expand(len(frames), 1, -1)], dim=1)
        flat = frames.flatten(0, 1)
        return torch.cat([flat, newline[None]]) if self.newline == "one_token" else flat


def _halved(side: int) -> int:
    return math.ceil(side / 2)


def _with_newlines(grid: Float[Tensor, "D h w"], newline: Float[Tensor, "D"]) -> Float[Tensor, "n D"]:
    """Row after row, each ended by the newline."""
    rows = torch.cat([grid, newline[:, None, None].expand(-1, grid.shape[1], 1)], dim=2)
    return rows.flatten(1).T
