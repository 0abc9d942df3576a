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
from mmdiff.models.image_tokenizer import VectorTokenizer
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


class VQGAN(VectorTokenizer):
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

    def _encoded(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels))

    def _decoded(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(vectors))

    @property
    def _table(self) -> Tensor:
        return self.quantize["embedding"].weight  # type: ignore[return-value]

    def _scaled(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1) if self.config.normalised else z


VQGAN.Config = Config
