"""Documents of MMMU and MMMU-Pro: parquet as on the hub, or a local folder. Strings that look like code stay strings.

A local folder is ``<folder>/<Subject>/<split>*.parquet`` or ``<split>.jsonl`` with pictures beside it; see
`data_pipelines.datasets.mmmu_format`, which writes one.
"""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError, MissingExtraError

from .subjects import ORDER, subject_of

__all__ = ["HUB", "SPLITS", "Document", "answer_of", "options_of", "read_documents"]

HUB = {"mmmu": "MMMU/MMMU", "pro": "MMMU/MMMU_Pro"}
SPLITS = ("dev", "validation", "test")
_IMAGES = tuple(f"image_{i}" for i in range(1, 8))
_MAX_LITERAL = 1 << 16
_PRO_SETS = ("standard (10 options)", "standard (4 options)", "vision")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One question.

    Attributes:
        id: Unique in its set.
        subject: Subject.
        question: Text with markers ``<image 1>``; empty for MMMU-Pro vision.
        options: Texts of the options; none for an open question.
        answer: Letter or text, or alternatives.
        question_type: ``multiple-choice`` or ``open``.
        images: Encoded pictures by column, such as ``image_1``.
    """

    id: str
    subject: str
    question: str
    options: tuple[str, ...]
    answer: str | tuple[str, ...]
    question_type: str
    images: Mapping[str, bytes]

    def record(self) -> dict[str, Any]:
        """Everything but the pictures, as `eval.mmmu.scoring.score` and the official files take it."""
        answer = self.answer if isinstance(self.answer, str) else list(self.answer)
        own = {k: getattr(self, k) for k in ("id", "subject", "question", "question_type")}
        return own | {"options": list(self.options), "answer": answer}


def options_of(text: object, identity: str) -> tuple[str, ...]:
    """The texts in an ``options`` cell: a list, or a string that spells a Python list of strings.

    Raises:
        ConfigError: Anything else; it is parsed as a literal and never run.
    """
    found = _literal(text, f"{identity}: options") if isinstance(text, str) else text
    if not isinstance(found, (list, tuple)) or not all(isinstance(x, str) for x in found):
        raise ConfigError(f"{identity}: options {str(text)[:80]!r} are not a list of texts")
    return tuple(found)


def answer_of(text: object, identity: str) -> str | tuple[str, ...]:
    """The truth in an ``answer`` cell: a text, or alternatives as a list or as a string that spells one."""
    if isinstance(text, str) and text.startswith("["):
        try:
            text = _literal(text, identity)
        except ConfigError:
            return str(text)  # an answer such as "[0, 1)" is a text
    if isinstance(text, (list, tuple)):
        return tuple(str(x) for x in text)
    return str(text)


def read_documents(
    source: str | Path, *, split: str = "validation", subjects: Sequence[str] = ORDER, part: str | None = None
) -> list[Document]:
    """Documents of a split.

    Args:
        source: Local folder, or a dataset id of the hub such as ``MMMU/MMMU``.
        split: ``dev``, ``validation`` or ``test``.
        subjects: Which subjects.
        part: Configuration of MMMU-Pro, such as ``standard (10 options)`` or ``vision``; None: MMMU itself.

    Raises:
        ConfigError: Nothing there, a broken record, or an id that occurs twice.
        MissingExtraError: A parquet file, or a dataset of the hub, and no pyarrow.
    """
    if part is not None and part not in _PRO_SETS:
        raise ConfigError(f"part {part!r}; MMMU-Pro has {', '.join(_PRO_SETS)}")
    rows = list(_rows(Path(_folder(source, part)), split, subjects, part))
    documents = [_document(row, subject) for row, subject in rows]
    documents = [d for d in documents if part is not None or d.subject in subjects]
    if not documents:
        raise ConfigError(f"{source}: no questions of split {split} ({', '.join(subjects[:3])}, ...)")
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise ConfigError(f"{source}: id {document.id} occurs more than once")
        seen.add(document.id)
    return documents


def _folder(source: str | Path, part: str | None) -> str:
    if Path(source).is_dir():
        return str(source)
    if str(source).count("/") != 1 or str(source).startswith((".", "/")):
        raise ConfigError(f"{source}: no such folder, and no dataset id such as {HUB['mmmu']}")
    from huggingface_hub import snapshot_download

    return snapshot_download(str(source), repo_type="dataset", allow_patterns=[f"{part}/*" if part else "*"])


def _rows(
    folder: Path, split: str, subjects: Sequence[str], part: str | None
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """(record, subject) of every file of the split, subject by subject where there is a folder each."""
    places = [(folder / part, None)] if part else [(folder / s, s) for s in subjects if (folder / s).is_dir()]
    for place, subject in places or [(folder, None)]:
        files = sorted({*place.rglob(f"{split}*.parquet"), *place.rglob(f"{split}*.jsonl")})
        for file in files:
            yield from ((row, subject) for row in (_parquet(file) if file.suffix == ".parquet" else _lines(file)))


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "pack", f"to read {file.name}") from None
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=32):
            yield from batch.to_pylist()
    except (ArrowInvalid, OSError) as error:
        raise ConfigError(f"{file}: cannot be read as parquet ({error})") from None


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{file}: line {number} is not JSON ({error})") from None
        yield {k: _picture(file, v) if k.startswith("image") and v else v for k, v in row.items()}


def _picture(file: Path, name: object) -> dict[str, bytes]:
    path = (file.parent / str(name)).resolve()
    if not path.is_relative_to(file.parent.resolve()) or not path.is_file():
        raise ConfigError(f"{file}: picture {name} is not a file in that folder")
    return {"bytes": path.read_bytes()}


def _document(row: Mapping[str, Any], subject: str | None) -> Document:
    identity = str(row.get("id", ""))
    if missing := [k for k in ("id", "options", "answer") if k not in row]:
        raise ConfigError(f"{identity or 'a record'}: no {missing[0]}; it has {', '.join(list(row)[:8])}")
    options = options_of(row["options"], identity)
    kind = str(row.get("question_type", "multiple-choice"))
    if kind == "multiple-choice" and not options:
        raise ConfigError(f"{identity}: a multiple choice without options")
    images = {name: _encoded(row[name], identity) for name in (*_IMAGES, "image") if row.get(name)}
    return Document(
        id=identity,
        subject=str(row.get("subject") or subject or subject_of(identity)),
        question=str(row.get("question", "")),
        options=options,
        answer=answer_of(row["answer"], identity),
        question_type=kind,
        images=images,
    )


def _encoded(cell: Any, identity: str) -> bytes:
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(data, bytes) or not io.BytesIO(data).read(1):
        raise ConfigError(f"{identity}: a picture without bytes")
    return data


def _literal(text: str, where: str) -> Any:
    if len(text) > _MAX_LITERAL:
        raise ConfigError(f"{where}: {len(text):,} characters, limit {_MAX_LITERAL:,}")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ConfigError(f"{where} {text[:80]!r} spell no list; they are read as a literal and never run") from None
