"""A checkpoint's network with what was asked of it: an adapter, fewer bits, several devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdiff.errors import ConfigError
from mmdiff.io import adapter as adapters
from mmdiff.io.dispatch import dispatch_
from mmdiff.io.folder import load_model
from mmdiff.io.quantize import quantize_

__all__ = ["load_variant"]


def load_variant(
    path_or_id: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    device_map: str | Mapping[str, Any] | None = None,
) -> nn.Module:
    """Load a network for inference.

    An adapter is merged into floating weights; beside quantised ones, which cannot be changed, it stays apart.

    Args:
        path_or_id: As in `mmdiff.io.folder.load_model`.
        device: Where the network goes.
        dtype: Dtype of floating weights; default as stored.
        quantize: Name in `mmdiff.io.quantize.SCHEMES`.
        adapter: Folder or hub id of an adapter in peft's layout.
        device_map: As in `mmdiff.io.dispatch.dispatch_`.

    Returns:
        The network, in evaluation mode.

    Raises:
        ConfigError: Words that contradict each other, or an unknown one.
        CheckpointError: The checkpoint or the adapter cannot be used.
        MissingExtraError: A library is not installed.
    """
    if device_map is not None and (quantize is not None or device is not None):
        raise ConfigError("device_map says where the weights go; leave out device and quantize, or device_map")
    found = None if adapter is None else adapters.read_adapter(adapter)
    later = quantize is not None or device_map is not None
    model: nn.Module = load_model(path_or_id, device="cpu" if later else device, dtype=dtype)
    if found is not None and quantize is None:
        adapters.merge(model, found)
    if quantize is not None:
        quantize_(model, quantize, device)
        if found is not None:
            adapters.inject(model, found)
            model.to(device or "cpu")
    if device_map is not None:
        dispatch_(model, device_map)
    return model.eval()
