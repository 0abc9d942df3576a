"""Weights in 4 or 8 bits: the linear layers of the backbone's blocks, through bitsandbytes or torchao.

Embedding, head, vision tower and connector keep their dtype. Quantised weights are for inference and for training an
adapter beside them; they cannot be saved.

Source: QLoRA (arXiv 2305.14314) for nf4 with doubly quantised constants; torchao's weight-only int8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmdiff.errors import ConfigError, MissingExtraError

__all__ = ["SCHEMES", "quantize_", "quantized_nbytes"]

_ROWS, _COLUMNS = 32, 64
_BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8}
"""Bits of a weight: nf4 keeps an 8-bit scale for 64 of them and a 32-bit scale for 256 of those; int8 one per row."""


def quantize_(model: nn.Module, scheme: str, device: torch.device | str | None = None) -> nn.Module:
    """Quantise a network in place, layer by layer; each goes to ``device`` as it is done.

    Args:
        model: Loaded, with floating weights.
        scheme: Name in `SCHEMES`.
        device: Where the network goes; default where it is.

    Returns:
        ``model``, on ``device``, its parameters frozen.

    Raises:
        ConfigError: Unknown scheme, or a device on which it cannot run.
        MissingExtraError: The library is not installed.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"quantize {scheme!r}; known: {', '.join(SCHEMES)}")
    place = torch.device(device or next(model.parameters()).device)
    if place.type == "mps":
        raise ConfigError(f"quantize {scheme!r} runs on cpu and cuda, not on {place}; leave quantize out")
    SCHEMES[scheme](_blocks(model), place)
    model.quantized = scheme  # type: ignore[assignment]
    # The name by which peft tells such networks.
    model.is_loaded_in_4bit = scheme == "nf4"  # type: ignore[assignment]
    return model.requires_grad_(False).to(place)


def quantized_nbytes(model: nn.Module, scheme: str) -> int:
    """Bytes that a network's weights would have after `quantize_`; the meta device will do."""
    linear = {id(m.weight): m.weight for _, m in _linears(_blocks(model))}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in linear)
    return rest + sum(int(w.numel() * _BITS[scheme] / 8) for w in linear.values())


def _blocks(model: nn.Module) -> nn.Module:
    blocks = getattr(getattr(model, "language", model), "layers", None)
    if not isinstance(blocks, nn.Module):
        raise ConfigError(f"quantize: a {type(model).__name__} has no backbone blocks to quantise")
    return blocks


def _nf4(blocks: nn.Module, device: torch.device) -> None:
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise MissingExtraError("bitsandbytes", "quant", "for quantize='nf4'") from error
    for name, linear in _linears(blocks):
        weight = linear.weight
        new = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        new.weight = Params4bit(weight.detach(), requires_grad=False, quant_type="nf4", module=new)
        new.bias = linear.bias
        blocks.set_submodule(name, new.to(device))


def _int8(blocks: nn.Module, device: torch.device) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise MissingExtraError("torchao", "quant", "for quantize='int8'") from error
    for _, linear in _linears(blocks):
        quantize_(linear.to(device), Int8WeightOnlyConfig())


def _linears(blocks: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The layers that are quantised; very narrow ones keep their dtype, since kernels take whole blocks."""
    layers = [(name, m) for name, m in blocks.named_modules() if isinstance(m, nn.Linear)]
    return [(name, m) for name, m in layers if m.out_features % _ROWS == 0 and m.in_features % _COLUMNS == 0]


SCHEMES: dict[str, Callable[[Any, torch.device], None]] = {"nf4": _nf4, "int8": _int8}
"""Name -> what quantises the blocks' linear layers."""
