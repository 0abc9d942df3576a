"""The Vision-Transformer block, with key names as timm's, and gathering of slots.

A block can be asked for some of its slots only: keys and values come from all of them, the rest of the arithmetic
runs where the result is needed.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.nn.dropout import Dropout, attention

__all__ = ["SelfAttention", "ViTBlock", "take"]


def take(x: Float[Tensor, "#B L D"], index: Int[Tensor, "B q"]) -> Float[Tensor, "B q D"]:
    """The slots ``index`` of every row; a single row of ``x`` serves all."""
    if len(x) == 1:
        return x[0][index]
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class SelfAttention(nn.Module):
    """Bidirectional attention with one projection for queries, keys and values, with biases.

    Args:
        width: D.
        heads: H.
        dropout: Of attention probabilities, in training.
        proj_dropout: Of the result, in training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, proj_dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.proj_drop = Dropout(proj_dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        attend: Bool[Tensor, "B 1 1 L"] | None = None,
        index: Int[Tensor, "B q"] | None = None,
    ) -> Float[Tensor, "B q D"]:
        """Attend.

        Args:
            x: Float [B, L, D].
            attend: True = may be attended; None = everything.
            index: Slots that ask; None = all.
        """
        if index is None:
            query, key, value = self._heads(self.qkv(x), 3)
        else:
            weight, bias, width = self.qkv.weight, self.qkv.bias, x.shape[-1]
            (query,) = self._heads(F.linear(take(x, index), weight[:width], bias[:width]), 1)
            key, value = self._heads(F.linear(x, weight[width:], bias[width:]), 2)
        rate = self.dropout if self.training else 0.0
        out = attention(query, key, value, attend, rate)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        b, length, _ = x.shape
        return x.view(b, length, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x))), exact GELU."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = Dropout(dropout)

    def forward(self, x: Float[Tensor, "B q D"]) -> Float[Tensor, "B q D"]:
        """Shape is kept."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); mlp ratio 4, LayerNorm eps 1e-6.

    Args:
        width: D.
        heads: H.
        dropout: Of attention probabilities, in training.
        proj_dropout: After the projection and after both feed-forward layers, in training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, proj_dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = SelfAttention(width, heads, dropout, proj_dropout)
        self.mlp = FeedForward(width, 4 * width, proj_dropout)

    def forward(
        self,
        x: Float[Tensor, "B L D"],
        attend: Bool[Tensor, "B 1 1 L"] | None = None,
        index: Int[Tensor, "B q"] | None = None,
    ) -> Float[Tensor, "B q D"]:
        """One block; arguments as in `SelfAttention.forward`."""
        kept = x if index is None else take(x, index)
        x = kept + self.attn(self.norm1(x), attend, index)
        return x + self.mlp(self.norm2(x))
