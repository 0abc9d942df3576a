"""Where shards are: names into lists of shards, and the index of each shard.

Names are paths, patterns and URLs; there are no pipes, no environment variables, no shells. Reading is ``ranges``'.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmdiff.errors import ShardError

from .index import ShardIndex, build_index, index_name, parse_index, read_index
from .ranges import REMOTE, RangeReader, scheme_of, shown

__all__ = ["embedded_root", "expand", "open_shards", "size_complaint"]

MAX_SHARDS = 1_000_000
"""Most shards that one name may stand for."""

_AT_ONCE = 16  # remote shards that are asked for at the same time
_BRACES = re.compile(r"\{([^{}]*)\}")
_log = logging.getLogger(__name__)


def embedded_root() -> Path:
    """Folder of the shards that ship with the package; ``embedded:emoji/train`` is a folder below it."""
    return Path(__file__).resolve().parent / "embedded"


def expand(spec: str | Path) -> list[str]:
    """The shards that a name stands for, sorted within each folder or pattern.

    Args:
        spec: A tar file, a folder of them, a glob, braces (``a-{000..012}.tar``, ``{a,b}.tar``), a URL (http, https,
            s3, gs, hf; braces allowed, globs where the store can list), or ``embedded:NAME/SPLIT``.

    Raises:
        ShardError: Nothing there, a scheme that is not allowed, or more than `MAX_SHARDS`.
    """
    name = os.fspath(spec)
    if Path(name).is_file():
        return [name]
    scheme = scheme_of(name)
    if scheme == "embedded":
        return _folder(_embedded(name), name)
    names = list(itertools.islice(_braces(name.removeprefix("file://")), MAX_SHARDS + 1))
    if len(names) > MAX_SHARDS:
        raise ShardError(f"{shown(name)}: stands for more than {MAX_SHARDS:,} shards; name fewer")
    listed = [_remote(n, scheme) if scheme in REMOTE else _local(n) for n in names]
    return [url for urls in listed for url in urls]


def open_shards(specs: str | Path | Sequence[str | Path], *, damaged: str = "refuse") -> list[ShardIndex]:
    """Find shards and read their indexes; a shard without one is indexed now.

    Args:
        specs: One name or several, each as `expand` takes it.
        damaged: ``"refuse"`` raises if a shard's size differs from its index; ``"skip"`` leaves it to the reader, which
            skips and counts its samples.

    Raises:
        ShardError: A shard is missing, refused by `build_index`, or differs from its index.
    """
    names = [specs] if isinstance(specs, (str, Path)) else list(specs)
    urls = list(dict.fromkeys(url for name in names for url in expand(name)))
    ranges = RangeReader()

    bare: list[str] = []

    def look(url: str) -> tuple[ShardIndex, int]:
        return _index(url, ranges, bare), ranges.size(url)

    remote = any(scheme_of(url) in REMOTE for url in urls)
    with ThreadPoolExecutor(_AT_ONCE if remote else 1) as pool:
        found = list((pool.map if remote else map)(look, urls))
    ranges.close()
    for shard, size in found if damaged == "refuse" else []:
        if (complaint := size_complaint(shard, size)) is not None:
            raise ShardError(complaint)
    return [shard for shard, _ in found]


def size_complaint(shard: ShardIndex, size: int) -> str | None:
    """What is wrong if a shard has ``size`` bytes now; None if that is what its index says."""
    if size == shard.size:
        return None
    key, name = shard.first_beyond(size), shown(shard.url)
    lost = f"; the first sample that is cut off is {key!r}" if key is not None else ""
    return (
        f"{name}: has {size:,} bytes, its index says {shard.size:,}{lost}; copy the shard again, or if it was changed "
        f"on purpose run: mmdiff data index --force {name}"
    )


def _index(url: str, ranges: RangeReader, bare: list[str]) -> ShardIndex:
    """The index beside a shard, else a new one, which is not saved: reading writes nothing. ``bare`` notes those."""
    if scheme_of(url) not in REMOTE:
        if Path(index_name(url)).is_file():
            return read_index(index_name(url), url=url)
    # A signed address opens one file, not its neighbour.
    elif "?" not in url and (data := ranges.whole(index_name(url), 1 << 30)) is not None:
        return parse_index(data, url)
    if not bare:  # said once: there may be thousands
        _log.warning("%s has no index beside it; reading such shards once (mmdiff data index saves this)", shown(url))
    bare.append(url)
    if scheme_of(url) not in REMOTE:
        return build_index(url)
    with ranges.stream(url) as stream:
        return build_index(url, url=url, stream=stream)


def _local(name: str) -> list[str]:
    path = Path(name)
    if path.is_dir():
        return _folder(path, name)
    if path.is_file():
        return [name]
    if any(c in name for c in "*?["):
        anchor = Path(path.anchor) if path.is_absolute() else Path()
        found = sorted(str(p) for p in anchor.glob(str(path.relative_to(path.anchor))) if p.is_file())
        if found:
            return found
        raise ShardError(f"{name}: no file matches this pattern")
    raise ShardError(f"{name}: no such shard")


def _folder(path: Path, name: str) -> list[str]:
    found = sorted(str(p) for p in path.glob("*.tar"))
    known = (str(p).removesuffix(index_name("")) for p in sorted(path.glob(index_name("*.tar"))))
    if missing := [shard for shard in known if shard not in set(found)]:
        raise ShardError(
            f"{missing[0]}: is missing, though its index is there ({len(missing):,} such in {name}); copy it again, or "
            f"delete {index_name(Path(missing[0]).name)} if it was removed on purpose"
        )
    if found:
        return found
    if not path.is_dir():
        raise ShardError(f"{name}: no such folder")
    below = sorted({p.parent.relative_to(path).as_posix() for p in path.glob("*/*.tar")})
    hint = f"; there are some in: {', '.join(below[:10])}" if below else "; make some with: mmdiff data pack"
    raise ShardError(f"{name}: no .tar files in this folder{hint}")


def _embedded(name: str) -> Path:
    rest = name.split(":", 1)[1].strip("/")
    if not rest or ".." in rest.split("/") or Path(rest).is_absolute():
        raise ShardError(f"{name}: expected embedded:NAME/SPLIT, such as embedded:emoji/train")
    return embedded_root() / rest


def _remote(url: str, scheme: str) -> list[str]:
    pattern = f"{url}*.tar" if url.endswith("/") else url
    if not any(c in pattern for c in "*["):
        return [url]
    if scheme in ("http", "https"):
        raise ShardError(f"{shown(url)}: a web server cannot list files; name the shards with braces: {{000..012}}.tar")
    found = RangeReader().listing(pattern)
    if not found:
        raise ShardError(f"{shown(url)}: no shard matches")
    return found


def _braces(name: str) -> Iterator[str]:
    match = _BRACES.search(name)
    if not match:
        yield name
        return
    before, after = name[: match.start()], name[match.end() :]
    for choice in _choices(match[1], name):
        for rest in _braces(after):
            yield before + choice + rest


def _choices(inside: str, name: str) -> Iterator[str]:
    numbers = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inside)
    if not numbers:
        yield from inside.split(",")
        return
    first, last = int(numbers[1]), int(numbers[2])
    if last < first:
        raise ShardError(f"{shown(name)}: the range {{{inside}}} runs backwards")
    for number in range(first, last + 1):
        yield f"{number:0{len(numbers[1])}d}"
