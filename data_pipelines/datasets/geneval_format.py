"""A small folder in GenEval's layout, made from emoji of classes that GenEval knows: real pictures laid out as asked.

For trying a harness from end to end, with detections that are true by construction. Some pictures are wrong on purpose,
so that a harness that calls everything right is found out. A score on it says nothing about a model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError
from mmdiff.images import decode

from ..reader import iter_samples
from .report import BuildReport

__all__ = ["CLASSES", "build", "write_prompts"]

CLASSES = (
    *("person", "bicycle", "motorcycle", "airplane", "bus", "train", "stop sign", "bird", "cat", "dog", "horse", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "skis", "kite", "skateboard"),
    *("wine glass", "spoon", "banana", "sandwich", "broccoli", "carrot", "hot dog", "pizza", "chair", "potted plant"),
    *("bed", "toilet", "laptop", "computer mouse", "scissors", "teddy bear", "toothbrush"),
)
"""Captions of emoji that are names of GenEval's classes, too."""

_NUMBERS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class _Placed:
    """An object of a picture: class, colour, place and size."""

    name: str
    color: str | None
    image: Any
    x: int
    y: int


def build(
    out: Path,
    *,
    shards: Sequence[str] = ("embedded:emoji/train", "embedded:emoji/novel_concepts"),
    prompts: int = 12,
    samples: int = 2,
    size: int = 128,
    wrong: float = 0.25,
    seed: int = 0,
) -> BuildReport:
    """Write ``<out>/<number>/metadata.jsonl``, ``samples/<number>.png`` and the true ``detections.jsonl``.

    Args:
        out: Folder.
        shards: Emoji shards the objects come from.
        prompts: Number of prompts: one object, two, counts, colours, places in turn.
        samples: Pictures per prompt.
        size: Side of a picture.
        wrong: Share of pictures that show something else.
        seed: Of all choices.

    Raises:
        ConfigError: Fewer than two of the classes are in the shards.
    """
    pictures = _objects(shards, size // 3)
    if len(pictures) < 2:
        raise ConfigError(f"{list(shards)}: {len(pictures)} of GenEval's classes are in them, at least 2 are needed")
    draw = random.Random(seed)
    detections = []
    total = 0
    for number in range(prompts):
        metadata = _metadata(number, sorted(pictures), pictures, draw)
        folder = out / f"{number:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps(metadata), encoding="utf-8")
        for sample in range(samples):
            shown = _layout(metadata, pictures, size, draw)
            if draw.random() < wrong:
                shown = shown[:-1]
            path = folder / "samples" / f"{sample:05d}.png"
            _paint(shown, size).save(path)
            total += path.stat().st_size
            detections.append({"filename": path.relative_to(out).as_posix(), "detections": _true(shown)})
    lines = "".join(json.dumps(d) + "\n" for d in detections)
    (out / "detections.jsonl").write_text(lines, encoding="utf-8")
    return BuildReport(
        name="geneval-format", out=out, counts={"images": len(detections)}, shards=(), bytes=total, skipped={}
    )


def write_prompts(out: Path, *, shards: Sequence[str] = ("embedded:emoji/train",)) -> int:
    """Write a metadata file of single objects in the words of captions, for models that know emoji and nothing else.

    Args:
        out: The file: one prompt, such as ``pizza``, for each of `CLASSES` that the shards have.
        shards: Emoji shards.

    Returns:
        Number of prompts.
    """
    names = sorted(_objects(shards, side=1))
    lines = [
        json.dumps({"tag": "single_object", "include": [{"class": name, "count": 1}], "prompt": name}) + "\n"
        for name in names
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(lines), encoding="utf-8")
    return len(names)


def _objects(shards: Sequence[str], side: int) -> dict[str, tuple[str | None, Any]]:
    """Class -> (main colour where there is one, picture)."""
    found: dict[str, tuple[str | None, Any]] = {}
    for sample, error in iter_samples(list(shards)):
        if sample is None:
            raise ConfigError(f"{list(shards)}: {error}")
        info = sample.info()
        name = str(info.get("caption"))
        if name in CLASSES and name not in found:
            found[name] = (_known_color(info.get("color")), decode(sample.image()).resize((side, side)))
    return found


def _metadata(
    number: int, names: Sequence[str], pictures: Mapping[str, tuple[str | None, Any]], draw: random.Random
) -> dict[str, Any]:
    a, b = draw.sample(list(names), 2)
    colored = [name for name in names if pictures[name][0]]
    kind = ("single_object", "two_object", "counting", "colors", "position")[number % 5]
    one: dict[str, Any] = {"class": a, "count": 1}
    if kind == "two_object":
        return {"tag": kind, "include": [one, {"class": b, "count": 1}], "prompt": f"a photo of a {a} and a {b}"}
    if kind == "counting":
        count = draw.choice(sorted(_NUMBERS))
        exclude = [{"class": a, "count": count + 1}]
        text = f"a photo of {_NUMBERS[count]} {a}s"
        return {"tag": kind, "include": [one | {"count": count}], "exclude": exclude, "prompt": text}
    if kind == "colors" and colored:
        name = draw.choice(colored)
        color = pictures[name][0]
        include = [{"class": name, "count": 1, "color": color}]
        return {"tag": kind, "include": include, "prompt": f"a photo of a {color} {name}"}
    if kind == "position":
        relation = draw.choice(["left of", "right of", "above", "below"])
        include = [{"class": b, "count": 1}, one | {"position": [relation, 0]}]
        return {"tag": kind, "include": include, "prompt": f"a photo of a {a} {relation} a {b}"}
    return {"tag": "single_object", "include": [one], "prompt": f"a photo of a {a}"}


def _known_color(color: str | None) -> str | None:
    # GenEval has no grey; what emoji call grey is nearest to white there.
    return {"gray": "white", "grey": "white"}.get(color, color) if color else None


def _layout(
    metadata: Mapping[str, Any], pictures: Mapping[str, tuple[str | None, Any]], size: int, draw: random.Random
) -> list[_Placed]:
    names = [entry["class"] for entry in metadata["include"] for _ in range(entry["count"])]
    far = size - size // 3
    places = draw.sample([(0, 0), (far, 0), (0, far), (far, far)], len(names))
    relation = metadata["include"][-1].get("position", [None])[0]
    if relation:
        ends = {"left of": ((far, 0), (0, 0)), "right of": ((0, 0), (far, 0))}
        ends |= {"above": ((0, far), (0, 0)), "below": ((0, 0), (0, far))}
        places = list(ends[relation])
    return [
        _Placed(name, pictures[name][0], pictures[name][1], *place) for name, place in zip(names, places, strict=True)
    ]


def _paint(shown: Sequence[_Placed], size: int) -> Any:
    from PIL import Image

    canvas = Image.new("RGB", (size, size), "white")
    for one in shown:
        canvas.paste(one.image, (one.x, one.y))
    return canvas


def _true(shown: Sequence[_Placed]) -> list[dict[str, Any]]:
    """What a perfect detector finds; scores fall a little, so that no two of a class are equal."""
    return [
        {
            "class": one.name,
            "box": [one.x, one.y, one.x + one.image.width, one.y + one.image.height],
            "score": 0.99 - 0.001 * number,
            "color": one.color,
        }
        for number, one in enumerate(shown)
    ]
