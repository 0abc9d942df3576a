"""What a pickle asks to import, found by reading its instructions; nothing is built or run."""

from __future__ import annotations

import contextlib
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["foreign_imports"]

_LIMIT = 256 << 20


def foreign_imports(path: Path) -> list[str]:
    """Names such as ``posix.system`` that a PyTorch checkpoint asks for beyond those of PyTorch itself.

    Only for the message of a refusal, in the order of the file: a damaged or unusual pickle may give an empty list.
    """
    found: dict[str, None] = {}
    # What was found before the first unreadable place counts.
    with contextlib.suppress(zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        for data in _streams(path):
            with contextlib.suppress(ValueError, IndexError, KeyError):
                for name in _imports(data):
                    found[name] = None
    plain = {"argparse.Namespace", "collections.OrderedDict", "collections.Counter", "collections.defaultdict"}
    return [name for name in found if name not in plain and not name.startswith(("torch.", "_codecs.encode"))]


def _streams(path: Path) -> Iterator[bytes]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            yield file.read(_LIMIT)
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith(".pkl") and entry.file_size <= _LIMIT:
                yield archive.read(entry)


def _imports(data: bytes) -> Iterator[str]:
    """Arguments of the import instructions; of protocol 4, the two strings put before."""
    strings: list[str] = []
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(argument, str):
            strings.append(argument)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif opcode.name in ("GET", "BINGET", "LONG_BINGET"):
            strings.append(_recall(memo, argument))


def _recall(memo: dict[int, str], argument: Any) -> str:
    return memo.get(int(argument), "")
