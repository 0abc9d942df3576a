"""The image tokenizer of aMUSEd and Lumina-DiMOO: diffusers' ``VQModel`` in the house's interface.

Source: aMUSEd (arXiv 2401.01808); diffusers' conversion of its tokenizer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.image_tokenizer import VectorTokenizer

__all__ = ["AmusedVQ", "Config"]


@config
class Config:
    """Shape of the tokenizer; the defaults are the published one's."""

    type: Literal["amused_vq"] = "amused_vq"
    """Family name."""
    image_size: int = Field(512, gt=0)
    """Side of the images it is used for; it takes any multiple of the downsampling."""
    widths: tuple[int, ...] = Field((128, 256, 256, 512, 768), min_length=1)
    """Channels of each level; every level after the first halves the resolution."""
    layers: int = Field(2, gt=0)
    """Residual blocks per level."""
    channels: int = Field(64, gt=0)
    """Channels of the encoder's output, and length of a code vector."""
    codebook: int = Field(8192, gt=1)
    """K, number of codes."""
    groups: int = Field(32, gt=0)
    """Groups of the norms."""

    def __post_init__(self) -> None:
        if any(w % self.groups for w in self.widths):
            raise ConfigError(f"widths {self.widths} must be multiples of the {self.groups} groups of the norms")
        if self.image_size % self.factor:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of the downsampling {self.factor}")

    @property
    def factor(self) -> int:
        """Pixels per token and side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Tokens per side of the images it is used for."""
        return self.image_size // self.factor


class AmusedVQ(VectorTokenizer):
    """Image tokenizer: pixels to codes and back.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        from diffusers import VQModel

        self.config = c = config
        levels = len(c.widths)
        self.net: Any = VQModel(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=c.widths,
            layers_per_block=c.layers,
            latent_channels=c.channels,
            num_vq_embeddings=c.codebook,
            norm_num_groups=c.groups,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )
        if generator is not None:
            self.init_(generator)

    def nearest(self, z: Float[Tensor, "B C h w"]) -> Int[Tensor, "B h w"]:
        """The code of smallest distance at every place."""
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        return torch.cdist(flat, self.net.quantize.embedding.weight).argmin(1).view(len(z), *z.shape[2:])

    def vectors(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """Vectors of codes."""
        return self.net.quantize.embedding(codes).permute(0, 3, 1, 2)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> AmusedVQ:
        """Kaiming-normal weights without bias, norms of one, codes of a small even spread."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.kaiming_normal_(parameter, nonlinearity="linear", generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))
        k = self.codebook
        nn.init.uniform_(self.net.quantize.embedding.weight, -1 / k, 1 / k, generator=generator)
        return self

    def _encoded(self, pixels: Tensor) -> Tensor:
        # The network itself takes and gives [0, 1].
        return self.net.quant_conv(self.net.encoder((pixels + 1) / 2))

    def _decoded(self, vectors: Tensor) -> Tensor:
        return 2 * self.net.decoder(self.net.post_quant_conv(vectors)) - 1


AmusedVQ.Config = Config
