"""MMDiT over masked image tokens: Meissonic's network, and Muddit's, which also reads masked text.

Joint blocks of the text and the image stream, then blocks over both as one stream, with rotary positions; the readout
is over a codebook and, where the text is denoised too, over a vocabulary.

Source: Meissonic (arXiv 2410.08261), Muddit (arXiv 2505.23606) and their published code.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.nn.axial import axis_tables, grid_positions
from mmdiff.nn.joint import JointBlock, SingleBlock, Table
from mmdiff.nn.layers import RMSNorm
from mmdiff.nn.modulation import EPS, TIME_CHANNELS, Embedder, TimeEmbedder, normed
from mmdiff.nn.posemb import sinusoid

__all__ = ["Config", "MaskedMMDiT"]

MICRO = 5
"""Conditions on the picture itself: width, height, crop top, crop left, aesthetic score."""


@config
class Config:
    """Shape of a masked MMDiT; the defaults are Meissonic's."""

    type: Literal["masked_mmdit"] = "masked_mmdit"
    """Family name."""
    width: int = Field(1024, gt=0)
    """D, size of the streams."""
    heads: int = Field(8, gt=0)
    """Attention heads; head_dim = width / heads."""
    depth: int = Field(14, gt=0)
    """Number of joint blocks."""
    single_depth: int = Field(28, ge=0)
    """Number of blocks over both streams as one."""
    context_channels: int = Field(1024, gt=0)
    """Size of the text features."""
    pooled_channels: int = Field(1024, gt=0)
    """Size of the pooled text vector."""
    axes: tuple[Annotated[int, Field(ge=0)], ...] = (16, 56, 56)
    """Channels of a head that turn with the text, row and column position; they sum to head_dim."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    vocab_size: int = Field(8256, gt=0)
    """Rows of the image-token embedding; the last one is the mask."""
    codebook: int = Field(8192, gt=0)
    """Codes that can be predicted."""
    text_vocab_size: int | None = Field(None, gt=0)
    """Text ids that can be predicted; null: only the image is denoised (Meissonic)."""
    resample: bool = True
    """Halve the grid before the blocks and double it after them."""
    adapter: bool = False
    """A norm and a linear before the text embedding (the T5 variant)."""
    readout_scale: float = Field(1.0, gt=0)
    """Factor of the readouts' input (muP: base width / width, times a tunable multiplier)."""
    residual_scale: float = Field(1.0, gt=0)
    """Factor of every residual branch (depth scaling: base depth / depth)."""
    attention_scale: float | None = Field(None, gt=0)
    """Factor of the attention logits; null: 1 / sqrt(head_dim)."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} must be a multiple of heads {self.heads}")
        if sum(self.axes) != self.width // self.heads or any(size % 2 for size in self.axes):
            raise ConfigError(f"axes {self.axes} must be even and sum to head_dim {self.width // self.heads}")
        if self.codebook >= self.vocab_size:
            raise ConfigError(f"vocab_size {self.vocab_size} must exceed codebook {self.codebook}: it has the mask too")

    @property
    def mask_id(self) -> int:
        """The token that stands for a masked one."""
        return self.vocab_size - 1

    def with_width(self, width: int) -> Config:
        """The same network at another width; head_dim stays."""
        return dataclasses.replace(self, width=width, heads=max(1, width * self.heads // self.width))

    def with_depth(self, depth: int) -> Config:
        """The same network with ``depth`` joint blocks, and single blocks in proportion."""
        return dataclasses.replace(self, depth=depth, single_depth=depth * self.single_depth // self.depth)


class MaskedMMDiT(PretrainedModule):
    """The network.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        scales: dict[str, Any] = {"attention_scale": c.attention_scale, "residual_scale": c.residual_scale}
        self.embed = CodeEmbedding(c)
        self.time = TimeEmbedder(c.width)
        self.pooled = Embedder(c.width, c.width)
        self.micro = nn.ModuleList(
            [
                nn.Linear(c.pooled_channels + MICRO * TIME_CHANNELS, c.width, bias=False),
                nn.Linear(c.width, c.width, bias=False),
            ]
        )
        if c.adapter:
            self.adapter = nn.Linear(c.context_channels, c.context_channels, bias=False)
        self.context = nn.Linear(c.context_channels, c.width)
        self.context_norm = RMSNorm(c.width, EPS)
        self.blocks = nn.ModuleList(JointBlock(c.width, c.heads, qk_norm=True, **scales) for _ in range(c.depth))
        self.singles = nn.ModuleList(SingleBlock(c.width, c.heads, **scales) for _ in range(c.single_depth))
        self.codes = CodeReadout(c)
        if c.text_vocab_size is not None:
            self.text_readout = nn.Linear(c.width, c.text_vocab_size, bias=False)
        if generator is not None:
            self.init_(generator)

    def forward(
        self,
        codes: Int[Tensor, "B h w"],
        t: Float[Tensor, "B"],
        context: Float[Tensor, "B M J"],
        pooled: Float[Tensor, "B P"],
        micro: Float[Tensor, "B 5"],
    ) -> Float[Tensor, "B K h w"]:
        """Logits over the codes; arguments as in `both`."""
        image, _ = self.hidden(codes, t, context, pooled, micro)
        return self.codes(image, codes.shape[1])

    def both(
        self,
        codes: Int[Tensor, "B h w"],
        t: Float[Tensor, "B"],
        context: Float[Tensor, "B M J"],
        pooled: Float[Tensor, "B P"],
        micro: Float[Tensor, "B 5"],
    ) -> tuple[Float[Tensor, "B K h w"], Float[Tensor, "B M V"]]:
        """Logits over the codes and over the text ids.

        Args:
            codes: Int64 [B, h, w], image tokens; ``config.mask_id`` = masked.
            t: Float [B], share of masked tokens in [0, 1], on the scale the weights were trained with.
            context: Float [B, M, J], text features.
            pooled: Float [B, P], pooled text vector.
            micro: Float [B, 5], width, height, crop top, crop left, aesthetic score.

        Returns:
            (float [B, codebook, h, w], float [B, M, text_vocab_size]).

        Raises:
            ConfigError: The network denoises images only.
        """
        if self.config.text_vocab_size is None:
            raise ConfigError("this network predicts image codes only; its text_vocab_size is null")
        image, text = self.hidden(codes, t, context, pooled, micro)
        return self.codes(image, codes.shape[1]), self.text_readout(normed(text) * self.config.readout_scale)

    def hidden(
        self,
        codes: Int[Tensor, "B h w"],
        t: Float[Tensor, "B"],
        context: Float[Tensor, "B M J"],
        pooled: Float[Tensor, "B P"],
        micro: Float[Tensor, "B 5"],
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B M D"]]:
        """Image and text stream after all blocks; arguments as in `both`."""
        condition = F.silu(self.condition(t, pooled, micro))
        image = self.embed(codes)
        text = self.context_norm(self.context(self.adapter(normed(context)) if self.config.adapter else context))
        image_rope, text_rope = self._rope(codes, text.shape[1])
        for block in self.blocks:
            image, text = block(image, text, condition, (image_rope, text_rope))
        stream = torch.cat((text, image), dim=1)
        both = (torch.cat((text_rope[0], image_rope[0])), torch.cat((text_rope[1], image_rope[1])))
        for block in self.singles:
            stream = block(stream, condition, both)
        return stream[:, text.shape[1] :], stream[:, : text.shape[1]]

    def condition(
        self, t: Float[Tensor, "B"], pooled: Float[Tensor, "B P"], micro: Float[Tensor, "B 5"]
    ) -> Float[Tensor, "B D"]:
        """The vector that modulates every block."""
        first, second = self.micro
        features = torch.cat((pooled, sinusoid(micro, TIME_CHANNELS).flatten(1).to(pooled.dtype)), dim=1)
        return self.time(1000 * t) + self.pooled(second(F.silu(first(features))))

    def _rope(self, codes: Tensor, words: int) -> tuple[Table, Table]:
        c = self.config
        step = 2 if c.resample else 1
        grid = grid_positions((1, codes.shape[1] // step, codes.shape[2] // step)).to(codes.device)
        nowhere = grid.new_zeros(words, 3)
        return axis_tables(grid, c.axes, c.rope_theta), axis_tables(nowhere, c.axes, c.rope_theta)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> MaskedMMDiT:
        """Draw initial weights: N(0, 1/fan_in) matrices, N(0, 1) token embedding, zero modulation and readouts."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, 0.0, fan_in**-0.5, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.embed.table.weight, 0.0, 1.0, generator=generator)
        for block in self.blocks:
            for stream in (cast("JointBlock", block).image, cast("JointBlock", block).text):
                nn.init.zeros_(stream.modulation.weight)
        for single in self.singles:
            nn.init.zeros_(cast("SingleBlock", single).modulation.weight)
        nn.init.zeros_(self.codes.out.weight)
        if self.config.text_vocab_size is not None:
            nn.init.zeros_(self.text_readout.weight)
        return self


MaskedMMDiT.Config = Config


class CodeEmbedding(nn.Module):
    """Image tokens into the stream: table, norm, 1 x 1 convolution, optional halving, norm, linear."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.table = nn.Embedding(c.vocab_size, c.width)
        self.norm = RMSNorm(c.width, EPS)
        self.conv = nn.Conv2d(c.width, c.width, 1, bias=False)
        if c.resample:
            self.down_norm = RMSNorm(c.width, EPS)
            self.down = nn.Conv2d(c.width, c.width, 2, stride=2, bias=False)
        self.resample = c.resample
        self.in_norm = RMSNorm(c.width, EPS)
        self.linear = nn.Linear(c.width, c.width, bias=False)

    def forward(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B N D"]:
        """Tokens of the stream, row-major."""
        x = self.conv(self.norm(self.table(codes)).movedim(-1, 1))
        if self.resample:
            x = self.down(self.down_norm(x.movedim(1, -1)).movedim(-1, 1))
        return self.linear(self.in_norm(x.flatten(2).transpose(1, 2)))


class CodeReadout(nn.Module):
    """The stream into logits over codes: norm, linear, optional doubling, 1 x 1 convolution, norm, readout."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.norm = RMSNorm(c.width, EPS)
        self.linear = nn.Linear(c.width, c.width, bias=False)
        if c.resample:
            self.up_norm = RMSNorm(c.width, EPS)
            self.up = nn.ConvTranspose2d(c.width, c.width, 2, stride=2, bias=False)
        self.resample = c.resample
        self.conv = nn.Conv2d(c.width, c.width, 1, bias=False)
        self.out_norm = RMSNorm(c.width, EPS)
        self.out = nn.Conv2d(c.width, c.codebook, 1, bias=False)
        self.readout_scale = c.readout_scale

    def forward(self, x: Float[Tensor, "B N D"], rows: int) -> Float[Tensor, "B K h w"]:
        """Logits of a grid with ``rows`` rows of tokens."""
        x = self.linear(self.norm(x)).transpose(1, 2)
        x = x.unflatten(2, (rows // 2 if self.resample else rows, -1))
        if self.resample:
            x = self.up(self.up_norm(x.movedim(1, -1)).movedim(-1, 1))
        x = self.out_norm(self.conv(x).movedim(1, -1)).movedim(-1, 1)
        return self.out(x if self.readout_scale == 1 else x * self.readout_scale)
