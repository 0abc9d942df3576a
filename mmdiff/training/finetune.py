"""Low-rank adapters for training: which layers, which rank, and putting them into a network.

Files of adapters are the business of `mmdiff.io.adapter`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import nn

from mmdiff import rng
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.io.adapter import adapted, add_layers
from mmdiff.training.optim import fits

__all__ = ["LoraConfig", "attach"]


@config
class LoraConfig:
    """A low-rank adapter beside frozen weights (arXiv 2106.09685); needs the extra ``lora``."""

    rank: int = Field(16, gt=0)
    """Rank of the change of each layer."""
    alpha: float = Field(32.0, gt=0)
    """The change is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    layers: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("*layers.*.self_attn.*_proj", "*layers.*.mlp.*_proj"), min_length=1
    )
    """Names or patterns with ``*`` of the linear layers; the default is all of the backbone's blocks."""
    also: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Names or patterns of parameters that are trained whole beside it, such as connector and newline."""


def attach(model: nn.Module, spec: LoraConfig, seed: int) -> nn.Module:
    """Freeze a network and put an adapter beside its weights, in place; the network's outputs do not change yet.

    A network that carries an adapter already is left as it is.

    Args:
        model: Plain or quantised.
        spec: What to adapt.
        seed: Seed of the initial matrices.

    Returns:
        ``model``; trainable are the adapter (in float32) and what ``spec.also`` names.

    Raises:
        ConfigError: A pattern fits nothing.
        MissingExtraError: peft is not installed.
    """
    if adapted(model):
        return model
    names = _layers(model, spec.layers)
    model.requires_grad_(False)
    whole = _parameters(model, spec.also)
    add_layers(
        model,
        names,
        rank=spec.rank,
        alpha=spec.alpha,
        dropout=spec.dropout,
        rank_stabilised=spec.rank_stabilised,
    )
    for number, layer in enumerate(adapted(model).values()):
        _init(layer, rng.generator(seed, "lora", number))
    for parameter in whole:
        parameter.requires_grad_(True)
    return model


@torch.no_grad()
def _init(layer: Any, generator: torch.Generator) -> None:
    """A as peft draws it (uniform by fan-in), B zero; float32 whatever the weights are."""
    for side in (layer.lora_A, layer.lora_B):
        side.float()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if not a.is_meta:
        bound = 1 / math.sqrt(a.shape[1])
        a.copy_((2 * rng.uniform(generator, a.shape) - 1) * bound)
    b.zero_()


def _layers(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for pattern in patterns:
        if not any(fits(n, pattern) for n in linear):
            raise ConfigError(f"train.lora.layers: {pattern!r} fits no linear layer; there are {_some(linear)}")
    # The tower's blocks look like the backbone's; they are adapted only if a pattern says vision.
    tower = any("vision" in p for p in patterns)
    return [n for n in linear if any(fits(n, p) for p in patterns) and (tower or not n.startswith("vision."))]


def _parameters(model: nn.Module, patterns: tuple[str, ...]) -> list[nn.Parameter]:
    named = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fits(n, pattern) for n in named):
            raise ConfigError(f"train.lora.also: {pattern!r} fits no parameter; there are {_some(list(named))}")
    return [p for n, p in named.items() if any(fits(n, x) for x in patterns)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
