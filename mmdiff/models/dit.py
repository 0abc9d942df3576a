"""DiT: the class-conditional diffusion transformer over latents, in standard parametrisation and in muP.

A muP checkpoint has the names and shapes of a standard one; its forward multipliers are plain numbers in `Config`.

Source: DiT (arXiv 2212.09748) and its published code; muP for diffusion transformers (arXiv 2505.15270).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.batch import Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.nn.layers import MLP
from mmdiff.nn.modulation import TimeEmbedder, gated, modulate, normed
from mmdiff.nn.patches import unpatch
from mmdiff.nn.posemb import sincos_2d

__all__ = ["Config", "DiT"]


@config
class Config:
    """Shape of a DiT; the defaults are DiT-XL/2's at 256 x 256 pixels."""

    type: Literal["dit"] = "dit"
    """Family name."""
    image_size: int = Field(32, gt=0)
    """Side of the square latents."""
    patch_size: int = Field(2, gt=0)
    """Side of a patch."""
    channels: int = Field(4, gt=0)
    """Channels of the latents."""
    width: int = Field(1152, gt=0)
    """D, size of the residual stream."""
    depth: int = Field(28, gt=0)
    """Number of blocks."""
    heads: int = Field(16, gt=0)
    """Attention heads; head_dim = width / heads."""
    ffn_width: int = Field(4608, gt=0)
    """Hidden size of the feed-forward layers."""
    classes: int = Field(1000, gt=0)
    """Number of classes; the label ``classes`` itself means none."""
    learned_variance: bool = True
    """Predict twice the channels: noise, and the interpolation of its variance."""
    readout_scale: float = Field(1.0, gt=0)
    """Factor of the last linear's input (muP: base width / width, times a tunable multiplier)."""
    residual_scale: float = Field(1.0, gt=0)
    """Factor of every residual branch (depth scaling: base depth / depth)."""
    attention_scale: float | None = Field(None, gt=0)
    """Factor of the attention logits; null: 1 / sqrt(head_dim)."""

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ConfigError(f"width {self.width} must be a multiple of heads {self.heads} and of 4")
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @property
    def out_channels(self) -> int:
        """Channels of the prediction."""
        return self.channels * (2 if self.learned_variance else 1)

    def with_width(self, width: int) -> Config:
        """The same network at another width; head_dim stays."""
        heads = max(1, width * self.heads // self.width)
        return dataclasses.replace(self, width=width, heads=heads, ffn_width=width * self.ffn_width // self.width)

    def with_depth(self, depth: int) -> Config:
        """The same network with ``depth`` blocks."""
        return dataclasses.replace(self, depth=depth)


class Patches(nn.Module):
    """Latents into patch tokens, row-major."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
        """Tokens without positions."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Labels(nn.Module):
    """Class labels into conditions."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, labels: Int[Tensor, "B"]) -> Float[Tensor, "B D"]:
        """Condition vectors; the last row of the table stands for no class."""
        return self.embedding_table(labels)


class SelfAttention(nn.Module):
    """Multi-head attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, scale: float | None) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Attend from every token to every token."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and feed-forward, each modulated, gated and added to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn = SelfAttention(config.width, config.heads, config.attention_scale)
        self.mlp = MLP(config.width, config.ffn_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))
        self.residual_scale = config.residual_scale

    def forward(self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B D"]) -> Float[Tensor, "B N D"]:
        """One block."""
        vectors = self.adaLN_modulation(condition).chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        if self.residual_scale != 1:
            gate_a, gate_m = gate_a * self.residual_scale, gate_m * self.residual_scale
        x = gated(x, gate_a, self.attn(modulate(normed(x), shift_a, scale_a)))
        return gated(x, gate_m, self.mlp(modulate(normed(x), shift_m, scale_m)))


class FinalLayer(nn.Module):
    """Modulated norm and the readout."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.linear = nn.Linear(config.width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 2 * config.width))
        self.readout_scale = config.readout_scale

    def forward(self, x: Float[Tensor, "B N D"], condition: Float[Tensor, "B D"]) -> Float[Tensor, "B N P"]:
        """The pixels of each patch."""
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        x = modulate(normed(x), shift, scale)
        return self.linear(x if self.readout_scale == 1 else x * self.readout_scale)


class DiT(PretrainedModule):
    """The network.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = Patches(config.channels, config.patch_size, config.width)
        self.t_embedder = TimeEmbedder(config.width)
        self.y_embedder = Labels(config.classes, config.width)
        # A frozen parameter, as in published checkpoints.
        table = sincos_2d(config.width, config.grid, config.grid)[None]
        self.pos_embed = nn.Parameter(table.to(self.x_embedder.proj.weight.device), requires_grad=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        if generator is not None:
            self.init_(generator)

    def forward(
        self, x: Float[Tensor, "B C h w"], t: Float[Tensor, "B"], labels: Int[Tensor, "B"]
    ) -> Float[Tensor, "B _ h w"]:
        """Predicted noise, and behind it the variance if it is learned.

        Args:
            x: Float [B, C, S, S], noisy latents.
            t: Float [B], time steps 0 .. 999, fractional ones too.
            labels: Int64 [B], classes; ``config.classes`` = none.

        Returns:
            Float [B, C or 2 C, S, S].

        Raises:
            ConfigError: The latents have another size.
        """
        c = self.config
        if x.shape[1:] != (c.channels, c.image_size, c.image_size):
            wanted = (c.channels, c.image_size, c.image_size)
            raise ConfigError(f"latents are {tuple(x.shape[1:])}, the network takes {wanted}")
        tokens = self.x_embedder(x) + self.pos_embed
        condition = self.t_embedder(t) + self.y_embedder(labels)
        for block in self.blocks:
            tokens = block(tokens, condition)
        return unpatch(self.final_layer(tokens, condition), c.grid, c.patch_size)

    def layout(self) -> Layout:
        """What tasks build examples for: latents and classes."""
        side = self.config.image_size
        return Layout(latents=(self.config.channels, side, side), classes=self.config.classes, image_size=side)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> DiT:
        """Draw initial weights: Xavier-uniform matrices, N(0, 0.02) conditions, zero modulation and readout.

        Source: published code of DiT (adaLN-zero).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                nn.init.zeros_(cast("Tensor", module.bias))
        for weight in (self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(cast("Tensor", weight), 0.0, 0.02, generator=generator)
        nn.init.normal_(self.y_embedder.embedding_table.weight, 0.0, 0.02, generator=generator)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(cast("Tensor", cast("Block", part).adaLN_modulation[1].weight))
        nn.init.zeros_(self.final_layer.linear.weight)
        return self


DiT.Config = Config
