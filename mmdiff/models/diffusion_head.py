"""The per-token denoiser of MAR and eMIGM: a small MLP that sees one noisy token, a timestep and a condition.

Source: MAR (arXiv 2406.11838), section 4; key names as published.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff.nn.modulation import TimeEmbedder

__all__ = ["DiffusionHead"]


class Modulation(nn.Sequential):
    """Shift, scale and, with three parts, gate of a layer, from silu(y); keys as published (``1.weight``, ``1.bias``).

    The rows of the layer are used part by part: its output as a whole would be cut into strips, which the backward pass
    has to put together again.
    """

    def __init__(self, width: int, parts: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, parts * width))
        self.parts = parts

    def rows(self) -> list[tuple[Float[Tensor, "W W"], Float[Tensor, "W"]]]:
        """Weight and bias of every part."""
        layer: Any = self[1]
        weights, biases = layer.weight.unflatten(0, (self.parts, -1)), layer.bias.unflatten(0, (self.parts, -1))
        return list(zip(weights.unbind(), biases.unbind(), strict=True))


def _modulate(h: Tensor, active: Tensor, shift: tuple[Tensor, Tensor], scale: tuple[Tensor, Tensor]) -> Tensor:
    """Return h * (1 + scale) + shift; the product that makes the shift adds to what is there."""
    scaled = h * F.linear(active, scale[0], scale[1] + 1) + shift[1]
    return torch.addmm(scaled, active, shift[0].t())


class ResBlock(nn.Module):
    """h + gate * mlp(norm(h) * (1 + scale) + shift)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = Modulation(width, 3)

    def forward(self, h: Float[Tensor, "M W"], active: Float[Tensor, "M W"]) -> Float[Tensor, "M W"]:
        """``active`` is silu(y), the same for all blocks."""
        shift, scale, gate = self.adaLN_modulation.rows()
        return h + F.linear(active, *gate) * self.mlp(_modulate(self.in_ln(h), active, shift, scale))


class FinalLayer(nn.Module):
    """Modulated norm without weights, then the output."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.width = width
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, h: Float[Tensor, "M W"], active: Float[Tensor, "M W"]) -> Float[Tensor, "M O"]:
        """``active`` is silu(y)."""
        shift, scale = self.adaLN_modulation.rows()
        return self.linear(_modulate(F.layer_norm(h, (self.width,), eps=1e-6), active, shift, scale))


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
        self.time_embed = TimeEmbedder(width)
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
