"""Published discrete image tokenizers: VQGAN as MaskGIT uses it, and LlamaGen's.

Both are one network; LlamaGen's normalises codes and encoder outputs before it compares them.

Source: taming-transformers (arXiv 2012.09841); LlamaGen (arXiv 2406.06525), published code's behaviour.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.nn.autoencoder import Decoder, Encoder, init_convolutions

__all__ = ["VQGAN", "Config"]


@config
class Config:
    """Shape of a VQGAN; the defaults are those of the one with 1024 codes at a sixteenth of the resolution."""

    type: Literal["vqgan"] = "vqgan"
    """Family name."""
    image_size: int = Field(256, gt=0)
    """Side of the images it is used for; it takes any multiple of the downsampling."""
    width: int = Field(128, gt=0, multiple_of=32)
    """Channels of the first level."""
    multipliers: tuple[int, ...] = Field((1, 1, 2, 2, 4), min_length=1)
    """Width of each level, as a multiple; every level after the first halves the resolution."""
    blocks: int = Field(2, gt=0)
    """Residual blocks per level; the decoder has one more."""
    attention_levels: tuple[int, ...] = (4,)
    """Levels with attention, 0 the highest resolution; both middles always have it."""
    features: int = Field(256, gt=0)
    """Channels between the convolutional parts and the codes."""
    codebook: int = Field(1024, gt=1)
    """K, number of codes."""
    code_channels: int = Field(256, gt=0)
    """Length of a code vector."""
    normalised: bool = False
    """Whether codes and encoder outputs are scaled to length one (LlamaGen)."""

    def __post_init__(self) -> None:
        if self.image_size % self.factor:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of the downsampling {self.factor}")

    @property
    def factor(self) -> int:
        """Pixels per token and side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // self.factor


class VQGAN(PretrainedModule):
    """Image tokenizer: pixels to codes and back.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        levels = len(c.multipliers)
        self.encoder = Encoder(c.width, c.multipliers, [c.blocks] * levels, c.features, c.attention_levels)
        self.decoder = Decoder(c.width, c.multipliers, [c.blocks + 1] * levels, c.features, c.attention_levels)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(c.codebook, c.code_channels)})
        self.quant_conv = nn.Conv2d(c.features, c.code_channels, 1)
        self.post_quant_conv = nn.Conv2d(c.code_channels, c.features, 1)
        if generator is not None:
            init_convolutions(self, generator)
            nn.init.uniform_(self._table, -1 / c.codebook, 1 / c.codebook, generator=generator)

    @property
    def codebook(self) -> int:
        """Number of codes."""
        return self.config.codebook

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.config.grid

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B C h w"]]:
        """Reconstruction, and what was compared with the codes; gradients pass straight through the codes."""
        raw = self.features(pixels)
        z = self._scaled(raw)
        quantised = z + (self.vectors(self.nearest(raw)) - z).detach()
        return self.decoder(self.post_quant_conv(quantised)), raw

    def penalty(self, raw: Float[Tensor, "B C h w"]) -> Float[Tensor, ""]:
        """Codes move to the features, and a quarter as strongly the features to their codes (arXiv 1711.00937)."""
        z, codes = self._scaled(raw), self.vectors(self.nearest(raw))
        return F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())

    def usage(self, raw: Float[Tensor, "B C h w"]) -> Float[Tensor, ""]:
        """Share of the codes that these features are nearest to."""
        return self.nearest(raw).unique().numel() / torch.tensor(float(self.codebook))

    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """What is compared with the codes.

        Raises:
            ConfigError: The images are no multiple of the downsampling.
        """
        factor = self.config.factor
        if pixels.shape[-2] % factor or pixels.shape[-1] % factor:
            raise ConfigError(f"images are {tuple(pixels.shape[-2:])}; the tokenizer takes multiples of {factor}")
        return self.quant_conv(self.encoder(pixels))

    def nearest(self, z: Float[Tensor, "B C h w"]) -> Int[Tensor, "B h w"]:
        """The code of smallest distance at every place."""
        table = self.vector_table()
        flat = self._scaled(z).permute(0, 2, 3, 1).flatten(0, 2)
        distance = flat.square().sum(1, keepdim=True) + table.square().sum(1) - 2 * flat @ table.T
        return distance.argmin(1).view(z.shape[0], *z.shape[2:])

    def vector_table(self) -> Float[Tensor, "K C"]:
        """The code vectors, scaled if the tokenizer does that."""
        return F.normalize(self._table, dim=1) if self.config.normalised else self._table

    def vectors(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """Vectors of codes."""
        return F.embedding(codes, self.vector_table()).permute(0, 3, 1, 2)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Codes 0 .. K-1 of images in [-1, 1], int64, row-major."""
        return self.nearest(self.features(pixels))

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, about -1 .. 1, not clamped, of codes.

        Raises:
            ConfigError: A code lies outside the codebook.
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook:
            raise ConfigError(f"codes {int(codes.min())} .. {int(codes.max())} outside 0 .. {self.codebook - 1}")
        return self.decoder(self.post_quant_conv(self.vectors(codes)))

    @property
    def _table(self) -> Tensor:
        return self.quantize["embedding"].weight  # type: ignore[return-value]

    def _scaled(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1) if self.config.normalised else z


VQGAN.Config = Config
