"""The folder of an evaluation: what decided it, every answer as it comes, and the result with its page.

An answer is one line, written at once; a run that was killed goes on where it stopped, and a line that was cut off is
done again. Settings that differ from the folder's are refused, because the answers would not belong together.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdiff import config
from mmdiff.errors import ConfigError

from .files import write_json, write_text
from .processes import barrier, rank_and_world

__all__ = ["RunFolder", "versions", "write_record"]

_MANIFEST = "manifest.json"
_LIBRARIES = ("mmdiff", "torch", "numpy", "pillow", "transformers", "timm", "open-clip-torch", "lm-eval", "lmms-eval")


class RunFolder:
    """Answers of an evaluation, appended line by line; every process has a file of its own.

    Args:
        folder: Where; made if it is not there.
        settings: What decides the answers; plain data.

    Raises:
        ConfigError: The folder holds answers of other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings, default=str))
        self.rank, _ = rank_and_world()
        self._agree()
        self._file = self.folder / f"answers-{self.rank:05d}.jsonl"

    def done(self) -> dict[str, dict[str, Any]]:
        """Answers that are there, by id, whichever process wrote them."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    record = json.loads(line)
                    found[str(record["id"])] = record
                except (ValueError, KeyError, TypeError):
                    continue  # cut off by a kill; its question is asked again
        return found

    def append(self, identity: str, **answer: Any) -> None:
        """Keep one answer; it is on disk when this returns."""
        line = json.dumps({"id": identity, **answer}, ensure_ascii=False)
        head = b"" if self._ends_whole() else b"\n"
        with self._file.open("ab") as file:
            file.write(head + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_whole(self) -> bool:
        if not self._file.is_file() or not self._file.stat().st_size:
            return True
        with self._file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _agree(self) -> None:
        path = self.folder / _MANIFEST
        if path.is_file():
            try:
                theirs = json.loads(path.read_text(encoding="utf-8"))["settings"]
            except (OSError, ValueError, KeyError, TypeError):
                raise ConfigError(f"{path}: is not a manifest of `mmdiff eval`; give another folder") from None
            if differing := sorted(k for k in {*theirs, *self.settings} if theirs.get(k) != self.settings.get(k)):
                raise ConfigError(
                    f"{self.folder}: holds answers of other settings ({', '.join(differing)} differ); "
                    "give another folder"
                )
        elif self.rank == 0:
            write_json(path, {"settings": self.settings, "hash": config.fingerprint(self.settings)})
        barrier()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide numbers."""
    found = {"python": sys.version.split()[0], "machine": platform.machine()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_record(
    folder: Path,
    measure: str,
    result: Any,
    *,
    settings: Mapping[str, Any],
    page: str,
    hashes: Mapping[str, str | None] | None = None,
    items: Any = None,
) -> Path:
    """Write ``result.json`` and ``report.html``.

    Args:
        folder: Where to.
        measure: Name of the measure.
        result: Its dataclass.
        settings: What was asked for, seeds included.
        page: The page, see `eval.page`.
        hashes: Of weights, checkpoints and files.
        items: What happened to each item, where the result does not tell it.

    Returns:
        Path of ``result.json``.
    """
    tree = {
        "measure": measure,
        "result": dataclasses.asdict(result),
        "settings": json.loads(json.dumps(settings, default=str)),
        "hashes": dict(hashes or {}),
        "versions": versions(),
    }
    if items is not None:
        tree["items"] = items
    write_text(folder / "report.html", page)
    return write_json(folder / "result.json", tree)
