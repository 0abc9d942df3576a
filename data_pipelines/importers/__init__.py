"""Data of other tools as samples: captioned folders, class folders, LLaVA's JSON, COCO, parquet, others' shards.

Every form is a `Rows`: numbered samples whose keys are known at once and whose bytes are read when asked for, so that
``pack`` can share them out to processes and go on after an interruption.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from .coco import CocoCaptions, CocoQuestions
from .folders import TABLES, Captions, Classes, Images, has_text, images_in
from .llava import Llava
from .rows import Decoded, Row, Rows, load
from .shards import Shards
from .tables import Table, table_files

__all__ = ["KINDS", "Decoded", "Extra", "Row", "Rows", "Shards", "detect", "open_rows"]

KINDS = ("captions", "images", "classes", "llava", "coco", "vqa", "table", "shards")
"""Forms that can be read: images with texts, images alone, one folder per class, LLaVA's JSON, COCO's captions, VQA's
questions, parquet or arrow tables, webdataset shards."""


@dataclass(frozen=True, kw_only=True)
class Extra:
    """What some forms need beside their source.

    Attributes:
        images: Folder of the images of a JSON file; default: the file's own.
        answers: Annotations that belong to VQA's questions.
        captions: Captions by key that take the place of those in shards.
    """

    images: Path | None = None
    answers: Path | None = None
    captions: Path | None = None


def open_rows(source: str | Path, kind: str = "auto", extra: Extra | None = None) -> Rows:
    """The samples of a source, numbered in an order of their own.

    Args:
        source: The folder or file; shards may be named as `source.open_shards` takes them.
        kind: One of `KINDS`, or ``"auto"``.
        extra: Further files.

    Raises:
        ConfigError: Not of that form, or a path leads out of the folder.
    """
    extra, path = extra or Extra(), Path(source)
    chosen = detect(source) if kind == "auto" else kind
    images = extra.images if extra.images is not None else path.parent
    if chosen == "shards":
        return Shards(source, extra.captions)
    if chosen not in KINDS:
        raise ConfigError(f"kind {kind!r}: expected auto, {', '.join(KINDS)}")
    if not path.exists():
        raise ConfigError(f"{source}: there is no such file or folder")
    if chosen == "vqa":
        if extra.answers is None:
            raise ConfigError(f"{source}: VQA's questions need their annotations; give --answers FILE")
        return CocoQuestions(path, extra.answers, images)
    if chosen in ("llava", "coco"):
        return (Llava if chosen == "llava" else CocoCaptions)(path, images)
    return {"captions": Captions, "images": Images, "classes": Classes, "table": Table}[chosen](path)


def detect(source: str | Path) -> str:
    """Which of `KINDS` a source looks like.

    Raises:
        ConfigError: None of them.
    """
    path = Path(source)
    if path.suffix == ".tar" or "://" in str(source) or (path.is_dir() and any(path.glob("*.tar"))):
        return "shards"
    if path.is_file():
        return _kind_of_file(path)
    if not path.is_dir():
        raise ConfigError(f"{source}: expected a folder of images, a JSON or parquet file, or shards")
    if any((path / table).is_file() for table in TABLES) or any(has_text(image) for image in path.rglob("*")):
        return "captions"
    if table_files(path):
        return "table"
    if any(images_in(folder) for folder in path.iterdir() if folder.is_dir()):
        return "classes"
    hint = "; for pictures without texts add --kind images" if images_in(path) else ""
    raise ConfigError(f"{source}: found neither images with .txt or .json beside them nor one folder per class{hint}")


def _kind_of_file(path: Path) -> str:
    if path.suffix in (".parquet", ".arrow"):
        return "table"
    if path.suffix == ".jsonl":
        return "llava"
    if path.suffix != ".json":
        raise ConfigError(f"{path}: expected a .json, .jsonl, .parquet, .arrow or .tar file")
    content: Any = load(path)
    if isinstance(content, dict) and "questions" in content:
        return "vqa"
    return "coco" if isinstance(content, dict) and "images" in content else "llava"
