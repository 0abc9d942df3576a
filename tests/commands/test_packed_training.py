"""Training with packed rows and token budgets, from a recipe to a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipelines.pack import write_shards
from mmdiff.commands import train
from mmdiff.models.registry import load_model
from mmdiff.text import Tokenizer


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny language model on texts of one to twenty words."""
    folder = tmp_path_factory.mktemp("packed")
    texts = [" ".join(["red", "blue", "green"][(i + n) % 3] for n in range(1 + i * 7 % 20)) for i in range(40)]
    Tokenizer.train(texts, 300).save_pretrained(folder / "tokenizer")
    rows = ((f"{i:02d}", {"json": json.dumps({"text": text}).encode()}) for i, text in enumerate(texts))
    write_shards(rows, folder / "shards", "s")
    language = {"vocab_size": 300, "width": 16, "depth": 2, "heads": 2, "kv_heads": 2, "ffn_width": 16}
    ids = {"max_length": 128, "rope_theta": 10000.0, "eos_id": 0, "bos_id": 1, "mask_id": 2, "eot_id": 5}
    return {
        "model": {"type": "llada", **language, **ids},
        "tokenizer": str(folder / "tokenizer"),
        "data": {"sources": [{"shards": [str(folder / "shards")], "tasks": [{"type": "text"}]}], "batch_size": 8},
        "objective": {"type": "masked"},
        "train": {"samples": 48, "accumulate": 2, "log_every_samples": 8, "optim": {"lr": 0.01}},
        "device": "cpu",
    }


def run(recipe: dict[str, Any], out: Path, **data: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps, and the trained weights."""
    result = train.run({**recipe, "data": {**recipe["data"], **data}, "out": str(out)}, progress=False)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], load_model(result.model_dir).state_dict()


def test_packed_rows_train_the_same_model(recipe: dict[str, Any], tmp_path: Path) -> None:
    losses, weights = run(recipe, tmp_path / "plain")
    packed, packed_weights = run(recipe, tmp_path / "packed", pack_length=64)
    assert len(losses) == 6
    assert packed == pytest.approx(losses, rel=1e-5, abs=1e-5)
    for name, weight in weights.items():
        # Adam divides by the root of second moments, which magnifies the last digits of small gradients.
        torch.testing.assert_close(packed_weights[name], weight, rtol=1e-3, atol=1e-3)


def test_a_token_budget_trains_with_batches_of_changing_size(recipe: dict[str, Any], tmp_path: Path) -> None:
    losses, _ = run(recipe, tmp_path / "budget", batch_size=32, max_tokens=120, multiple=2, pack_length=64)
    assert len(losses) >= 3
    assert all(loss > 0 for loss in losses)
