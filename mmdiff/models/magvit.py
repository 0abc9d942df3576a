"""MAGVIT-v2's image tokenizer with look-up-free quantisation, as Show-o and MMaDA use it.

A code is the signs of a few channels, so there is no table to search: the codebook is all combinations of signs.

Source: MAGVIT-v2 (arXiv 2310.05737), section 3.1; Show-o (arXiv 2408.12528), published code's behaviour.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.image_tokenizer import FeatureTokenizer
from mmdiff.nn.autoencoder import Decoder, Encoder, init_convolutions

__all__ = ["MAGVIT", "Config", "Side", "SignQuantizer"]


@config
class Side:
    """One half of the autoencoder."""

    width: int = Field(128, gt=0, multiple_of=32)
    """Channels of the highest resolution."""
    multipliers: tuple[int, ...] = Field((1, 2, 2, 4, 4), min_length=1)
    """Width of each level, as a multiple, from the highest resolution down."""
    blocks: tuple[int, ...] = Field((4, 3, 4, 3, 4), min_length=1)
    """Residual blocks of each level."""

    def __post_init__(self) -> None:
        if len(self.multipliers) != len(self.blocks):
            raise ConfigError(f"multipliers {self.multipliers} and blocks {self.blocks}: one of each per level")


@config
class Config:
    """Shape of the tokenizer; the defaults are the published one's."""

    type: Literal["magvit"] = "magvit"
    """Family name."""
    image_size: int = Field(256, gt=0)
    """Side of the images it is used for; it takes any multiple of the downsampling."""
    encoder: Side = Side()
    """Pixels to signs."""
    decoder: Side = Side(multipliers=(1, 1, 2, 2, 4), blocks=(4, 4, 3, 4, 3))
    """Signs to pixels."""
    bits: int = Field(13, gt=0, le=24)
    """Signs of a code; the codebook is 2 to that power."""
    commitment: float = Field(0.1, ge=0)
    """Weight of the distance between features and signs in the tokenizer's own loss."""
    pull: float = Field(0.25, ge=0)
    """Weight, within that, of the part that acts through the straight-through output."""
    entropy: float = Field(0.1, ge=0)
    """Weight of the entropy term: every sign sure of itself, and both signs of a channel used alike."""

    def __post_init__(self) -> None:
        if len(self.encoder.multipliers) != len(self.decoder.multipliers):
            raise ConfigError("encoder and decoder have different numbers of levels")
        if self.image_size % self.factor:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of the downsampling {self.factor}")

    @property
    def factor(self) -> int:
        """Pixels per token and side."""
        return 2 ** (len(self.encoder.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // self.factor

    @property
    def codebook(self) -> int:
        """K, number of codes."""
        return 2**self.bits


class SignQuantizer(nn.Module):
    """Signs of channels as a code, the first channel being the most significant bit.

    Args:
        bits: Number of channels.
    """

    embedding: Tensor
    power_vals: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        signs = (torch.arange(2**bits)[:, None] & powers > 0).float() * 2 - 1
        # Kept with the weights because the published file has them.
        self.register_buffer("embedding", signs)
        self.register_buffer("power_vals", powers)

    def forward(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Signs, +1 or -1; gradients pass straight through."""
        return z + (torch.where(z > 0, 1.0, -1.0).to(z.dtype) - z).detach()

    def codes(self, z: Float[Tensor, "B C h w"]) -> Int[Tensor, "B h w"]:
        """Codes of features."""
        return ((z > 0) * self.power_vals.long()[:, None, None]).sum(1)

    def vectors(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """Signs of codes."""
        return self.embedding[codes].permute(0, 3, 1, 2)


class MAGVIT(FeatureTokenizer):
    """Image tokenizer: pixels to codes and back.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        e, d, bits = config.encoder, config.decoder, config.bits
        self.encoder = Encoder(e.width, e.multipliers, e.blocks, bits, ())
        self.decoder = Decoder(d.width, d.multipliers, d.blocks, bits, ())
        self.quant_conv, self.post_quant_conv = nn.Conv2d(bits, bits, 1), nn.Conv2d(bits, bits, 1)
        self.quantize = SignQuantizer(bits)
        if generator is not None:
            init_convolutions(self, generator)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B C h w"]]:
        """Reconstruction, and the features whose signs are the codes; gradients pass straight through the signs."""
        z = self.features(pixels)
        return self._decoded(self.quantize(z)), z

    def penalty(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, ""]:
        """What the tokenizer's training adds to the reconstruction: `commitment` and `entropy`."""
        return self.commitment(z) + self.entropy(z)

    def commitment(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, ""]:
        """Distance between features and signs."""
        signs = self.quantize(z)
        pull = F.mse_loss(signs, z.detach())
        return self.config.commitment * (F.mse_loss(z, signs.detach()) + self.config.pull * pull)

    def entropy(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, ""]:
        """Mean entropy of the signs, minus the entropy of their mean, channel by channel.

        A sign's logits are minus the squared distances to +1 and to -1.
        """
        log_p = torch.stack((-((z - 1) ** 2), -((z + 1) ** 2)), -1).log_softmax(-1)
        own = -(log_p.exp() * log_p).sum(-1).mean()
        mean = log_p.exp().mean((0, 2, 3))
        return self.config.entropy * (own + (mean * mean.log()).sum(-1).mean())

    def nearest(self, z: Float[Tensor, "B C h w"]) -> Int[Tensor, "B h w"]:
        """The signs at every place as a number."""
        return self.quantize.codes(z)

    def vectors(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B C h w"]:
        """Signs of codes."""
        return self.quantize.vectors(codes).to(self.post_quant_conv.weight.dtype)

    def _encoded(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels))

    def _decoded(self, vectors: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(vectors))


MAGVIT.Config = Config
