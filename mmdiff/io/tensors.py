"""Safetensors files, opened but not read: names, shapes and dtypes at once, values when they are asked for.

One file, or a folder with one, or a folder with an index and shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff.errors import CheckpointError, UnsafeFileError
from mmdiff.io.atomic import load_json

__all__ = ["INDEX", "PICKLES", "TensorInfo", "Tensors", "listed", "open_files", "open_folder"]

INDEX = "model.safetensors.index.json"
"""Name of the file that says which shard holds which tensor."""

PICKLES = (".pth", ".pt", ".ckpt", ".bin")
"""Suffixes that are read as PyTorch pickles; every other file must be safetensors."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """What a file says about a tensor before it is read.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        file: Where it lies.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Tensors(Mapping[str, Tensor]):
    """Name -> tensor, read at the moment it is asked for; `info` tells shapes and dtypes without reading.

    Args:
        info: What is known of each tensor, in the order of the file.
        fetch: Reads one.
    """

    def __init__(self, info: Mapping[str, TensorInfo], fetch: Callable[[str], Tensor]) -> None:
        self.info = dict(info)
        self._fetch = fetch

    def __getitem__(self, name: str) -> Tensor:
        self.info[name]
        return self._fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.info)

    def __len__(self) -> int:
        return len(self.info)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(info.nbytes for info in self.info.values())

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The tensors ``names`` maps (old name -> new name), under their new names; the others are left out."""
        old = {new: name for name, new in names.items()}
        return Tensors({new: self.info[name] for new, name in old.items()}, lambda new: self[old[new]])

    def cast(self, dtype: torch.dtype) -> Tensors:
        """The tensors with floating values in ``dtype``; others as they are."""

        def entry(info: TensorInfo) -> TensorInfo:
            return replace(info, dtype=dtype) if info.dtype.is_floating_point else info

        return Tensors({n: entry(i) for n, i in self.info.items()}, lambda n: _cast(self[n], dtype))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def open_folder(folder: Path) -> Tensors:
    """Open ``model.safetensors``, or the shards that an index names, in a folder.

    Raises:
        UnsafeFileError: The index leads out of the folder.
        CheckpointError: There is none, it is damaged, a shard is missing, or index and shards disagree.
    """
    index = _only(folder, "*.safetensors.index.json", INDEX)
    if index is not None:
        return _read_index(index)
    single = _only(folder, "*.safetensors", "model.safetensors")
    if single is not None:
        return open_files([single])
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLES)
    hint = f"; name the file itself to read a pickle: {', '.join(pickles[:4])}" if pickles else ""
    raise CheckpointError(f"{folder}: holds no model.safetensors and no {INDEX}{hint}")


def _only(folder: Path, pattern: str, preferred: str) -> Path | None:
    """The file of that pattern in a folder: the usual one, or the only one."""
    found = sorted(folder.glob(pattern))
    if folder / preferred in found:
        return folder / preferred
    if len(found) > 1:
        names = ", ".join(p.name for p in found[:4])
        raise CheckpointError(f"{folder}: {len(found)} files could be meant ({names}); name one of them")
    return found[0] if found else None


def _read_index(index: Path) -> Tensors:
    tree = load_json(index)
    where = tree.get("weight_map") if isinstance(tree, dict) else None
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()) or not where:
        raise CheckpointError(f"{index}: has no weight_map from names to files")
    files = sorted(set(where.values()))
    for name in files:
        if Path(name).name != name:
            raise UnsafeFileError(f"{index}: names the file {name!r}, which is outside the folder")
        if not (index.parent / name).is_file():
            count = sum(v == name for v in where.values())
            raise CheckpointError(f"{index.parent}: shard {name} with {count} tensors is missing; download it again")
    tensors = open_files([index.parent / name for name in files])
    stray = [k for k in where if k not in tensors.info or tensors.info[k].file.name != where[k]]
    stray += [k for k in tensors.info if k not in where]
    if stray:
        raise CheckpointError(f"{index}: index and shards disagree\n" + listed("in one of them only", stray))
    return tensors


def open_files(files: Sequence[Path]) -> Tensors:
    """Open safetensors files as one mapping.

    Raises:
        UnsafeFileError: A file is a pickle under another name.
        CheckpointError: A file is damaged or holds a dtype that PyTorch lacks, or a name occurs twice.
    """
    info: dict[str, TensorInfo] = {}
    shards = _Shards()
    for file in files:
        opened = shards.open(file)
        for name in opened.keys():
            piece = opened.get_slice(name)
            if piece.get_dtype() not in _DTYPES:
                raise CheckpointError(f"{file}: {name} has dtype {piece.get_dtype()}, which is not supported")
            if name in info:
                raise CheckpointError(f"{file}: {name} is also in {info[name].file.name}")
            info[name] = TensorInfo(shape=tuple(piece.get_shape()), dtype=_DTYPES[piece.get_dtype()], file=file)
    return Tensors(info, lambda name: shards.open(info[name].file).get_tensor(name))


class _Shards:
    """Keeps one file mapped into memory, the last one used: pages of the others would count as memory as well."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._opened: Any = None

    def open(self, file: Path) -> Any:
        if file != self._file:
            self._file, self._opened = None, None
            self._file, self._opened = file, _open_safetensors(file)
        return self._opened


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as stream:
            head = stream.read(9)
        if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[8:9] != b"{"):
            raise UnsafeFileError(
                f"{file}: is a pickle under the name of a safetensors file and was not opened; get the file from its "
                "origin again, or, if it is meant to be a PyTorch checkpoint, name it .pth"
            )
        return safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{file}: not a whole safetensors file ({error}); download it again") from None


def listed(what: str, names: Sequence[str]) -> str:
    """One indented line for a message: how many, and the first 20."""
    if not names:
        return ""
    more = f", and {len(names) - 20} more" if len(names) > 20 else ""
    return f"  {len(names)} {what}: {', '.join(names[:20])}{more}"
