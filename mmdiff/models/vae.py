"""Continuous image autoencoders: the KL autoencoder of MAR and eMIGM, and DC-AE through diffusers.

Both have ``encode`` and ``decode`` in the scale of the image model: latents of about unit variance.

Source: MAR (arXiv 2406.11838), published code and checkpoint layout; DC-AE (arXiv 2410.10733).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.nn.autoencoder import Decoder, Encoder, init_convolutions

__all__ = ["DCAE", "KLVAE", "Config", "DCConfig", "posterior"]


@config
class Config:
    """Shape of a KL autoencoder; the defaults are KL-16's."""

    type: Literal["kl_vae"] = "kl_vae"
    """Family name."""
    image_size: int = Field(256, gt=0)
    """Side of the images it is used for; it takes any multiple of the downsampling."""
    width: int = Field(128, gt=0, multiple_of=32)
    """Channels of the first level."""
    multipliers: tuple[int, ...] = Field((1, 1, 2, 2, 4), min_length=1)
    """Width of each level, as a multiple; every level after the first halves the resolution."""
    blocks: int = Field(2, gt=0)
    """Residual blocks per level; the decoder has one more."""
    channels: int = Field(16, gt=0)
    """Latent channels."""
    attention_levels: tuple[int, ...] = (4,)
    """Levels of the encoder with attention, 0 the highest resolution; both middles always have it."""
    scale: float = Field(0.2325, gt=0)
    """Latents of the image model are those of the autoencoder times this."""

    def __post_init__(self) -> None:
        if self.image_size % self.factor:
            raise ConfigError(f"image_size {self.image_size} is not a multiple of the downsampling {self.factor}")

    @property
    def factor(self) -> int:
        """Pixels per latent cell and side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def grid(self) -> int:
        """Latent cells per side."""
        return self.image_size // self.factor


def posterior(moments: Float[Tensor, "B M h w"]) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B C h w"]]:
    """Mean and standard deviation of stored moments; the log-variance is clamped to [-30, 20]."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean, (0.5 * log_variance.clamp(-30, 20)).exp()


class KLVAE(PretrainedModule):
    """Pixels to a normal distribution over latents, and latents to pixels.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = c = config
        levels = len(c.multipliers)
        self.encoder = Encoder(c.width, c.multipliers, [c.blocks] * levels, 2 * c.channels, c.attention_levels)
        self.decoder = Decoder(c.width, c.multipliers, [c.blocks + 1] * levels, c.channels, ())
        self.quant_conv = nn.Conv2d(2 * c.channels, 2 * c.channels, 1)
        self.post_quant_conv = nn.Conv2d(c.channels, c.channels, 1)
        if generator is not None:
            init_convolutions(self, generator)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B M h w"]]:
        """Reconstruction of a posterior sample, and the moments; noise comes from PyTorch's own generator."""
        moments = self.moments(pixels)
        mean, std = posterior(moments)
        noise = torch.zeros_like(mean)
        if self.training:
            noise.normal_()
        return self.decoder(self.post_quant_conv(mean + std * noise)), moments

    def penalty(self, moments: Float[Tensor, "B M h w"]) -> Float[Tensor, ""]:
        """KL divergence to the standard normal distribution, nats, mean over images."""
        mean, std = posterior(moments)
        return 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).sum((1, 2, 3)).mean()

    def moments(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B M h w"]:
        """Mean channels, then log-variance channels, of images in [-1, 1].

        Raises:
            ConfigError: The images are no multiple of the downsampling.
        """
        _check_size(pixels, self.config.factor)
        return self.quant_conv(self.encoder(pixels))

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "B 3 H W"], noise: Float[Tensor, "B C h w"] | None = None
    ) -> Float[Tensor, "B C h w"]:
        """Latents in the image model's scale: a posterior sample with ``noise``, or the mean without."""
        mean, std = posterior(self.moments(pixels))
        return (mean if noise is None else mean + std * noise) * self.config.scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, about -1 .. 1, not clamped, of latents in the image model's scale.

        Raises:
            ConfigError: The latents have another number of channels.
        """
        _check_channels(latents, self.config.channels)
        return self.decoder(self.post_quant_conv(latents / self.config.scale))


KLVAE.Config = Config


@config
class DCConfig:
    """Shape of a deep-compression autoencoder; the defaults are those of dc-ae-f32c32-in-1.0."""

    type: Literal["dc_ae"] = "dc_ae"
    """Family name."""
    image_size: int = Field(512, gt=0)
    """Side of the images it is used for."""
    channels: int = Field(32, gt=0)
    """Latent channels."""
    head_dim: int = Field(32, gt=0)
    """Channels per attention head."""
    widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    """Channels of each level; every level after the first halves the resolution."""
    encoder_layers: tuple[int, ...] = (0, 4, 8, 2, 2, 2)
    """Blocks per level of the encoder."""
    decoder_layers: tuple[int, ...] = (0, 5, 10, 2, 2, 2)
    """Blocks per level of the decoder."""
    block_types: tuple[Literal["ResBlock", "EfficientViTBlock"], ...] = (
        *("ResBlock",) * 3,
        *("EfficientViTBlock",) * 3,
    )
    """Kind of the blocks of each level."""
    decoder_norms: tuple[Literal["batch_norm", "rms_norm"], ...] = (*("batch_norm",) * 3, *("rms_norm",) * 3)
    """Norm of the decoder's blocks of each level."""
    decoder_activations: tuple[Literal["relu", "silu"], ...] = (*("relu",) * 3, *("silu",) * 3)
    """Activation of the decoder's blocks of each level."""
    multiscales: tuple[tuple[int, ...], ...] = ((),) * 6
    """Kernel sizes of the multi-scale attention of each level."""
    upsample: Literal["pixel_shuffle", "interpolate"] = "pixel_shuffle"
    """How the decoder doubles the resolution."""
    downsample: Literal["pixel_unshuffle", "Conv"] = "pixel_unshuffle"
    """How the encoder halves it."""
    scale: float = Field(0.3189, gt=0)
    """Latents of the image model are those of the autoencoder times this."""

    def __post_init__(self) -> None:
        levels = {len(getattr(self, name)) for name in _PER_LEVEL}
        if levels != {len(self.widths)}:
            raise ConfigError(f"{', '.join(_PER_LEVEL)} must have one entry per level, {len(self.widths)} each")

    @property
    def factor(self) -> int:
        """Pixels per latent cell and side."""
        return 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Latent cells per side."""
        return self.image_size // self.factor


_PER_LEVEL = ("encoder_layers", "decoder_layers", "block_types", "decoder_norms", "decoder_activations", "multiscales")


class DCAE(PretrainedModule):
    """diffusers' ``AutoencoderDC`` in the house's interface; deterministic.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: DCConfig

    def __init__(self, config: DCConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        from diffusers import AutoencoderDC

        self.config = c = config
        self.net: Any = AutoencoderDC(
            in_channels=3,
            latent_channels=c.channels,
            attention_head_dim=c.head_dim,
            encoder_block_types=c.block_types,
            decoder_block_types=c.block_types,
            encoder_block_out_channels=c.widths,
            decoder_block_out_channels=c.widths,
            encoder_layers_per_block=c.encoder_layers,
            decoder_layers_per_block=c.decoder_layers,
            encoder_qkv_multiscales=c.multiscales,
            decoder_qkv_multiscales=c.multiscales,
            decoder_norm_types=c.decoder_norms,
            decoder_act_fns=c.decoder_activations,
            upsample_block_type=c.upsample,
            downsample_block_type=c.downsample,
            scaling_factor=c.scale,
        )
        if generator is not None:
            self.init_(generator)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B C h w"]]:
        """Reconstruction, and the latents in the autoencoder's own scale."""
        _check_size(pixels, self.config.factor)
        latents = self.net.encode(pixels).latent
        return self.net.decode(latents).sample, latents

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Latents in the image model's scale, of images in [-1, 1].

        Raises:
            ConfigError: The images are no multiple of the downsampling.
        """
        _check_size(pixels, self.config.factor)
        return self.net.encode(pixels).latent * self.config.scale

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Images, about -1 .. 1, not clamped, of latents in the image model's scale.

        Raises:
            ConfigError: The latents have another number of channels.
        """
        _check_channels(latents, self.config.channels)
        return self.net.decode(latents / self.config.scale).sample

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> DCAE:
        """Kaiming-normal weights without bias, norms of one."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                nn.init.kaiming_normal_(parameter, nonlinearity="linear", generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight")))
        return self


DCAE.Config = DCConfig


def _check_size(pixels: Tensor, factor: int) -> None:
    height, width = pixels.shape[-2:]
    if height % factor or width % factor:
        raise ConfigError(f"images are {height} x {width}; the autoencoder takes multiples of {factor}")


def _check_channels(latents: Tensor, channels: int) -> None:
    if latents.shape[1] != channels:
        raise ConfigError(
            f"latents have {latents.shape[1]} channels, the autoencoder {channels}: it is not the one that the image "
            "model was trained with"
        )
