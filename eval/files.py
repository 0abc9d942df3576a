"""Prediction, reference and result files: JSON or JSON lines, size-capped, ids checked both ways, written whole."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

__all__ = ["by_id", "no_twins", "read_records", "write_json", "write_text"]

_MAX_BYTES = 1 << 30


def read_records(path: str | Path, *keys: str) -> list[dict[str, Any]]:
    """The records of a file: a JSON list of objects, JSON lines, or an object with such a list under one of ``keys``.

    Raises:
        ConfigError: The file is missing, too large, not JSON, or holds something else; the line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise ConfigError(f"{path}: {size:,} bytes, limit {_MAX_BYTES:,}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    tree = _parse(path, text)
    if isinstance(tree, dict):
        tree = next((tree[k] for k in keys if k in tree), [tree])
    if not isinstance(tree, list) or not all(isinstance(r, dict) for r in tree):
        raise ConfigError(f"{path}: expected a list of objects, or one object per line")
    return tree


def by_id(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], key: str
) -> list[Mapping[str, Any]]:
    """The predictions in the order of the references.

    Raises:
        ConfigError: A record without ``key``, or an id that is doubled, missing or unknown.
    """
    wanted = _ids(references, key, "references")
    found = dict(zip(_ids(predictions, key, "predictions"), predictions, strict=True))
    if missing := [i for i in wanted if i not in found]:
        raise ConfigError(f"predictions: {len(missing)} of {len(wanted)} {key}s missing, first {missing[0]}")
    known = set(wanted)
    if unknown := [i for i in found if i not in known]:
        raise ConfigError(f"predictions: {len(unknown)} {key}s that no reference has, first {unknown[0]}")
    return [found[i] for i in wanted]


def no_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file, for ``object_pairs_hook``: a key that occurs twice is an error, not the last one's.

    Raises:
        ConfigError: A key is doubled.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f"key {next(k for n, k in enumerate(keys) if k in keys[:n])} occurs more than once")
    return found


def write_json(path: Path, tree: Any) -> Path:
    """Write plain data as JSON; the file appears whole or not at all."""
    return write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write a text file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)
    return path


def _ids(records: Sequence[Mapping[str, Any]], key: str, where: str) -> list[str]:
    for number, record in enumerate(records):
        if key not in record:
            found = ", ".join(list(record)[:8]) or "nothing"
            raise ConfigError(f"{where}: record {number} has no {key}; it has {found}")
    # JSON keys are text and ids often numbers: compare as text.
    ids = [str(r[key]) for r in records]
    if len(set(ids)) < len(ids):
        ((doubled, _),) = Counter(ids).most_common(1)
        raise ConfigError(f"{where}: {key} {doubled} occurs more than once")
    return ids


def _parse(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        pass
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ConfigError(f"{path}: line {number} is not JSON ({error})") from None
    return records
