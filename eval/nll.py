"""How well a model expects true texts: an upper bound of their negative log-likelihood, and the perplexity it gives.

A masked-diffusion model has no exact likelihood; what is averaged is its bound, estimated with random masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff import config
from mmdiff.errors import ConfigError

from .bootstrap import Interval, bootstrap
from .processes import merge_objects, rank_and_world
from .run_folder import RunFolder

__all__ = ["NllResult", "measure", "score"]


@dataclass(frozen=True, kw_only=True)
class NllResult:
    """Likelihood of a set of texts.

    Attributes:
        n: Number of texts.
        tokens: Number of tokens in them.
        nll: Nats per text, mean.
        nll_per_token: Nats per token over all texts.
        perplexity: exp of that.
        bits_per_byte: Bits per byte of UTF-8.
        interval: Bootstrap over texts of the nats per text.
        samples: Masks per text; 0 where likelihoods were given.
        each: Nats of each text.
    """

    n: int
    tokens: int
    nll: float
    nll_per_token: float
    perplexity: float
    bits_per_byte: float
    interval: Interval
    samples: int
    each: tuple[float, ...]


def score(
    loglikelihoods: Sequence[float], texts: Sequence[str], tokens: Sequence[int], *, samples: int = 0
) -> NllResult:
    """Averages of given log-likelihoods.

    Args:
        loglikelihoods: In nats, one per text.
        texts: The texts.
        tokens: Number of tokens of each.
        samples: Masks per text, for the record.

    Raises:
        ConfigError: Different numbers of them, none, or a value that is not finite.
    """
    if not texts or not len(loglikelihoods) == len(texts) == len(tokens):
        raise ConfigError(f"{len(loglikelihoods)} likelihoods, {len(texts)} texts, {len(tokens)} lengths")
    if wrong := [i for i, v in enumerate(loglikelihoods) if not math.isfinite(v)]:
        raise ConfigError(f"text {wrong[0]} {texts[wrong[0]][:40]!r}: log-likelihood {loglikelihoods[wrong[0]]}")
    each = tuple(-float(v) for v in loglikelihoods)
    total, count = sum(each), sum(tokens)
    return NllResult(
        n=len(texts),
        tokens=count,
        nll=total / len(texts),
        nll_per_token=total / count,
        perplexity=math.exp(total / count),
        bits_per_byte=total / math.log(2) / max(1, sum(len(t.encode()) for t in texts)),
        interval=bootstrap(each),
        samples=samples,
        each=each,
    )


def measure(
    model: Any,
    records: Sequence[Mapping[str, Any]],
    *,
    samples: int = 32,
    seed: int = 0,
    out: str | Path | None = None,
    checkpoint: str = "",
) -> NllResult:
    """Likelihood of the answers of records under a model; under torchrun the processes share the work.

    Args:
        model: A loaded checkpoint, see `mmdiff.load`.
        records: ``answer``, ``prompt`` (or ``question``), and maybe ``image``.
        samples: Masks per text.
        seed: Of the masks.
        out: Folder where each likelihood is kept as it comes; an interrupted run goes on there. None: nothing is kept.
        checkpoint: Hash of the model, for the record.

    Raises:
        ConfigError: A record without ``answer``, or a folder with likelihoods of other texts or settings.
    """
    from mmdiff.pipelines.prompts import tokenizer_of

    for number, record in enumerate(records):
        if not record.get("answer"):
            raise ConfigError(f"record {number} has no answer; it has {', '.join(list(record)[:8])}")
    texts = [str(record["answer"]) for record in records]
    settings = {"samples": samples, "seed": seed, "checkpoint": checkpoint, "texts": config.fingerprint(texts)}
    kept = None if out is None else RunFolder(out, settings)
    done = {} if kept is None else {int(i): float(a["loglikelihood"]) for i, a in kept.done().items()}
    for number in _mine(len(records), done):
        done[number] = _loglikelihood(model, records[number], samples, seed)
        if kept is not None:
            kept.append(str(number), loglikelihood=done[number])
    for part in merge_objects(done):
        done |= part
    count = tokenizer_of(model.checkpoint).encode
    values = [done[number] for number in range(len(records))]
    return score(values, texts, [len(count(text)) for text in texts], samples=samples)


def _mine(count: int, done: Mapping[int, float]) -> Iterator[int]:
    """The places that this process has still to do."""
    from tqdm import tqdm

    rank, world = rank_and_world()
    todo = [number for number in range(rank, count, world) if number not in done]
    yield from tqdm(todo, unit="text", desc="likelihood", disable=None)


def _loglikelihood(model: Any, record: Mapping[str, Any], samples: int, seed: int) -> float:
    prompt, answer = str(record.get("prompt", record.get("question", ""))), str(record["answer"])
    if record.get("image") is not None:
        return float(model.vision.loglikelihood(record["image"], prompt, answer, samples=samples, seed=seed))
    return float(model.text.loglikelihood(prompt, answer, samples=samples, seed=seed))
