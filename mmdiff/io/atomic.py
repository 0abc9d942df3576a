"""Files that are whole or absent: atomic writes, JSON with size caps, manifests with SHA-256.

Everything the library saves goes through `replacing`, so a reader (or the next start after a crash or a full disk)
sees the old file or the new one, never half of one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmdiff.errors import CheckpointError
from mmdiff.io.faults import fault

__all__ = [
    "MANIFEST",
    "fsync_folder",
    "load_json",
    "replacing",
    "save_json",
    "save_text",
    "verify_manifest",
    "write_manifest",
]

MANIFEST = "manifest.json"
"""Name of the file that holds the SHA-256 of its neighbours."""

_UNLISTED = frozenset({MANIFEST, "README.md", ".gitattributes"})
"""Not in a manifest: nothing is loaded from them, and people edit them."""

_JSON_BYTES = 64 << 20
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@contextlib.contextmanager
def replacing(path: Path, needed: int) -> Iterator[Path]:
    """Give a name in the same folder to write to; afterwards the file is synced and takes the place of ``path``.

    Args:
        path: The file that will exist.
        needed: Bytes that will be written, for the message when they do not fit.

    Raises:
        CheckpointError: It could not be written; ``path`` is as it was before.
    """
    draft = path.with_name(f".{path.name[:200]}.tmp-{os.getpid()}")
    try:
        fault("write")
        yield draft
        _fsync(draft)
        fault("rename")
        os.replace(draft, path)
        fsync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(_complaint(path, needed, error)) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def save_text(path: str | Path, text: str) -> None:
    """Write a small UTF-8 file atomically.

    Raises:
        CheckpointError: It could not be written; what was there is as before.
    """
    data = text.encode("utf-8")
    with replacing(Path(path), len(data)) as draft:
        draft.write_bytes(data)


def save_json(path: str | Path, tree: Any) -> None:
    """Write plain data as JSON, atomically.

    Raises:
        CheckpointError: It could not be written, or a number is not finite.
    """
    try:
        text = json.dumps(tree, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not plain data that JSON can hold ({error})") from None
    save_text(path, text + "\n")


def load_json(path: str | Path, *, limit: int = _JSON_BYTES) -> Any:
    """Read a JSON file of at most ``limit`` bytes.

    Raises:
        CheckpointError: It is missing, too large, or not JSON.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > limit:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, limit {limit:,} for a file of this kind")
    try:
        return json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download or write it again") from None


def write_manifest(folder: str | Path) -> Path:
    """Write ``manifest.json`` with size and SHA-256 of every file in ``folder`` and below.

    README.md and hidden files are left out: nothing is loaded from them.

    Raises:
        CheckpointError: A file could not be read or the manifest not written.
    """
    folder = Path(folder)
    try:
        names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        listed = {name: _entry(folder / name) for name in names if not _is_unlisted(name)}
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read for its manifest ({error.strerror})") from error
    fault("manifest")
    save_text(folder / MANIFEST, _canonical(listed))
    return folder / MANIFEST


def verify_manifest(folder: str | Path) -> None:
    """Check every byte of a folder against its manifest.

    Raises:
        CheckpointError: The manifest is missing or damaged, or a file is missing, of another size, or changed; all of
            them are named.
    """
    folder = Path(folder)
    tree = load_json(folder / MANIFEST)
    files = tree.get("files") if isinstance(tree, dict) else None
    if not isinstance(files, dict) or _canonical(files).encode() != (folder / MANIFEST).read_bytes():
        raise CheckpointError(f"{folder / MANIFEST}: damaged or not a manifest; {_ADVICE}")
    complaints = [text for name in files if (text := _difference(folder, name, files[name]))]
    if complaints:
        raise CheckpointError(f"{folder}: {'; '.join(complaints)}; {_ADVICE}")


_ADVICE = "copy or download the folder again, or, if you changed it yourself, delete its manifest.json"


def fsync_folder(folder: Path) -> None:
    """Make renames and deletions in a folder durable."""
    _fsync(folder)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_unlisted(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return parts[-1] in _UNLISTED or any(part.startswith(".") for part in parts)


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size": path.stat().st_size}


def _canonical(files: dict[str, Any]) -> str:
    # Only one text stands for a table, so that a changed byte anywhere in the manifest shows.
    return json.dumps({"algorithm": "sha256", "files": files}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _difference(folder: Path, name: str, entry: Any) -> str | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return f"the manifest names {name!r}, which is outside the folder"
    path = folder / relative
    try:
        found = _entry(path)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if found == entry:
        return None
    size = entry.get("size") if isinstance(entry, dict) else None
    if found["size"] != size:
        return f"{name} has {found['size']:,} bytes, its manifest says {size}"
    return f"{name} differs from its manifest (SHA-256 {found['sha256'][:12]}..)"


def _complaint(path: Path, needed: int, error: OSError) -> str:
    reason = error.strerror or str(error)
    kept = "what was there before is intact" if path.exists() else "nothing was left behind"
    try:
        free = f", {shutil.disk_usage(path.parent).free:,} are free"
    except OSError:
        free = ""
    advice = "make room and save again" if error.errno in _FULL else "check the folder and its permissions"
    return f"{path}: could not be written ({reason}); it needs {needed:,} bytes{free}; {kept}; {advice}"
