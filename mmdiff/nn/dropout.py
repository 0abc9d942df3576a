"""Dropout whose random bits are cheap on a CPU, alone and inside attention.

PyTorch draws a float per number there, a tenth of a training step of a small network; 16 bits decide as well.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Dropout", "attention", "dropped"]

_VALUES = 1 << 16


class Dropout(nn.Dropout):
    """`torch.nn.Dropout` with the draws of `dropped`."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Shape is kept."""
        return dropped(x, self.p) if self.training else x


def dropped(x: Float[Tensor, "*B D"], rate: float) -> Float[Tensor, "*B D"]:
    """A share of the numbers set to 0, the others scaled so that the mean stays.

    On a CPU the share is a multiple of 2**-16, by which the others are scaled too; elsewhere PyTorch's own kernel runs.
    Draws come from PyTorch's generator, as those of its own dropout do.

    Args:
        x: Any shape.
        rate: Share, in [0, 1).
    """
    if not rate or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    limit = min(round(rate * _VALUES), _VALUES - 1)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(torch.iinfo(torch.int64).min, None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    # 0 below the limit and 1 from it on, by arithmetic: a comparison takes several times as long.
    keep = bits.float().add_(_VALUES // 2 + 1 - limit).clamp_(0, 1).mul_(_VALUES / (_VALUES - limit))
    return x * keep.to(x.dtype)


def attention(
    query: Float[Tensor, "B H q K"],
    key: Float[Tensor, "B H L K"],
    value: Float[Tensor, "B H L K"],
    attend: Bool[Tensor, "B 1 1 L"] | None = None,
    rate: float = 0.0,
) -> Float[Tensor, "B H q K"]:
    """Scaled dot-product attention with dropout of its probabilities.

    PyTorch has no kernel for this on a CPU: it takes the steps one by one, as is done here with cheaper draws.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        attend: True = may be attended; None = everything.
        rate: Share of the probabilities that is dropped.
    """
    if not rate or query.device.type != "cpu" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attend, dropout_p=rate)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if attend is not None:
        scores = scores.masked_fill(~attend, -torch.inf)
    return dropped(scores.softmax(-1), rate) @ value
