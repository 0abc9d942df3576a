"""Attention over a set of slots: bidirectional, masked, or against stored keys and values."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.nn.rope import rotate
from mmdiff.nn.store import Store, take

__all__ = ["Attention"]


class Attention(nn.Module):
    """Multi-head attention with rotary positions and grouped key/value heads, without biases.

    Args:
        width: D.
        heads: H query heads; head_dim K = D / H.
        kv_heads: Key/value heads; query head h uses head floor(h * kv_heads / heads).
    """

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B q D"],
        rope: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "#B 1 _ T"] | None = None,
        *,
        store: Store | None = None,
        layer: int = 0,
        index: Int[Tensor, "B q"] | None = None,
        queries: Int[Tensor, "B p"] | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """Attend from the q computed slots.

        Args:
            x: Float [B, q, D].
            rope: Tables of `mmdiff.nn.rope.tables` for the q slots.
            mask: Bool [B, 1, q or 1, T], True = may be attended; None = everything.
            store: Where fresh keys and values go and the other slots come from; None: the q slots are all there is.
            layer: Number of this layer in the store.
            index: Int64 [B, q], the slots of the store that ``x`` stands for; None = all of them, in order.
            queries: Int64 [B, p], rows of ``x`` that attend; default all q.

        Returns:
            Float [B, q, D], or [B, p, D] with ``queries``.
        """
        b, q, _ = x.shape
        key = rotate(self.k_proj(x).view(b, q, self.kv_heads, -1), *rope)
        value = self.v_proj(x).view(b, q, self.kv_heads, -1)
        if store is not None:
            key, value = store.write(layer, index, key, value)
        if queries is not None:
            x, rope = take(x, queries), (take(rope[0], queries), take(rope[1], queries))
            mask = mask if mask is None or mask.shape[2] == 1 else take(mask[:, 0], queries)[:, None]
        query = rotate(self.q_proj(x).view(*x.shape[:2], self.heads, -1), *rope)
        return self.o_proj(_attend(query, key, value, mask).flatten(2))


def _attend(
    query: Float[Tensor, "B q H K"],
    key: Float[Tensor, "B T h K"],
    value: Float[Tensor, "B T h K"],
    mask: Bool[Tensor, "#B 1 _ T"] | None,
) -> Float[Tensor, "B q H K"]:
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    q, heads = query.shape[1:3]
    if heads == key.shape[1]:
        return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=mask).transpose(1, 2)
    # Query heads of one group stand as further rows of its key head: no key is copied.
    groups = heads // key.shape[1]
    folded = query.unflatten(2, (-1, groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if mask is not None and mask.shape[2] != 1:
        mask = mask.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask)
    return out.unflatten(2, (groups, q)).permute(0, 3, 1, 2, 4).flatten(2, 3)
