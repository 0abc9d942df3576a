"""Objective of block diffusion: blocks are drawn one after the other, masked diffusion within each.

The network reads a noised and a clean copy of the row in one pass; a noised block sees itself and the clean blocks
before it, as it will in decoding with stored keys and values.

Source: BD3-LM (arXiv 2503.09573); with a causal context NBDiff.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmdiff import rng
from mmdiff.batch import IGNORE, Batch
from mmdiff.config import Field, config
from mmdiff.diffusion import block_diffusion, objectives
from mmdiff.diffusion.noise import NOISES
from mmdiff.errors import ConfigError
from mmdiff.nn import masks
from mmdiff.training.losses import Losses, count_rows, row_sum

__all__ = ["BlockDiffusion"]


@config
class BlockDiffusion:
    """Masked diffusion of text in blocks."""

    type: Literal["block_diffusion"] = "block_diffusion"
    """Objective name."""
    block_length: int = Field(32, gt=0)
    """Slots of a block, counted from the start of the row."""
    schedule: Literal["loglinear", "cosine", "cosine-squared", "square", "square-root", "log"] = "loglinear"
    """How the share of masked tokens grows with t."""
    interval: tuple[float, float] = (1e-3, 1.0)
    """Smallest and largest time, and share of a block that is masked: a narrower interval has less variance."""
    context: Literal["block", "causal"] = "block"
    """How clean slots see each other: whole blocks, or token by token, as an autoregressive model does."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 < low < high <= 1:
            raise ConfigError(f"objective.interval ({low}, {high}): expected 0 < low < high <= 1")

    def __call__(self, model: Any, batch: Batch, source: rng.Source) -> Losses:
        """Weighted cross-entropy at masked answer positions over the sum of all answers' weights."""
        if batch.pixels is not None or batch.images:
            raise ConfigError("objective block_diffusion: reads text alone; leave tasks with images out")
        targets = batch.labels != IGNORE
        if not bool(targets.any()):
            raise ConfigError("objective block_diffusion: this batch has no answer to learn")
        masked, weight = self._noise(targets, source)
        hidden = self._hidden(model, batch, masked)
        # A batch without a masked token still takes part: its loss is 0 and so are its gradients.
        if not bool(masked.any()):
            return Losses(hidden.sum() * 0, {}, {"text": hidden.sum() * 0})
        loss = objectives.chunked_cross_entropy(hidden[masked], batch.labels[masked], model.text_head)
        per_row = row_sum(loss * (weight * batch.weights)[masked], masked)
        answers = batch.weights * targets
        terms: dict[str, tuple[Tensor, int]] = {}
        count_rows(terms, batch, (per_row / answers.sum(1).clamp_min(1e-9)).detach(), targets.any(1))
        return Losses(per_row.sum() / answers.sum(), terms, {"text": per_row.sum()})

    def counts(self, model: Any, batch: Batch, source: rng.Source) -> dict[str, float]:
        """The sum of all answers' weights."""
        return {"text": float((batch.weights * (batch.labels != IGNORE)).sum())}

    def _noise(self, targets: Tensor, source: rng.Source) -> tuple[Tensor, Tensor]:
        """Masked answer positions [B, L], and the weight of every position."""
        rows, length = targets.shape
        u = rng.uniform(source, (rows, -(-length // self.block_length)), device=targets.device)
        noise, t = NOISES[self.schedule], block_diffusion.block_times(u, self.interval)
        masked = block_diffusion.clipped_mask(noise.share(t), length, self.block_length, self.interval, source)
        weight = block_diffusion.weights(noise, t, self.interval)
        return masked & targets, weight.repeat_interleave(self.block_length, dim=1)[:, :length]

    def _hidden(self, model: Any, batch: Batch, masked: Tensor) -> Tensor:
        """States of the noised copy."""
        length = batch.ids.shape[1]
        mask_id = int(getattr(model.config, "language", model.config).mask_id)
        both = torch.cat([batch.ids.masked_fill(masked, mask_id), batch.ids], 1)
        rule = masks.block_diffusion(length, self.block_length, context=self.context)
        seen = masks.dense(rule, 1, 2 * length, device=both.device) & batch.valid.repeat(1, 2)[:, None]
        # Padding sees itself, so that no softmax is empty.
        seen = seen | torch.eye(2 * length, dtype=torch.bool, device=both.device)
        positions = torch.arange(length, device=both.device).repeat(len(both), 2)
        embeds = model.embed_slots(both, None)
        return model.hidden(embeds=embeds, attend=seen, positions=positions)[:, :length]
