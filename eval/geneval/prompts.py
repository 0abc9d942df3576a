"""The 553 prompts of GenEval, made again from their seed, and the 80 classes and 10 colours they speak of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmdiff.errors import ConfigError

from ..files import read_records

__all__ = ["CLASSES", "COLORS", "METADATA_SHA256", "RELATIONS", "metadata_lines", "official_prompts", "read_prompts"]

CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
    clock, vase, scissors, teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
"""In the order of a COCO detector's outputs."""

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")

METADATA_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
"""Of the published ``evaluation_metadata.jsonl``."""

_SEED = 43
_NUMBERS = ("zero", "one", "two", "three", "four")
_DRAWS = 100


def official_prompts() -> list[dict[str, Any]]:
    """Metadata of the 553 prompts, in the order of the published file.

    Raises:
        ConfigError: This numpy draws other numbers; give the published file instead.

    Source: behaviour of the benchmark's generator script.
    """
    drawn: dict[str, dict[str, Any]] = {}
    for metadata in _draw(np.random.Generator(np.random.PCG64(_SEED))):
        drawn.setdefault(json.dumps(metadata), metadata)
    found = list(drawn.values())
    digest = hashlib.sha256(metadata_lines(found).encode()).hexdigest()
    if digest != METADATA_SHA256:
        raise ConfigError(
            f"GenEval's prompts drawn with numpy {np.__version__} have sha256 {digest}, expected {METADATA_SHA256}; "
            "give the published evaluation_metadata.jsonl"
        )
    return found


def metadata_lines(prompts: Iterable[Mapping[str, Any]]) -> str:
    """The text of a metadata file: one JSON object per line."""
    return "".join(json.dumps(metadata) + "\n" for metadata in prompts)


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """Metadata of a file in the published form, checked.

    Raises:
        ConfigError: A line that is not such metadata; the prompt is named.
    """
    found = read_records(path)
    for number, metadata in enumerate(found):
        check(metadata, f"{path}: prompt {number}")
    return found


def check(metadata: Mapping[str, Any], where: str) -> None:
    """Make sure that a prompt's metadata can be judged.

    Raises:
        ConfigError: Something is missing, or a class, colour, relation or target is unknown.
    """
    if missing := [k for k in ("tag", "include", "prompt") if k not in metadata]:
        raise ConfigError(f"{where}: no {missing[0]}")
    for entry in [*metadata["include"], *metadata.get("exclude", ())]:
        if entry.get("class") not in CLASSES or not isinstance(entry.get("count"), int):
            raise ConfigError(f"{where}: {entry} names no class of the 80, or no count")
    for number, entry in enumerate(metadata["include"]):
        if entry.get("color", COLORS[0]) not in COLORS:
            raise ConfigError(f"{where}: colour {entry['color']!r}; known: {', '.join(COLORS)}")
        relation, target = entry.get("position", (RELATIONS[0], None))
        if relation not in RELATIONS or (target is not None and not 0 <= target < number):
            raise ConfigError(f"{where}: position {entry['position']} names no relation to an earlier object")


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _plural(word: str) -> str:
    return f"{word}es" if word.endswith("s") else f"{word}s"


def _one(number: int, **more: Any) -> dict[str, Any]:
    return {"class": CLASSES[number], "count": 1, **more}


def _draw(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """All prompts before repeats are dropped; the order and kind of every draw is part of the seed's meaning."""
    for i in rng.choice(80, size=80, replace=False):
        yield _metadata("single_object", [_one(i)], _article(CLASSES[i]))
    for _ in range(_DRAWS):
        a, b = rng.choice(80, size=2, replace=False)
        yield _metadata("two_object", [_one(a), _one(b)], f"{_article(CLASSES[a])} and {_article(CLASSES[b])}")
    for _ in range(_DRAWS):
        yield _counting(int(rng.choice(80)), int(rng.integers(2, 4, endpoint=True)))
    for _ in range(_DRAWS):
        i, color = (rng.choice(79) + 1) % 80, COLORS[rng.choice(10)]  # a person has no colour
        yield _metadata("colors", [_one(i, color=color)], f"{_article(color)} {CLASSES[i]}")
    for _ in range(_DRAWS):
        a, b = rng.choice(80, size=2, replace=False)
        relation = RELATIONS[rng.choice(4)]
        text = f"{_article(CLASSES[a])} {relation} {_article(CLASSES[b])}"
        yield _metadata("position", [_one(b), _one(a, position=[relation, 0])], text)
    for _ in range(_DRAWS):
        a, b = (rng.choice(79, size=2, replace=False) + 1) % 80
        one, two = (COLORS[c] for c in rng.choice(10, size=2, replace=False))
        text = f"{_article(one)} {CLASSES[a]} and {_article(two)} {CLASSES[b]}"
        yield _metadata("color_attr", [_one(a, color=one), _one(b, color=two)], text)


def _counting(i: int, count: int) -> dict[str, Any]:
    include = [{"class": CLASSES[i], "count": count}]
    exclude = [{"class": CLASSES[i], "count": count + 1}]
    return _metadata("counting", include, f"{_NUMBERS[count]} {_plural(CLASSES[i])}", exclude)


def _metadata(
    tag: str, include: list[dict[str, Any]], what: str, exclude: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    found: dict[str, Any] = {"tag": tag, "include": include}
    if exclude:
        found["exclude"] = exclude
    return {**found, "prompt": f"a photo of {what}"}
