"""Objective of rectified flow: the velocity between an image and noise, at a time drawn for each row.

What the network is told of an image is its class, or what a text encoder makes of its text; both are dropped now and
then, so that guidance has an unconditional branch.

Source: SD3 (arXiv 2403.03206), section 3; a dropped text is the empty one, as published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.config import Field, config
from mmdiff.diffusion import flow
from mmdiff.errors import ConfigError
from mmdiff.training.losses import Losses

__all__ = ["Conditions", "Encode", "Flow"]

Conditions = tuple[Float[Tensor, "B M J"], Float[Tensor, "B P"]]
"""Features of texts, and one vector for each."""

Encode = Callable[[Sequence[str]], Conditions]
"""A text encoder."""


@config
class Flow:
    """Rectified flow over latents or pixels."""

    type: Literal["flow"] = "flow"
    """Objective name."""
    time: Literal["logit_normal", "mode", "uniform"] = "logit_normal"
    """How the share of noise sigma is drawn: sigmoid(mean + std n); SD3's heavy-tailed mode map; or evenly."""
    mean: float = 0.0
    """Of ``logit_normal``."""
    std: float = Field(1.0, gt=0)
    """Of ``logit_normal``."""
    scale: float = 1.29
    """Of ``mode``: positive favours the middle."""
    weight: Literal["none", "cosmap", "sigma_sqrt"] = "none"
    """Weight of a row by its sigma."""
    shift: float = Field(1.0, gt=0)
    """More noise for larger images: sigma becomes shift sigma / (1 + (shift - 1) sigma). Draw with the same."""
    base_tokens: int | None = Field(None, gt=0)
    """Image tokens at which ``shift`` is meant; larger images get the root of the ratio on top. Null: no matter."""
    drop: float = Field(0.1, ge=0, le=1)
    """Share of images whose class or text is dropped."""

    def __call__(self, model: Any, batch: Batch, generator: rng.Source) -> Losses:
        """The loss of a network that is told classes."""
        if batch.classes is None:
            raise ConfigError("objective flow: the batch holds no classes; for texts name a text_encoder in the recipe")
        drop = rng.uniform(generator, (len(batch),), device=batch.classes.device) < self.drop
        labels = batch.classes.masked_fill(drop, model.config.classes)
        return self.losses(model, batch, (labels,), generator)

    def reading(self, encode: Encode) -> Prompted:
        """The objective of a network that is told what ``encode`` makes of texts."""
        return Prompted(self, encode)

    def losses(self, model: Any, batch: Batch, conditions: Sequence[Tensor], generator: rng.Source) -> Losses:
        """Weighted squared error of the velocity, mean over the rows."""
        x0 = batch.latents
        if x0 is None or not x0.is_floating_point():
            raise ConfigError("objective flow: needs the task prompted or latent, on shards with latents or on pixels")
        sigma = self.sigmas(len(batch), generator, x0, model.config.patch_size)
        noise = rng.normal(generator, x0.shape, device=x0.device)
        predicted = model(flow.noised(x0, noise, sigma), flow.TRAIN_STEPS * sigma, *conditions)
        if predicted.shape != x0.shape:
            raise ConfigError(
                f"objective flow: the network predicts {tuple(predicted.shape[1:])} of {tuple(x0.shape[1:])}; set "
                "learned_variance to false, and out_channels to channels"
            )
        each = flow.per_sample_loss(predicted, flow.velocity(x0, noise)) * self._weights(sigma)
        return Losses(each.mean(), {"image": (each.detach().sum(), len(batch))})

    def sigmas(self, rows: int, generator: rng.Source, like: Tensor, patch: int) -> Float[Tensor, "B"]:
        """Shares of noise of the rows of a batch of images like ``like``."""
        if self.time == "logit_normal":
            sigma = flow.logit_normal(rng.normal(generator, (rows,), device=like.device), self.mean, self.std)
        else:
            u = rng.uniform(generator, (rows,), device=like.device)
            sigma = u if self.time == "uniform" else flow.mode(u, self.scale)
        tokens = like.shape[-2] * like.shape[-1] // patch**2
        factor = 1.0 if self.base_tokens is None else flow.resolution_shift(tokens, self.base_tokens)
        return flow.shifted(sigma, self.shift * factor)

    def _weights(self, sigma: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        if self.weight == "cosmap":
            return flow.cosmap_weight(sigma)
        # At sigma 0 the weight has no bound; a thousandth is where published times end.
        least = 1 / flow.TRAIN_STEPS
        return torch.ones_like(sigma) if self.weight == "none" else flow.sigma_sqrt_weight(sigma.clamp_min(least))


@dataclass(frozen=True)
class Prompted:
    """`Flow` with a text encoder."""

    spec: Flow
    encode: Encode

    def __call__(self, model: Any, batch: Batch, generator: rng.Source) -> Losses:
        """The loss of a network that is told texts."""
        if len(batch.texts) != len(batch):
            raise ConfigError("objective flow: a text_encoder needs texts; use the task prompted")
        drop = rng.uniform(generator, (len(batch),)) < self.spec.drop
        told = ["" if gone else text for text, gone in zip(batch.texts, drop.tolist(), strict=True)]
        like = batch.latents
        context, pooled = self.encode(told)
        if like is not None:
            context, pooled = context.to(like), pooled.to(like)
        return self.spec.losses(model, batch, (context, pooled), generator)
