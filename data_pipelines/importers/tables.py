"""Parquet files and folders of Hugging Face datasets: a sample per row.

Needs pyarrow (``pip install 'mmdiff[pack]'``). Nothing of a dataset's author is run: only the tables are read.
"""

from __future__ import annotations

import base64
import bisect
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError, MissingExtraError, SampleError

from ..reader import numbered
from .rows import Rows, image_suffix, inside, packed, read_file

__all__ = ["Table", "table_files"]

_SIGNATURES = {b"\xff\xd8": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp"}
_MAX_PART_BYTES = 4 << 30  # one row group is in memory at a time, unpacked
_TEXTS = ("caption", "text", "prompt", "description")
_ANSWERS = ("answer", "multiple_choice_answer", "label")


class Table(Rows):
    """Rows of parquet files, or of the arrow files that ``save_to_disk`` writes.

    A column of images (a struct of ``bytes`` and ``path``, or bytes) gives the sample's images, several columns or a
    list of them several images. A text column called caption, text, prompt or description is the ``caption``,
    ``question`` with ``answer`` the ``qa``, ``messages`` the ``conversations``; a class label gives ``cls`` and
    ``concept``. All other columns that JSON can hold stay under their names.

    Args:
        source: A file, or a folder in which they lie at any depth.

    Raises:
        ConfigError: No such files, or files that cannot be read or differ in their columns.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, source: Path) -> None:
        self._root = source if source.is_dir() else source.parent
        self._files = table_files(source)
        if not self._files:
            raise ConfigError(f"{source}: no .parquet or .arrow files here")
        self._parts = [(file, part, rows) for file in self._files for part, rows in enumerate(_parts(file))]
        self._ends = list(itertools.accumulate(rows for *_, rows in self._parts))
        self._classes = _class_names(self._files[0])
        self._open: tuple[int, Any] | None = None
        stems = [p.relative_to(self._root).with_suffix("").as_posix() for p in self._files]
        counts = [sum(rows for f, _, rows in self._parts if f == file) for file in self._files]
        keys = [f"{stem}/{row:08d}" for stem, count in zip(stems, counts, strict=True) for row in range(count)]
        super().__init__(keys, f"table {[file.stat().st_size for file in self._files]}")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": None}

    def members(self, i: int) -> Mapping[str, bytes]:
        """Images and JSON of a row; errors as in `Rows`."""
        part = bisect.bisect_right(self._ends, i)
        if self._open is None or self._open[0] != part:
            file, number, _ = self._parts[part]
            self._open = (part, _read_part(file, number))
        start = self._ends[part - 1] if part else 0
        row = self._open[1].slice(i - start, 1).to_pylist()[0]
        return self._convert(row, self.key(i))

    def _convert(self, row: Mapping[str, Any], key: str) -> dict[str, bytes]:
        images: list[tuple[bytes, str]] = []
        info: dict[str, Any] = {}
        members: dict[str, bytes] = {}
        for name, value in row.items():
            found = [self._image(v, key) for v in (value if isinstance(value, list) else [value]) if _is_image(v)]
            if found:
                images += found
            elif name in self._classes and isinstance(value, int) and 0 <= value < len(self._classes[name]):
                members["cls"], info["concept"] = str(value).encode(), self._classes[name][value]
            elif value is not None:
                info[name] = value
        for number, (data, suffix) in enumerate(images):
            members[numbered(number, suffix)] = data
        return {**members, "json": packed(_fields(info))}

    def _image(self, value: Any, key: str) -> tuple[bytes, str]:
        if isinstance(value, bytes):
            return value, _suffix_of(value, key)
        if value.get("bytes"):
            return value["bytes"], _suffix_of(value["bytes"], key)
        path = inside(self._root, str(value["path"]), key)
        return read_file(path), image_suffix(path.name)


def table_files(source: Path) -> list[Path]:
    """Parquet or arrow files of a source, sorted."""
    if source.is_file():
        return [source] if source.suffix in (".parquet", ".arrow") else []
    found = sorted(source.rglob("*.parquet"))
    return found or sorted(p for p in source.rglob("*.arrow") if not p.name.startswith("cache-"))


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "pack", "to read parquet and arrow files") from error
    return pyarrow


def _parts(file: Path) -> list[int]:
    """Rows of each part (row group or record batch) of a file."""
    arrow = _arrow()
    try:
        if file.suffix == ".parquet":
            told = arrow.parquet.read_metadata(file)
            groups = [told.row_group(i) for i in range(told.num_row_groups)]
            if large := [group.total_byte_size for group in groups if group.total_byte_size > _MAX_PART_BYTES]:
                raise ConfigError(f"{file}: a row group of {large[0]:,} bytes, limit 4 GiB; write smaller row groups")
            return [group.num_rows for group in groups]
        return [batch.num_rows for batch in _batches(file)]
    except (OSError, arrow.ArrowException) as error:
        raise ConfigError(f"{file}: cannot be read as a table ({_first_line(error)})") from None


def _read_part(file: Path, number: int) -> Any:
    arrow = _arrow()
    try:
        if file.suffix == ".parquet":
            return arrow.parquet.ParquetFile(file).read_row_group(number)
        return arrow.Table.from_batches([_batches(file)[number]])
    except (OSError, arrow.ArrowException) as error:
        raise SampleError("unreadable_table", f"{file}: part {number} cannot be read ({_first_line(error)})") from None


def _batches(file: Path) -> list[Any]:
    """Record batches of an arrow file, mapped into memory; both of its forms occur."""
    arrow = _arrow()
    mapped = arrow.memory_map(str(file))
    try:
        return list(arrow.ipc.open_stream(mapped))
    except arrow.ArrowInvalid:
        reader = arrow.ipc.open_file(mapped)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]


def _class_names(file: Path) -> dict[str, Sequence[str]]:
    """Names of the classes of every column of class labels, from what datasets writes into the schema."""
    arrow = _arrow()
    if file.suffix == ".parquet":
        schema = arrow.parquet.read_schema(file)
    else:
        schema = _batches(file)[0].schema
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {n: f["names"] for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _is_image(value: Any) -> bool:
    if isinstance(value, dict):
        return value.keys() == {"bytes", "path"} and (value["bytes"] is not None or value["path"] is not None)
    return isinstance(value, bytes) and _signature(value) is not None


def _suffix_of(data: bytes, key: str) -> str:
    found = _signature(data)
    if found is None:
        raise SampleError("not_an_image", f"{key}: bytes of an image of no known kind")
    return found


def _signature(data: bytes) -> str | None:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((suffix for start, suffix in _SIGNATURES.items() if data.startswith(start)), None)


def _fields(info: Mapping[str, Any]) -> dict[str, Any]:
    """Columns under the names that tasks know."""
    out = {name: _plain(value) for name, value in info.items()}
    text = next((out[n] for n in _TEXTS if isinstance(out.get(n), str)), None)
    if text is not None:
        out.setdefault("caption", text)
    answer = next((out[n] for n in _ANSWERS if isinstance(out.get(n), str)), None)
    if isinstance(out.get("question"), str) and answer is not None:
        out.setdefault("qa", [[out["question"], answer, ""]])
    talk = out.get("messages", out.get("conversation"))
    if isinstance(talk, list) and "conversations" not in out:
        out["conversations"] = [_turn(turn) for turn in talk]
    return out


def _turn(turn: Any) -> Any:
    roles = {"user": "human", "assistant": "gpt"}
    if isinstance(turn, dict) and isinstance(turn.get("content"), str):
        return {"from": roles.get(turn.get("role", ""), turn.get("role")), "value": turn["content"]}
    return turn


@functools.singledispatch
def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


@_plain.register
def _(value: list) -> Any:
    return [_plain(v) for v in value]


@_plain.register
def _(value: dict) -> Any:
    return {str(k): _plain(v) for k, v in value.items()}


@_plain.register
def _(value: bytes) -> Any:
    return base64.b64encode(value).decode()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
