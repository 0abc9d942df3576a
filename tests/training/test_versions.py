"""Checkpoints of every version load, and runs that it began go on (R31)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdiff.models.registry import load_model
from mmdiff.training.state import Checkpoints

VERSIONS = sorted(p for p in (Path(__file__).parents[1] / "fixtures" / "checkpoints").iterdir() if p.is_dir())


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda p: p.name)
def test_r31_a_model_of_a_former_version_gives_its_logits(folder):
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = load_model(folder / "model")(expected["ids"])
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda p: p.name)
def test_r31_a_run_of_a_former_version_goes_on(toy, folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    steps = {"samples": 16, "checkpoint_every_samples": 8, "log_every_samples": 4, "ema_halflife_samples": 16}
    assert toy.train(tmp_path / "run", plain=True, **steps).samples == 16
    saved = Checkpoints(tmp_path / "run", 2).latest()
    expected = {k.removeprefix("end/"): v for k, v in load_file(folder / "expected.safetensors").items() if "end/" in k}
    torch.testing.assert_close(load_file(saved / "model.safetensors"), expected, rtol=1e-5, atol=1e-5)


def test_versions_are_kept():
    assert VERSIONS
