"""MMDiT: the two-stream transformer of Stable Diffusion 3, as a flow-matching network over latents.

The same blocks over masked image tokens are `mmdiff.models.masked_mmdit`.

Source: SD3 (arXiv 2403.03206), section 4; published weights and diffusers' network of the same name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.batch import Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.nn.joint import JointBlock
from mmdiff.nn.modulation import Embedder, TimeEmbedder, modulate, normed
from mmdiff.nn.patches import unpatch
from mmdiff.nn.posemb import sincos_2d

__all__ = ["Config", "MMDiT"]


@config
class Config:
    """Shape of an MMDiT; the defaults are SD3-medium's."""

    type: Literal["mmdit"] = "mmdit"
    """Family name."""
    image_size: int = Field(128, gt=0)
    """Side of the latents that the positions are scaled to."""
    patch_size: int = Field(2, gt=0)
    """Side of a patch."""
    channels: int = Field(16, gt=0)
    """Channels of the latents."""
    out_channels: int = Field(16, gt=0)
    """Channels of the prediction."""
    width: int = Field(1536, gt=0)
    """D, size of both streams."""
    depth: int = Field(24, gt=0)
    """Number of blocks."""
    heads: int = Field(24, gt=0)
    """Attention heads; head_dim = width / heads."""
    context_channels: int = Field(4096, gt=0)
    """Size of the text features."""
    pooled_channels: int = Field(2048, gt=0)
    """Size of the pooled text vector."""
    max_grid: int = Field(192, gt=0)
    """Patches per side of the position table; smaller images take its middle."""
    dual_layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Blocks whose image stream has a second attention of its own."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head."""
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
        if any(layer >= self.depth for layer in self.dual_layers):
            raise ConfigError(f"dual_layers {self.dual_layers} names a block beyond the last, {self.depth - 1}")

    def with_width(self, width: int) -> Config:
        """The same network at another width; head_dim stays."""
        return dataclasses.replace(self, width=width, heads=max(1, width * self.heads // self.width))

    def with_depth(self, depth: int) -> Config:
        """The same network with ``depth`` blocks."""
        return dataclasses.replace(self, depth=depth, dual_layers=tuple(i for i in self.dual_layers if i < depth))


class MMDiT(PretrainedModule):
    """The network.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config
    pos_embed: Tensor

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        self.patch = nn.Conv2d(c.channels, c.width, c.patch_size, stride=c.patch_size)
        scale = c.max_grid * c.patch_size / c.image_size
        table = sincos_2d(c.width, c.max_grid, c.max_grid, scale=scale)[None]
        self.register_buffer("pos_embed", table.to(self.patch.weight.device))
        self.time = TimeEmbedder(c.width)
        self.pooled = Embedder(c.pooled_channels, c.width)
        self.context = nn.Linear(c.context_channels, c.width)
        self.blocks = nn.ModuleList(
            JointBlock(
                c.width,
                c.heads,
                qk_norm=c.qk_norm,
                dual=i in c.dual_layers,
                last=i == c.depth - 1,
                attention_scale=c.attention_scale,
                residual_scale=c.residual_scale,
            )
            for i in range(c.depth)
        )
        self.modulation = nn.Linear(c.width, 2 * c.width)
        self.readout = nn.Linear(c.width, c.patch_size**2 * c.out_channels)
        if generator is not None:
            self.init_(generator)

    def forward(
        self,
        x: Float[Tensor, "B C h w"],
        t: Float[Tensor, "B"],
        context: Float[Tensor, "B M J"],
        pooled: Float[Tensor, "B P"],
        *,
        skip_layers: Sequence[int] = (),
    ) -> Float[Tensor, "B _ h w"]:
        """Predicted velocity, noise minus data.

        Args:
            x: Float [B, C, h, w], noisy latents; h and w are multiples of the patch size.
            t: Float [B], 1000 times the share of noise.
            context: Float [B, M, J], text features.
            pooled: Float [B, P], pooled text vector.
            skip_layers: Blocks to leave out (skip-layer guidance).

        Returns:
            Float [B, C, h, w].

        Raises:
            ConfigError: The latents do not divide into patches, or are larger than the position table.
        """
        image = self.tokens(x)
        text = self.context(context)
        condition = F.silu(self.time(t) + self.pooled(pooled))
        for i, block in enumerate(self.blocks):
            if i not in skip_layers:
                image, text = block(image, text, condition)
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        image = modulate(normed(image), shift, scale)
        c = self.config
        image = image if c.readout_scale == 1 else image * c.readout_scale
        return unpatch(self.readout(image), x.shape[2] // c.patch_size, c.patch_size)

    def layout(self) -> Layout:
        """What tasks build examples for: latents beside the features of a text encoder."""
        side = self.config.image_size
        return Layout(latents=(self.config.channels, side, side), image_size=side)

    def tokens(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
        """Patch tokens with their positions, taken from the middle of the table."""
        c = self.config
        rows, columns = x.shape[2] // c.patch_size, x.shape[3] // c.patch_size
        if x.shape[2] % c.patch_size or x.shape[3] % c.patch_size:
            raise ConfigError(f"latents of {tuple(x.shape[2:])} do not divide into patches of {c.patch_size}")
        if max(rows, columns) > c.max_grid:
            raise ConfigError(f"{rows} x {columns} patches are beyond the position table of {c.max_grid} per side")
        top, left = (c.max_grid - rows) // 2, (c.max_grid - columns) // 2
        table = self.pos_embed.view(c.max_grid, c.max_grid, -1)[top : top + rows, left : left + columns]
        return self.patch(x).flatten(2).transpose(1, 2) + table.reshape(1, rows * columns, -1)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> MMDiT:
        """Draw initial weights: Xavier-uniform matrices, N(0, 0.02) conditions, zero modulation and readout.

        Source: published code of DiT (adaLN-zero), carried over to two streams.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                nn.init.zeros_(cast("Tensor", module.bias))
        for embedder in (self.time, self.pooled):
            for i in (0, 2):
                nn.init.normal_(cast("Tensor", embedder.mlp[i].weight), 0.0, 0.02, generator=generator)
        for block in cast("list[JointBlock]", self.blocks):
            nn.init.zeros_(block.image.modulation.weight)
            nn.init.zeros_(block.text.modulation.weight)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.readout.weight)
        return self


MMDiT.Config = Config
