"""A record of what the interpreter is asked to do: processes started, files written, hosts looked up.

Python calls an audit hook before it starts a process, opens a file or touches the network, whichever library asks. A
hook cannot be taken away again, so there is one for the whole test run, and it only notes something while a test looks.
Native code that bypasses Python (such as the writer of safetensors) is not seen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROCESSES = frozenset(
    {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"}
)
CHANGES = frozenset(
    {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown"}
)
NETWORK = frozenset({"socket.connect", "socket.getaddrinfo", "urllib.Request", "ftplib.connect"})
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass
class Record:
    """What was seen, in order.

    Attributes:
        processes: Event and arguments of every process that was to be started.
        written: Every path that was to be opened for writing, made, renamed or removed.
        network: Event and arguments of every use of the network.
    """

    processes: list[str] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    network: list[str] = field(default_factory=list)

    def outside(self, *folders: Path) -> list[Path]:
        """Written paths that lie in none of the folders; Python's own compiled files do not count."""
        roots = [folder.resolve() for folder in folders]
        return [
            path
            for path in self.written
            if not any(path.is_relative_to(root) for root in roots) and "__pycache__" not in path.parts
        ]


_active: list[Record] = []
_installed: list[bool] = []


@contextmanager
def watch() -> Iterator[Record]:
    """Record until the end of the block."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    record = Record()
    _active.append(record)
    try:
        yield record
    finally:
        _active.remove(record)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _active:
        return
    for record in list(_active):
        if event in PROCESSES:
            record.processes.append(f"{event} {args!r}")
        elif event in NETWORK:
            record.network.append(f"{event} {args!r}")
        elif event in CHANGES:
            record.written += [path for a in args[:2] if (path := _path(a)) is not None]
        elif event == "open" and _writes(args) and (path := _path(args[0])) is not None:
            record.written.append(path)


def _writes(args: tuple[Any, ...]) -> bool:
    mode, flags = args[1], args[2]
    return (isinstance(mode, str) and any(c in mode for c in "wax+")) or bool(
        isinstance(flags, int) and flags & _WRITING
    )


def _path(value: Any) -> Path | None:
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    if not isinstance(value, (str, os.PathLike)) or os.fspath(value) == os.devnull:
        return None
    return Path(os.path.abspath(value))
