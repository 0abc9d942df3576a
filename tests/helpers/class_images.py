"""Tiny class-conditional image checkpoints with random weights that do draw something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmdiff import rng
from mmdiff.config import parse
from mmdiff.models.registry import FAMILIES, build
from mmdiff.pipelines import Checkpoint

__all__ = ["KINDS", "checkpoint", "folder"]

_PART = {"width": 16, "depth": 2, "heads": 2}
_TREES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "emigm": (
        {
            "type": "emigm",
            "grid": 4,
            "channels": 4,
            "classes": 3,
            "encoder": _PART,
            "decoder": _PART,
            "buffer": 3,
            "head_width": 16,
            "head_depth": 1,
        },
        {
            "type": "kl_vae",
            "image_size": 8,
            "width": 32,
            "multipliers": [1, 1],
            "blocks": 1,
            "channels": 4,
            "attention_levels": [],
        },
    ),
    "bert": (
        {"type": "maskgit", "grid": 4, "codebook": 9, "classes": 3, "width": 16, "depth": 2, "heads": 2},
        {
            "type": "vqgan",
            "image_size": 8,
            "width": 32,
            "multipliers": [1, 1],
            "blocks": 1,
            "features": 4,
            "codebook": 9,
            "code_channels": 3,
            "attention_levels": [],
        },
    ),
}
_TREES["mar"] = ({**_TREES["emigm"][0], "tied_null": False}, _TREES["emigm"][1])
_TREES["halton"] = ({**_TREES["bert"][0], "variant": "halton"}, _TREES["bert"][1])
KINDS = tuple(_TREES)


def _built(tree: dict[str, Any], seed: int) -> nn.Module:
    module = build(parse(FAMILIES[tree["type"]].config, tree, "tiny"), generator=rng.generator(seed, "init")).eval()
    draw = rng.generator(seed, "noise")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            # Layers that start at zero would make every picture the same; a wild head would diverge.
            scale = 0.1 if "diffloss" in name else 0.4
            parameter += scale * torch.randn(parameter.shape, generator=draw)
    return module


def checkpoint(kind: str) -> Checkpoint:
    """A network with its image tokenizer."""
    model, tokenizer = _TREES[kind]
    return Checkpoint(_built(model, 0), None, _built(tokenizer, 1), ("ant", "bee", "cat"))


def folder(kind: str, path: Path) -> Path:
    """The same on disk."""
    from mmdiff.pipelines import Pipeline

    Pipeline(checkpoint(kind)).save_pretrained(path)
    return path
