"""The convolutional encoder and decoder of VQGAN and of the KL autoencoders, with published key names.

Source: taming-transformers (arXiv 2012.09841), published code's behaviour.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Decoder", "Encoder", "init_convolutions"]


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution where the width changes."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else None

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D h w"]:
        """Width C becomes D."""
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """x + attention over all positions, one head, 1x1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Shape is kept."""
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).transpose(1, 2)[:, None] for part in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.proj_out(out.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Half the resolution; one zero column on the right and one zero row at the bottom are added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        """H = h / 2."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C H W"]:
        """H = 2 h."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Blocks of one resolution, then the change to the next."""

    def __init__(self, widths: Sequence[int], *, attention: bool, down: bool = False, up: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b) for a, b in itertools.pairwise(widths))
        self.attn = nn.ModuleList(AttnBlock(widths[-1]) for _ in range(len(widths) - 1 if attention else 0))
        self.downsample = Downsample(widths[-1]) if down else None
        self.upsample = Upsample(widths[-1]) if up else None

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B D H W"]:
        """All of it in turn."""
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for change in (self.downsample, self.upsample):
            x = x if change is None else change(x)
        return x


class Middle(nn.Module):
    """Block, attention, block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = ResnetBlock(width, width), ResnetBlock(width, width)
        self.attn_1 = AttnBlock(width)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B C h w"]:
        """Shape is kept."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels to features.

    Args:
        width: Channels of the first level.
        multipliers: Width of each level, as a multiple; every level but the last halves the resolution.
        blocks: Residual blocks of each level.
        out: Channels of the result.
        attention: Levels with attention, 0 the highest resolution.
    """

    def __init__(
        self, width: int, multipliers: Sequence[int], blocks: Sequence[int], out: int, attention: Sequence[int]
    ) -> None:
        super().__init__()
        widths = [width * m for m in multipliers]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, now) in enumerate(zip([width, *widths], widths, strict=False)):
            last = i + 1 == len(widths)
            self.down.append(Level([before, *[now] * blocks[i]], attention=i in attention, down=not last))
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), nn.Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Features at the lowest resolution."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Features to pixels; arguments as in `Encoder`."""

    def __init__(
        self, width: int, multipliers: Sequence[int], blocks: Sequence[int], channels: int, attention: Sequence[int]
    ) -> None:
        super().__init__()
        widths = [width * m for m in multipliers]
        self.conv_in = nn.Conv2d(channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, (now, below) in enumerate(zip(widths, [*widths[1:], widths[-1]], strict=True)):
            self.up.append(Level([below, *[now] * blocks[i]], attention=i in attention, up=i > 0))
        self.norm_out, self.conv_out = _norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels, about -1 .. 1, not clamped."""
        x = self.mid(self.conv_in(features))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


@torch.no_grad()
def init_convolutions(module: nn.Module, generator: torch.Generator) -> None:
    """Draw initial weights: Kaiming-normal convolutions without bias, zero second convolution of residual blocks."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="linear", generator=generator)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, ResnetBlock):
            nn.init.zeros_(part.conv2.weight)
        if isinstance(part, AttnBlock):
            nn.init.zeros_(part.proj_out.weight)
