"""``mmdiff info``: what a checkpoint is, without loading it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmdiff.models.registry import Identity
    from mmdiff.text import Tokenizer

__all__ = ["describe", "info"]


def info(
    path: Annotated[str, typer.Argument(help="Folder, weight file or hub id.")],
    flops: Annotated[bool, typer.Option("--flops", help="Also count the operations of one example.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print family, sizes, dtype, licence, capabilities and tokenizers of a checkpoint; PATH may be a recipe too."""
    report = describe(path) if not _is_recipe(path) else _recipe(path)
    if flops:
        report["count"] = _count(path)
    typer.echo(json.dumps(report, indent=2) if as_json else _text(report))


def describe(path_or_id: str | Path) -> dict[str, Any]:
    """Everything `info` prints, as plain data. Weights are not read.

    Args:
        path_or_id: Folder, weight file or hub id.

    Returns:
        Keys ``path tensors parameters bytes dtypes``, and for a checkpoint with a config.json also ``family layout
        unused config licence capabilities tokenizer image_tokenizer text_encoder classes manifest``.

    Raises:
        CheckpointError: Missing, damaged, of no known family, or not fitting its configuration.
    """
    from mmdiff.io import hub
    from mmdiff.io.bare import guess
    from mmdiff.io.checkpoint import find_root, read_tensors
    from mmdiff.io.folder import identify

    path = hub.resolve(path_or_id)
    if path.is_file() and not (path.parent / "config.json").is_file():
        info = read_tensors(path, root=find_root(path)).info
        if guess(info) is None:
            return {"path": str(path), **_weights(info)}
    return _checkpoint(identify(path))


def _is_recipe(path: str) -> bool:
    return path.endswith((".yaml", ".yml"))


def _recipe(path: str) -> dict[str, Any]:
    """What a recipe says of its network: there are no weights yet."""
    from mmdiff import config as configs
    from mmdiff.commands.mup import network_of

    network = network_of(path, [])
    return {"path": path, "family": network.type, "config": configs.to_dict(network)}


def _count(path: str) -> dict[str, Any]:
    from mmdiff.commands.mup import network_of
    from mmdiff.io import hub
    from mmdiff.io.folder import identify
    from mmdiff.scale.flops import count

    return count(network_of(path, []) if _is_recipe(path) else identify(hub.resolve(path)).config)


def _checkpoint(identity: Identity) -> dict[str, Any]:
    from mmdiff import config as configs
    from mmdiff.io import card
    from mmdiff.io.atomic import MANIFEST
    from mmdiff.io.checkpoint import read_tensors
    from mmdiff.io.folder import open_checkpoint
    from mmdiff.models.registry import build
    from mmdiff.pipelines.base import Checkpoint, read_tokenizer

    folder = identity.path if identity.path.is_dir() else identity.path.parent
    tokenizer = read_tokenizer(folder, identity.config)
    tokens = folder / "image_tokenizer"
    images = describe(tokens) if tokens.is_dir() else None
    classes, used = _classes(folder), open_checkpoint(identity).info
    texts = (folder / "text_encoder").is_dir()
    model = build(identity.config, device="meta")
    parts = Checkpoint(model, tokenizer, images, classes, text_encoder=texts or None)
    return {
        "path": str(identity.path),
        "family": identity.family,
        "layout": identity.layout,
        **_weights(used),
        "unused": len(read_tensors(identity.path, root=identity.root).info) - len(used),
        "licence": card.licence_of(folder),
        "capabilities": sorted(parts.capabilities),
        "tokenizer": _tokenizer(tokenizer),
        "image_tokenizer": images,
        "text_encoder": texts,
        "classes": len(classes),
        "manifest": (folder / MANIFEST).is_file(),
        "config": configs.to_dict(identity.config),
    }


def _weights(tensors: Any) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for entry in tensors.values():
        dtypes[str(entry.dtype).removeprefix("torch.")] += entry.nbytes // entry.dtype.itemsize
    return {
        "tensors": len(tensors),
        "parameters": sum(dtypes.values()),
        "bytes": sum(entry.nbytes for entry in tensors.values()),
        "dtypes": dict(dtypes.most_common()),
        "files": len({entry.file for entry in tensors.values()}),
    }


def _tokenizer(tokenizer: Tokenizer | None) -> dict[str, int] | None:
    if tokenizer is None:
        return None
    names = ("vocab_size", "mask_id", "bos_id", "eos_id", "eot_id")
    return {name: getattr(tokenizer, name) for name in names}


def _classes(folder: Path) -> tuple[str, ...]:
    from mmdiff.io.atomic import load_json

    file = folder / "classes.json"
    names = load_json(file) if file.is_file() else []
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _text(report: dict[str, Any]) -> str:
    counted = f"\n{_counted(report['count'])}" if "count" in report else ""
    if "tensors" in report:
        return _weights_text(report) + counted
    return f"{report['path']}\n  family: {report['family']}, a recipe without weights{counted}"


def _counted(count: dict[str, Any]) -> str:
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in count["example"].items())
    return (
        f"  trained parameters: {count['parameters']:,}\n"
        f"  one example ({shapes}): {count['macs']:,} multiply-accumulates, {count['flops']:,} FLOPs forward, "
        f"{count['training_flops']:,} for a training step"
    )


def _weights_text(report: dict[str, Any]) -> str:
    dtypes = ", ".join(f"{name} {count:,}" for name, count in report["dtypes"].items())
    lines = [
        report["path"],
        f"  weights: {report['parameters']:,} parameters in {report['tensors']:,} tensors, {report['bytes']:,} bytes, "
        f"{report['files']} file{'s' if report['files'] != 1 else ''}; {dtypes}",
    ]
    if report.get("unused"):
        lines[1] += f"; {report['unused']:,} more tensors of the published layout are not used"
    if "family" not in report:
        return "\n".join([*lines, "  no config.json beside it: the family is not known"])
    tokenizer, images = report["tokenizer"], report["image_tokenizer"]
    special = ", ".join(f"{k.removesuffix('_id')} {v}" for k, v in (tokenizer or {}).items() if k != "vocab_size")
    sizes = ", ".join(f"{key} {value}" for key, value in _flat(report["config"]) if key != "system")
    lines[1:1] = [f"  family: {report['family']} in the layout {report['layout']!r}", f"  sizes: {sizes}"]
    lines += [
        f"  capabilities: {', '.join(report['capabilities']) or 'none without a tokenizer beside it'}",
        f"  tokenizer: {tokenizer['vocab_size']:,} ids; {special}" if tokenizer else "  tokenizer: none",
        f"  image tokenizer: {_images(images)}" if images else "  image tokenizer: none",
        f"  text encoder: {'beside it' if report['text_encoder'] else 'none'}",
        f"  classes: {report['classes'] or 'none'}",
        f"  licence: {report['licence'] or 'not stated'}",
        f"  manifest: {'present, checked when the weights are loaded' if report['manifest'] else 'none'}",
    ]
    return "\n".join(lines)


def _images(report: dict[str, Any]) -> str:
    return f"{report['family']}, {report['parameters']:,} parameters"


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        elif key != "type":
            rows.append((f"{prefix}{key}", value))
    return rows
