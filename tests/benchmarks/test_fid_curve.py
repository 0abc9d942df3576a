"""The curve of a run: every checkpoint is drawn from and measured once, beside real pictures."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from benchmarks import fid_curve
from mmdiff import rng
from mmdiff.cli import app
from mmdiff.commands.train import train
from mmdiff.images import open_image
from mmdiff.models import scorer
from mmdiff.text import Tokenizer
from tests.commands import test_image_training as tiny
from tests.helpers.tiny import TEXTS

shards = tiny.shards


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run of two checkpoints, and a network that makes features."""
    folder = tmp_path_factory.mktemp("curve")
    first = train(
        tiny.recipe(tiny.VQ, {"type": "image"}, {"type": "autoencoding"}, shards, folder / "vq"), progress=False
    )
    words = ["data", "cache", str(shards), "--encoder", str(first.model_dir), "--out", str(folder / "codes")]
    assert CliRunner().invoke(app, words).exit_code == 0
    recipe = tiny.recipe(tiny.MASKGIT, {"type": "latent"}, {"type": "masked_codes"}, folder / "codes", folder / "run")
    recipe["train"] = {**tiny.SHORT, "checkpoint_every_samples": 4}
    train({**recipe, "image_tokenizer": str(first.model_dir)}, progress=False)
    texts = Tokenizer.train(TEXTS, 300)
    judge = scorer.Scorer(
        scorer.Config(vocab_size=texts.vocab_size, image_size=16, widths=(8, 8), width=8), generator=rng.generator(0)
    )
    judge.save_pretrained(folder / "judge")
    texts.save_pretrained(folder / "judge")
    return folder


def test_every_checkpoint_is_measured_once(run, shards, monkeypatch, capsys):
    said = []

    def inside(*words: object) -> None:
        said.append(words[0])
        result = CliRunner().invoke(app, [str(w) for w in words])
        assert result.exit_code == 0, result.output

    monkeypatch.setattr(fid_curve, "mmdiff", inside)
    features = f"scorer:{run / 'judge'}"
    words = [
        "fid_curve",
        str(run / "run"),
        "--real",
        str(shards),
        "--reference",
        str(shards),
        "--out",
        str(run / "out"),
    ]
    words += ["--num", "6", "--final", "8", "--features", features, "--", "--set", "order=random"]
    monkeypatch.setattr(sys, "argv", words)
    fid_curve.main()
    result = json.loads((run / "out" / "curve.json").read_text())
    assert result["samples"] == [4, 8]
    assert len(result["curves"][features]) == 2
    assert result["floor"][features] == pytest.approx(0, abs=1e-6)  # the same pictures on both sides
    assert result["final"]["fid"][features] > 0
    assert "real" in (run / "out" / "curve.svg").read_text()
    assert open_image(run / "out" / "pictures.png").height > 2 * 16
    assert said.count("eval") == 2 + 2 + 1
    said.clear()
    fid_curve.main()
    assert set(said) == {"sample"}  # which finds all pictures there
    capsys.readouterr()
