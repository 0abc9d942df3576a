"""Tasks of image models that take no sequence: the image, encoded or as it is, and a class number or a text."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdiff import rng
from mmdiff.batch import Example, Layout
from mmdiff.errors import ConfigError, SampleError

from .reader import Sample

__all__ = ["LatentTask", "PromptedTask", "read_array", "read_latents"]

_MAX_BYTES = 8 << 20


class LatentTask:
    """Reads ``codes.npy``, ``latents.npy`` or ``moments.npy`` (mean, then log-variance) and a class.

    Args:
        options: A `task_config.LatentConfig`.
        layout: What the model expects.

    Raises:
        ConfigError: The model draws no classes.
    """

    def __init__(self, options: Any, layout: Layout) -> None:
        if not layout.classes:
            raise ConfigError("task 'latent': this model draws no classes; use a model of family emigm or maskgit")
        self.options, self.layout = options, layout
        self._numbers = {name: i for i, name in enumerate(options.classes)}

    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        """One example; draws the mirror and the posterior's noise."""
        flip = self.options.flip and float(rng.uniform(generator, (1,))) < 0.5
        empty = torch.zeros(0)
        return Example(
            key=sample.key,
            task="latent",
            ids=empty.long(),
            labels=empty.long(),
            weights=empty,
            droppable=empty.bool(),
            latents=self._codes(sample, flip)
            if self.layout.codes
            else read_latents(sample, self.layout.latents, flip, generator),
            cls=self._class(sample),
        )

    def _codes(self, sample: Sample, flip: bool) -> Tensor:
        values = _member(sample, "codes", flip)
        if values is None:
            raise SampleError("missing_codes", f"{sample}: no member codes.npy; run mmdiff data cache on these shards")
        fits = values.dtype.kind in "iu" and values.size == self.layout.codes
        if not fits or values.min() < 0 or values.max() >= self.layout.codebook:
            raise SampleError(
                "bad_codes",
                f"{sample}: codes.npy is {values.dtype} {values.shape}, the model draws {self.layout.codes} codes "
                f"below {self.layout.codebook:,}; run mmdiff data cache with this model's image tokenizer",
            )
        return torch.from_numpy(values.astype(np.int64))[None]

    def _class(self, sample: Sample) -> int:
        number = sample.text("cls")
        if number is None:
            name = sample.info().get(self.options.field)
            if name not in self._numbers:
                raise SampleError("missing_class", f"{sample}: {self.options.field} {name!r} is none of task.classes")
            return self._numbers[name]
        if not number.strip().isdecimal() or int(number.strip()[:9]) >= self.layout.classes:
            raise SampleError("bad_class", f"{sample}: class {number[:20]!r} is not below {self.layout.classes}")
        return int(number)


class PromptedTask:
    """A text and the image it describes, as latents of the cache or as pixels.

    Args:
        options: A `task_config.PromptedConfig`.
        layout: What the model expects.
        caption: (sample, options, generator) -> one of the sample's texts.
        square: (sample, generator) -> its picture, [1, 3, S, S].

    Raises:
        ConfigError: The model draws no latents, or pixels of other channels.
    """

    def __init__(
        self,
        options: Any,
        layout: Layout,
        caption: Callable[[Sample, Any, torch.Generator], str],
        square: Callable[[Sample, torch.Generator], Tensor],
    ) -> None:
        if not layout.latents or layout.classes:
            raise ConfigError("task 'prompted': this model draws nothing from texts; use a model of family mmdit")
        if options.image == "pixels" and layout.latents[0] != 3:
            raise ConfigError(
                f"task 'prompted': the model draws {layout.latents[0]} channels, pixels have 3; set the model's "
                "channels to 3, or image: latents"
            )
        self.options, self.layout, self._caption, self._square = options, layout, caption, square

    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        """One example; draws the text, the mirror and the posterior's noise."""
        text = self._caption(sample, self.options, generator)
        if self.options.image == "pixels":
            image = self._square(sample, generator)[0]
        else:
            flip = self.options.flip and float(rng.uniform(generator, (1,))) < 0.5
            image = read_latents(sample, self.layout.latents, flip, generator)
        empty = torch.zeros(0)
        return Example(
            key=sample.key,
            task="prompted",
            ids=empty.long(),
            labels=empty.long(),
            weights=empty,
            droppable=empty.bool(),
            latents=image,
            text=text,
        )


def read_latents(sample: Sample, shape: Sequence[int], flip: bool, generator: torch.Generator) -> Tensor:
    """Float32 latents of a sample: those stored, or a draw from the moments stored.

    Args:
        sample: With ``moments.npy`` (mean, then log-variance) or ``latents.npy``.
        shape: (C, h, w) of the latents that the model takes.
        flip: Take the mirrored ones, where they are.
        generator: Draws the posterior's noise.

    Raises:
        SampleError: There are none, or they have another shape or values that are not finite.
    """
    for name, times in (("moments", 2), ("latents", 1)):
        values = _member(sample, name, flip)
        if values is None:
            continue
        want = (shape[0] * times, *shape[1:])
        if values.dtype.kind != "f" or values.shape != want:
            raise SampleError(
                "bad_latents",
                f"{sample}: {name}.npy is {values.dtype} {values.shape}, the model takes {want}; run mmdiff data "
                "cache with this model's autoencoder",
            )
        found = torch.from_numpy(values.astype(np.float32))
        if not bool(torch.isfinite(found).all()):
            raise SampleError("bad_latents", f"{sample}: {name}.npy holds values that are not finite")
        if times == 1:
            return found
        mean, log_variance = found.chunk(2)
        return mean + (0.5 * log_variance).exp() * rng.normal(generator, mean.shape)
    raise SampleError("missing_latents", f"{sample}: no member moments.npy or latents.npy; run mmdiff data cache")


def _member(sample: Sample, name: str, flip: bool) -> np.ndarray | None:
    """An array of a sample; the mirrored one if it is asked for and there."""
    data = sample.members.get(f"{name}_flip.npy") if flip else None
    data = sample.members.get(f"{name}.npy") if data is None else data
    if data is None:
        return None
    array = read_array(data)
    if array is None:
        raise SampleError("bad_latents", f"{sample}: {name}.npy is not a small array of numbers")
    return array


def read_array(data: bytes, limit: int = _MAX_BYTES) -> np.ndarray | None:
    """An array in numpy's format; the header is checked before anything of its size is made."""
    if len(data) > limit:
        return None
    stream = io.BytesIO(data)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=1000)
        body = stream.read()
        if dtype.kind not in "iuf" or fortran or not body or math.prod(shape) * dtype.itemsize != len(body):
            return None
        return np.frombuffer(body, dtype=dtype).reshape(shape)
    except (ValueError, SyntaxError, TypeError, KeyError, EOFError, RecursionError, MemoryError):
        return None
