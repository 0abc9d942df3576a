"""The vision tower: SigLIP's transformer over image patches, and the connector into the language model.

Written on plain modules rather than taken from transformers, whose SigLIP changed its module names twice within
version 5; a test holds both to the same numbers.

Source: SigLIP (arXiv 2303.15343), SigLIP 2 (arXiv 2502.14786); the connector is LLaVA-1.5's two-layer MLP.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.nn.layers import MLP

__all__ = ["Config", "SiglipTower", "connector"]


@config
class Config:
    """Shape of a SigLIP tower; the defaults are LLaDA-V's siglip2-so400m-patch14-384 without its last layer."""

    type: Literal["siglip"] = "siglip"
    """Family name."""
    image_size: int = Field(384, gt=0)
    """Side of the square input, pixels."""
    patch_size: int = Field(14, gt=0)
    """Side of a patch; rows and columns that do not fill a patch are not seen."""
    width: int = Field(1152, gt=0)
    """Size of the residual stream."""
    depth: int = Field(26, gt=0)
    """Number of layers that are used (the published tower has 27 and LLaDA-V drops the last)."""
    heads: int = Field(16, gt=0)
    """Attention heads."""
    ffn_width: int = Field(4304, gt=0)
    """Hidden size of the feed-forward layers."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of the layer norms."""
    post_norm: bool = False
    """Normalise the features with ``post_layernorm``. LLaDA-V does not; a tower that is trained from nothing should,
    for its residual stream grows to many times the scale of text embeddings."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} of the vision tower must be a multiple of heads {self.heads}")
        if self.patch_size > self.image_size:
            raise ConfigError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Patches per image."""
        return self.grid**2

    def with_width(self, width: int) -> Config:
        """The same tower at another width; head_dim stays."""
        heads = max(1, width * self.heads // self.width)
        return dataclasses.replace(self, width=width, heads=heads, ffn_width=width * self.ffn_width // self.width)

    def with_depth(self, depth: int) -> Config:
        """The same tower with ``depth`` layers."""
        return dataclasses.replace(self, depth=depth)


class Embeddings(nn.Module):
    """Patch projection plus learned positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Embedding(config.tokens, config.width)

    def forward(self, pixels: Float[Tensor, "M 3 S S"]) -> Float[Tensor, "M N D"]:
        """Patches in row-major order."""
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding.weight


class SelfAttention(nn.Module):
    """Full attention with biases, head_dim^-0.5 scale."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "M N D"]) -> Float[Tensor, "M N D"]:
        """Every token attends to every token of its image."""
        m, n, _ = x.shape
        q, k, v = (p(x).view(m, n, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).reshape(m, n, -1))


class Layer(nn.Module):
    """Pre-norm block: attention, then MLP."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.self_attn = SelfAttention(config.width, config.heads)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config.width, config.ffn_width)

    def forward(self, x: Float[Tensor, "M N D"]) -> Float[Tensor, "M N D"]:
        """Shape is kept."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SiglipTower(PretrainedModule):
    """Pixels to patch features: the state after the last kept layer.

    ``post_layernorm`` is part of the published weights; where it is not applied it is kept so that a checkpoint
    survives conversion in both directions.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Layer(config) for _ in range(config.depth))
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.post_layernorm.requires_grad_(config.post_norm)
        if generator is not None:
            self.init_(generator)

    def forward(self, pixels: Float[Tensor, "M 3 S S"]) -> Float[Tensor, "M N D"]:
        """Features of M images in [-1, 1].

        Raises:
            ConfigError: The images have another size than the tower.
        """
        size = self.config.image_size
        if pixels.shape[-2:] != (size, size):
            raise ConfigError(f"images are {tuple(pixels.shape[-2:])}, the vision tower takes ({size}, {size})")
        x = self.embeddings(pixels)
        for layer in cast("nn.ModuleList", self.encoder.layers):
            x = layer(x)
        return self.post_layernorm(x) if self.config.post_norm else x

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> SiglipTower:
        """Draw initial weights: Xavier-uniform matrices, zero biases, N(0, 1/D) positions, fan-in patch projection."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        conv = self.embeddings.patch_embedding
        nn.init.normal_(conv.weight, 0.0, conv.weight[0].numel() ** -0.5, generator=generator)
        nn.init.zeros_(cast("Tensor", conv.bias))
        nn.init.normal_(self.embeddings.position_embedding.weight, 0.0, self.config.width**-0.5, generator=generator)
        return self


SiglipTower.Config = Config


def connector(vision_width: int, width: int, *, generator: torch.Generator | None = None) -> nn.Sequential:
    """LLaVA's ``mlp2x_gelu`` projector: Linear, exact GELU, Linear; keys ``0.*`` and ``2.*``."""
    first, second = nn.Linear(vision_width, width), nn.Linear(width, width)
    if generator is not None:
        for linear in (first, second):
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.zeros_(linear.bias)
    return nn.Sequential(first, nn.GELU(), second)
