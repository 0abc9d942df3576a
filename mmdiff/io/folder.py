"""Checkpoints as folders: our layout, and loading from it or a published one.

Our layout::

    config.json           {"model_type": family, "mmdiff_version": ..., "config": {...}}
    model.safetensors     or shards of it with model.safetensors.index.json
    tokenizer.json        with tokenizer_config.json, if the network reads or writes text
    image_tokenizer/      the same layout again, if the network draws
    text_encoder/         in its own layout, if the network reads features of prompts
    classes.json          names of classes, if it knows any
    generation_config.json, published.json   defaults of generation; what a converted checkpoint said of itself
    README.md             model card
    manifest.json         SHA-256 of all of these but the card
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mmdiff
from mmdiff import config as configs
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.io import card, hub
from mmdiff.io.atomic import MANIFEST, load_json, save_json, save_text, verify_manifest, write_manifest
from mmdiff.io.bare import GUESSED, guess
from mmdiff.io.checkpoint import find_root, load_state, match, read_tensors, write_sharded
from mmdiff.io.layouts import LAYOUTS, detect, hostile_fields
from mmdiff.io.tensors import PICKLES, Tensors
from mmdiff.models.base import PretrainedModule
from mmdiff.models.registry import FAMILIES, Identity, build, family_of
from mmdiff.text import Tokenizer

__all__ = [
    "OURS",
    "identify",
    "load_model",
    "open_checkpoint",
    "save_folder",
    "special_ids",
    "write_config",
]

logger = logging.getLogger(__name__)

OURS = "mmdiff"
"""Name of our layout among those of `mmdiff.io.layouts.LAYOUTS`."""

_CONFIG_BYTES = 4 << 20


def identify(path: str | Path, *, root: str | None = None) -> Identity:
    """Read the config.json of a checkpoint, or the shapes of a published file that comes without one.

    Args:
        path: A folder, a weight file beside its config.json, or a published weight file alone.
        root: For PyTorch pickles: where in the file the tensors are, such as ``"model_ema"``.

    Raises:
        UnsafeFileError: The file asks to run code.
        CheckpointError: There is none, it is of no known family, or it asks for what our network cannot do.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    file = folder / "config.json"
    if not file.is_file() and path.is_file():
        if path.suffix.lower() not in (".safetensors", *PICKLES):
            raise CheckpointError(f"{path}: is no weight file, and there is no config.json beside it")
        return _identify_bare(path, root)
    if not file.is_file():
        run = f"; did you mean {folder / 'model'}?" if (folder / "model" / "config.json").is_file() else ""
        raise CheckpointError(f"{folder}: holds no config.json, which says what network the weights belong to{run}")
    tree = load_json(file, limit=_CONFIG_BYTES)
    if not isinstance(tree, dict):
        raise CheckpointError(f"{file}: holds {type(tree).__name__}, expected a table")
    if asked := sorted(hostile_fields(tree)):
        logger.warning("%s: %s ignored; mmdiff runs no code that a checkpoint names", file, ", ".join(asked))
    try:
        layout, family, config = _read_config(tree, folder)
    except (ConfigError, CheckpointError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    root = root or (find_root(path) if path.is_file() else None)
    return Identity(path=path, family=family, layout=layout, config=config, tree=tree, root=root)


def _identify_bare(path: Path, root: str | None) -> Identity:
    root = root or find_root(path)
    tree = guess(read_tensors(path, root=root).info)
    if tree is None:
        raise CheckpointError(
            f"{path}: there is no config.json beside it, and its tensors are of no published network; known are "
            f"{', '.join(GUESSED)}; write a config.json beside it"
        )
    try:
        layout, family, config = _read_config(tree, path.parent)
    except (ConfigError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Identity(path=path, family=family, layout=layout, config=config, tree=tree, root=root)


def load_model(
    path_or_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    root: str | None = None,
    expected: type[nn.Module] = nn.Module,
    verify: bool = True,
) -> PretrainedModule:
    """Load a network.

    Args:
        path_or_id: Folder in our layout or a published one, a weight file beside its config.json, or a hub id.
        device: Where the weights go; default the CPU.
        dtype: Dtype of floating weights; default as stored.
        revision: Branch, tag or commit on the hub.
        root: For PyTorch pickles: where in the file the tensors are, such as ``"model_ema"``.
        expected: Class that the network must be of.
        verify: Check all bytes against manifest.json, if there is one.

    Returns:
        The network, in evaluation mode.

    Raises:
        UnsafeFileError: A file asks to run code.
        CheckpointError: Missing, damaged, of another family, or not fitting its configuration.
    """
    path = hub.resolve(path_or_id, revision)
    if verify and (path / MANIFEST).is_file():
        verify_manifest(path)
    identity = identify(path, root=root)
    module = FAMILIES[identity.family].module
    if not issubclass(module, expected):
        raise CheckpointError(
            f"{path}: holds a {module.__name__}, not a {expected.__name__}; load it with "
            f"{module.__name__}.from_pretrained or mmdiff.load"
        )
    tensors = open_checkpoint(identity, root=root)
    # A few networks compute constants when they are built. They are built a second time, with memory, and only now
    # that their size has been found in the file.
    built = build(identity.config, device="meta")
    if any(b.is_meta for b in built.buffers()):
        built = build(identity.config)
    load_state(built, tensors, dtype=dtype, device=device or "cpu", where=str(path))
    return built.to(device or "cpu").eval()


def open_checkpoint(identity: Identity, *, root: str | None = None) -> Tensors:
    """The tensors of a checkpoint under the names of our module, checked for names and shapes but not read.

    Raises:
        CheckpointError: Names or shapes do not fit the configuration; all are listed.
    """
    tensors = read_tensors(identity.path, root=root or identity.root)
    layers = _layers(configs.to_dict(identity.config))
    if layers > len(tensors):
        raise CheckpointError(
            f"{identity.path}: config.json promises {layers:,} layers, the file holds {len(tensors)} tensors"
        )
    try:
        skeleton = build(identity.config, device="meta")
    except RuntimeError as error:  # sizes whose product is beyond 64 bits
        raise CheckpointError(f"{identity.path}: config.json asks for sizes that no machine holds ({error})") from None
    layout = LAYOUTS.get(identity.layout)
    rename = layout.key_map(identity.config).forward if layout else str
    unused = layout.unused(identity.config) if layout else ()
    tensors = layout.regroup(tensors, identity.config) if layout else tensors
    return tensors.renamed(match(skeleton, tensors.info, rename, unused, str(identity.path)))


def save_folder(
    module: nn.Module,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    image_tokenizer: nn.Module | str | Path | None = None,
    text_encoder: str | Path | None = None,
    classes: Sequence[str] | None = None,
    generation: Mapping[str, Any] | None = None,
    license: str | None = None,  # noqa: A002 - the word of model cards
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a checkpoint in our layout.

    Args:
        module: The network.
        folder: Made if it does not exist; files of the same names are replaced, others stay.
        tokenizer: Of its text.
        image_tokenizer: Of the images it draws; the network or where it lies.
        text_encoder: Where the encoder of its prompts lies; copied.
        classes: Names of its classes, in order.
        generation: Defaults of generation, plain data.
        license: Identifier for the model card, such as ``apache-2.0``.
        max_shard_bytes: Larger weights are split into files of this size.

    Raises:
        CheckpointError: A file could not be written.
        ConfigError: The module is of no known family.
    """
    folder = Path(folder)
    config: Any = getattr(module, "config", None)
    family_of(config)
    if getattr(module, "quantized", None):
        raise ConfigError(f"{folder}: {module.quantized} weights cannot be saved; load without quantize and save that")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # First, so that a half-written folder is not taken for a whole one.
        (folder / MANIFEST).unlink(missing_ok=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be written ({error.strerror})") from error
    if image_tokenizer is not None:
        other = image_tokenizer if isinstance(image_tokenizer, nn.Module) else load_model(image_tokenizer)
        save_folder(other, folder / "image_tokenizer", license=license)
    if text_encoder is not None:
        from mmdiff.io.text_encoders import copy_text_encoder

        copy_text_encoder(text_encoder, folder)
    for name, tree in (("classes.json", classes), ("generation_config.json", generation)):
        if tree is not None:
            save_json(folder / name, tree if isinstance(tree, Mapping) else list(tree))
    write_sharded(folder, module.state_dict(), max_shard_bytes=max_shard_bytes)
    write_config(folder, config, licence=license or card.licence_of(folder))
    write_manifest(folder)


def write_config(folder: Path, config: Any, *, licence: str | None) -> None:
    """Write config.json and the model card of a folder whose other files are there.

    Raises:
        CheckpointError: A file could not be written.
    """
    tree = configs.to_dict(config)
    save_json(folder / "config.json", {"model_type": config.type, "mmdiff_version": mmdiff.__version__, "config": tree})
    count = sum(p.numel() for p in build(config, device="meta").parameters())
    parts = {name: what for name, what in _PARTS.items() if (folder / name).exists()}
    summary = FAMILIES[config.type].summary
    text = card.render(folder.resolve().name, summary, tree, parameters=count, licence=licence, parts=parts)
    save_text(folder / "README.md", text)


_PARTS = {
    "config.json": "shape of the network",
    "model.safetensors": "weights",
    "model.safetensors.index.json": "which shard holds which weights",
    "tokenizer.json": "text tokenizer",
    "image_tokenizer": "image tokenizer, a checkpoint of its own",
    "text_encoder": "encoder of its prompts, a checkpoint of its own",
    "classes.json": "names of the classes",
    "generation_config.json": "defaults of generation",
    "published.json": "what the published checkpoint said of itself",
    "manifest.json": "SHA-256 of the files",
}


def _read_config(tree: Mapping[str, Any], folder: Path) -> tuple[str, str, Any]:
    if "mmdiff_version" in tree and isinstance(tree.get("config"), Mapping):
        family = str(tree.get("model_type"))
        if family not in FAMILIES:
            raise CheckpointError(
                f"is of the family {family!r}, written by mmdiff {tree['mmdiff_version']}; this is mmdiff "
                f"{mmdiff.__version__} and knows {', '.join(FAMILIES)}"
            )
        return OURS, family, configs.parse(FAMILIES[family].config, tree["config"], "config")
    layout = detect(tree)
    if layout is None:
        raise CheckpointError(
            f"model_type {tree.get('model_type')!r} with architectures {tree.get('architectures')!r} is not known; "
            f"known are our own layout ({', '.join(FAMILIES)}) and the published ones ({', '.join(LAYOUTS)})"
        )
    return layout, LAYOUTS[layout].family, LAYOUTS[layout].read(tree, special_ids(folder))


def special_ids(folder: Path) -> dict[str, int]:
    """Id of each added token in a tokenizer.json; empty if there is none."""
    file = folder / "tokenizer.json"
    tree = load_json(file) if file.is_file() else {}
    added = tree.get("added_tokens") if isinstance(tree, dict) else None
    rows = [row for row in added or () if isinstance(row, dict)]
    return {str(row.get("content")): row["id"] for row in rows if isinstance(row.get("id"), int)}


def _layers(tree: Mapping[str, Any]) -> int:
    """Number of layers a configuration promises, before anything of that number is built."""
    total = 0
    for key, value in tree.items():
        if isinstance(value, Mapping):
            total += _layers(value)
        elif (key.endswith("depth") or key == "blocks") and isinstance(value, int):
            total += value
    return total
