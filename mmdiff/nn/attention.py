"""Attention over a set of slots: bidirectional, masked, or against stored keys and values.

`Store` is the common form of every key/value cache: T slots per layer, of which a pass recomputes some.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.nn.rope import rotate

__all__ = ["Attention", "Store"]


class Store:
    """Keys (rotated) and values of every layer for T slots per row.

    Args:
        layers: Number of attention layers.
        batch: B rows.
        slots: T slots per row.

    The tensors are allocated at the first write, in the dtype and on the device of what is written. A slot that was
    never written is not attended.
    """

    def __init__(self, layers: int, batch: int, slots: int) -> None:
        self.slots = slots
        self.filled: Bool[Tensor, "B T"] = torch.zeros(batch, slots, dtype=torch.bool)
        self._kv: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def mark(self, index: Int[Tensor, "B q"]) -> None:
        """Note that the slots ``index`` are written in this pass."""
        self.filled = self.filled.to(index.device).scatter(1, index, True)

    def write(
        self, layer: int, index: Int[Tensor, "B q"], k: Float[Tensor, "B H q K"], v: Float[Tensor, "B H q K"]
    ) -> tuple[Float[Tensor, "B H T K"], Float[Tensor, "B H T K"]]:
        """Write the slots ``index`` of one layer; returns keys and values of all T slots."""
        pair = self._kv[layer]
        if pair is None:
            shape = (*k.shape[:2], self.slots, k.shape[-1])
            pair = (k.new_zeros(shape), v.new_zeros(shape))
        where = index[:, None, :, None].expand_as(k)
        self._kv[layer] = pair = (pair[0].scatter(2, where, k), pair[1].scatter(2, where, v))
        return pair


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
        mask: Bool[Tensor, "#B 1 #q T"] | None = None,
        *,
        store: Store | None = None,
        layer: int = 0,
        index: Int[Tensor, "B q"] | None = None,
    ) -> Float[Tensor, "B q D"]:
        """Attend from the q computed slots.

        Args:
            x: Float [B, q, D].
            rope: Tables of `mmdiff.nn.rope.tables` for the q slots.
            mask: Bool [B, 1, q or 1, T], True = may be attended; None = everything.
            store: Where fresh keys and values go and the other slots come from; None: the q slots are all there is.
            layer: Number of this layer in the store.
            index: Int64 [B, q], the slots of the store that ``x`` stands for.

        Returns:
            Float [B, q, D].
        """
        b, q, _ = x.shape
        query = rotate(self.q_proj(x).view(b, q, self.heads, -1).transpose(1, 2), *rope)
        key = rotate(self.k_proj(x).view(b, q, self.kv_heads, -1).transpose(1, 2), *rope)
        value = self.v_proj(x).view(b, q, self.kv_heads, -1).transpose(1, 2)
        if store is not None and index is not None:
            key, value = store.write(layer, index, key, value)
        if self.kv_heads != self.heads:
            repeats = self.heads // self.kv_heads
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).reshape(b, q, -1))
