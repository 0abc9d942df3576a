"""Joint blocks: two streams with weights of their own and one attention over both; and blocks over a single stream.

The bricks of MMDiT (Stable Diffusion 3) and of the Flux layout that masked image models share with it.

Source: SD3 (arXiv 2403.03206), figure 2; the single blocks are Flux's, as in Meissonic (arXiv 2410.08261).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.nn.axial import rotate_pairs
from mmdiff.nn.layers import MLP, RMSNorm
from mmdiff.nn.modulation import EPS, gated, modulate, normed

__all__ = ["JointBlock", "Projections", "SingleBlock", "Stream", "Table", "attend"]

Table = tuple[Float[Tensor, "_ K"], Float[Tensor, "_ K"]]
Heads = tuple[Float[Tensor, "B H L K"], Float[Tensor, "B H L K"], Float[Tensor, "B H L K"]]


def attend(heads: Heads, scale: float | None) -> Float[Tensor, "B L D"]:
    """Every position attends to every position; heads come back side by side."""
    return F.scaled_dot_product_attention(*heads, scale=scale).transpose(1, 2).flatten(2)


class Projections(nn.Module):
    """Queries, keys and values of one stream, and the way back into it.

    Args:
        width: D.
        heads: H.
        qk_norm: RMS-normalise queries and keys per head.
        out: Whether there is a way back.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, out: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        if qk_norm:
            self.q_norm, self.k_norm = RMSNorm(width // heads, EPS), RMSNorm(width // heads, EPS)
        if out:
            self.out = nn.Linear(width, width)
        self.qk_norm = qk_norm

    def forward(self, x: Float[Tensor, "B L D"], rope: Table | None = None) -> Heads:
        """Queries, keys and values per head, rotated if tables are given."""
        q, k, v = (linear(x).unflatten(-1, (self.heads, -1)) for linear in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return (q, k, v) if rope is None else (rotate_pairs(q, *rope), rotate_pairs(k, *rope), v)


class Stream(nn.Module):
    """What one modality has of its own in a joint block.

    Args:
        width: D.
        heads: H.
        qk_norm: See `Projections`.
        dual: A second attention within the stream.
        last: The stream ends here: it gives keys and values, and gets nothing back.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, dual: bool = False, last: bool = False) -> None:
        super().__init__()
        self.parts = 2 if last else 9 if dual else 6
        self.modulation = nn.Linear(width, self.parts * width)
        self.attn = Projections(width, heads, qk_norm=qk_norm, out=not last)
        if dual:
            self.attn2 = Projections(width, heads, qk_norm=qk_norm)
        if not last:
            self.mlp = MLP(width, 4 * width)

    def vectors(self, condition: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B D"], ...]:
        """The modulation of this block: (shift, scale, gate) for attention, feed-forward and the second attention.

        A stream that ends here has (scale, shift) only, in this order, as in diffusers' files.
        """
        return self.modulation(condition).chunk(self.parts, dim=1)


class JointBlock(nn.Module):
    """One block of an MMDiT.

    Args:
        width: D.
        heads: H.
        qk_norm: RMS-normalise queries and keys.
        dual: The image stream has a second attention of its own (SD3.5-medium).
        last: The text stream ends here.
        attention_scale: Factor of the logits; None: 1 / sqrt(head_dim).
        residual_scale: Factor of every branch.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        qk_norm: bool,
        dual: bool = False,
        last: bool = False,
        attention_scale: float | None = None,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.image = Stream(width, heads, qk_norm=qk_norm, dual=dual)
        self.text = Stream(width, heads, qk_norm=qk_norm, last=last)
        self.dual, self.last = dual, last
        self.attention_scale, self.residual_scale = attention_scale, residual_scale

    def forward(
        self,
        image: Float[Tensor, "B N D"],
        text: Float[Tensor, "B M D"],
        condition: Float[Tensor, "B D"],
        rope: tuple[Table, Table] | None = None,
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B M D"]]:
        """Both streams after the block.

        Args:
            image: Float [B, N, D].
            text: Float [B, M, D].
            condition: Float [B, D], SiLU already applied.
            rope: Tables of the image and of the text positions.

        Returns:
            (image, text); the text as it came in if its stream ends here.
        """
        i, t = self.image.vectors(condition), self.text.vectors(condition)
        plain = normed(image)
        modulated = modulate(plain, i[0], i[1])
        context = modulate(normed(text), t[1], t[0]) if self.last else modulate(normed(text), t[0], t[1])
        image_rope, text_rope = rope or (None, None)
        heads = zip(self.image.attn(modulated, image_rope), self.text.attn(context, text_rope), strict=True)
        q, k, v = (torch.cat(pair, dim=2) for pair in heads)
        seen, read = attend((q, k, v), self.attention_scale).split((image.shape[1], text.shape[1]), dim=1)
        image = self._add(image, i[2], self.image.attn.out(seen))
        if self.dual:
            # The second attention reads the norm of the block's input, not of the stream as it is by now.
            second = attend(self.image.attn2(modulate(plain, i[6], i[7]), image_rope), self.attention_scale)
            image = self._add(image, i[8], self.image.attn2.out(second))
        image = self._add(image, i[5], self.image.mlp(modulate(normed(image), i[3], i[4])))
        if self.last:
            return image, text
        text = self._add(text, t[2], self.text.attn.out(read))
        return image, self._add(text, t[5], self.text.mlp(modulate(normed(text), t[3], t[4])))

    def _add(self, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        return gated(x, gate if self.residual_scale == 1 else gate * self.residual_scale, branch)


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side on one stream.

    Args:
        width: D.
        heads: H.
        attention_scale: Factor of the logits; None: 1 / sqrt(head_dim).
        residual_scale: Factor of the branch.
    """

    def __init__(
        self, width: int, heads: int, *, attention_scale: float | None = None, residual_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.attn = Projections(width, heads, qk_norm=True, out=False)
        self.fc1 = nn.Linear(width, 4 * width)
        self.out = nn.Linear(5 * width, width)
        self.attention_scale, self.residual_scale = attention_scale, residual_scale

    def forward(
        self, x: Float[Tensor, "B L D"], condition: Float[Tensor, "B D"], rope: Table | None = None
    ) -> Float[Tensor, "B L D"]:
        """The stream after the block; ``condition`` has gone through SiLU already."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=1)
        y = modulate(normed(x), shift, scale)
        seen = attend(self.attn(y, rope), self.attention_scale)
        branch = self.out(torch.cat((seen, F.gelu(self.fc1(y), approximate="tanh")), dim=-1))
        return gated(x, gate if self.residual_scale == 1 else gate * self.residual_scale, branch)
