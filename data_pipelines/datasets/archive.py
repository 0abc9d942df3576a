"""Reading packages without extracting them: npm tarballs, Debian packages, folders.

Nothing is ever written to disk and no member's name becomes a path. Only regular files are read, each within a size
limit, and a package that inflates beyond the total limit is refused.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mmdiff.errors import ShardError, UnsafeFileError

__all__ = ["MAX_MEMBER_BYTES", "MAX_TOTAL_BYTES", "read_members"]

MAX_MEMBER_BYTES = 256 * 2**20
MAX_TOTAL_BYTES = 4 * 2**30
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


def read_members(
    path: Path,
    wanted: Callable[[str], bool],
    *,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    max_total_bytes: int = MAX_TOTAL_BYTES,
) -> Iterator[tuple[str, bytes]]:
    """The wanted files of a package, in the order in which they are stored (of a folder: sorted).

    Args:
        path: A ``.tgz``/``.tar``/``.tar.gz``/``.tar.xz``, a ``.deb``, or a folder.
        wanted: Decides by the member's name, such as ``"package/assets/1f600.webp"``.
        max_member_bytes: Limit of one file.
        max_total_bytes: Limit of all sizes the archive declares.

    Raises:
        ShardError: The archive is damaged or truncated.
        UnsafeFileError: A file, or all of them, is above its limit.
    """
    if path.is_dir():
        yield from _read_folder(path, wanted, max_member_bytes)
        return
    try:
        with path.open("rb") as file:
            stream = _deb_data(file, path) if path.suffix == ".deb" else file
            with tarfile.open(fileobj=stream, mode="r|*") as archive:
                yield from _read_tar(archive, path, wanted, max_member_bytes, max_total_bytes)
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError) as error:
        raise ShardError(f"{path}: the archive cannot be read ({error}); fetch it again") from error


def _read_tar(
    archive: tarfile.TarFile, path: Path, wanted: Callable[[str], bool], max_member: int, max_total: int
) -> Iterator[tuple[str, bytes]]:
    total = 0
    for member in archive:
        total += member.size
        if total > max_total:
            raise UnsafeFileError(f"{path}: the archive holds more than {max_total:,} bytes; refused")
        if not member.isreg() or member.issparse() or not wanted(member.name.removeprefix("./")):
            continue
        if member.size > max_member:
            raise UnsafeFileError(f"{path}: member {member.name!r} has {member.size:,} bytes, limit {max_member:,}")
        file = archive.extractfile(member)
        data = file.read() if file is not None else b""
        if len(data) != member.size:
            raise ShardError(f"{path}: member {member.name!r} ends after {len(data):,} of {member.size:,} bytes")
        yield member.name.removeprefix("./"), data


def _read_folder(path: Path, wanted: Callable[[str], bool], max_member: int) -> Iterator[tuple[str, bytes]]:
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if not file.is_file() or not wanted(name):
            continue
        if file.stat().st_size > max_member:
            raise UnsafeFileError(f"{file}: has {file.stat().st_size:,} bytes, limit {max_member:,}")
        yield name, file.read_bytes()


def _deb_data(file: BinaryIO, path: Path) -> BinaryIO:
    """The ``data.tar.*`` inside a Debian package (an ``ar`` archive), as a file of its own."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise ShardError(f"{path}: is not a Debian package")
    while header := file.read(_AR_HEADER):
        if len(header) != _AR_HEADER or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
            raise ShardError(f"{path}: a header of the Debian package is damaged")
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), int(header[48:58])
        if size > MAX_TOTAL_BYTES:
            raise UnsafeFileError(f"{path}: {name!r} has {size:,} bytes, limit {MAX_TOTAL_BYTES:,}")
        if name.startswith("data.tar"):
            if name.endswith(".zst"):
                raise ShardError(f"{path}: is compressed with zstd; unpack it yourself (dpkg -x) and give the folder")
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, 1)
    raise ShardError(f"{path}: the Debian package holds no data.tar")
