"""The backbone: LLaDA, a LLaMA-shaped transformer with bidirectional attention.

Embeddings in, blocks, hidden states out; the text head is one head among others. LLaDA-8B, the language model of
LLaDA-V, iLLaDA and the demo's small model are configurations of this one class. The network gets no time input: a
masked-diffusion model reads the noise level off the masks.

Source: LLaDA (arXiv 2502.09992) and the modelling file that ships with the LLaDA-8B checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmdiff.batch import Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.nn.attention import Attention
from mmdiff.nn.layers import RMSNorm, SwiGLU
from mmdiff.nn.rope import stretched, tables
from mmdiff.nn.store import FeatureStore, Store, take

__all__ = ["Config", "LLaDA"]


@config
class Config:
    """Shape and token ids of a LLaDA network; the defaults are LLaDA-8B's."""

    type: Literal["llada"] = "llada"
    """Family name."""
    vocab_size: int = Field(126464, gt=0)
    """V, rows of the embedding and of the head."""
    width: int = Field(4096, gt=0)
    """D, size of the residual stream."""
    depth: int = Field(32, gt=0)
    """Number of blocks."""
    heads: int = Field(32, gt=0)
    """Query heads; head_dim = width / heads."""
    kv_heads: int = Field(32, gt=0)
    """Key/value heads; fewer than heads = grouped attention."""
    ffn_width: int = Field(12288, gt=0)
    """Hidden size of the SwiGLU layers."""
    max_length: int = Field(4096, gt=0)
    """Longest sequence the model was trained for."""
    rope_theta: float = Field(500000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_full_precision: bool = True
    """Rotate in float32 (OLMo-layout files); False: tables in the model's dtype (LLaMA-layout files)."""
    norm_eps: float = Field(1e-5, gt=0)
    """Epsilon of the RMS norms."""
    tied: bool = False
    """Whether the head is the transposed embedding."""
    mask_id: int = 126336
    """The absorbing state of the diffusion."""
    bos_id: int = 126080
    """Start of a conversation."""
    eos_id: int = 126081
    """End of text; also the padding."""
    eot_id: int = 126348
    """End of a turn."""

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigError(f"width {self.width} must be an even multiple of heads {self.heads}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        for name in ("mask_id", "bos_id", "eos_id", "eot_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(f"{name} {getattr(self, name)} is outside the vocabulary of {self.vocab_size}")

    def with_width(self, width: int) -> Config:
        """The same network at another width: head_dim and the ratio of the feed-forward layer stay."""
        heads = max(1, width * self.heads // self.width)
        kv_heads = max(1, heads * self.kv_heads // self.heads)
        ffn_width = width * self.ffn_width // self.width
        return dataclasses.replace(self, width=width, heads=heads, kv_heads=kv_heads, ffn_width=ffn_width)

    def with_depth(self, depth: int) -> Config:
        """The same network with ``depth`` blocks."""
        return dataclasses.replace(self, depth=depth)

    def with_length(self, length: int) -> Config:
        """The same network for sequences of ``length`` > ``max_length``: a larger rotary base, no other weights.

        Source: UltraLLaDA (arXiv 2510.10481), before its further training.
        """
        head_dim = self.width // self.heads
        theta = stretched(head_dim, self.rope_theta, 2 * self.max_length, 2 * length)[2]
        return dataclasses.replace(self, max_length=length, rope_theta=theta)


class Block(nn.Module):
    """Pre-norm block: attention, then SwiGLU, each added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config.width, config.heads, config.kv_heads)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.ffn_width)

    def forward(
        self,
        x: Float[Tensor, "B q D"],
        rope: tuple[Tensor, Tensor],
        mask: Bool[Tensor, "#B 1 _ T"] | None,
        *,
        store: Store | None,
        layer: int,
        index: Int[Tensor, "B q"] | None,
        queries: Int[Tensor, "B p"] | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """One block; arguments as in `mmdiff.nn.attention.Attention.forward`."""
        y = self.self_attn(self.input_layernorm(x), rope, mask, store=store, layer=layer, index=index, queries=queries)
        x = (x if queries is None else take(x, queries)) + y
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDA(PretrainedModule):
    """The bidirectional transformer.

    Args:
        config: Shape and token ids.
        generator: Draws the initial weights; None leaves PyTorch's allocation (for weights that are loaded next).
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if generator is not None:
            self.init_(generator)

    def forward(
        self,
        ids: Int[Tensor, "B L"] | None = None,
        *,
        embeds: Float[Tensor, "B L D"] | None = None,
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L *A"] | None = None,
        attend: Bool[Tensor, "#B L L"] | None = None,
        store: Store | None = None,
        index: Int[Tensor, "B q"] | None = None,
        head_index: Int[Tensor, "B p"] | None = None,
    ) -> Float[Tensor, "B _ V"]:
        """Logits for the same positions (no shift); arguments as in `hidden`."""
        return self.head(
            self.hidden(
                ids,
                embeds=embeds,
                valid=valid,
                positions=positions,
                attend=attend,
                store=store,
                index=index,
                head_index=head_index,
            )
        )

    def hidden(
        self,
        ids: Int[Tensor, "B L"] | None = None,
        *,
        embeds: Float[Tensor, "B L D"] | None = None,
        valid: Bool[Tensor, "B L"] | None = None,
        positions: Int[Tensor, "B L *A"] | None = None,
        attend: Bool[Tensor, "#B L L"] | None = None,
        store: Store | None = None,
        index: Int[Tensor, "B q"] | None = None,
        head_index: Int[Tensor, "B p"] | None = None,
    ) -> Float[Tensor, "B _ D"]:
        """Hidden states after the final norm.

        Args:
            ids: Int64 [B, L], the canvas; exactly one of ``ids`` and ``embeds`` is given.
            embeds: Float [B, L, D], the canvas as input embeddings.
            valid: Bool [B, L], False = padding, never attended. None = all real.
            positions: Int64 [B, L] rotary positions, or [B, L, A] along several axes (`mmdiff.nn.rope.tables`); default
                0 .. L-1 for every row.
            attend: Bool [B or 1, L, L], True = query (first axis) may see key; default everything.
            store: Keys and values of the L slots; the computed slots are written, the others read if filled.
            index: Int64 [B, q], the slots to compute; default all. Needs ``store`` unless all are computed.
            head_index: Int64 [B, p], slots (among the computed ones) whose states are returned; default all computed.

        Returns:
            Float [B, q, D], or [B, p, D] with ``head_index``.

        Raises:
            ConfigError: Both or neither of ``ids`` and ``embeds``; ``index`` without ``store``.
        """
        if (ids is None) == (embeds is None):
            raise ConfigError("give exactly one of ids and embeds")
        if index is not None and store is None:
            raise ConfigError("index needs a store: slots that are not computed must come from somewhere")
        given = ids if embeds is None else embeds
        assert given is not None
        length = given.shape[1]
        if positions is None:
            positions = torch.arange(length, device=given.device)[None]
        if store is not None:
            store.mark(index, given.device)
        mask = _mask(valid, attend, store, index)
        if index is not None:
            given, positions = take(given, index), take(positions, index)
        x = self.embed_tokens(given) if embeds is None else given
        if head_index is not None and index is not None:
            head_index = _places(index, head_index, length)
        return self.norm(self._blocks(x, positions, mask, store, index, head_index))

    def head(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Text logits of hidden states."""
        if self.config.tied:
            return nn.functional.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def layout(self) -> Layout:
        """What this model expects of a sequence: text alone."""
        return Layout(vocab_size=self.config.vocab_size)

    def embed_slots(self, ids: Int[Tensor, "B L"], images: None = None) -> Float[Tensor, "B L D"]:
        """Input embeddings of a canvas; the same call as of networks that see images.

        Raises:
            ConfigError: Images are given.
        """
        if images is not None:
            raise ConfigError("this model sees no images; leave them out, or use a model with a vision tower")
        return self.embed_tokens(ids)

    def text_head(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Text logits of hidden states; the same call as of networks with several heads."""
        return self.head(hidden)

    def _blocks(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        store: Store | None,
        index: Tensor | None,
        wanted: Tensor | None,
    ) -> Tensor:
        """All blocks; of the last one only the rows ``wanted`` of ``x``, the others being needed by nobody."""
        cos, sin = tables(positions, self.config.width // self.config.heads, self.config.rope_theta)
        if not self.config.rope_full_precision:
            cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        if isinstance(store, FeatureStore):
            for layer, block in enumerate(self.layers):
                x = store.run(layer, block, x, (cos, sin), mask)
            return x if wanted is None else take(x, wanted)
        *first, last = self.layers
        for layer, block in enumerate(first):
            x = block(x, (cos, sin), mask, store=store, layer=layer, index=index)
        return last(x, (cos, sin), mask, store=store, layer=len(first), index=index, queries=wanted)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> LLaDA:
        """Draw initial weights: truncated normal at 3 std, std by fan-in, outputs of block i divided by sqrt(2(i+1)).

        Source: the ``mitchell`` rule of the published LLaDA code.
        """
        width, ffn = self.config.width, self.config.ffn_width

        def draw(weight: Tensor, std: float) -> None:
            nn.init.trunc_normal_(weight, 0.0, std, -3 * std, 3 * std, generator=generator)

        draw(self.embed_tokens.weight, width**-0.5)
        if not self.config.tied:
            draw(self.lm_head.weight, width**-0.5)
        for i, block in enumerate(cast("list[Block]", self.layers)):
            depth = math.sqrt(2 * (i + 1))
            attention, mlp = block.self_attn, block.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
                draw(linear.weight, width**-0.5)
            draw(attention.o_proj.weight, width**-0.5 / depth)
            draw(mlp.down_proj.weight, ffn**-0.5 / depth)
            block.input_layernorm.weight.fill_(1)
            block.post_attention_layernorm.weight.fill_(1)
        self.norm.weight.fill_(1)
        return self


LLaDA.Config = Config


def _places(index: Int[Tensor, "B q"], wanted: Int[Tensor, "B p"], length: int) -> Int[Tensor, "B p"]:
    """Where the slots ``wanted`` stand among the computed slots ``index``."""
    place = torch.zeros(index.shape[0], length, dtype=torch.long, device=index.device)
    place.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
    return place.gather(1, wanted)


def _mask(
    valid: Tensor | None, attend: Tensor | None, store: Store | None, index: Tensor | None
) -> Bool[Tensor, "#B 1 _ T"] | None:
    """One boolean mask for scaled-dot-product attention, or None if everything may be seen."""
    seen = [m for m in (valid, None if store is None else store.filled) if m is not None]
    mask = None if not seen else torch.stack(seen).all(0)[:, None, None, :]
    if attend is not None:
        rows = attend if index is None else take(attend, index)
        mask = rows[:, None] if mask is None else mask & rows[:, None]
    return mask
