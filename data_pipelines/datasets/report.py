"""What a build hands back, and the small file that describes a built dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fetch import Package, sha256

__all__ = ["BuildReport", "compact_json", "write_description"]


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What was built and where."""

    name: str
    out: Path
    counts: dict[str, int]
    """Samples per split."""
    shards: tuple[Path, ...]
    bytes: int
    """Size of everything written, indexes and notices included."""
    skipped: dict[str, int]
    """Files of the sources that were left out, by reason."""


def compact_json(sample: Mapping[str, Any]) -> bytes:
    """The sample's JSON without blanks, in UTF-8: the same bytes for the same content."""
    return json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode()


def write_description(
    name: str,
    out: Path,
    shards: Mapping[str, Sequence[Path]],
    counts: Mapping[str, int],
    skipped: Mapping[str, int],
    packages: Sequence[Package],
    details: Mapping[str, Any],
    notice: str,
) -> BuildReport:
    """Write ``dataset.json`` and ``NOTICE.md`` beside the shards, and sum up.

    Args:
        name: The dataset.
        out: Its folder.
        shards: Shards by split.
        counts: Samples by split.
        skipped: Left out, by reason.
        packages: Where the data came from.
        details: Options and rules that decided the content.
        notice: Text of ``NOTICE.md``.
    """
    files = [path for split in shards.values() for path in split]
    description = {
        "name": name,
        "counts": dict(counts),
        "skipped": dict(sorted(skipped.items())),
        **details,
        "sources": [
            {"package": package.spec, "kind": package.kind, "sha256": package.sha256, "licence": package.licence}
            for package in packages
        ],
        "sha256": {path.relative_to(out).as_posix(): sha256(path) for path in files},
    }
    text = json.dumps(description, ensure_ascii=False, indent=1) + "\n"
    (out / "dataset.json").write_text(text, encoding="utf-8")
    (out / "NOTICE.md").write_text(notice, encoding="utf-8")
    written = [path for split in shards for path in (out / split).iterdir()] + [out / "dataset.json", out / "NOTICE.md"]
    return BuildReport(
        name=name,
        out=out,
        counts=dict(counts),
        shards=tuple(files),
        bytes=sum(path.stat().st_size for path in written),
        skipped=dict(skipped),
    )
