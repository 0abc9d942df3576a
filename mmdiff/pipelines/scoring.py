"""How likely a network finds a given answer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmdiff import rng
from mmdiff.diffusion.likelihood import confidence_score, log_likelihood, stratified_masks
from mmdiff.errors import ConfigError
from mmdiff.pipelines.answers import check_length, place_images
from mmdiff.pipelines.base import Checkpoint
from mmdiff.sampling import Canvas, Cfg, TextBackbone, layout

__all__ = ["Method", "Scoring", "answer_logits", "score_answer"]

Method = Literal["sampled", "confidence"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How an answer is scored.

    Attributes:
        samples: Masks drawn, for ``sampled``.
        seed: Of the masks.
        method: ``sampled``: the Monte-Carlo estimate of log p in nats; ``confidence``: iLLaDA's deterministic score,
            the true tokens revealed one by one, the most probable first.
        guidance: Weight of the prompt; 1 = none.
        batch_size: Masks per pass; it changes the draws of ``sampled`` as in the published code.

    Raises:
        ConfigError: No samples, no batch, or an unknown method.
    """

    samples: int = 128
    seed: int = 0
    method: Method = "sampled"
    guidance: float = 1.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch_size < 1:
            raise ConfigError(f"samples {self.samples} and batch_size {self.batch_size} must be at least 1")
        if self.method not in ("sampled", "confidence"):
            raise ConfigError(f"method {self.method!r}; known: sampled, confidence")


def score_answer(
    checkpoint: Checkpoint, prompt: Sequence[int], answer: Sequence[int], how: Scoring, images: Any = None
) -> float:
    """The score of an answer, in nats.

    Source: LLaDA (arXiv 2502.09992), published likelihood code: stratified numbers of masked tokens.

    Raises:
        ConfigError: An empty answer, or one too long for the model.
    """
    if not answer:
        raise ConfigError("loglikelihood: the answer is empty; give at least one token")
    logits = answer_logits(checkpoint, prompt, answer, guidance=how.guidance, images=images)
    target = torch.tensor(list(answer), device=checkpoint.device)
    with torch.no_grad():
        if how.method == "confidence":
            return float(-confidence_score(logits, target).losses.double().sum())
        draws = rng.generator(how.seed, "likelihood")
        return log_likelihood(logits, target, stratified_masks(len(answer), how.samples, how.batch_size, draws))


def answer_logits(
    checkpoint: Checkpoint,
    prompt: Sequence[int],
    answer: Sequence[int],
    *,
    guidance: float = 1.0,
    images: Any = None,
    after: Sequence[int] = (),
) -> Callable[[Tensor], Tensor]:
    """What `mmdiff.diffusion.likelihood` asks for: masks [b, L] of the answer's tokens in, logits [b, L, V] there out.

    Args:
        checkpoint: Network and tokenizer.
        prompt: Ids before the answer.
        answer: L ids.
        guidance: Weight of the prompt; 1 = none.
        images: Of the prompt's `mmdiff.batch.IMAGE` ids.
        after: Ids behind the answer, which the network sees (iLLaDA's ``padd_eos``).
    """
    backbone = TextBackbone(checkpoint.model)
    canvas = layout([prompt], [[*answer, *after]], mask_id=backbone.mask_id, device=checkpoint.device)
    check_length(checkpoint, canvas)
    canvas = place_images(canvas, checkpoint.model, images)
    here = slice(canvas.start, canvas.start + len(answer))
    index = torch.arange(here.start, here.stop, device=checkpoint.device)

    def logits(masked: Tensor) -> Tensor:
        rows = canvas.select(torch.zeros(len(masked), dtype=torch.long, device=masked.device))
        rows.tokens[:, here].masked_fill_(masked, backbone.mask_id)
        branches = Cfg(guidance).branches(rows, backbone.null_id)
        tall = functools.reduce(Canvas.stack, branches)
        read = backbone.forward(tall, index.expand(len(tall), -1))
        return Cfg(guidance).combine(read.chunk(len(branches)))

    return logits
