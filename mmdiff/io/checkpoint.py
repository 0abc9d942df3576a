"""Tensors in files: reading lazily, writing atomically, and filling a module strictly.

The only file that calls ``torch.load``: always ``weights_only=True``, on the CPU, with ``argparse.Namespace`` as the
one class allowed beyond PyTorch's tensors and containers, and never again with less care after a refusal. An explicit
``weights_only`` also wins over the environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD.
"""

from __future__ import annotations

import argparse
import errno
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.errors import CheckpointError, UnsafeFileError
from mmdiff.io.atomic import MANIFEST, load_json, replacing, save_json, verify_manifest, write_manifest
from mmdiff.io.faults import fault
from mmdiff.io.pickles import foreign_imports
from mmdiff.io.tensors import INDEX, PICKLES, TensorInfo, Tensors, listed, open_files, open_folder

__all__ = [
    "MANIFEST",
    "TensorInfo",
    "Tensors",
    "find_root",
    "load_json",
    "load_state",
    "match",
    "read_tensors",
    "save_json",
    "verify_manifest",
    "write_manifest",
    "write_sharded",
    "write_tensors",
]


def read_tensors(path: str | Path, *, root: str | None = None) -> Tensors:
    """Open a checkpoint.

    Args:
        path: A safetensors file, a folder with one (or with an index and its shards), or a PyTorch pickle
            (``.pth .pt .ckpt .bin``).
        root: For pickles: dotted path of the dictionary that holds the tensors, such as ``"model_ema"``.

    Returns:
        The tensors; those of safetensors are read only when asked for.

    Raises:
        UnsafeFileError: The file asks to import code, or is a pickle under another name.
        CheckpointError: Missing, damaged, a shard is missing, or a pickle holds several dictionaries and ``root`` does
            not say which.
    """
    path = Path(path)
    if path.is_dir():
        return open_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    if path.suffix.lower() in PICKLES:
        return _read_pickle(path, root)
    return open_files([path])


_ROOTS = ("model_ema", "model_state_dict", "state_dict", "model")
"""Where published image models keep their weights, the averaged ones first."""


def find_root(path: str | Path) -> str | None:
    """The dictionary of a PyTorch pickle that holds the weights to generate with; None if there is only one, or none.

    Raises:
        UnsafeFileError: The file asks to import code.
        CheckpointError: It is damaged.
    """
    path = Path(path)
    if path.suffix.lower() not in PICKLES:
        return None
    tree = _load(path)
    tables = tree if isinstance(tree, Mapping) else {}
    return next((root for root in _ROOTS if isinstance(tables.get(root), Mapping)), None)


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically.

    Args:
        path: The file; its folder exists.
        tensors: Name -> tensor on any device, of any strides; names that share memory are written as often.
        metadata: Strings for the header.

    Raises:
        CheckpointError: It could not be written; the bytes needed are named and a former file of that name is intact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = _separate({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    needed = sum(t.numel() * t.element_size() for t in plain.values())
    with replacing(Path(path), needed) as draft:
        try:
            save_file(plain, draft, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            # The library reports a full disk in words; as an OSError it gets the same message as every other file.
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
        fault("fsync")


def write_sharded(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: float = 5e9,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write ``model.safetensors``, or shards of it with ``model.safetensors.index.json``.

    Memory: one shard, if ``tensors`` reads lazily. Files of a former model in the folder are removed afterwards.

    Returns:
        The files written, the index included.

    Raises:
        CheckpointError: As `write_tensors`.
    """
    folder = Path(folder)
    shards = _plan(tensors, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, keys in zip(names, shards, strict=True):
        write_tensors(folder / name, {k: tensors[k] for k in keys}, metadata=metadata)
    if len(shards) > 1:
        where = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(_nbytes(tensors, k) for k in tensors)
        save_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
        names.append(INDEX)
    for old in folder.glob("model*.safetensors*"):
        if old.name not in names:
            old.unlink()
    return [folder / name for name in names]


def match(
    module: nn.Module,
    info: Mapping[str, TensorInfo],
    rename: Callable[[str], str | None],
    unused: Sequence[str],
    where: str,
) -> dict[str, str]:
    """Pair the tensors of a file with those of a module, completely.

    Args:
        module: The module, on any device.
        info: Published key -> what the file says.
        rename: Published key -> key of the module; None = unknown.
        unused: Regular expressions of published keys that are left out.
        where: Name of the file for the message.

    Returns:
        Published key -> key of the module.

    Raises:
        CheckpointError: A key of the file fits nowhere or two fit one place, a tensor of the module is missing, or a
            shape differs; up to 20 of each are listed.
    """
    skip = re.compile("|".join(f"(?:{p})" for p in unused)) if unused else None
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    pairs: dict[str, str] = {}
    taken: dict[str, str] = {}
    extra, wrong = [], []
    for key, found in info.items():
        name = rename(key)
        if skip and skip.fullmatch(key):
            continue
        if name is None or name not in wanted:
            extra.append(key)
        elif name in taken:
            extra.append(f"{key} (the place of {taken[name]})")
        else:
            pairs[key], taken[name] = name, key
            if wanted[name] != found.shape:
                wrong.append(f"{key} is {list(found.shape)}, the configuration asks for {list(wanted[name])}")
    missing = [name for name in wanted if name not in taken]
    if extra or missing or wrong:
        lists = [listed("missing", missing), listed("unexpected", extra), listed("of another shape", wrong)]
        raise CheckpointError(f"{where}: does not fit {type(module).__name__}\n" + "\n".join(t for t in lists if t))
    return pairs


def load_state(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    rename: Callable[[str], str | None] = lambda key: key,
    unused: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    where: str = "the checkpoint",
) -> nn.Module:
    """Fill a module, strictly: every tensor used exactly once, every place filled, every shape right.

    Args:
        module: On the meta device or with memory; its tensors are replaced, not copied into.
        tensors: From `read_tensors`, or any mapping.
        rename: Key of the file -> key of the module.
        unused: Regular expressions of keys of the file that are left out.
        dtype: Dtype for floating tensors; None keeps that of the file.
        device: Where the tensors go.
        where: Name of the file for messages.

    Returns:
        ``module``.

    Raises:
        CheckpointError: As `match`.
    """
    pairs = match(module, _infos(tensors), rename, unused, where)
    state = {name: _placed(tensors[key], dtype, device) for key, name in pairs.items()}
    module.load_state_dict(state, strict=True, assign=True)
    return module


def _read_pickle(path: Path, root: str | None) -> Tensors:
    tree = _descend(path, _load(path), root)
    if not isinstance(tree, Mapping) or not tree or not all(isinstance(v, Tensor) for v in tree.values()):
        raise CheckpointError(f"{path}: {_contents(tree, root)}")
    tensors = {str(name): tensor.detach() for name, tensor in tree.items()}
    for name, tensor in tensors.items():
        # A stored view may claim terabytes with a stride of 0, and a meta tensor has no values at all.
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise UnsafeFileError(f"{path}: {name} claims shape {list(tensor.shape)} without the values for it")
    info = {name: TensorInfo(shape=tuple(t.shape), dtype=t.dtype, file=path) for name, t in tensors.items()}
    return Tensors(info, tensors.__getitem__)


def _load(path: Path) -> Any:
    zipped = _check_stored(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The format before PyTorch 1.6 cannot be mapped into memory; it is read with the same restrictions.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged pickles fail in every way there is; all are reported, none is retried
        text = " ".join(str(error).split())
        if "weights_only" not in text.lower():
            reason = text[:200] or type(error).__name__
            raise CheckpointError(f"{path}: not a whole PyTorch checkpoint ({reason})") from error
        raise UnsafeFileError(_refusal(path, text)) from None


def _check_stored(path: Path) -> bool:
    """Whether it is an archive; a compressed one is refused, since a small file must not become gigabytes."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole PyTorch checkpoint ({error})") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
            raise UnsafeFileError(f"{path}: {entry.filename} is compressed, which PyTorch never writes; refused")
    return True


def _refusal(path: Path, text: str) -> str:
    if foreign := foreign_imports(path):
        why = f"asks to import {', '.join(foreign[:4])}"
    else:
        reason = re.search(r"(Unsupported .*?|Trying to .*?)(?: was not| Check the| Please|$)", text)
        why = f"asks for more than tensors ({reason[1] if reason else text[:200]})"
    code = (
        "import torch; from safetensors.torch import save_file; "
        f"d = torch.load('{path.name}', map_location='cpu', weights_only=False); "
        f"d = next((d[k] for k in {_ROOTS} if k in d), d); "
        "d = {k: v.contiguous().clone() for k, v in d.items() if torch.is_tensor(v)}; "
        f"save_file(d, '{path.stem}.safetensors')"
    )
    return (
        f"{path}: refused, because it {why}; nothing of it was run. Only tensors, plain containers and "
        "argparse.Namespace are read. If you trust its origin, convert it once, offline, on a machine that holds "
        f'nothing of value, and load the result:\npython -c "{code}"'
    )


def _descend(path: Path, tree: Any, root: str | None) -> Any:
    for step in root.split(".") if root else ():
        if isinstance(tree, argparse.Namespace):
            tree = vars(tree)
        if not isinstance(tree, Mapping) or step not in tree:
            raise CheckpointError(f"{path}: has no {root!r}: {_contents(tree, None)}")
        tree = tree[step]
    return tree


def _contents(tree: Any, root: str | None) -> str:
    at = f"under {root!r} " if root else ""
    if not isinstance(tree, Mapping):
        return f"{at}is {type(tree).__name__}, expected a dictionary of tensors"
    tables = {str(k): len(v) for k, v in tree.items() if isinstance(v, Mapping)}
    shown = ", ".join(f"{k!r} ({n} entries)" for k, n in list(tables.items())[:8])
    others = ", ".join(repr(str(k)) for k in list(tree)[:8])
    return f"{at}holds more than tensors; say which part with root: " + (shown or f"among {others} is no dictionary")


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    # Always a copy: memory that maps a file would change, or end the process, with the file.
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(device=device, dtype=target, copy=True)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those that share memory with an earlier one, which safetensors refuses."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        out[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return out


def _infos(tensors: Mapping[str, Tensor]) -> Mapping[str, TensorInfo]:
    if isinstance(tensors, Tensors):
        return tensors.info
    return {k: TensorInfo(shape=tuple(t.shape), dtype=t.dtype, file=Path()) for k, t in tensors.items()}


def _nbytes(tensors: Mapping[str, Tensor], key: str) -> int:
    return tensors.info[key].nbytes if isinstance(tensors, Tensors) else tensors[key].nbytes


def _plan(tensors: Mapping[str, Tensor], limit: float) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for key in tensors:
        n = _nbytes(tensors, key)
        if shards[-1] and size + n > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += n
    return shards
