"""Low-rank adapters in peft's layout: reading, merging into the weights, injecting beside them, writing.

An adapter is a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. Names may be those of our
networks or of a published layout. Merging needs no peft; injecting does, and is for weights that cannot be changed
because they are quantised, and for training.

Source: LoRA (arXiv 2106.09685); peft's file format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.errors import CheckpointError, MissingExtraError
from mmdiff.io import hub
from mmdiff.io.atomic import load_json
from mmdiff.io.checkpoint import read_tensors, write_tensors
from mmdiff.io.layouts import LAYOUTS

__all__ = ["Adapter", "adapted", "inject", "merge", "read_adapter", "write_adapter"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = "default"
_PLAIN = {"use_dora": False, "fan_in_fan_out": False, "lora_bias": False, "alpha_pattern": {}, "bias": "none"}
"""Options of peft's configuration that are not taken, and the value that means they are off."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter that was read.

    Attributes:
        path: Its folder.
        alpha: Numerator of the scale.
        rank_stabilised: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        pairs: Module's name, as the adapter says it -> (A [r, in], B [out, r]).
        full: Parameter's name -> tensor, of parameters that were trained whole.
    """

    path: Path
    alpha: float
    rank_stabilised: bool
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    full: Mapping[str, Tensor]

    def scale(self, rank: int) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_adapter(path_or_id: str | Path) -> Adapter:
    """Read an adapter.

    Args:
        path_or_id: Its folder, or a hub id.

    Raises:
        CheckpointError: Missing, damaged, a pickle, or of a kind that is not taken.
    """
    folder = hub.resolve(path_or_id)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            found = ", ".join(sorted(p.name for p in folder.iterdir())[:6]) if folder.is_dir() else "no folder"
            raise CheckpointError(f"{folder}: is no adapter, it lacks {name} (it holds: {found})")
    tree = load_json(folder / CONFIG)
    if not isinstance(tree, dict) or tree.get("peft_type") != "LORA":
        kind = tree.get("peft_type") if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(f"{folder / CONFIG}: peft_type is {kind!r}; only 'LORA' is taken")
    wrong = [f"{k} = {tree[k]!r}" for k, off in _PLAIN.items() if tree.get(k) not in (None, off)]
    alpha = tree.get("lora_alpha")
    if wrong or not isinstance(alpha, int | float):
        said = ", ".join(wrong) or f"lora_alpha = {alpha!r}"
        raise CheckpointError(f"{folder / CONFIG}: {said} is not taken; merge the adapter with peft first")
    pairs, full = _sorted_tensors(folder)
    return Adapter(path=folder, alpha=alpha, rank_stabilised=tree.get("use_rslora") is True, pairs=pairs, full=full)


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Add an adapter to a network's weights, in float32, in place.

    Args:
        model: Plain, neither quantised nor adapted.
        adapter: From `read_adapter`.

    Returns:
        ``model``.

    Raises:
        CheckpointError: A name or a shape does not fit; all are listed.
    """
    for linear, (a, b) in _matched(model, adapter).values():
        weight = linear.weight
        change = b.to(weight.device, torch.float32) @ a.to(weight.device, torch.float32)
        weight.copy_((weight.float() + adapter.scale(len(a)) * change).to(weight.dtype))
    _copy_full(model, adapter)
    return model


@torch.no_grad()
def inject(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Put an adapter beside a network's weights, which stay as they are; arguments and errors as in `merge`.

    Raises:
        MissingExtraError: peft is not installed.
    """
    found = _matched(model, adapter)
    ranks = {len(a) for _, (a, _) in found.values()}
    if len(ranks) != 1:
        raise CheckpointError(f"{adapter.path}: ranks {sorted(ranks)}; beside quantised weights all must be equal")
    rank = ranks.pop()
    add_layers(model, found, rank=rank, alpha=adapter.alpha, rank_stabilised=adapter.rank_stabilised)
    for name, (_, (a, b)) in found.items():
        layer: Any = model.get_submodule(name)
        layer.lora_A[_NAME].weight.copy_(a)
        layer.lora_B[_NAME].weight.copy_(b)
    _copy_full(model, adapter)
    return model.requires_grad_(False).eval()


def add_layers(
    model: nn.Module,
    names: Iterable[str],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    rank_stabilised: bool = False,
) -> None:
    """Inject peft's layers at some linear layers; B is zero, A is not drawn from any generator of ours.

    Raises:
        MissingExtraError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtraError("peft", "lora", "for adapters beside the weights") from error
    options = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        use_rslora=rank_stabilised,
        target_modules=list(names),
    )
    # peft draws A from PyTorch's global generator, which belongs to the user.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(options, model, adapter_name=_NAME)


def adapted(model: nn.Module) -> dict[str, Any]:
    """Layers of a network that carry an injected adapter, by name."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and _NAME in getattr(m, "lora_A", {})}


def write_adapter(model: nn.Module, folder: str | Path, *, base: str | None = None) -> Path:
    """Write the adapter of a network that `add_layers` was called on, and whatever else of it is trainable.

    Args:
        model: The network.
        folder: Made if it does not exist.
        base: Where the base weights lie: path or hub id.

    Returns:
        The folder.

    Raises:
        CheckpointError: The network has no adapter, or a file could not be written.
    """
    layers, folder = adapted(model), Path(folder)
    if not layers:
        raise CheckpointError(f"{folder}: the network carries no adapter, so there is none to write")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A[_NAME].weight.detach().cpu()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B[_NAME].weight.detach().cpu()
    full = [n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n]
    tensors |= {f"{_PREFIX}{n}": model.get_parameter(n).detach().cpu() for n in full}
    peft_config: Any = model.peft_config[_NAME]  # type: ignore[index]
    peft_config.base_model_name_or_path = base
    peft_config.target_modules = sorted(layers)
    peft_config.modules_to_save = sorted({n.rpartition(".")[0] for n in full} - {""}) or None
    peft_config.inference_mode = True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        peft_config.save_pretrained(folder)
        write_tensors(folder / WEIGHTS, tensors)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder


def _sorted_tensors(folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Pairs by module, and whole parameters by name."""
    sides: dict[str, dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for key, tensor in dict(read_tensors(folder / WEIGHTS)).items():
        name = key.removeprefix(_PREFIX).replace(f".{_NAME}.", ".").replace(".modules_to_save.", ".")
        module, _, side = name.removesuffix(".weight").rpartition(".lora_")
        if module and side in ("A", "B"):
            sides.setdefault(module, {})[side] = tensor
        elif ".lora_" in name:
            raise CheckpointError(f"{folder / WEIGHTS}: {key} is no matrix of a linear layer; it is not taken")
        else:
            full[name] = tensor
    alone = sorted(m for m, found in sides.items() if len(found) != 2)
    if alone:
        raise CheckpointError(f"{folder / WEIGHTS}: only one of lora_A and lora_B for {', '.join(alone[:5])}")
    return {m: (found["A"], found["B"]) for m, found in sides.items()}, full


def _matched(model: nn.Module, adapter: Adapter) -> dict[str, tuple[nn.Linear, tuple[Tensor, Tensor]]]:
    """Our name of every adapted layer -> (layer, matrices)."""
    out: dict[str, tuple[nn.Linear, tuple[Tensor, Tensor]]] = {}
    complaints = []
    for given, (a, b) in adapter.pairs.items():
        name = _own_name(model, f"{given}.weight").removesuffix(".weight")
        layer = dict(model.named_modules()).get(name)
        shape = (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        if not isinstance(layer, nn.Linear):
            complaints.append(f"no linear layer {given}")
        elif a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or shape != (b.shape[0], a.shape[1]):
            complaints.append(f"{given} is {tuple(b.shape)} x {tuple(a.shape)}, the layer {shape}")
        else:
            out[name] = (layer, (a, b))
    if complaints or not out:
        said = "; ".join(sorted(complaints)[:8]) or "it holds no matrices"
        raise CheckpointError(f"{adapter.path}: does not fit a {type(model).__name__}: {said}")
    return out


def _copy_full(model: nn.Module, adapter: Adapter) -> None:
    own = dict(model.named_parameters())
    for given, tensor in adapter.full.items():
        parameter = own.get(_own_name(model, given))
        if parameter is None or parameter.shape != tensor.shape:
            raise CheckpointError(f"{adapter.path}: {given} {tuple(tensor.shape)} fits no parameter of the model")
        parameter.copy_(tensor)


def _own_name(model: nn.Module, name: str) -> str:
    """A parameter's name in our network; published names are looked up in the layouts."""
    own = {n for n, _ in model.named_parameters()}
    if name in own:
        return name
    config: Any = getattr(model, "config", None)
    family = getattr(config, "type", None)
    maps = [layout.key_map(config) for layout in LAYOUTS.values() if layout.family == family]
    # peft leaves out the "model." that a wrapped class puts in front of its own.
    found = (keys.forward(given) for given in (name, f"model.{name}") for keys in maps)
    return next((n for n in found if n in own), name)
