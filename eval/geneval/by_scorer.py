"""NOT GenEval: a verdict by an image-text scorer that was trained here, for machines without detector weights.

The scorer knows emoji. Its verdicts are comparable with its own only, and every result says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff.errors import CheckpointError
from mmdiff.images import to_pixels
from mmdiff.rng import generator

from .files import pictures_of
from .measuring import opened, verdict_of
from .scoring import GenEvalResult, summarise

__all__ = ["LABEL", "ScorerVerdict", "judge_by_scorer", "open_scorer", "plain"]

LABEL = "NOT GenEval: judged by a scorer trained on emoji"

_HEAD = re.compile(r"^a photo of (an? )?")

EncodeTexts = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts -> ids [B, L] and which of them are real, bool [B, L]."""


@dataclass(frozen=True, kw_only=True)
class ScorerVerdict:
    """What the scorer says of a folder.

    Attributes:
        result: Pictures are right where the scorer finds them nearest to their own prompt.
        shuffled: Share of right pictures if every picture had been drawn for another prompt of the folder: the control.
        chance: 1 / number of different prompts.
    """

    result: GenEvalResult
    shuffled: float
    chance: float


def plain(prompt: str) -> str:
    """A prompt in the words of captions: without ``a photo of`` and its article."""
    return _HEAD.sub("", prompt)


def open_scorer(folder: str | Path, tokenizer: str | Path | None = None) -> tuple[Any, EncodeTexts]:
    """A scorer and what turns texts into its ids.

    Args:
        folder: Checkpoint of a scorer.
        tokenizer: Folder of the tokenizer it was trained with; None: the scorer's own folder.

    Raises:
        CheckpointError: The checkpoint is no scorer.
    """
    from mmdiff.models.registry import load_model
    from mmdiff.text import Tokenizer

    net: Any = load_model(str(folder))
    if not hasattr(net, "embed_text"):
        raise CheckpointError(f"{folder}: a {type(net).__name__} does not judge pictures and texts; give a scorer")
    words = Tokenizer.from_pretrained(tokenizer or folder)

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor(words.encode(text)) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    return net.eval(), encode


@torch.no_grad()
def judge_by_scorer(
    folder: str | Path, scorer: Any, encode: EncodeTexts, *, samples: int | None = None, seed: int = 0
) -> ScorerVerdict:
    """A picture is right if, of all prompts in the folder, the scorer finds it nearest to its own.

    Args:
        folder: Pictures in the official layout.
        scorer: Network with ``embed_image`` and ``embed_text``.
        encode: See `open_scorer`.
        samples: Pictures that every prompt must have; None: as many as the others.
        seed: Of the order in which prompts are given away for the control.
    """
    prompts = pictures_of(folder, samples=samples)
    texts = sorted({str(metadata["prompt"]) for metadata in prompts.values()})
    wanted = scorer.embed_text(*encode([plain(text) for text in texts]))
    size = scorer.config.image_size
    rows = torch.cat([scorer.embed_image(to_pixels(opened(path), size)[None]) for path in prompts])
    nearest = (rows @ wanted.T).argmax(dim=1).tolist()
    own = [texts.index(str(metadata["prompt"])) for metadata in prompts.values()]
    order = torch.randperm(len(texts), generator=generator(seed, "geneval-control")).tolist()
    other = {number: order[place - 1] for place, number in enumerate(order)}  # nobody keeps their own
    pictures = []
    for (path, metadata), number, true in zip(prompts.items(), nearest, own, strict=True):
        reason = "" if number == true else f"nearer to: {texts[number]}"
        pictures.append(verdict_of(str(path), metadata, {"correct": number == true, "reason": reason, "details": {}}))
    given_away = [number == other[true] for number, true in zip(nearest, own, strict=True)]
    return ScorerVerdict(result=summarise(pictures), shuffled=sum(given_away) / len(given_away), chance=1 / len(texts))
