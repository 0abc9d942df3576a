"""A small set of questions in MMMU's layout, made from emoji: real pictures, real answers, all kinds of questions.

For trying a harness from end to end. A score on it says nothing about MMMU. Layout: ``<out>/<Subject>/<split>.jsonl``
with the hub's columns (``options`` is a string that spells a list) and pictures beside it; with pyarrow also parquet as
on the hub.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError, MissingExtraError
from mmdiff.images import decode, encode_png

from ..reader import iter_samples
from .report import BuildReport

__all__ = ["SUBJECTS", "build"]

SUBJECTS: dict[str, str] = {
    "animals and nature": "Biology",
    "food and drink": "Agriculture",
    "travel and places": "Geography",
    "activities": "Music",
    "objects": "Design",
    "symbols": "Math",
    "flags": "History",
    "people and body": "Sociology",
    "smileys and emotion": "Psychology",
}
"""Group of emoji -> the subject whose folder its questions go to."""

_COLUMNS = (
    *("id", "question", "options", "explanation", *(f"image_{i}" for i in range(1, 8))),
    *("img_type", "answer", "topic_difficulty", "question_type", "subfield"),
)


def build(
    out: Path,
    *,
    shards: str = "embedded:emoji/novel_concepts",
    split: str = "validation",
    per_subject: int = 6,
    parquet: bool = False,
    seed: int = 0,
) -> BuildReport:
    """Write the set.

    Args:
        out: Folder, one folder per subject in it.
        shards: Emoji shards the pictures come from.
        split: ``dev``, ``validation`` or ``test``.
        per_subject: Questions of each subject: names with one picture, choices between pictures, and open ones in turn.
        parquet: Write parquet as on the hub instead of JSON lines with PNG files.
        seed: Of the choice of pictures and the order of options.

    Raises:
        ConfigError: Too few pictures.
        MissingExtraError: Parquet without pyarrow.
    """
    groups: dict[str, list[tuple[Mapping[str, Any], bytes]]] = {}
    for sample, error in iter_samples(shards):
        if sample is None:
            raise ConfigError(f"{shards}: {error}")
        info = sample.info()
        group = str(info.get("group"))
        if group in SUBJECTS:
            groups.setdefault(group, []).append((info, encode_png(decode(sample.image()))))
    draw = random.Random(seed)
    counts, size = 0, 0
    for group, subject in SUBJECTS.items():
        pictures = groups.get(group, [])
        if len(pictures) < 4:
            continue
        rows = [_row(pictures, n, f"{split}_{subject}_{n + 1}", draw) for n in range(per_subject)]
        counts += len(rows)
        size += _write(out / subject, split, rows, parquet)
    if not counts:
        raise ConfigError(f"{shards}: no group with four pictures; give emoji shards")
    return BuildReport(name="mmmu-format", out=out, counts={split: counts}, shards=(), bytes=size, skipped={})


def _row(
    pictures: Sequence[tuple[Mapping[str, Any], bytes]], number: int, identity: str, draw: random.Random
) -> dict[str, Any]:
    """One question with the hub's columns; pictures as bytes."""
    four = draw.sample(list(pictures), 4)
    (info, png), kind = four[0], number % 3
    row: dict[str, Any] = dict.fromkeys(_COLUMNS, "") | {f"image_{i}": None for i in range(1, 8)}
    row |= {"id": identity, "img_type": "['Icons and Symbols']", "topic_difficulty": "Easy"}
    row |= {"question_type": "multiple-choice", "subfield": str(info["subgroup"]), "image_1": png}
    if kind == 0:
        texts = [str(other["caption"]) for other, _ in four]
        return row | {"question": "What does <image 1> show?"} | _choice(texts, draw)
    if kind == 1:
        order = draw.sample(four, 4)
        place = next(i for i, (other, _) in enumerate(order) if other is info)
        row |= {f"image_{i}": data for i, (_, data) in enumerate(order, 1)}
        marks = [f"<image {i}>" for i in range(1, 5)]
        text = f"Which picture shows this: {info['caption']}?"
        return row | {"question": text, "options": str(marks), "answer": "ABCD"[place]}
    answer = str(info.get("color") or info["subgroup"])
    asked = "What is the main color of <image 1>?" if info.get("color") else "What type of thing is <image 1>?"
    return row | {"question": asked, "question_type": "open", "options": "[]", "answer": answer}


def _choice(texts: list[str], draw: random.Random) -> dict[str, str]:
    order = draw.sample(texts, len(texts))
    return {"options": str(order), "answer": "ABCD"[order.index(texts[0])]}


def _write(folder: Path, split: str, rows: Sequence[dict[str, Any]], parquet: bool) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    if parquet:
        path = folder / f"{split}-00000-of-00001.parquet"
        _parquet(path, rows)
        return path.stat().st_size
    size, lines = 0, []
    for row in rows:
        kept = dict(row)
        for name, data in row.items():
            if isinstance(data, bytes):
                picture = folder / f"{row['id']}_{name}.png"
                picture.write_bytes(data)
                kept[name], size = picture.name, size + len(data)
        lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
    text = "".join(lines)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return size + len(text.encode())


def _parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "pack", "to write parquet") from None
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([(c, picture if c.startswith("image_") else pyarrow.string()) for c in _COLUMNS])
    kept = [
        {k: {"bytes": v, "path": f"{row['id']}_{k}.png"} if isinstance(v, bytes) else v for k, v in row.items()}
        for row in rows
    ]
    parquet.write_table(pyarrow.Table.from_pylist(kept, schema=schema), path)
