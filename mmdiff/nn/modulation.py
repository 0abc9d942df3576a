"""Blocks that a condition vector steers: norms without weights, modulation, gates, and the embedding of time.

Source: DiT (arXiv 2212.09748), section 3.2 (adaLN-zero).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.nn.posemb import sinusoid

__all__ = ["Embedder", "TimeEmbedder", "gated", "modulate", "normed"]

EPS = 1e-6
"""Epsilon of the norms without weights in every published DiT and MMDiT."""

TIME_CHANNELS = 256
"""Channels of the sinusoid of time in every published DiT and MMDiT."""


def normed(x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
    """Layer norm without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def modulate(
    x: Float[Tensor, "B L D"], shift: Float[Tensor, "B D"], scale: Float[Tensor, "B D"]
) -> Float[Tensor, "B L D"]:
    """X (1 + scale) + shift, one pair of vectors per row."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def gated(
    x: Float[Tensor, "B L D"], gate: Float[Tensor, "B D"], branch: Float[Tensor, "B L D"]
) -> Float[Tensor, "B L D"]:
    """X + gate * branch, one gate vector per row."""
    return torch.addcmul(x, gate[:, None], branch)


class Embedder(nn.Module):
    """Two linear layers with SiLU between: a vector into the space of conditions.

    Args:
        channels: Size of the input.
        width: D.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B D"]:
        """Condition vectors."""
        return self.mlp(x)


class TimeEmbedder(Embedder):
    """The same over the sinusoid of a time step.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__(TIME_CHANNELS, width)

    def forward(self, t: Float[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Condition vectors of times, as the checkpoint was trained to see them (0 .. 1000)."""
        return self.mlp(sinusoid(t, TIME_CHANNELS).to(self.mlp[0].weight.dtype))  # type: ignore[arg-type]
