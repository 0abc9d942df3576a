from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mmdiff
from data_pipelines.pack import write_shards
from mmdiff.cli import app
from mmdiff.commands import run_parts, train
from mmdiff.errors import EXIT_STOPPED, ConfigError
from mmdiff.models.registry import load_model
from mmdiff.text import Tokenizer
from mmdiff.training import state
from mmdiff.training.loop import FitReport

CAPTIONS = ["a red square", "a green square", "a blue square", "a white square"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    samples = []
    for i in range(24):
        pixels = np.zeros((16, 16, 3), np.uint8)
        pixels[:, :, i % 3] = 255
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        codes = io.BytesIO()
        np.save(codes, np.full((2, 2), i % 4, np.int16))
        text = json.dumps({"caption": CAPTIONS[i % 4], "qa": [["what colour?", CAPTIONS[i % 4].split()[1], "colour"]]})
        samples.append((f"{i:04d}", {"png": png.getvalue(), "json": text.encode(), "codes.npy": codes.getvalue()}))
    write_shards(samples, folder, "toy")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train(CAPTIONS * 4, 300).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(shards, tokenizer, tmp_path) -> dict:
    language = {"vocab_size": 300, "width": 16, "depth": 1, "heads": 2, "kv_heads": 2, "ffn_width": 16}
    ids = {"max_length": 128, "rope_theta": 10000.0, "eos_id": 0, "bos_id": 1, "mask_id": 2, "eot_id": 5}
    return {
        "model": {
            "type": "unified",
            "language": {**language, **ids},
            "vision": {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "ffn_width": 16},
            "codes": {"codebook": 4, "grid": 2},
        },
        "tokenizer": str(tokenizer),
        "data": {
            "sources": [{"shards": [str(shards)], "tasks": [{"type": "caption"}, {"type": "text_to_image"}]}],
            "batch_size": 4,
        },
        "objective": {"type": "masked"},
        "train": {
            "samples": 24,
            "ema_halflife_samples": 8,
            "checkpoint_every_samples": 8,
            "log_every_samples": 8,
            "optim": {"lr": 0.01},
        },
        "device": "cpu",
        "out": str(tmp_path / "run"),
    }


def test_training_exports_the_averaged_weights_with_their_tokenizer(recipe, tokenizer):
    result = train.run(recipe, progress=False)
    assert result.model_dir == Path(recipe["out"]) / "model"
    assert result.fit.samples == 24
    assert set(result.fit.losses) == {"loss", "caption", "text_to_image"}
    exported = load_model(result.model_dir)
    assert (result.model_dir / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    newest = state.Checkpoints(result.run_dir, 2).load(state.Checkpoints(result.run_dir, 2).latest())
    weights = state.model_tensors(exported)
    assert all(torch.equal(weights[name], average) for name, average in newest.tensors["ema"].items())
    assert any(not torch.equal(weights[name], own) for name, own in newest.tensors["model"].items())


def test_the_model_at_any_checkpoint_of_a_run(recipe, tmp_path):
    result = train.run(recipe, progress=False)
    first, *_, last = sorted((result.run_dir / "checkpoints").iterdir())
    for step in (first, last):
        done = CliRunner().invoke(app, ["convert", str(step), str(tmp_path / step.name), "--json"])
        assert json.loads(done.stdout) == {"source": str(step), "target": str(tmp_path / step.name)}
        average = state.Checkpoints(result.run_dir, 2).load(step).tensors["ema"]
        weights = state.model_tensors(load_model(tmp_path / step.name))
        assert all(torch.equal(weights[name], tensor) for name, tensor in average.items())
    names = {p.name for p in result.model_dir.iterdir()}
    assert names == {p.name for p in (tmp_path / last.name).iterdir()}
    for name in names - {"README.md", "manifest.json"}:  # the card is headed by the folder's name
        assert (result.model_dir / name).read_bytes() == (tmp_path / last.name / name).read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--dtype", "bfloat16"), "a run's checkpoint is written in our layout; convert the result afterwards"),
        (("--to", "llada"), "a run's checkpoint is written in our layout; convert the result afterwards"),
        ((), "model.safetensors"),
    ],
    ids=["dtype", "layout", "damaged"],
)
def test_what_no_model_is_made_of(recipe, tmp_path, words, told):
    result = train.run(recipe, progress=False)
    step = max((result.run_dir / "checkpoints").iterdir())
    if not words:
        data = (step / "model.safetensors").read_bytes()
        (step / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = CliRunner().invoke(app, ["convert", str(step), str(tmp_path / "model"), *words])
    assert done.exit_code == (2 if words else 4)
    assert told in " ".join(done.output.split())
    assert not (tmp_path / "model").exists()


def test_a_checkpoints_model_overwrites_nothing(recipe, tmp_path):
    result = train.run(recipe, progress=False)
    step = max((result.run_dir / "checkpoints").iterdir())
    done = CliRunner().invoke(app, ["convert", str(step), str(result.model_dir)])
    assert done.exit_code == 2
    assert f"{result.model_dir}: not an empty folder; give a new one" in " ".join(done.output.split())


def test_r01_a_stopped_command_exits_75_and_its_resume_command_gives_the_same_model(recipe, tmp_path):
    """The whole command with real tasks, stopped by a probe that raises the signal."""
    whole = train.run(recipe, progress=False)

    class Stop:
        every_samples = (12,)

        def __call__(self, model, samples_seen):
            os.kill(os.getpid(), 15)

    stopped = train.run({**recipe, "out": str(tmp_path / "again")}, probes=[Stop()], progress=False)
    assert stopped.fit.stopped
    assert stopped.model_dir is None
    words = stopped.resume_command.split()
    assert words[:2] == ["mmdiff", "train"]
    assert words[-1] == "--resume"
    resumed = train.run(words[2], resume=True, progress=False)
    for name in ("model.safetensors", "config.json"):
        assert (resumed.model_dir / name).read_bytes() == (whole.model_dir / name).read_bytes()


def test_a_run_goes_on_with_copies_of_its_shards_but_not_with_others(recipe, shards, tmp_path):
    copies, others = tmp_path / "copies", tmp_path / "others"
    shutil.copytree(shards, copies)
    write_shards([("k", {"json": b'{"caption": "a red square"}'})], others, "toy")
    train.run(recipe, ["train.samples=8"], progress=False)
    where = "data.sources.0.shards.0="
    with pytest.raises(ConfigError, match="saved for plan"):
        train.run(recipe, ["train.samples=8", f"{where}{others}"], resume=True, progress=False)
    assert train.run(recipe, ["train.samples=8", f"{where}{copies}"], resume=True, progress=False).fit.samples == 8


def test_a_dry_run_measures_and_writes_nothing(recipe, shards):
    before = sorted(str(p) for p in shards.iterdir())
    result = train.run(recipe, dry_run=True)
    estimate = result.estimate
    model = run_parts.model_of(train.load_config(recipe))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert estimate.trainable == count
    assert estimate.parameters == sum(p.numel() for p in model.parameters())
    assert estimate.gradients == 4 * count
    assert estimate.optimizer == 8 * count
    assert estimate.average == 4 * count
    assert estimate.activations > 1000
    assert estimate.total == estimate.weights + 16 * count + estimate.activations + estimate.logits
    assert estimate.logits > 0
    assert not Path(recipe["out"]).exists()
    assert sorted(str(p) for p in shards.iterdir()) == before


def test_activations_grow_with_the_batch_and_shrink_with_accumulation(recipe):
    def activations(*overrides):
        return train.run(recipe, overrides, dry_run=True).estimate.activations

    one = activations()
    assert activations("data.batch_size=8") > 1.5 * one
    assert activations("data.batch_size=8", "train.accumulate=2") < 1.3 * one


def test_the_python_door_takes_overrides_as_keywords(recipe, tmp_path):
    result = mmdiff.train(recipe, out=tmp_path / "other", train={"samples": 8}, progress=False)
    assert result.run_dir == tmp_path / "other"
    assert result.fit.samples == 8
    assert "lr: 0.01" in (tmp_path / "other" / "config.yaml").read_text()


def test_training_can_begin_from_a_model(recipe, tmp_path):
    first = train.run(recipe, ["train.samples=4"], progress=False)
    second = {k: v for k, v in recipe.items() if k != "model"}
    second |= {"init_from": str(first.model_dir), "out": str(tmp_path / "second")}
    assert train.run(second, ["train.samples=4"], progress=False).model_dir.is_dir()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.sampels=3"], "unknown key 'train.sampels'; did you mean 'samples'"),
        (["init_from=x"], "give model .* or init_from .* not both"),
        (["model=null"], "give model"),
        (["model.language.mask_id=7"], "mask_id is 7, but 2 in tokenizer"),
        (["model.language.vocab_size=100"], r"\d+ ids, the model room for 100"),
        (["train.optim.factors={nobody: 0.5}"], "'nobody' fits no parameter"),
    ],
)
def test_a_recipe_that_cannot_be_carried_out_is_refused_in_words(recipe, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train.run(recipe, overrides, dry_run=True)


def test_several_processes_without_a_launcher_are_refused(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2 but RANK, MASTER_ADDR, MASTER_PORT is not set; .*torchrun"):
        train.run(recipe)
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="not a number of processes"):
        train.run(recipe)


def test_a_used_folder_is_refused_before_anything_is_built(recipe, monkeypatch):
    Path(recipe["out"]).mkdir()
    (Path(recipe["out"]) / "notes.txt").write_text("x")
    monkeypatch.setattr(run_parts, "model_of", lambda spec: pytest.fail("built"))
    with pytest.raises(ConfigError, match=r"not empty \(notes.txt\); add --resume"):
        train.run(recipe)


def test_skipped_samples_are_written_once_though_a_resumed_run_passes_them_again(tmp_path):
    from data_pipelines.loader import Skip

    path = tmp_path / "skipped.jsonl"
    first = train._skip_log(path)
    for position in (3, 8, 8, 12):
        first(Skip("reason", "key", "url", position, "message"))
    with path.open("a") as file:
        file.write('{"half')
    second = train._skip_log(path)
    for position in (8, 8, 12, 15):
        second(Skip("reason", "key", "url", position, "message"))
    assert [json.loads(line)["position"] for line in path.read_text().splitlines()] == [3, 8, 8, 12, 15]


def invoke(recipe, tmp_path, *options: str):
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps(recipe))
    return CliRunner().invoke(app, ["train", str(config), *options])


def test_print_config_is_a_configuration_that_reads_back_the_same(recipe, tmp_path):
    result = invoke(recipe, tmp_path, "train.samples=99", "--print-config")
    printed = tmp_path / "printed.yaml"
    printed.write_text(result.stdout)
    assert train.load_config(printed) == train.load_config(recipe, ["train.samples=99"])
    assert not Path(recipe["out"]).exists()


def test_a_dry_run_prints_its_table_on_stdout(recipe, tmp_path):
    result = invoke(recipe, tmp_path, "--dry-run", "--json")
    table = json.loads(result.stdout)
    parts = ("weights", "gradients", "optimizer", "average", "activations", "logits")
    assert table["total"] == sum(table[k] for k in parts)
    text = invoke(recipe, tmp_path, "--dry-run").stdout
    assert "activations" in text
    assert "MiB" in text


def test_r17_a_stopped_command_exits_75_and_says_how_to_go_on(recipe, tmp_path, monkeypatch):
    fit = FitReport(samples=4, steps=1, seconds=1.0, samples_per_second=4.0, stopped=True, losses={}, skipped={})
    stopped = train.TrainResult(run_dir=tmp_path, fit=fit, resume_command="mmdiff train x --resume")
    monkeypatch.setattr(train, "run", lambda *_, **__: stopped)
    result = invoke(recipe, tmp_path)
    assert result.exit_code == EXIT_STOPPED
    assert result.stdout == ""
    assert "mmdiff train x --resume" in result.stderr


def test_the_command_prints_the_model_on_stdout_and_progress_on_stderr(recipe, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(json.dumps(recipe))
    run = [sys.executable, "-m", "mmdiff", "train", str(config), "train.samples=8"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{recipe['out']}/model"
    assert "8/8 samples" in done.stderr
    assert "ETA" in done.stderr
