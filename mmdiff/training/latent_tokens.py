"""Continuous image tokens among text: where their values lie in a batch, and eMIGM's loss of the masked ones.

Source: MAR (arXiv 2406.11838), section 4; eMIGM (arXiv 2503.07197): the loss of `mmdiff.training.token_diffusion`.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.errors import ConfigError
from mmdiff.training.token_diffusion import denoising_losses, process

__all__ = ["latent_losses", "slot_values"]


def slot_values(model: Any, batch: Batch) -> Float[Tensor, "B L C"] | None:
    """Continuous tokens at their slots, zeros elsewhere; None for a network without any, or a batch without images.

    Raises:
        ConfigError: A row with image slots and no latents, or other than one whole image.
    """
    layout = model.layout()
    drawn = batch.ids >= layout.code_offset
    if not layout.latents or not bool(drawn.any()):
        return None
    if batch.latents is None or not bool(((drawn.sum(1) == 0) | (drawn.sum(1) == layout.codes)).all()):
        raise ConfigError(
            f"rows with {drawn.sum(1).tolist()} slots of continuous tokens and "
            f"{'no latents' if batch.latents is None else 'latents'}; a row holds one image of {layout.codes} or none"
        )
    tokens = model.latents.patchify(batch.latents)
    values = tokens.new_zeros(*drawn.shape, tokens.shape[2])
    values[drawn] = tokens[drawn.any(1)].flatten(0, 1)
    return values


def latent_losses(
    model: Any,
    batch: Batch,
    masked: Bool[Tensor, "B L"],
    hidden: Float[Tensor, "B L D"],
    source: rng.Source,
    copies: int,
) -> Float[Tensor, "M"]:
    """Loss of every masked token, the mean over its copies.

    Args:
        model: A `mmdiff.models.unified.Unified` that draws continuous tokens.
        batch: Clean rows.
        masked: Their masked image slots.
        hidden: What the backbone says of the masked rows.
        source: Draws timesteps and noise.
        copies: Noise levels per token.
    """
    values = slot_values(model, batch)
    assert values is not None  # something is masked, so there are slots
    # Drawn for every token of an image, so that a row's numbers depend on nothing but the row.
    shape = (len(batch), copies, model.layout().codes)
    u = rng.uniform(source, shape, device=hidden.device)
    noise = rng.normal(source, (*shape, values.shape[2]), device=hidden.device)
    row, number = masked.nonzero()[:, 0], model.number(batch.ids)[masked]
    t = (u[row, :, number] * len(process())).long()
    added = noise[row, :, number].transpose(0, 1).flatten(0, 1)
    z = model.latents.condition(hidden[masked], number)
    each = denoising_losses(model.head, values[masked].repeat(copies, 1), z, t.T.flatten(), added, copies)
    return each.unflatten(0, (copies, -1)).mean(0)
