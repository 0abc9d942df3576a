"""Objective of discrete image tokens: cross-entropy of class-conditional codes under a mask.

Source: MaskGIT (arXiv 2202.04200); its PyTorch reproduction (arXiv 2310.14400) and Halton-MaskGIT (arXiv 2503.17076),
which learn all positions.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.training.losses import Losses

__all__ = ["MaskedCodes"]


@config
class MaskedCodes:
    """Masked codes of class-conditional images."""

    type: Literal["masked_codes"] = "masked_codes"
    """Objective name."""
    schedule: Literal["arccos", "cosine", "linear"] = "arccos"
    """Share of masked tokens from a uniform number r: 2/pi arccos r, cos(pi/2 r), or 1 - r."""
    positions: Literal["masked", "all"] = "masked"
    """Which tokens are learnt; published PyTorch code learns all."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Smoothing of the targets."""
    drop_label: float = Field(0.1, ge=0, le=1)
    """Share of images whose class is dropped, so that guidance has an unconditional branch."""

    def __call__(self, model: Any, batch: Batch, source: rng.Source) -> Losses:
        """Mean over the learnt tokens of the batch."""
        codes, mask, labels = self._noise(model, batch, source)
        total, b = self.loss(model, codes, labels, mask), len(codes)
        return Losses(total, {"image": (total.detach() * b, b)}, {"image": total * self._learnt(mask)})

    def counts(self, model: Any, batch: Batch, source: rng.Source) -> dict[str, float]:
        """Learnt tokens."""
        return {"image": float(self._learnt(self._noise(model, batch, source)[1]))}

    def _noise(self, model: Any, batch: Batch, source: rng.Source) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, mask and labels."""
        if batch.latents is None or batch.classes is None or batch.latents.is_floating_point():
            raise ConfigError("objective masked_codes: needs the task latent on shards with codes (mmdiff data cache)")
        codes, device = batch.latents.flatten(1), batch.latents.device
        b, n = codes.shape
        r, drop = rng.uniform(source, (b, 2), device=device).unbind(1)
        mask = self.mask(r, rng.uniform(source, (b, n), device=device))
        return codes, mask, batch.classes.masked_fill(drop < self.drop_label, model.config.classes)

    def _learnt(self, mask: Tensor) -> Tensor | int:
        return mask.numel() if self.positions == "all" else mask.sum()

    def mask(self, r: Float[Tensor, "B"], u: Float[Tensor, "B N"]) -> Bool[Tensor, "B N"]:
        """Each token is masked independently where u is below the share."""
        curves = {
            "arccos": torch.arccos(r) / (math.pi / 2),
            "cosine": torch.cos(r * math.pi / 2),
            "linear": 1 - r,
        }
        return u < curves[self.schedule][:, None]

    def loss(
        self, model: Any, codes: Int[Tensor, "B N"], labels: Int[Tensor, "B"], mask: Bool[Tensor, "B N"]
    ) -> Float[Tensor, ""]:
        """The loss for a given mask and given labels (the number of classes = none)."""
        logits = model(codes.masked_fill(mask, model.config.codebook), labels).float()
        if self.positions == "all":
            return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), label_smoothing=self.label_smoothing)
        if not bool(mask.any()):
            return logits.sum() * 0
        return F.cross_entropy(logits[mask], codes[mask], label_smoothing=self.label_smoothing)
