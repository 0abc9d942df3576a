"""Class-conditional masked image transformers over discrete codes: both generations of the public PyTorch MaskGIT.

``bert``: the first, a BERT-like network with the class as one more token. ``halton``: the second, modulated by the
class, with the tokenizer of LlamaGen. Both read codes 0 .. K-1 and K for a masked one, and classes 0 .. C-1 and C for
none.

Source: MaskGIT (arXiv 2202.04200), its PyTorch reproduction (arXiv 2310.14400) and Halton-MaskGIT (arXiv 2503.17076),
published code's behaviour; key names as published.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.batch import Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule, check_range
from mmdiff.nn.dropout import Dropout, attention
from mmdiff.nn.layers import RMSNorm

__all__ = ["SIZES", "Config", "MaskGIT"]


@config
class Config:
    """Shape of a masked image transformer; the defaults are those of the first generation at 256 pixels."""

    type: Literal["maskgit"] = "maskgit"
    """Family name."""
    variant: Literal["bert", "halton"] = "bert"
    """Generation of the network."""
    grid: int = Field(16, gt=0)
    """Tokens per side."""
    codebook: int = Field(1024, gt=1)
    """K, number of codes; also the id of a masked token."""
    classes: int = Field(1000, gt=0)
    """Number of classes; the label of that number means no class."""
    width: int = Field(768, gt=0)
    """D, size of the residual stream."""
    depth: int = Field(24, gt=0)
    """Number of blocks."""
    heads: int = Field(16, gt=0)
    """Attention heads."""
    ffn_width: int = Field(3072, gt=0)
    """Nominal hidden size of the feed-forward layers; ``halton`` uses two thirds of it, rounded up to 256."""
    registers: int = Field(1, ge=0)
    """Extra tokens without a meaning (``halton``)."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """In training."""
    readout_scale: float = Field(1.0, gt=0)
    """Factor of the readout's input (muP: base width / width, times a tunable multiplier)."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} must be a multiple of heads {self.heads}")

    @property
    def tokens(self) -> int:
        """N, tokens of an image."""
        return self.grid**2

    @property
    def ffn_hidden(self) -> int:
        """Hidden size of the feed-forward layers as built."""
        return self.ffn_width if self.variant == "bert" else 256 * math.ceil(int(2 * self.ffn_width / 3) / 256)

    def with_width(self, width: int) -> Config:
        """The same network at another width: head_dim and the ratio of the feed-forward layer stay."""
        heads = max(1, width * self.heads // self.width)
        return dataclasses.replace(self, width=width, heads=heads, ffn_width=width * self.ffn_width // self.width)

    def with_depth(self, depth: int) -> Config:
        """The same network with ``depth`` blocks."""
        return dataclasses.replace(self, depth=depth)


def _halton(width: int, depth: int, heads: int) -> Config:
    return Config(
        variant="halton",
        grid=24,
        codebook=16384,
        width=width,
        depth=depth,
        heads=heads,
        ffn_width=4 * width,
    )


SIZES: dict[str, Config] = {
    "bert-256": Config(),
    "bert-512": Config(grid=32),
    "halton-tiny-384": _halton(384, 6, 6),
    "halton-base-384": _halton(768, 12, 12),
    "halton-large-384": _halton(1024, 24, 16),
    "halton-xlarge-384": _halton(1152, 28, 16),
}
"""Published sizes."""


class Prenorm(nn.Module):
    """A layer behind a norm: ``fn(norm(x))``."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Shape is kept."""
        return self.fn(self.norm(x))


class InProjAttention(nn.Module):
    """Bidirectional attention with the key names of PyTorch's own."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Shape is kept."""
        query, key, value = _heads(F.linear(x, self.in_proj_weight, self.in_proj_bias), 3, self.heads)
        out = attention(query, key, value, rate=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class BertAttention(nn.Module):
    """Attention under the published name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mha = InProjAttention(config.width, config.heads, config.dropout)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Shape is kept."""
        return self.mha(x)


class BertFeedForward(nn.Module):
    """Feed-forward layers under the published name."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d, f, rate = config.width, config.ffn_width, config.dropout
        self.net = nn.Sequential(nn.Linear(d, f), nn.GELU(), Dropout(rate), nn.Linear(f, d), Dropout(rate))

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Shape is kept."""
        return self.net(x)


class BertBlock(nn.ModuleList):
    """Attention, then the feed-forward layer, each added to the residual stream."""

    def __init__(self, config: Config) -> None:
        super().__init__([Prenorm(config.width, BertAttention(config)), Prenorm(config.width, BertFeedForward(config))])

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """One block."""
        for layer in self:
            x = x + layer(x)
        return x


class Stack(nn.Module):
    """Blocks under the published name."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)


class Bert(nn.Module):
    """The first generation.

    Args:
        config: Shape.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, d, rate = config, config.width, config.dropout
        entries = c.codebook + 1 + c.classes + 1
        self.config = config
        self.tok_emb = nn.Embedding(entries, d)
        self.pos_emb = nn.Parameter(torch.empty(1, c.tokens + 1, d))
        self.bias = nn.Parameter(torch.empty(c.tokens + 1, entries))
        self.first_layer = nn.Sequential(*_mlp(d, rate), Dropout(rate), nn.Linear(d, d))
        self.last_layer = nn.Sequential(*_mlp(d, rate))
        self.transformer = Stack(BertBlock(config) for _ in range(c.depth))

    def forward(self, codes: Int[Tensor, "B N"], labels: Int[Tensor, "B"]) -> Float[Tensor, "B N V"]:
        """Logits of the codes and of the mask; the class is the last token of the sequence."""
        c = self.config
        ids = torch.cat((codes, labels[:, None] + c.codebook + 1), dim=1)
        x = self.first_layer(self.tok_emb(ids) + self.pos_emb)
        for block in self.transformer.layers:
            x = block(x)
        x = _scaled(self.last_layer(x[:, : c.tokens]), c.readout_scale)
        seen = c.codebook + 1  # the rows of classes are never read
        return x @ self.tok_emb.weight[:seen].T + self.bias[: c.tokens, :seen]


def _mlp(width: int, rate: float) -> list[nn.Module]:
    norms = [nn.LayerNorm(width, eps=1e-12) for _ in range(2)]
    return [norms[0], Dropout(rate), nn.Linear(width, width), nn.GELU(), norms[1]]


class HaltonAttention(nn.Module):
    """Attention without biases; queries and keys are normalised over the whole width, before the heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.width
        self.heads, self.dropout = config.heads, config.dropout
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Shape is kept."""
        width = x.shape[-1:]
        parts = (F.rms_norm(self.wq(x), width, eps=_EPS), F.rms_norm(self.wk(x), width, eps=_EPS), self.wv(x))
        query, key, value = (_heads(part, 1, self.heads)[0] for part in parts)
        out = attention(query, key, value, rate=self.dropout if self.training else 0.0)
        return self.wo(out.transpose(1, 2).flatten(2))


class HaltonFeedForward(nn.Module):
    """SwiGLU without biases; two thirds of the nominal width, rounded up to a multiple of 256."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(config.width, config.ffn_hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(config.ffn_hidden, config.width, bias=False)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B L D"]) -> Float[Tensor, "B L D"]:
        """Shape is kept."""
        return self.drop(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class HaltonBlock(nn.Module):
    """Attention and feed-forward layer, each shifted, scaled and gated by the class."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        d = config.width
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(d, 6 * d))
        self.ln1, self.ln2 = RMSNorm(d, _EPS), RMSNorm(d, _EPS)
        self.attn, self.ff = HaltonAttention(config), HaltonFeedForward(config)

    def forward(self, x: Float[Tensor, "B L D"], cls: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B L D"]:
        """One block."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.mlp(cls).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.ln1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.ff(self.ln2(x) * (1 + scale2) + shift2)


class BiasedRMSNorm(RMSNorm):
    """An RMS norm with a bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalise the last axis."""
        return super().forward(x) + self.bias


class HaltonNorm(nn.Module):
    """The last norm, modulated by the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = BiasedRMSNorm(width, _EPS)
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Float[Tensor, "B L D"], cls: Float[Tensor, "B 1 D"]) -> Float[Tensor, "B L D"]:
        """Shape is kept."""
        shift, scale = self.mlp(cls).chunk(2, dim=-1)
        return self.norm_final(x) * (1 + scale) + shift


class Halton(nn.Module):
    """The second generation; the readout is the transposed embedding.

    Args:
        config: Shape.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        c, d = config, config.width
        self.config = config
        self.cls_emb = nn.Embedding(c.classes + 1, d)
        self.tok_emb = nn.Embedding(c.codebook + 1, d)
        self.pos_emb = nn.Embedding(c.tokens, d)
        self.reg_tokens = nn.Embedding(c.registers, d) if c.registers else None
        self.in_drop = Dropout(c.dropout)
        self.transformer = Stack(HaltonBlock(c) for _ in range(c.depth))
        self.last_norm = HaltonNorm(d)
        self.head = nn.ParameterDict({"bias": nn.Parameter(torch.empty(c.codebook + 1))})

    def forward(self, codes: Int[Tensor, "B N"], labels: Int[Tensor, "B"]) -> Float[Tensor, "B N V"]:
        """Logits of the codes and of the mask; registers stand after the image tokens."""
        cls = self.cls_emb(labels)[:, None]
        x = self.tok_emb(codes) + self.pos_emb.weight
        if self.reg_tokens is not None:
            x = torch.cat((x, self.reg_tokens.weight.expand(len(x), -1, -1)), dim=1)
        x = self.in_drop(x)
        for block in self.transformer.layers:
            x = block(x, cls)
        x = _scaled(self.last_norm(x[:, : codes.shape[1]], cls), self.config.readout_scale)
        return F.linear(x, self.tok_emb.weight, self.head["bias"])


class MaskGIT(PretrainedModule):
    """Logits of every image token, given the known ones and the class.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.net = Bert(config) if config.variant == "bert" else Halton(config)
        if generator is not None:
            self.init_(generator)

    def layout(self) -> Layout:
        """What tasks build examples for."""
        return Layout(codes=self.config.tokens, codebook=self.config.codebook, classes=self.config.classes)

    def forward(self, codes: Int[Tensor, "B *grid"], labels: Int[Tensor, "B"]) -> Float[Tensor, "B N V"]:
        """Logits.

        Args:
            codes: Int64 [B, N] or [B, h, w], row-major; K = masked.
            labels: Classes 0 .. C-1; C = none.

        Returns:
            Float [B, N, K+1]; the last entry is that of the mask, which published networks have too.

        Raises:
            ConfigError: Another number of tokens, or codes or labels out of range.
        """
        codes = codes.flatten(1)
        if codes.shape[1] != self.config.tokens:
            raise ConfigError(f"{codes.shape[1]} codes per image, the network takes {self.config.tokens}")
        check_range("codes", codes, self.config.codebook)
        check_range("labels", labels, self.config.classes)
        return self.net(codes, labels)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> MaskGIT:
        """Normal(0, 0.02) weights, zero biases; modulations of the second generation start at zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2 and not name.endswith("bias"):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif "bias" in name:
                nn.init.zeros_(parameter)
            if ".mlp.1." in name:
                nn.init.zeros_(parameter)
        return self


MaskGIT.Config = Config

_EPS = 1e-5
"""Of every norm of the second generation."""


def _scaled(x: Float[Tensor, "*B D"], factor: float) -> Float[Tensor, "*B D"]:
    """The input of a readout; at 1 it is left as it is."""
    return x if factor == 1 else x * factor


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    b, length, _ = x.shape
    return x.view(b, length, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
