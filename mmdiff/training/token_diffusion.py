"""Objective of continuous image tokens: a diffusion loss per masked token.

The head runs on masked tokens only (published code runs it on all and multiplies by the mask: the same sum), the last
decoder block too, the condition of a token is embedded once for all its copies, and each timestep once.

Source: MAR (arXiv 2406.11838), section 4; eMIGM (arXiv 2503.07197), published training code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.config import Field, config
from mmdiff.diffusion import masking
from mmdiff.diffusion.gaussian import Process
from mmdiff.diffusion.mask_schedules import GAMMAS, GammaName, independent_masks, shared_mask
from mmdiff.errors import ConfigError
from mmdiff.training.losses import Losses

__all__ = ["TokenDiffusion", "denoising_losses", "process"]

Draws = Callable[[Int[Tensor, "M"]], tuple[Int[Tensor, "M"], Float[Tensor, "M C"]]]
"""Places (copy, image, token), flattened with copies outermost, to timesteps and noise."""


@config
class TokenDiffusion:
    """Masked continuous tokens: eMIGM's training, and MAR's."""

    type: Literal["token_diffusion"] = "token_diffusion"
    """Objective name."""
    schedule: GammaName = "exp"
    """Mask schedule gamma(t)."""
    masks: Literal["shared", "own", "mar"] = "shared"
    """shared: one time and count for the whole batch, as published for eMIGM; own: a time per image; mar: a share of
    tokens per image from a normal distribution (mean 1, sd 0.25) cut to [0.7, 1], the largest of the batch for all."""
    t_min: float = Field(0.2, ge=0, lt=1)
    """Smaller times are raised to this one (not with mar)."""
    weighted: bool = False
    """Weight every token by gamma'(t) / gamma(t), which makes the loss a bound of the likelihood."""
    velocity: float = Field(0.0, ge=0)
    """Weight the error of the noise by 1 / alpha_bar(t), at most this much, which makes it the error of the velocity
    (arXiv 2202.00512) below that noise level; 0 = no weight, as published. The levels at which known tokens tell most
    about a token then count more."""
    copies: int = Field(4, gt=0)
    """Noise levels drawn per token and step."""
    drop_label: float = Field(0.1, ge=0, le=1)
    """Share of images whose class is dropped, so that guidance has an unconditional branch."""

    def __post_init__(self) -> None:
        if self.weighted and self.masks == "mar":
            raise ConfigError("objective: weighted needs a mask schedule; mar has none")

    def together(self, model: Any, batch: Batch, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Masks of all rows of a step: they share a time, or spread theirs."""
        mask, p = self.masked(rows, self._tokens(model, batch).shape[1], generator)
        return {"masked": mask, "t": p[:, 0]}

    def counts(self, model: Any, batch: Batch, source: rng.Source) -> dict[str, float]:
        """Masked tokens, once per copy."""
        mask, _ = self._masked(self._tokens(model, batch), batch, source)
        return {"image": float(mask.sum()) * self.copies}

    def __call__(self, model: Any, batch: Batch, source: rng.Source) -> Losses:
        """Mean over the masked tokens of the batch."""
        tokens = self._tokens(model, batch)
        b, n, c = tokens.shape
        mask, p = self._masked(tokens, batch, source)
        drop = rng.uniform(source, (b,), device=tokens.device)
        labels = self.dropped(cast("Tensor", batch.classes), drop, model.config.classes)
        # Drawn for every token, so that a row's numbers depend on nothing but the row.
        u = rng.uniform(source, (b, self.copies, n), device=tokens.device)
        noise = rng.normal(source, (b, self.copies, n, c), device=tokens.device)

        def draws(places: Tensor) -> tuple[Tensor, Tensor]:
            t = (u.transpose(0, 1).flatten()[places] * len(process())).long()
            return t, noise.transpose(0, 1).flatten(0, 2)[places]

        total = self.loss(model, tokens, labels, mask, p, draws)
        count = mask.sum() * self.copies
        return Losses(total, {"image": (total.detach() * b, b)}, {"image": total * count})

    def _tokens(self, model: Any, batch: Batch) -> Float[Tensor, "B N C"]:
        if batch.latents is None or batch.classes is None:
            raise ConfigError("objective token_diffusion: needs the task latent (shards made by mmdiff data cache)")
        return model.patchify(batch.latents)

    def _masked(self, tokens: Tensor, batch: Batch, source: rng.Source) -> tuple[Tensor, Tensor]:
        """The masks of the step, or new ones."""
        b, n, _ = tokens.shape
        if batch.masked is not None and batch.t is not None:
            return batch.masked, batch.t[:, None].expand(b, n)
        mask, p = self.masked(b, n, source)
        return mask.to(tokens.device), p.to(tokens.device)

    def masked(self, batch: int, tokens: int, source: rng.Source) -> tuple[Bool[Tensor, "B N"], Float[Tensor, "B N"]]:
        """(True = masked, the time that weights the loss)."""
        if self.masks == "mar":
            return masking.mar_mask(batch, tokens, source), torch.ones(batch, tokens)
        draw = shared_mask if self.masks == "shared" else independent_masks
        return draw(self.schedule, batch, tokens, source, t_min=self.t_min)

    def dropped(self, labels: Int[Tensor, "B"], u: Float[Tensor, "B"], classes: int) -> Int[Tensor, "B"]:
        """Labels, some replaced by the number of classes, which means none."""
        return labels.masked_fill(u < self.drop_label, classes)

    def loss(
        self,
        model: Any,
        tokens: Float[Tensor, "B N C"],
        labels: Int[Tensor, "B"],
        mask: Bool[Tensor, "B N"],
        p: Float[Tensor, "B N"],
        draws: Draws,
    ) -> Float[Tensor, ""]:
        """The loss for given masks, labels and draws.

        Args:
            model: `EMIGM`, or a network with its ``condition`` and ``head``.
            tokens: Clean tokens.
            labels: Classes; the number of classes = none.
            mask: True = masked.
            p: Time of each token, for the weight.
            draws: Timesteps and noise for given places.
        """
        b, n, _ = tokens.shape
        masked = mask.sum(1)
        low, high = int(masked.min()), int(masked.max())
        index = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :high]
        real = mask.gather(1, index)
        z = model.condition(tokens, mask, labels, index=index, counts=(n - high, n - low))[real]
        places = (index + n * torch.arange(b, device=index.device)[:, None])[real]
        copies = torch.arange(self.copies, device=index.device)[:, None] * (b * n)
        t, noise = draws((places + copies).flatten())
        clean = tokens.flatten(0, 1)[places].repeat(self.copies, 1)
        each = denoising_losses(model.head, clean, z, t, noise, self.copies, self.velocity)
        if self.weighted:
            each = each * GAMMAS[self.schedule].weight(p.flatten()[places]).repeat(self.copies)
        return each.sum() / len(each)


def denoising_losses(
    head: Any,
    clean: Float[Tensor, "M C"],
    z: Float[Tensor, "m D"],
    t: Int[Tensor, "M"],
    noise: Float[Tensor, "M C"],
    copies: int,
    velocity: float = 0.0,
) -> Float[Tensor, "M"]:
    """Diffusion loss of every copy of every token, copies outermost (M = copies * m).

    Args:
        head: `mmdiff.models.diffusion_head.DiffusionHead`.
        clean: Tokens.
        z: Their conditions, once each.
        t: Timesteps of the training process.
        noise: What is added.
        copies: Noise levels per token.
        velocity: See `TokenDiffusion.velocity`.
    """
    known = process()
    noisy = known.noised(clean, t, noise)
    every = torch.arange(len(known), device=t.device)
    time = head.time_embed(every.float())[t] if len(t) > len(known) else head.time_embed(t.float())
    output = head.denoise(noisy, time, head.cond_embed(z).repeat(copies, 1))
    mse, vb = known.token_losses(output, clean, noisy, t, noise)
    if velocity:
        mse = mse * (1 / known.alphas_cumprod.to(t.device)[t]).float().clamp_max(velocity)
    return mse + vb


@cache
def process() -> Process:
    """The training process of the head."""
    return Process.cosine()
