"""Modules made of declared shapes: foreign networks for plans, without their code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

Shape = Sequence[int]


def bag(shapes: Mapping[str, Shape], *, embeddings: Sequence[str] = (), device: str = "cpu") -> nn.Module:
    """A tree of layers with parameters of the given names and shapes.

    A weight of two dimensions is a linear layer's (or, if named, an embedding's), one of three to five a convolution's,
    one of a single dimension a norm's; everything else is a bare parameter.
    """
    root = nn.Module()
    with torch.device(device):
        for name, shape in shapes.items():
            path, _, attribute = name.rpartition(".")
            owner = _place(root, path, attribute, shape, name in embeddings)
            owner.register_parameter(attribute, nn.Parameter(torch.zeros(tuple(shape))))
    return root


def _place(root: nn.Module, path: str, attribute: str, shape: Shape, embedding: bool) -> nn.Module:
    node = root
    parts = path.split(".") if path else []
    for i, part in enumerate(parts):
        child = getattr(node, part, None)
        if child is None:
            child = _layer(attribute, shape, embedding) if i + 1 == len(parts) else nn.Module()
            node.add_module(part, child)
        node = child
    return node


def _layer(attribute: str, shape: Shape, embedding: bool) -> nn.Module:
    if attribute != "weight":
        return nn.Module()
    if embedding:
        return nn.Embedding(*shape)
    if len(shape) > 2:
        kind = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[len(shape)]
        return kind(shape[1], shape[0], tuple(shape[2:]), bias=False)
    return nn.Linear(shape[1], shape[0], bias=False) if len(shape) == 2 else nn.Module()
