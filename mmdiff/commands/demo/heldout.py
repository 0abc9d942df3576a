"""The pictures that training never saw, and what is asked about them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmdiff.rng import derive

__all__ = ["SPLITS", "Held", "Question", "choose_prompts", "questions", "read_split"]

SPLITS = {"novel concepts": "embedded:emoji/novel_concepts", "novel combinations": "embedded:emoji/novel_combinations"}


@dataclass(frozen=True)
class Held:
    """One held-out picture.

    Attributes:
        key: Its name in the shard.
        split: Key of `SPLITS`.
        image: The picture.
        info: Its JSON.
    """

    key: str
    split: str
    image: Image.Image
    info: dict[str, Any]

    @property
    def caption(self) -> str:
        """The true caption."""
        return str(self.info["caption"])


@dataclass(frozen=True)
class Question:
    """One question about one held-out picture."""

    held: Held
    question: str
    answer: str
    kind: str


def read_split(name: str) -> list[Held]:
    """All pictures of a split, in shard order.

    Raises:
        SampleError: One is damaged; the shards ship with the package, so nothing is skipped here.
    """
    from data_pipelines.reader import iter_samples
    from mmdiff import images

    held = []
    for sample, error in iter_samples([SPLITS[name]]):
        if sample is None:
            raise error if error is not None else RuntimeError("neither sample nor error")
        held.append(Held(sample.key, name, images.decode(sample.image()), sample.info()))
    return held


def questions(held: Iterable[Held], *, per_kind: int, seed: int = 0) -> list[Question]:
    """Questions balanced over answers within each kind; a pure function of its arguments."""
    from data_pipelines.datasets.questions import balanced_questions

    by_key = {h.key: h for h in held}
    chosen = balanced_questions([(k, h.info) for k, h in by_key.items()], seed, per_kind)
    return [Question(by_key[key], question, answer, kind) for key, question, answer, kind in chosen]


def choose_prompts(held: Iterable[Held], count: int) -> list[Held]:
    """``count`` pictures with different captions, chosen by a hash of their names."""
    distinct = {h.caption: h for h in held}
    return sorted(distinct.values(), key=lambda h: derive(0, "prompt", h.key))[:count]
