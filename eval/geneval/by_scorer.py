"""NOT GenEval: a verdict by an image-text scorer that was trained here, for machines without detector weights.

The scorer knows emoji. Its verdicts are comparable with its own only, and every result says so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff.errors import CheckpointError
from mmdiff.images import to_pixels

from .files import pictures_of
from .measuring import opened, verdict_of
from .scoring import GenEvalResult, summarise

__all__ = ["LABEL", "judge_by_scorer", "open_scorer"]

LABEL = "NOT GenEval: judged by a scorer trained on emoji"

EncodeTexts = Callable[[list[str]], tuple[Tensor, Tensor]]
"""Texts -> ids [B, L] and which of them are real, bool [B, L]."""


def open_scorer(folder: str | Path, tokenizer: str | Path) -> tuple[Any, EncodeTexts]:
    """A scorer and what turns texts into its ids.

    Args:
        folder: Checkpoint of a scorer.
        tokenizer: Folder of the tokenizer it was trained with.

    Raises:
        CheckpointError: The checkpoint is no scorer.
    """
    from mmdiff.models.registry import load_model
    from mmdiff.text import Tokenizer

    net: Any = load_model(str(folder))
    if not hasattr(net, "embed_text"):
        raise CheckpointError(f"{folder}: a {type(net).__name__} does not judge pictures and texts; give a scorer")
    words = Tokenizer.from_pretrained(tokenizer)

    def encode(texts: list[str]) -> tuple[Tensor, Tensor]:
        rows = [torch.tensor(words.encode(text)) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]

    return net.eval(), encode


@torch.no_grad()
def judge_by_scorer(
    folder: str | Path, scorer: Any, encode: EncodeTexts, *, samples: int | None = None
) -> GenEvalResult:
    """A picture is right if, of all prompts in the folder, the scorer finds it nearest to its own.

    Args:
        folder: Pictures in the official layout.
        scorer: Network with ``embed_image`` and ``embed_text``.
        encode: See `open_scorer`.
        samples: Pictures that every prompt must have; None: as many as the others.
    """
    prompts = pictures_of(folder, samples=samples)
    texts = sorted({str(metadata["prompt"]) for metadata in prompts.values()})
    wanted = scorer.embed_text(*encode([text.removeprefix("a photo of ") for text in texts]))
    size = scorer.config.image_size
    rows = torch.cat([scorer.embed_image(to_pixels(opened(path), size)[None]) for path in prompts])
    pictures = []
    for (path, metadata), number in zip(prompts.items(), (rows @ wanted.T).argmax(dim=1).tolist(), strict=True):
        own = texts[number] == metadata["prompt"]
        record = {"correct": own, "reason": "" if own else f"nearer to: {texts[number]}", "details": {}}
        pictures.append(verdict_of(str(path), metadata, record))
    return summarise(pictures)
