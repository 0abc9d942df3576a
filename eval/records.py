"""Pictures with their true captions or answers: from shards, or from COCO-style JSON beside a folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from .files import read_records

__all__ = ["Pictured", "captioned", "is_shards", "questions"]


@dataclass(frozen=True, kw_only=True)
class Pictured:
    """A picture with what is true of it.

    Attributes:
        id: Of the picture, or of the question about it.
        prompt: The question; empty for a caption.
        truth: Reference record as the measure takes it.
        image: Reads the encoded picture.
    """

    id: str
    prompt: str
    truth: dict[str, Any]
    image: Callable[[], bytes]


def is_shards(source: object) -> bool:
    """Whether a text names shards and not a JSON file."""
    text = str(source)
    path = Path(text)
    return text.startswith("embedded:") or text.endswith((".tar", "}")) or (path.is_dir() and any(path.glob("*.tar")))


def captioned(source: str | Path, images: str | Path | None = None) -> list[Pictured]:
    """Pictures with ``image_id`` and ``captions``.

    Args:
        source: Shards, or COCO annotations (``images`` with ``file_name``, ``annotations`` with ``caption``), or
            records of ``image_id`` and ``caption`` or ``captions``.
        images: Folder of the pictures of a JSON file; None where only the captions are needed.

    Raises:
        ConfigError: A broken record, a picture without captions, or one that is not there.
    """
    if is_shards(source):
        return [
            Pictured(id=key, prompt="", truth={"image_id": key, "captions": _captions(key, info)}, image=read)
            for key, info, read in _samples(source)
        ]
    truths: dict[str, list[str]] = {}
    for record in read_records(source, "annotations"):
        if "image_id" not in record or not ({"caption", "captions"} & set(record)):
            raise ConfigError(f"{source}: records need image_id and caption or captions; found {list(record)[:8]}")
        truths.setdefault(str(record["image_id"]), []).extend(record.get("captions") or [record["caption"]])
    find = _finder(source, images)
    return [
        Pictured(id=i, prompt="", truth={"image_id": i, "captions": texts}, image=find(i))
        for i, texts in truths.items()
    ]


def questions(source: str | Path, images: str | Path | None = None, asked: str | Path | None = None) -> list[Pictured]:
    """Questions with their answers.

    Args:
        source: Shards whose samples have ``qa``; or annotations of ``question_id`` and ``answer`` or ``answers``, with
            ``image_id``.
        images: Folder of the pictures of a JSON file; None where only the answers are needed.
        asked: VQAv2 keeps the texts of the questions in a file of their own (``question_id``, ``question``).

    Raises:
        ConfigError: A broken record, or a question whose text or picture is not there.
    """
    if is_shards(source):
        return [
            Pictured(
                id=f"{key}/{number}",
                prompt=str(question),
                truth={"question_id": f"{key}/{number}", "answer": answer, "kind": (kind or ["all"])[0]},
                image=read,
            )
            for key, info, read in _samples(source)
            for number, (question, answer, *kind) in enumerate(info.get("qa", ()))
        ]
    texts = {str(r["question_id"]): str(r["question"]) for r in read_records(asked, "questions")} if asked else {}
    find = _finder(source, images)
    found = []
    for record in read_records(source, "annotations"):
        identity = str(record.get("question_id"))
        text = str(record.get("question", texts.get(identity, "")))
        if images is not None and not text:
            raise ConfigError(f"{source}: question {identity} has no text; give the file of the questions")
        found.append(Pictured(id=identity, prompt=text, truth=record, image=find(str(record.get("image_id")))))
    return found


def _samples(source: str | Path) -> Iterator[tuple[str, dict[str, Any], Callable[[], bytes]]]:
    from data_pipelines.reader import IMAGE_SUFFIXES, ShardReader
    from data_pipelines.source import open_shards

    shards = open_shards(str(source))
    texts = ShardReader(shards, suffixes=("json",))
    pictures = ShardReader(shards, suffixes=IMAGE_SUFFIXES)
    for shard, index in enumerate(shards):
        for sample in range(len(index)):
            one = texts.read(shard, sample)
            yield one.key, one.info(), partial(_image, pictures, shard, sample)


def _image(reader: Any, shard: int, sample: int) -> bytes:
    return reader.read(shard, sample).image()


def _captions(key: str, info: dict[str, Any]) -> list[str]:
    found = info.get("captions") or ([info["caption"]] if info.get("caption") else [])
    if not found:
        raise ConfigError(f"{key}: the sample has no caption")
    return [str(text) for text in found]


def _finder(source: str | Path, images: str | Path | None) -> Callable[[str], Callable[[], bytes]]:
    """Id of a picture -> what reads it: by the names in a COCO file, else by the id as a file's stem."""
    names: dict[str, str] = {}
    if images is not None:
        tree = json.loads(Path(source).read_text(encoding="utf-8")) if str(source).endswith(".json") else None
        known: Sequence[Any] = tree.get("images", ()) if isinstance(tree, dict) else ()
        names = {str(one["id"]): str(one["file_name"]) for one in known}

    def find(identity: str) -> Callable[[], bytes]:
        def read() -> bytes:
            if images is None:
                raise ConfigError(f"{source}: picture {identity} is needed; give the folder of the pictures")
            folder = Path(images)
            candidates = [folder / names[identity]] if identity in names else sorted(folder.glob(f"{identity}.*"))
            if not candidates or not candidates[0].resolve().is_relative_to(folder.resolve()):
                raise ConfigError(f"{folder}: picture {identity} is not there")
            return candidates[0].read_bytes()

        return read

    return find
