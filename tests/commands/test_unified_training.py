"""The recipe of one model for six tasks, on tiny networks and pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipelines.pack import write_shards
from mmdiff import config, rng
from mmdiff.cli import app
from mmdiff.commands import train
from mmdiff.images import encode_png
from mmdiff.models import vae
from mmdiff.pipelines import load
from tests.helpers.tiny import picture, unified_checkpoint

KINDS = ("style", "group", "tone", "gender", "color", "shape", "subgroup", "is_face")
TASKS = {"caption", "vqa", "text", "text_to_image", "class_to_image", "edit"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the demo leaves behind, in small."""
    folder = tmp_path_factory.mktemp("start")
    parts = unified_checkpoint()
    parts.model.save_pretrained(
        folder, tokenizer=parts.tokenizer, image_tokenizer=parts.image_tokenizer, classes=parts.classes
    )
    return str(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Shards; a third of the samples has nothing it could be made from."""
    folder, rows = tmp_path_factory.mktemp("plain"), []
    for n in range(12):
        info: dict[str, Any] = {"caption": f"a cat {n}", "concept": f"cat {n % 4}", "subgroup": "cat"}
        info["qa"] = [["what?", ("yes", "no")[n % 2], kind] for kind in KINDS]
        members = {"png": encode_png(picture(n, 16, 16))}
        if n % 3:
            info["instruction"] = f"the same in style {n % 2}"
            members["image2.png"] = encode_png(picture(n + 20, 16, 16))
        rows.append((f"{n:03d}", {**members, "json": json.dumps(info).encode()}))
    return str(write_shards(rows, folder, "pictures")[0])


def cached(shards: str, encoder: Path, out: Path) -> str:
    result = CliRunner().invoke(app, ["data", "cache", shards, "--encoder", str(encoder), "--out", str(out)])
    assert result.exit_code == 0, result.output
    return str(out)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory, plain: str, start: str) -> str:
    return cached(plain, Path(start, "image_tokenizer"), tmp_path_factory.mktemp("codes"))


@pytest.fixture
def recipe(tmp_path, start: str, codes: str) -> dict[str, Any]:
    """The shipped recipe on that model and those shards, for a few steps."""
    tree = config.read_yaml(config.find_recipe("unified/styles.yaml"))
    for source in tree["data"]["sources"]:
        source["shards"] = [codes]
    tree |= {"init_from": start, "init_parts": {}, "tokenizer": start, "image_tokenizer": f"{start}/image_tokenizer"}
    tree |= {"classes": f"{start}/classes.json", "out": str(tmp_path / "run"), "device": "cpu"}
    tree["train"] |= {"samples": 64, "log_every_samples": 64, "checkpoint_every_samples": 32}
    return tree


def test_every_task_is_learnt_and_reported_and_a_stopped_run_goes_on_exactly(recipe, tmp_path):
    whole = train.run(recipe, progress=False)
    assert set(whole.fit.losses) >= TASKS
    assert all(np.isfinite(whole.fit.losses[task]) for task in TASKS)
    assert not whole.fit.skipped, "samples that nothing leads to were drawn for edits"

    class Stop:
        every_samples = (32,)

        def __call__(self, model, samples_seen):
            os.kill(os.getpid(), 15)

    stopped = train.run({**recipe, "out": str(tmp_path / "again")}, probes=[Stop()], progress=False)
    assert stopped.fit.stopped
    resumed = train.run(stopped.resume_command.split()[2], resume=True, progress=False)
    weights = [(r.model_dir / "model.safetensors").read_bytes() for r in (whole, resumed)]
    assert weights[0] == weights[1]


def test_the_trained_model_follows_instructions_from_the_command_line_too(recipe, tmp_path):
    folder = train.run({**recipe, "train": {**recipe["train"], "samples": 16}}, progress=False).model_dir
    images = load(folder, device="cpu").images
    assert {"caption", "ask", "text_image", "class_image", "edit"} <= images.capabilities
    before = tmp_path / "before.png"
    before.write_bytes(encode_png(picture(1, 16, 16)))
    out = tmp_path / "after.png"
    arguments = ["generate", str(folder), "a cat", "--image", str(before), "--out", str(out), "--seed", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    drawn = images.edit(str(before), None, "a cat", seed=3)
    assert images.trace.nfe == recipe["generation"]["image"]["num_inference_steps"]
    assert Image.open(out).tobytes() == drawn.tobytes()
    result = CliRunner().invoke(app, [*arguments[:3], "--image", str(before)])
    assert result.exit_code == 2
    assert "--out" in result.stderr


def test_the_same_tasks_are_learnt_with_continuous_image_tokens(recipe, plain, tmp_path):
    shape = vae.Config(image_size=16, width=32, multipliers=(1, 1), blocks=1, channels=2, attention_levels=())
    vae.KLVAE(shape, generator=rng.generator(0)).save_pretrained(tmp_path / "vae")
    moments = cached(plain, tmp_path / "vae", tmp_path / "moments")
    for source in recipe["data"]["sources"]:
        source["shards"] = [moments]
    network = config.to_dict(unified_checkpoint().model.config)
    network |= {"codes": None, "latents": {"grid": 8, "channels": 2, "patch": 2, "head_width": 16, "head_depth": 1}}
    recipe |= {"model": network, "init_from": None, "image_tokenizer": str(tmp_path / "vae"), "generation": None}
    recipe["train"]["optim"]["factors"] = {"vision": 0, "latents": 2}
    assert train.run(recipe, dry_run=True).estimate.losses["loss"] > 0
    result = train.run(recipe, progress=False)
    assert set(result.fit.losses) >= TASKS
    assert not result.fit.skipped
    images = load(result.model_dir, device="cpu").images
    assert "edit" in images.capabilities
    drawn = images.edit(picture(1, 16, 16), None, "the same in style 1", seed=3, num_inference_steps=2)
    assert drawn.size == (16, 16)
