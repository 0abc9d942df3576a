"""GenEval's folder of pictures, its results file, and detections made elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdiff.errors import ConfigError

from ..files import read_records, write_text
from .prompts import CLASSES, check
from .rules import Detection
from .scoring import Picture, result_line

__all__ = ["pictures_of", "prepare_folder", "read_detections", "read_results", "sample_path", "write_results"]

_FIELDS = {"filename", "tag", "prompt", "correct", "reason", "metadata", "details"}


def sample_path(folder: Path, prompt: int, sample: int) -> Path:
    """Where picture ``sample`` of prompt ``prompt`` lies."""
    return folder / f"{prompt:05d}" / "samples" / f"{sample:05d}.png"


def prepare_folder(folder: Path, prompts: Sequence[Mapping[str, Any]]) -> None:
    """Make the official layout: a folder per prompt with its metadata.

    Raises:
        ConfigError: The folder holds pictures of other prompts.
    """
    for number, metadata in enumerate(prompts):
        path = folder / f"{number:05d}" / "metadata.jsonl"
        text = json.dumps(metadata)
        if path.is_file() and path.read_text(encoding="utf-8").strip() != text:
            raise ConfigError(f"{path}: holds another prompt than number {number}; give another folder")
        write_text(path, text)


def pictures_of(folder: str | Path, *, samples: int | None = None) -> dict[Path, dict[str, Any]]:
    """Picture -> metadata of its prompt, sorted, as the official script finds them.

    Args:
        folder: ``<folder>/<digits>/metadata.jsonl`` and ``samples/<digits>.png``.
        samples: How many pictures every prompt must have; None: as many as there are, but the same for all.

    Raises:
        ConfigError: No such folder, a prompt without metadata or pictures, or with another number of them.
    """
    folder = Path(folder)
    places = sorted((p for p in folder.glob("*") if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
    if not places:
        raise ConfigError(f"{folder}: no folders 00000, 00001, ... in it")
    found: dict[Path, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for place in places:
        metadata = _metadata(place)
        pictures = sorted(p for p in place.glob("samples/*") if re.match(r"\d+\.png", p.name))
        counts[place.name] = len(pictures)
        found |= dict.fromkeys(pictures, metadata)
    wanted = samples if samples is not None else max(counts.values())
    if wrong := [name for name, count in counts.items() if count != wanted or not count]:
        raise ConfigError(
            f"{folder}/{wrong[0]}: {counts[wrong[0]]} pictures, {wanted} expected; {len(wrong)} of {len(counts)} "
            "prompts have another number"
        )
    return found


def read_detections(path: str | Path) -> dict[str, list[Detection]]:
    """Detections made elsewhere: records of ``filename`` and ``detections`` (``class, box, score``, maybe ``color``).

    Raises:
        ConfigError: A record that is not such a one, or a picture that occurs twice.
    """
    found: dict[str, list[Detection]] = {}
    for number, record in enumerate(read_records(path)):
        name = record.get("filename")
        if not isinstance(name, str) or not isinstance(record.get("detections"), list):
            raise ConfigError(f"{path}: record {number} needs filename and detections")
        if name in found:
            raise ConfigError(f"{path}: {name} occurs more than once")
        found[name] = [_detection(d, f"{path}: {name}") for d in record["detections"]]
    return found


def write_results(path: Path, pictures: Iterable[Picture]) -> Path:
    """Write the official results file."""
    return write_text(path, "".join(result_line(picture) + "\n" for picture in pictures))


def read_results(path: str | Path) -> list[Picture]:
    """Judged pictures of a results file.

    Raises:
        ConfigError: A record that lacks something.
    """
    pictures = []
    for number, record in enumerate(read_records(path)):
        if missing := sorted(_FIELDS - set(record)):
            raise ConfigError(f"{path}: line {number + 1} has no {missing[0]}")
        pictures.append(Picture(**{name: record[name] for name in _FIELDS}))
    return pictures


def _metadata(place: Path) -> dict[str, Any]:
    path = place / "metadata.jsonl"
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as one JSON object ({error})") from None
    check(metadata, str(path))
    return metadata


def _detection(tree: Mapping[str, Any], where: str) -> Detection:
    try:
        box = np.asarray(tree["box"], dtype=np.float32)
        name, score, color = str(tree["class"]), float(np.float32(tree["score"])), tree.get("color")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: a detection needs class, box and score ({error!r})") from None
    if name not in CLASSES or box.shape != (4,) or not np.isfinite(box).all():
        raise ConfigError(f"{where}: class {name!r} with box {tree['box']} is no detection of the 80 classes")
    return Detection(name=name, box=box, score=score, color=color)
