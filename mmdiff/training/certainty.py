"""Objective of certainty forcing: a trained model learns to be sure of more tokens at once, on its own answers.

Source: dParallel (arXiv 2509.26488).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmdiff import rng
from mmdiff.batch import IGNORE, Batch, places
from mmdiff.config import Field, config
from mmdiff.diffusion import certainty, objectives
from mmdiff.errors import ConfigError
from mmdiff.training.losses import Losses, count_rows, row_sum

__all__ = ["CertaintyForcing"]


@config
class CertaintyForcing:
    """Cross-entropy plus the entropy of right predictions, on both halves of one block of every answer."""

    type: Literal["certainty"] = "certainty"
    """Objective name."""
    block_length: int | None = Field(32, gt=0)
    """Answer tokens of a block; blocks before a random one are given, later ones hidden. Null: all of the answer."""
    mask_share: float = Field(0.5, gt=0, lt=1)
    """Share of the block that is masked; the second copy masks the rest."""
    weight: float = Field(2.0, ge=0)
    """Weight of the entropy."""
    temperature: float = Field(0.5, gt=0)
    """Temperature at which the entropy is taken."""

    def __call__(self, model: Any, batch: Batch, source: rng.Source) -> Losses:
        """Mean over both copies of cross-entropy and weighted entropy, each over its masked positions."""
        answer = batch.labels != IGNORE
        self._check(answer, batch, model)
        two = certainty.halves(
            answer,
            self._clean_blocks(answer, source),
            rng.uniform(source, tuple(answer.shape), device=answer.device),
            block=self.block_length,
            share=self.mask_share,
        )
        hidden = self._hidden(model, batch, two.hidden)
        labels, total, per_row = batch.labels.repeat(2, 1), hidden.sum() * 0, []
        for rows in (slice(None, len(batch)), slice(len(batch), None)):
            learnt = two.learnt[rows]
            logits = model.text_head(hidden[rows][learnt])
            entropy = objectives.cross_entropy(logits, labels[rows][learnt])
            sure = certainty.right_entropy(logits, labels[rows][learnt], self.temperature)
            total = total + objectives.mean_of(entropy) + self.weight * sure
            per_row.append(row_sum(entropy.detach(), learnt))
        terms: dict[str, tuple[Tensor, int]] = {}
        both = two.learnt.unflatten(0, (2, -1)).sum((0, 2))
        count_rows(terms, batch, (per_row[0] + per_row[1]) / both.clamp_min(1), both > 0)
        return Losses(total, terms)

    def _check(self, answer: Tensor, batch: Batch, model: Any) -> None:
        if not bool(answer.any()):
            raise ConfigError("objective certainty: this batch has no answer to learn")
        if bool((batch.labels >= model.layout().code_offset).any()):
            raise ConfigError("objective certainty is for answers in text; this batch holds image codes to draw")

    def _clean_blocks(self, answer: Tensor, source: rng.Source) -> Tensor:
        """Blocks that are given, drawn per row; a row whose rest is empty learns nothing, as published."""
        u = rng.uniform(source, (len(answer),), device=answer.device)
        if self.block_length is None:
            return torch.zeros_like(u, dtype=torch.long)
        return (u * (answer.sum(1) // self.block_length + 1)).long()

    def _hidden(self, model: Any, batch: Batch, hidden: Tensor) -> Tensor:
        """States of both copies; images are read once."""
        mask_id = int(getattr(model.config, "language", model.config).mask_id)
        images: Any = [image for row in batch.images for image in row] if batch.images else batch.pixels
        mask = model.embed_slots(torch.full_like(batch.ids[:1, :1], mask_id))
        embeds = model.embed_slots(batch.ids, images)
        return model.hidden(
            embeds=torch.where(hidden[..., None], mask.to(embeds.dtype), embeds.repeat(2, 1, 1)),
            valid=batch.valid.repeat(2, 1),
            positions=places(model, batch.ids.repeat(2, 1)),
        )
