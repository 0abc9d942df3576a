"""From pictures to a model that draws classes: autoencoder, cache, training, sampling, on tiny networks."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipelines.pack import write_shards
from mmdiff import rng
from mmdiff.cli import app
from mmdiff.commands.train import train
from mmdiff.errors import ConfigError
from mmdiff.images import encode_png
from mmdiff.pipelines import ImageGenerator

CLASSES = 2
VAE = {
    "type": "kl_vae",
    "image_size": 16,
    "width": 32,
    "multipliers": [1, 1],
    "blocks": 1,
    "channels": 2,
    "attention_levels": [],
}
VQ = {
    "type": "vqgan",
    "image_size": 16,
    "width": 32,
    "multipliers": [1, 1],
    "blocks": 1,
    "features": 4,
    "codebook": 8,
    "code_channels": 2,
    "attention_levels": [],
}
PART = {"width": 16, "depth": 1, "heads": 2}
EMIGM = {
    "type": "emigm",
    "grid": 8,
    "channels": 2,
    "classes": 2,
    "encoder": PART,
    "decoder": PART,
    "buffer": 2,
    "head_width": 16,
    "head_depth": 1,
}
MASKGIT = {"type": "maskgit", "grid": 8, "codebook": 8, "classes": 2, "width": 16, "depth": 1, "heads": 2}
SHORT = {"samples": 8, "optim": {"lr": 1e-3}, "log_every_samples": 4, "checkpoint_every_samples": 8}


def recipe(model, task, objective, shards, out, **more):
    data = {"sources": [{"shards": [str(shards)], "tasks": [task]}], "batch_size": 4}
    return {
        "model": model,
        "data": data,
        "objective": objective,
        "train": SHORT,
        "out": str(out),
        "device": "cpu",
        **more,
    }


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Twelve pictures of two classes."""
    draw = rng.generator(0, "pictures")
    pictures = (rng.uniform(draw, (12, 16, 16, 3)) * 255).byte().numpy()
    rows = [
        (f"{i:03d}", {"png": encode_png(Image.fromarray(a)), "cls": str(i % CLASSES).encode()})
        for i, a in enumerate(pictures)
    ]
    return write_shards(rows, tmp_path_factory.mktemp("shards"), "pictures")[0]


@pytest.mark.parametrize(
    ("encoder", "model", "objective"),
    [
        (VAE, EMIGM, {"type": "token_diffusion", "copies": 2}),
        (VQ, {**MASKGIT, "variant": "halton"}, {"type": "masked_codes", "positions": "all", "label_smoothing": 0.1}),
    ],
    ids=["continuous", "discrete"],
)
def test_a_class_conditional_model_is_trained_and_draws(tmp_path, shards, encoder, model, objective):
    image, rebuild = {"type": "image"}, {"type": "autoencoding"}
    first = train(recipe(encoder, image, rebuild, shards, tmp_path / "vae"), progress=False)
    folder, coded = str(first.model_dir), tmp_path / "codes"
    arguments = ["data", "cache", str(shards), "--encoder", folder, "--out", str(coded), "--flips"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    cached, task = coded / "cached-00000.tar", {"type": "latent"}
    parts = {"image_tokenizer": str(first.model_dir)}
    second = train(recipe(model, task, objective, cached, tmp_path / "model", **parts), progress=False)
    assert second.fit.losses["loss"] > 0
    assert not second.fit.skipped
    generator = ImageGenerator.from_pretrained(second.model_dir, device="cpu")
    assert generator.classes == CLASSES
    assert generator(labels=[0], seeds=[0], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    note = json.loads((tmp_path / "codes" / "cache.json").read_text())
    (tmp_path / "codes" / "cache.json").write_text(json.dumps({**note, "encoder": "another"}))
    with pytest.raises(ConfigError, match="was encoded by another"):
        train(recipe(model, task, objective, cached, tmp_path / "again", **parts), progress=False)
