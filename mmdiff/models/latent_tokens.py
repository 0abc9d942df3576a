"""Continuous image tokens in a sequence: their embedding, their positions, and eMIGM's diffusion head.

A known token enters as a projection of its numbers, a masked one as a vector of its own; what the backbone says at a
masked slot, with a second table of positions, is the head's condition. There are no ids for values: the id of a slot
only says whether it is known.

Source: MAR (arXiv 2406.11838), section 4, and eMIGM (arXiv 2503.07197): `mmdiff.models.emigm` in a sequence of text.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.diffusion_head import DiffusionHead
from mmdiff.nn.patches import fold, unfold

__all__ = ["LatentTokens", "LatentTokensConfig"]


@config
class LatentTokensConfig:
    """Continuous image tokens: latents of an autoencoder, drawn by a diffusion head."""

    grid: int = Field(gt=0)
    """Latent cells per side."""
    channels: int = Field(gt=0)
    """Channels of the latent."""
    patch: int = Field(1, gt=0)
    """Latent cells per token and side."""
    rotary: Literal["sequence", "grid"] = "sequence"
    """As of codes."""
    head_width: int = Field(1024, gt=0)
    """Width of the diffusion head."""
    head_depth: int = Field(6, gt=0)
    """Residual blocks of the diffusion head."""

    def __post_init__(self) -> None:
        if self.grid % self.patch:
            raise ConfigError(f"latents.grid {self.grid} is not a multiple of latents.patch {self.patch}")

    @property
    def side(self) -> int:
        """Tokens per side."""
        return self.grid // self.patch

    @property
    def token_channels(self) -> int:
        """C, numbers in a token."""
        return self.channels * self.patch**2


class LatentTokens(nn.Module):
    """Embedding and head of continuous image tokens.

    Args:
        config: Their shape.
        width: D of the backbone.
    """

    def __init__(self, config: LatentTokensConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.project, self.norm = nn.Linear(config.token_channels, width), nn.LayerNorm(width, eps=1e-6)
        self.mask = nn.Parameter(torch.empty(width))
        self.position = nn.Embedding(config.side**2, width)
        self.head_position = nn.Embedding(config.side**2, width)
        self.head = DiffusionHead(config.token_channels, width, config.head_width, config.head_depth)

    def embed(
        self, values: Float[Tensor, "n C"], known: Bool[Tensor, "n"], number: Int[Tensor, "n"]
    ) -> Float[Tensor, "n D"]:
        """Embeddings of slots.

        Args:
            values: Tokens; those of masked slots do not matter.
            known: False = masked.
            number: Place of each within its image, row-major.
        """
        seen = self.norm(self.project(values.to(self.mask.dtype)))
        return torch.where(known[:, None], seen, self.mask) + self.position(number)

    def condition(self, hidden: Float[Tensor, "*B D"], number: Int[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
        """What the head is told of slots, from the backbone's states there."""
        return hidden + self.head_position(number)

    def patchify(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B N C"]:
        """Tokens of latents, as eMIGM's."""
        return unfold(latents, self.config.patch)

    def unpatchify(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B c h w"]:
        """Latents of tokens."""
        return fold(tokens, self.config.grid, self.config.patch)

    @torch.no_grad()
    def init_(self, generator: torch.Generator, scale: float) -> LatentTokens:
        """Draw initial weights: what enters at ``scale``, the head as eMIGM's."""
        nn.init.xavier_uniform_(self.project.weight, generator=generator)
        nn.init.zeros_(self.project.bias)
        nn.init.normal_(self.mask, 0.0, scale, generator=generator)
        nn.init.normal_(self.position.weight, 0.0, scale, generator=generator)
        nn.init.normal_(self.head_position.weight, 0.0, 0.02, generator=generator)
        self.head.init_(generator)
        return self
