"""The per-token denoiser of MAR and eMIGM: a small MLP that sees one noisy token, a timestep and a condition.

Source: MAR (arXiv 2406.11838), section 4; key names as published.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DiffusionHead", "sinusoid"]

_FREQUENCIES = 256


def sinusoid(t: Float[Tensor, "M"], width: int = _FREQUENCIES) -> Float[Tensor, "M W"]:
    """Cosines, then sines, of t times 10000^(-k / (width/2)), float32."""
    half = width // 2
    rates = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * rates
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeEmbed(nn.Module):
    """Timestep to width w."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Float[Tensor, "M"]) -> Float[Tensor, "M W"]:
        """Any float timesteps, fractional ones included."""
        return self.mlp(sinusoid(t).to(next(self.mlp.parameters()).dtype))


class ResBlock(nn.Module):
    """h + gate * mlp(norm(h) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, h: Float[Tensor, "M W"], active: Float[Tensor, "M W"]) -> Float[Tensor, "M W"]:
        """``active`` is silu(y), the same for all blocks."""
        shift, scale, gate = self.adaLN_modulation[1](active).chunk(3, dim=-1)
        return torch.addcmul(h, gate, self.mlp(torch.addcmul(shift, self.in_ln(h), 1 + scale)))


class FinalLayer(nn.Module):
    """Modulated norm without weights, then the output."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, h: Float[Tensor, "M W"], active: Float[Tensor, "M W"]) -> Float[Tensor, "M O"]:
        """``active`` is silu(y)."""
        shift, scale = self.adaLN_modulation[1](active).chunk(2, dim=-1)
        return self.linear(torch.addcmul(shift, F.layer_norm(h, (self.width,), eps=1e-6), 1 + scale))


class DiffusionHead(nn.Module):
    """(noisy token, timestep, condition) to (noise, position of the log-variance).

    Args:
        channels: C of a token.
        condition: D of the condition.
        width: w of the network.
        depth: Residual blocks.
    """

    def __init__(self, channels: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.channels = channels
        self.time_embed = TimeEmbed(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(channels, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * channels)

    def forward(self, x: Float[Tensor, "M C"], t: Float[Tensor, "M"], c: Float[Tensor, "M D"]) -> Float[Tensor, "M O"]:
        """Noise, then position of the log-variance, of every token on its own.

        Args:
            x: Noisy tokens.
            t: Timesteps of the training process, 0 .. 999, fractional ones allowed.
            c: Conditions.
        """
        return self.denoise(x, self.time_embed(t), self.cond_embed(c))

    def denoise(
        self, x: Float[Tensor, "M C"], time: Float[Tensor, "#M W"], cond: Float[Tensor, "M W"]
    ) -> Float[Tensor, "M O"]:
        """The same with both embeddings made beforehand: they stay over a run (``cond``) or are one row (``time``)."""
        active = F.silu(time + cond)
        h = self.input_proj(x.to(cond.dtype))
        for block in self.res_blocks:
            h = block(h, active)
        return self.final_layer(h, active)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> DiffusionHead:
        """Xavier-uniform layers without bias, small time layers, zero modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and name.startswith("time_embed"):
                nn.init.normal_(parameter, std=0.02, generator=generator)
            elif "adaLN_modulation" in name or name.startswith("final_layer"):
                nn.init.zeros_(parameter)
        return self
