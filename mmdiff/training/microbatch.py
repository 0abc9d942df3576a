"""Cutting a batch into parts for gradient accumulation."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mmdiff.batch import IMAGE, Batch
from mmdiff.errors import ConfigError

__all__ = ["split"]


def split(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into at most ``parts`` parts of consecutive rows, as equal as possible, each with its images.

    Raises:
        ConfigError: It cannot be told which images belong to which row.
    """
    if parts == 1:
        return [batch]
    rows = torch.arange(len(batch)).tensor_split(min(parts, len(batch)))
    images = _images_per_row(batch)
    ends = images.cumsum(0).tolist()
    out = []
    for chunk in rows:
        first, last = int(chunk[0]), int(chunk[-1]) + 1
        begin, end = (ends[first - 1] if first else 0), ends[last - 1]
        out.append(_rows(batch, first, last, slice(begin, end)))
    return out


def _images_per_row(batch: Batch) -> Tensor:
    if batch.pixels is None:
        # Images with a tiling lie row by row and are cut with the rows.
        return torch.zeros(len(batch), dtype=torch.long)
    images, slots = len(batch.pixels), (batch.ids == IMAGE).sum(1)
    if not bool(slots.any()) and images == len(batch):
        return torch.ones(len(batch), dtype=torch.long)
    per_image, rest = divmod(int(slots.sum()), images)
    if rest or not per_image or bool((slots % per_image).any()):
        raise ConfigError(
            f"train.accumulate: {images} images do not divide among rows with {slots.tolist()} image slots; "
            "set train.accumulate=1 or give each sample its images' slots"
        )
    return slots // per_image


def _rows(batch: Batch, first: int, last: int, images: slice) -> Batch:
    given = {f.name: getattr(batch, f.name) for f in fields(Batch) if f.name != "pixels"}
    cut: dict[str, Any] = {name: None if value is None else value[first:last] for name, value in given.items()}
    pixels = batch.pixels[images] if batch.pixels is not None and images.stop > images.start else None
    return Batch(**cut, pixels=pixels)
