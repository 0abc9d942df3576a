"""Rotary positions on several axes, and what stretches rotary positions to inputs longer than those of training.

`mmdiff.nn.rope` turns a sequence in the half-split pairing (j, j + K/2) of LLaMA; here channels are divided among the
axes of an image or a video, and pair as (2j, 2j + 1) unless asked otherwise. Text and grids of two or three axes
differ only in their positions and in how the channels are divided.

Source: RoFormer (arXiv 2104.09864); RIFLEx (arXiv 2502.15894); the context rules are those of LongLLaDA
(arXiv 2506.14429) and UltraLLaDA (arXiv 2510.10481).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "Riflex",
    "Stretch",
    "axis_tables",
    "frequencies",
    "grid_positions",
    "intrinsic_frequency",
    "rotate_pairs",
    "stretch",
]


@dataclass(frozen=True)
class Riflex:
    """Slow down one frequency so that it does not come round within a longer input.

    Attributes:
        k: Number of the frequency, from 1; `intrinsic_frequency` finds it.
        length: Length to generate, in positions of the axis. Use it only when this exceeds the period.

    Source: RIFLEx (arXiv 2502.15894), section 3.3.
    """

    k: int
    length: int


@dataclass(frozen=True)
class Stretch:
    """A base for longer inputs.

    Attributes:
        critical: Channels whose period was fully seen in training.
        scale: Factor of the base.
        theta: The new base.
    """

    critical: int
    scale: float
    theta: float


def frequencies(dim: int, theta: float, *, riflex: Riflex | None = None) -> Float[Tensor, "J"]:
    """The frequencies theta^(-2j/dim), j = 0 .. dim/2 - 1, in float64.

    Args:
        dim: Channels of the axis, even.
        theta: Base.
        riflex: Replace one of them.

    >>> frequencies(4, 100.0).tolist()
    [1.0, 0.1]
    """
    out = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    if riflex is not None:
        # Nine tenths of a turn over the whole length: less than one period.
        out[riflex.k - 1] = 0.9 * 2 * math.pi / riflex.length
    return out


def axis_tables(
    positions: Float[Tensor, "L A"],
    sizes: Sequence[int],
    theta: float,
    *,
    interleaved: bool = True,
    riflex: Mapping[int, Riflex] | None = None,
) -> tuple[Float[Tensor, "L K"], Float[Tensor, "L K"]]:
    """Cosine and sine tables of positions on A axes, computed in float64, returned in float32.

    A 2-D table is (column, row) with half the channels each; a 3-D one is (time, row, column) with 1/4, 3/8 and 3/8.

    Args:
        positions: [L, A] positions, fractional ones too.
        sizes: Channels of each axis, even, in order; they sum to K.
        theta: Base of the frequencies.
        interleaved: Each angle twice in a row, for `rotate_pairs`; False: all angles and all again, as
            `mmdiff.nn.rope` pairs them.
        riflex: Axis -> frequency to replace there.

    Returns:
        (cos, sin), each float32 [L, K], on the device of ``positions``.
    """
    rules = riflex or {}
    waves = [frequencies(size, theta, riflex=rules.get(axis)) for axis, size in enumerate(sizes)]
    places = positions.double().unbind(1)
    angles = torch.cat([p[:, None] * w.to(p.device) for p, w in zip(places, waves, strict=True)], dim=1)
    angles = angles.repeat_interleave(2, dim=1) if interleaved else torch.cat((angles, angles), dim=1)
    return angles.cos().float(), angles.sin().float()


def grid_positions(
    shape: Sequence[int], *, start: Sequence[float] | None = None, stop: Sequence[float] | None = None
) -> Float[Tensor, "L A"]:
    """Positions of the cells of a grid, row-major, one column per axis, in float64.

    Args:
        shape: Cells per axis, such as (rows, columns).
        start: First position of each axis; default 0.
        stop: Position one past the last, to spread the cells over a crop box; default: steps of 1 from 0.

    >>> grid_positions((2, 2)).tolist()
    [[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]

    Source: published code of CogVideoX and Hunyuan-DiT: the last position of an axis is stop * (n - 1) / n.
    """
    start, stop = start or [0.0] * len(shape), stop or [float(n) for n in shape]
    axes = [
        torch.linspace(a, b * (n - 1) / n, n, dtype=torch.float64, device="cpu")
        for n, a, b in zip(shape, start, stop, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(shape))


def rotate_pairs(
    x: Float[Tensor, "B H L K"], cos: Float[Tensor, "L K"], sin: Float[Tensor, "L K"]
) -> Float[Tensor, "B H L K"]:
    """Rotate heads whose channels pair as (2j, 2j + 1), in the dtype of the tables; returned in that of ``x``."""
    y = x.to(cos.dtype)
    a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.addcmul(y * cos, torch.stack((-b, a), dim=-1).flatten(-2), sin).to(x.dtype)


def intrinsic_frequency(dim: int, theta: float, repeats: int) -> tuple[int, int]:
    """The frequency whose period is nearest to the length at which a model starts to repeat itself.

    Args:
        dim: Channels of the axis.
        theta: Base.
        repeats: That length, in positions.

    Returns:
        (k, period): its number from 1, and its period in whole positions.

    >>> intrinsic_frequency(16, 256.0, 48)
    (4, 50)
    """
    periods = [round(2 * math.pi / f) for f in frequencies(dim, theta).tolist()]
    k = min(range(len(periods)), key=lambda j: abs(periods[j] - repeats))
    return k + 1, periods[k]


def stretch(theta: float, head_dim: int, trained: int, wanted: int, *, bidirectional: bool = True) -> Stretch:
    """A base with which a model reads ``wanted`` tokens though it was trained on ``trained``.

    The channels whose period was seen in full keep turning as they did at the end of the trained range.

    Args:
        theta: Base of training.
        head_dim: K.
        trained: Length of training.
        wanted: Length to read.
        bidirectional: The model sees distances of both signs, a range twice as long; False gives the rule for causal
            models.

    >>> stretch(500000.0, 128, 4096, 16384).critical
    70

    Source: diffusion-aware NTK of UltraLLaDA (arXiv 2510.10481); the causal rule as used by LongLLaDA.
    """
    span = (2 if bidirectional else 1) / (2 * math.pi)
    critical = 2 * math.ceil(head_dim / 2 * math.log(span * trained, theta))
    scale = (span * wanted) ** (head_dim / critical) / theta
    return Stretch(critical, scale, scale * theta)
