"""What is learnt from a batch: draw noise, run the network, loss at masked positions.

An objective is a callable (model, batch, source) -> `Losses`; its configuration names it in a recipe. A new objective
is a new class in `ObjectiveConfig` and nothing else changes. ``source`` is a generator, or one per row: then what is
drawn for a row does not depend on how a batch is spread over processes and parts. Two methods are optional:

* ``together(model, batch, rows, generator)``: what has to be drawn for all ``rows`` of a step at once, as fields of
  `Batch` with a row each;
* ``counts(model, batch, source)``: number of summands of each of the losses' ``sums``, with the draws of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mmdiff import rng
from mmdiff.batch import IGNORE, Batch, Packing, places
from mmdiff.config import Field, config
from mmdiff.diffusion import bounds, masking, noise, objectives
from mmdiff.errors import ConfigError
from mmdiff.nn.masks import document_mask
from mmdiff.training.autoencoding import Autoencoding
from mmdiff.training.block_diffusion import BlockDiffusion
from mmdiff.training.certainty import CertaintyForcing
from mmdiff.training.flow import Flow
from mmdiff.training.latent_tokens import latent_losses, slot_values
from mmdiff.training.losses import Losses, count_rows, row_sum
from mmdiff.training.masked_codes import MaskedCodes
from mmdiff.training.parallel.rows import of_everyone
from mmdiff.training.token_diffusion import TokenDiffusion

__all__ = [
    "Autoencoding",
    "BlockDiffusion",
    "CertaintyForcing",
    "Contrastive",
    "Flow",
    "Losses",
    "Masked",
    "MaskedCodes",
    "Objective",
    "ObjectiveConfig",
    "TokenDiffusion",
    "build",
]


Objective = Callable[[nn.Module, Batch, rng.Source], Losses]


@config
class Masked:
    """Masked diffusion of answers and image codes in one batch."""

    type: Literal["masked"] = "masked"
    """Objective name."""
    text_weight: float = Field(1.0, ge=0)
    """Weight of the text loss."""
    image_weight: float = Field(1.0, ge=0)
    """Weight of the image-code loss."""
    drop_prompt: float = Field(0.1, ge=0, le=1)
    """Share of drawing samples whose prompt is masked, so that guidance has an unconditional branch."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Smoothing of the image-code targets."""
    copies: int = Field(4, gt=0)
    """Noise levels drawn per masked token and step, for networks with continuous image tokens."""
    masking: Literal["count", "independent"] = "count"
    """How answers are masked. count: l of L positions, l uniform, weight L / l; independent: each with probability
    p(t), weight 1 / p, as LLaDA published. Same expectation; for short answers the weights of count stay small."""
    stratified: bool = True
    """Spread the times of a batch evenly (low discrepancy: lower variance, same expectation)."""
    schedule: Literal["linear", "geometric", "cosine", "cosine-squared", "square", "square-root", "log"] = "linear"
    """How the share of masked answer tokens grows with t, for ``masking: independent``. linear: LLaDA's, from 0.001 to
    1; the others as MDLM, RADD and BD3-LM published them, with weight p'(t) / p(t). The bound is the same in
    expectation; its variance is not."""
    reduction: Literal["answer", "token", "square"] = "answer"
    """What an answer of l tokens counts. answer: as much as any other (LLaDA's fine-tuning); token: l times as much
    (pre-training); square: sqrt(l) times as much, divided by the sum of all weights (LLaDA-o)."""
    exclude_mask: bool = False
    """Leave the mask out of the text softmax (MDLM's SUBS, RADD); published LLaDA networks keep it."""
    complementary: bool = False
    """Read every row twice, the second time with the other answer positions masked, and take the plain mean of the
    cross-entropy over all of them: every token is learnt in every step, images are encoded once (LaViDa, arXiv
    2505.16839). Rows with image codes are not doubled. ``masking`` then only says how the first mask is drawn."""

    def together(self, model: Any, batch: Batch, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Times that are spread over all rows of a step."""
        if not self.stratified:
            return {}
        t = masking.stratified_times(rng.uniform(generator, (rows,)))
        return {"t": t[rng.permutation(generator, 1, rows)[0]]}

    def counts(self, model: Any, batch: Batch, source: rng.Source) -> dict[str, float]:
        """By what the sum over answers is divided, and the number of masked image codes."""
        noised = _noise(self, model, batch, source)
        weights = batch.weights * noised.labels_text
        text = weights.sum() if self.complementary else self._of_answers(noised, weights)[1]
        return {"text": float(text), "image": float(noised.image.sum())}

    def __call__(self, model: Any, batch: Batch, source: rng.Source) -> Losses:
        """Loss of text answers (LLaDA's SFT loss) plus loss of image codes (MaskGIT's)."""
        noised = _noise(self, model, batch, source)
        values = slot_values(model, batch)
        told = {} if values is None else {"values": values}
        embeds = model.embed_slots(noised.ids, _seen(batch), **told)
        if self.complementary:
            return self._both_halves(model, batch, noised, embeds)
        hidden = _hidden(model, noised.ids, embeds, batch, batch.packing)
        text, weights = noised.text, batch.weights * noised.labels_text
        terms: dict[str, tuple[Tensor, int]] = {}
        total, sums = hidden.new_zeros(()), dict[str, Tensor]()
        rows_text = noised.labels_text.any(1)
        if bool(text.any()):
            loss = objectives.chunked_cross_entropy(hidden[text], batch.labels[text], self._text_head(model))
            per_row = row_sum(loss * objectives.token_weights(text, noised.p, weights)[text], text)
            of_token, count = self._of_answers(noised, weights)
            sums["text"] = self.text_weight * (loss * of_token[text]).sum()
            total = total + sums["text"] / count
            count_rows(terms, batch, per_row.detach(), rows_text)
        image = noised.image
        if bool(image.any()):
            loss = self._image_losses(model, batch, image, hidden, source)
            sums["image"] = self.image_weight * loss.sum()
            total = total + sums["image"] / len(loss)
            count_rows(terms, batch, row_sum(loss.detach(), image) / image.sum(1).clamp_min(1), image.any(1))
        return Losses(total, terms, sums)

    def _image_losses(
        self, model: Any, batch: Batch, image: Tensor, hidden: Tensor, source: rng.Source
    ) -> Float[Tensor, "M"]:
        """Of masked codes the cross-entropy, of masked continuous tokens the diffusion loss."""
        layout = model.layout()
        if layout.latents:
            return latent_losses(model, batch, image, hidden, source, self.copies)
        codes = batch.labels[image] - layout.code_offset
        logits = model.code_head(hidden[image]).float()
        return F.cross_entropy(logits, codes, reduction="none", label_smoothing=self.label_smoothing)

    def _text_head(self, model: Any) -> Callable[[Tensor], Tensor]:
        if not self.exclude_mask:
            return cast("Callable[[Tensor], Tensor]", model.text_head)
        return lambda hidden: bounds.without(model.text_head(hidden), _mask_id(model))

    def _of_answers(self, noised: _Noised, weights: Tensor) -> tuple[Float[Tensor, "B L"], Float[Tensor, ""]]:
        """What the loss of a masked token counts, and by what the sum over all of them is divided."""
        if self.reduction == "answer":
            return objectives.token_weights(noised.text, noised.p, weights), noised.labels_text.any(1).sum().float()
        if self.reduction == "token":
            return weights / noised.p[:, None], weights.sum()
        of_answer = objectives.length_weights(noised.labels_text.sum(1).clamp_min(1), noised.p, "square")
        of_token = weights * of_answer[:, None]
        return of_token, of_token[noised.text].sum()

    def _both_halves(self, model: Any, batch: Batch, noised: _Noised, embeds: Tensor) -> Losses:
        """Mean cross-entropy of answer positions, each masked in one of two copies of its row."""
        if bool(noised.image.any()):
            raise ConfigError("objective.complementary is for answers in text; this batch holds image codes to draw")
        first, labels = noised.text, noised.labels_text
        second = labels & ~first
        mask = model.embed_slots(torch.full_like(batch.ids[:1, :1], _mask_id(model)))
        told = model.embed_slots(batch.ids.masked_fill(~labels, 0)).to(embeds.dtype)
        other = torch.where(second[..., None], mask.to(embeds.dtype), torch.where(first[..., None], told, embeds))
        both = torch.cat([first, second])
        packing = None if batch.packing is None else batch.packing.twice()
        hidden = _hidden(model, noised.ids, torch.cat([embeds, other]), batch, packing)
        loss = objectives.chunked_cross_entropy(hidden[both], batch.labels.repeat(2, 1)[both], self._text_head(model))
        weights = (batch.weights * labels).repeat(2, 1)
        summed = row_sum(loss * weights[both], both).unflatten(0, (2, -1)).sum(0)
        per_row = summed / (batch.weights * labels).sum(1).clamp_min(torch.finfo(weights.dtype).tiny)
        terms: dict[str, tuple[Tensor, int]] = {}
        count_rows(terms, batch, per_row.detach(), labels.any(1))
        total = self.text_weight * summed.sum()
        count = weights[: len(batch)].sum().clamp_min(torch.finfo(weights.dtype).tiny)
        return Losses(total / count, terms, {"text": total})


@config
class Contrastive:
    """Images and their texts against all other pairs of the batch."""

    type: Literal["contrastive"] = "contrastive"
    """Objective name."""

    def __call__(self, model: Any, batch: Batch, source: rng.Source) -> Losses:
        """SigLIP's sigmoid loss, summed over texts and averaged over images (arXiv 2303.15343, algorithm 1)."""
        texts, first = of_everyone(model.embed_text(batch.ids, batch.valid))
        logits = model.similarity(model.embed_image(_pixels(batch)), texts)
        same = torch.zeros_like(logits)
        same[:, first : first + len(batch)].fill_diagonal_(1)
        loss = -F.logsigmoid((2 * same - 1) * logits).sum(1)
        return Losses(loss.mean(), {"pair": (loss.detach().sum(), len(batch))})


AnyObjective = (
    Masked | BlockDiffusion | CertaintyForcing | Autoencoding | Contrastive | TokenDiffusion | MaskedCodes | Flow
)

ObjectiveConfig = Annotated[AnyObjective, Field(discriminator="type")]


def build(spec: AnyObjective) -> Objective:
    """The callable of an objective's configuration (the configuration itself)."""
    return spec


@dataclass(frozen=True)
class _Noised:
    ids: Tensor  # [B, L] with masks in place
    text: Tensor  # [B, L] bool, masked text targets
    image: Tensor  # [B, L] bool, masked code targets
    labels_text: Tensor  # [B, L] bool, all text targets
    p: Tensor  # [B], 1 / weight of the bound; of the linear schedule: the share of masked answer positions


def _noise(spec: Masked, model: Any, batch: Batch, source: rng.Source) -> _Noised:
    """Mask text targets independently with p(t), code targets in exact cosine counts, and drop some prompts."""
    layout, device = model.layout(), batch.ids.device
    b, length = batch.ids.shape
    t, drop = rng.uniform(source, (b, 2), device=device).unbind(1)
    u = rng.uniform(source, (b, length), device=device)
    if batch.t is not None:
        t = batch.t
    elif spec.stratified:
        t = masking.stratified_times(t)[rng.permutation(source, 1, b, device=device)[0]]
    targets = batch.labels != IGNORE
    is_code = targets & (batch.labels >= layout.code_offset)
    labels_text = targets & ~is_code
    if spec.masking == "count":
        text = masking.uniform_count_mask(t, u, labels_text)
        p = text.sum(1) / labels_text.sum(1).clamp_min(1)
    elif spec.schedule == "linear":
        p = masking.mask_probability(t)
        text = masking.independent_mask(p, u, labels_text)
    else:
        gamma, time = noise.NOISES[spec.schedule], masking.mask_probability(t)
        p = 1 / gamma.weight(time)
        text = masking.independent_mask(gamma.share(time), u, labels_text)
    image = masking.exact_count_mask(masking.masked_share(t), u, is_code)
    dropped = (drop < spec.drop_prompt)[:, None] & is_code.any(1, keepdim=True) & batch.droppable
    ids = batch.ids.masked_fill(text | dropped, _mask_id(model))
    return _Noised(ids.masked_fill(image, layout.code_mask_id), text, image, labels_text, p)


def _hidden(model: Any, ids: Tensor, embeds: Tensor, batch: Batch, packing: Packing | None) -> Tensor:
    """Hidden states of the batch's rows, or of as many copies of them as ``embeds`` holds; packed if the batch is."""
    copies, length = len(embeds) // len(batch), embeds.shape[1]
    own = places(model, ids.repeat(copies, 1))
    if packing is None:
        return model.hidden(embeds=embeds, valid=batch.valid.repeat(copies, 1), positions=own)
    packed = packing.layout(length, embeds.device)
    # Places on a grid are counted from the start of a row of the batch, wherever it lies in the packed row.
    positions = packed.positions if own is None or own.ndim == 2 else packed.gather(own)
    hidden = model.hidden(embeds=packed.gather(embeds), attend=document_mask(packed.segments), positions=positions)
    return packed.scatter(hidden, len(embeds), length)


def _mask_id(model: Any) -> int:
    return int(getattr(model.config, "language", model.config).mask_id)


def _seen(batch: Batch) -> Any:
    """The images of all rows in order."""
    return [image for row in batch.images for image in row] if batch.images else batch.pixels


def _pixels(batch: Batch) -> Tensor:
    if batch.pixels is None:
        raise ValueError("this objective needs a task that yields pixels, such as 'image' or 'pair'")
    return batch.pixels
