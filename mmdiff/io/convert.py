"""Conversion of checkpoints between published layouts and ours: same tensors, same dtypes, other names.

Tensors stream from file to file, one shard in memory at a time; nothing is computed with them. What a published
config.json said and we have no field for is kept in ``published.json``, so that converting back gives it again; fields
that make other programs run code are kept there apart and never written to a config.json.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.io import card, hub
from mmdiff.io.atomic import MANIFEST, load_json, save_json, verify_manifest, write_manifest
from mmdiff.io.bare import guess
from mmdiff.io.checkpoint import find_root, read_tensors, write_sharded, write_tensors
from mmdiff.io.folder import OURS, identify, open_checkpoint, special_ids, write_config
from mmdiff.io.layouts import HOSTILE, LAYOUTS
from mmdiff.io.tensors import PICKLES, Tensors
from mmdiff.models.registry import Identity

__all__ = ["Conversion", "convert"]

logger = logging.getLogger(__name__)

_ASIDE = "published.json"

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "classes.json",
    "LICENSE",
)
"""Files that mean the same in every layout."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `convert` did.

    Attributes:
        source: Layout that was read; ``"pickle"`` for a PyTorch file.
        target: Layout that was written; ``"safetensors"`` for a single file.
        tensors: Number of tensors.
        nbytes: Bytes of their values.
        files: Weight files written.
    """

    source: str
    target: str
    tensors: int
    nbytes: int
    files: tuple[str, ...]


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str | None = None,
    root: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
) -> Conversion:
    """Convert a checkpoint.

    Args:
        src: Folder in a published layout or ours, hub id, or a PyTorch pickle (``.pth .pt .ckpt .bin``).
        dst: New or empty folder; for a pickle also a file ending in ``.safetensors``.
        to: ``"mmdiff"`` or a name in `mmdiff.io.layouts.LAYOUTS`. Default: ours for a published folder, and for ours
            the layout it once came from; with ``dtype`` the layout it is in.
        root: For pickles: dotted path of the dictionary that holds the tensors; default as `from_pretrained` has it,
            averaged weights first.
        dtype: Precision of floating weights, the image tokenizer's included; default as stored.
        max_shard_bytes: Larger weights are split into files of this size.

    Raises:
        UnsafeFileError: The source asks to run code.
        CheckpointError: The source is damaged or does not fit its configuration, or the result cannot be written.
        ConfigError: The destination is not empty, or the layout is not one of this family.
    """
    path = hub.resolve(src)
    if path.is_file() and path.suffix.lower() in PICKLES and not _is_published(path, Path(dst), root):
        if dtype is not None:
            raise ConfigError(f"{path}: dtype is for checkpoints of a known network; this file is converted as it is")
        return _convert_pickle(path, Path(dst), root)
    if (path / MANIFEST).is_file():
        verify_manifest(path)
    identity = identify(path, root=root)
    target = to or (identity.layout if dtype else _other(path, identity))
    _check_target(identity, target, same=dtype is not None)
    ours = open_checkpoint(identity)
    ours = ours if dtype is None else ours.cast(dtype)
    out = _new_folder(Path(dst))
    tensors = ours if target == OURS else _published_names(ours, target, identity.config)
    files = write_sharded(out, tensors, max_shard_bytes=max_shard_bytes)
    _copy_neighbours(path, out, dtype)
    _write_config(identity, target, path, out)
    write_manifest(out)
    return Conversion(
        source=identity.layout,
        target=target,
        tensors=len(tensors),
        nbytes=tensors.nbytes,
        files=tuple(f.name for f in files),
    )


def _is_published(path: Path, dst: Path, root: str | None) -> bool:
    """Whether a PyTorch file that comes without a config.json is a whole checkpoint of a known network."""
    if dst.suffix == ".safetensors" or (path.parent / "config.json").is_file():
        return False
    return guess(read_tensors(path, root=root or find_root(path)).info) is not None


def _convert_pickle(path: Path, dst: Path, root: str | None) -> Conversion:
    tensors = read_tensors(path, root=root or find_root(path))
    if dst.suffix == ".safetensors":
        if dst.exists():
            raise ConfigError(f"{dst}: exists already; choose another name or remove it")
        _make_folder(dst.parent)
        write_tensors(dst, tensors)
        files = [dst]
    else:
        out = _new_folder(dst)
        files = write_sharded(out, tensors)
        _copy_neighbours(path.parent, out)
        if (path.parent / "config.json").is_file():
            _without_hostile(path.parent / "config.json", out / "config.json")
    return Conversion(
        source="pickle",
        target="safetensors",
        tensors=len(tensors),
        nbytes=tensors.nbytes,
        files=tuple(f.name for f in files),
    )


def _other(path: Path, identity: Identity) -> str:
    """Ours for a published folder, and for ours the one it came from."""
    return _origin(path, identity.family) if identity.layout == OURS else OURS


def _check_target(identity: Identity, target: str, *, same: bool) -> None:
    fitting = [name for name, layout in LAYOUTS.items() if layout.family == identity.family]
    if target != OURS and target not in fitting:
        known = ", ".join([OURS, *fitting])
        raise ConfigError(f"layout {target!r} is none of a {identity.family}; known: {known}")
    if target == identity.layout and not same:
        raise ConfigError(f"{identity.path}: is in the layout {target!r} already")


def _origin(folder: Path, family: str) -> str:
    """The layout that a folder of ours was converted from; else the first of its family."""
    aside = _aside(folder)
    if aside.get("layout") in LAYOUTS:
        return str(aside["layout"])
    fitting = [name for name, layout in LAYOUTS.items() if layout.family == family]
    if not fitting:
        raise ConfigError(f"{folder}: the family {family!r} has no published layout to convert to")
    return fitting[0]


def _published_names(ours: Tensors, layout: str, config: Any) -> Tensors:
    """The tensors under their published names, those that are published twice included."""
    keys, copies = LAYOUTS[layout].key_map(config), LAYOUTS[layout].copies(config)
    names: dict[str, str] = {}
    for key in ours:
        name = keys.backward(key)
        if name is None:
            raise CheckpointError(f"{key} has no name in the layout {layout!r}")
        names[name] = key
    names |= copies
    published = Tensors({new: ours.info[old] for new, old in names.items()}, lambda new: ours[names[new]])
    return LAYOUTS[layout].ungroup(published, config)


def _write_config(identity: Identity, target: str, path: Path, out: Path) -> None:
    aside = _aside(path) if identity.layout == OURS else _set_aside(identity)
    if target == OURS:
        if aside:
            save_json(out / _ASIDE, aside)
        write_config(out, identity.config, licence=card.licence_of(path))
        return
    layout = LAYOUTS[target]
    kept = aside.get("config") if aside.get("layout") == target else None
    # What was said before is said again, unless the network has another shape by now.
    same = isinstance(kept, Mapping) and layout.read(kept, special_ids(path)) == identity.config
    save_json(out / "config.json", kept if same else layout.write(identity.config))


def _set_aside(identity: Identity) -> dict[str, Any]:
    return {
        "layout": identity.layout,
        "config": _harmless(identity.tree),
        "set_aside": {k: v for k, v in identity.tree.items() if k in HOSTILE},
    }


def _harmless(tree: Any) -> Any:
    """The same without fields that make other programs run code, at any depth."""
    if isinstance(tree, Mapping):
        return {k: _harmless(v) for k, v in tree.items() if k not in HOSTILE}
    return [_harmless(v) for v in tree] if isinstance(tree, list) else tree


def _aside(folder: Path) -> Mapping[str, Any]:
    tree = load_json(folder / _ASIDE) if (folder / _ASIDE).is_file() else {}
    return tree if isinstance(tree, Mapping) else {}


def _without_hostile(src: Path, dst: Path) -> None:
    tree = load_json(src)
    save_json(dst, _harmless(tree))


def _copy_neighbours(src: Path, out: Path, dtype: torch.dtype | None = None) -> None:
    images = src / "image_tokenizer"
    if dtype is not None and images.is_dir():
        convert(images, out / "image_tokenizer", dtype=dtype)
    try:
        for name in _COPIED:
            if (src / name).is_file():
                shutil.copyfile(src / name, out / name)
        if dtype is None and images.is_dir():
            shutil.copytree(images, out / "image_tokenizer")
    except OSError as error:
        raise CheckpointError(f"{error.filename or out}: could not be copied ({error.strerror})") from error


def _new_folder(out: Path) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder; choose another or empty it")
    return _make_folder(out)


def _make_folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made ({error.strerror})") from error
    return out
