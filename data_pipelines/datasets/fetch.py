"""Getting packages: the user's own copy, the cache, or the package client that the machine has anyway.

``npm pack`` and ``apt-get download`` ask whatever registry the user configured; nothing else is contacted. Both only
download: no install script runs. Every package is checked against its sha256 before use.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmdiff.errors import ConfigError, ShardError

__all__ = ["Package", "cache_dir", "obtain", "sha256"]

TIMEOUT_SECONDS = 1800
_CLIENTS = {"npm": "npm", "deb": "apt-get"}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that holds data."""

    kind: Literal["npm", "deb"]
    name: str
    version: str
    """Exact for npm; for Debian packages the version that was checked."""
    sha256: str | None
    """Full sum or its beginning; None where the distribution's own signature is what counts."""
    licence: str

    @property
    def stem(self) -> str:
        """The first part of the file's name as the client writes it."""
        name = self.name.removeprefix("@").replace("/", "-")
        return f"{name}-{self.version}" if self.kind == "npm" else f"{name}_"

    @property
    def suffix(self) -> str:
        """The file's suffix as the client writes it."""
        return ".tgz" if self.kind == "npm" else ".deb"

    @property
    def spec(self) -> str:
        """What the client is asked for."""
        return f"{self.name}@{self.version}" if self.kind == "npm" else self.name

    @property
    def command(self) -> str:
        """How a user fetches it by hand."""
        return f"npm pack {self.spec}" if self.kind == "npm" else f"apt-get download {self.spec}"


def cache_dir() -> Path:
    """Where packages are kept: ``MMDIFF_CACHE``, else ``mmdiff`` in the user's cache folder."""
    if own := os.environ.get("MMDIFF_CACHE"):
        return Path(own)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mmdiff"


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def obtain(package: Package, source: str | os.PathLike[str] | None = None) -> Path:
    """The package's file on this machine.

    Args:
        package: What is wanted.
        source: The file itself, or a folder that holds it under the name its client gives it. None looks into the
            cache and then asks the client.

    Raises:
        ConfigError: ``source`` does not hold it, the client is missing or failed, or the machine is set offline.
        ShardError: The file's sha256 is another one.
    """
    if source is not None:
        path = _in_source(package, Path(source))
        return _checked(path, package)
    folder = cache_dir() / "packages"
    if (cached := _find(package, folder)) is not None:
        return _checked(cached, package)
    return _download(package, folder)


def _in_source(package: Package, source: Path) -> Path:
    if source.is_file():
        return source
    found = _find(package, source) if source.is_dir() else None
    if found is None:
        raise ConfigError(f"{source}: holds no {package.stem}*{package.suffix}; fetch it there with: {package.command}")
    return found


def _find(package: Package, folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    names = sorted(path for path in folder.iterdir() if path.name.startswith(package.stem))
    return next((path for path in reversed(names) if path.suffix == package.suffix), None)


def _checked(path: Path, package: Package) -> Path:
    if package.sha256 is not None and not (found := sha256(path)).startswith(package.sha256):
        raise ShardError(
            f"{path}: sha256 is {found}, expected {package.sha256}; delete it and fetch {package.spec} again"
        )
    return path


def _download(package: Package, folder: Path) -> Path:
    client = _CLIENTS[package.kind]
    by_hand = f"fetch it on another machine ({package.command}) and pass that file or its folder as --source"
    if os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("MMDIFF_OFFLINE") == "1":
        raise ConfigError(f"{package.spec} is not in {folder} and this machine is set offline; {by_hand}")
    program = shutil.which(client)
    if program is None:
        raise ConfigError(f"{package.spec} is not in {folder} and the program {client} is not installed; {by_hand}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        verb = ["pack", "--silent", package.spec] if package.kind == "npm" else ["download", package.spec]
        try:
            done = subprocess.run(
                [program, *verb],
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"{package.command} did not end within {TIMEOUT_SECONDS} s; {by_hand}") from error
        found = _find(package, Path(scratch))
        if done.returncode != 0 or found is None:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            raise ConfigError(f"{package.command} failed ({lines[-1] if lines else done.returncode}); {by_hand}")
        _checked(found, package)
        return found.replace(folder / found.name)
