"""What golden tests share: rules for every expected entry, published folders, and a backbone that remembers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff.nn.store import FeatureStore, Store
from mmdiff.sampling import Canvas, TextBackbone


def root_of(config: Any, name: str) -> Path:
    """Folder of a fixture under ``--fixtures DIR``."""
    return Path(config.getoption("--fixtures")) / name


def tree_of(config: Any, name: str) -> dict[str, Any]:
    return json.loads((root_of(config, name) / "config.json").read_text())


def rule(rules: dict[str, str], name: str) -> str:
    """The rule of an expected entry; one without a rule fails."""
    found = [r for pattern, r in rules.items() if re.fullmatch(pattern, name)]
    assert len(found) == 1, f"{name} has {len(found)} rules"
    return found[0]


def publish(folder: Path, tree: dict[str, Any], weights: Path) -> Path:
    """A folder in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tree))
    shutil.copy(weights, folder / "model.safetensors")
    return folder


class Spy(TextBackbone):
    """Remembers the logits of every slot that a pass computes, and what a feature store refreshed."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.logits: list[Tensor] = []
        self.updated: list[dict[int, Tensor]] = []
        self.drift: list[float] = []

    def forward(
        self, canvas: Canvas, index: Tensor, store: Store | None = None, compute: Tensor | None = None
    ) -> Tensor:
        everything = torch.arange(canvas.tokens.shape[1]).expand_as(canvas.tokens)
        if store is None:
            return super().forward(canvas, index)
        computed = everything if compute is None else compute
        logits = super().forward(canvas, computed, store, compute)
        self.logits.append(logits)
        self.updated.append(dict(store.updated) if isinstance(store, FeatureStore) else {})
        full = super().forward(canvas, computed)
        masked = canvas.undecided.gather(1, computed)
        self.drift.append(float((logits - full)[masked].abs().max()))
        place = (computed[:, None] == index[..., None]).int().argmax(-1)
        return logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))
