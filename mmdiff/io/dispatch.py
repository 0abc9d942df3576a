"""One network over several devices, through accelerate.

What fits stays on the accelerators, the rest waits in memory or on disk and is fetched block by block.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.errors import ConfigError

__all__ = ["dispatch_"]


def dispatch_(
    model: nn.Module, device_map: str | Mapping[str, Any], max_memory: Mapping[Any, int | str] | None = None
) -> nn.Module:
    """Spread a network over devices, in place, for inference.

    Blocks stay whole. Their states go from device to device; whatever stands outside the blocks gives its results back
    on the main device, so that the code around the network meets one device only.

    Args:
        model: Loaded on the CPU.
        device_map: ``"auto"`` fills the devices in turn, ``"balanced"`` evenly; or module's name -> device (``"disk"``
            and ``"cpu"`` offload).
        max_memory: Device -> most bytes, or text such as ``"20GiB"``; default what is free.

    Returns:
        ``model``; its attribute ``main_device`` says where inputs go.

    Raises:
        ConfigError: Another word, or a map that leaves out a part of the network.
    """
    from accelerate import dispatch_model

    places = _places(model, device_map, max_memory)
    main = _main(places)
    # Parameters of the network itself are used by its code directly and never moved.
    places |= {name: main for name, _ in model.named_parameters(recurse=False)}
    if set(map(str, places.values())) == {str(main)}:
        model.to(main)
    else:
        folder = None
        if any(str(place) == "disk" for place in places.values()):
            folder = tempfile.mkdtemp(prefix="mmdiff-offload-")
            # The files live as long as the network does.
            weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        # By its name: accelerate compares with the word "cpu".
        dispatch_model(model, places, main_device=str(main), offload_dir=folder)
        for name in places:
            _give_back(model, name, main)
    model.main_device = main  # type: ignore[assignment]
    return model


def _places(model: nn.Module, device_map: Any, max_memory: Any) -> dict[str, Any]:
    """Module's name -> device."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import check_device_map, get_balanced_memory

    whole = sorted({type(m[0]).__name__ for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)})
    if isinstance(device_map, str):
        if device_map not in ("auto", "balanced"):
            raise ConfigError(f"device_map {device_map!r}; known: auto, balanced, or a mapping from modules to devices")
        if device_map == "balanced":
            max_memory = get_balanced_memory(model, max_memory=max_memory, no_split_module_classes=whole)
        found = infer_auto_device_map(model, max_memory=max_memory, no_split_module_classes=whole)
        return dict(found)
    places = dict(device_map)
    try:
        check_device_map(model, places)
    except ValueError as error:
        raise ConfigError(f"device_map: {error}") from None
    return places


def _main(places: Mapping[str, Any]) -> torch.device:
    """The first device that computes."""
    for place in places.values():
        if str(place) not in ("cpu", "disk"):
            return torch.device(place)
    return torch.device("cpu")


def _give_back(model: nn.Module, name: str, main: torch.device) -> None:
    """Results of a module outside the blocks go to the main device; those of blocks go on to the next block."""
    parent = name.rpartition(".")[0]
    if not name or name in dict(model.named_parameters(recurse=False)):
        return
    if not isinstance(model.get_submodule(parent), nn.ModuleList):
        model.get_submodule(name).register_forward_hook(lambda module, args, out: _moved(out, main))


def _moved(out: Any, device: torch.device) -> Any:
    return out.to(device) if isinstance(out, Tensor) else out
