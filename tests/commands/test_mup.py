from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from data_pipelines.pack import write_shards
from mmdiff.cli import app
from mmdiff.commands import mup_sweep, train
from mmdiff.commands.mup_page import draw
from mmdiff.commands.mup_sweep import Grid, Sweep, run_sweep
from mmdiff.errors import ConfigError
from mmdiff.models.registry import build, load_model
from mmdiff.text import Tokenizer
from tests.scale.test_mup import CONFIGS, DIT, TEXT

TEXTS = ["a red square", "a green square", "a blue square", "a white square"]


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def net(tmp_path) -> Path:
    """A file with nothing but a network's configuration."""
    path = tmp_path / "dit.yaml"
    wide = DIT.with_width(64)
    path.write_text(json.dumps({"type": "dit", **{k: v for k, v in vars(wide).items() if not k.startswith("__")}}))
    return path


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe that trains a small text model on captions."""
    folder = tmp_path_factory.mktemp("recipe")
    samples = []
    for i in range(12):
        png = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(png, "PNG")
        text = json.dumps({"caption": TEXTS[i % 4]}).encode()
        samples.append((f"{i:04d}", {"png": png.getvalue(), "json": text}))
    write_shards(samples, folder / "shards", "toy")
    Tokenizer.train(TEXTS * 4, 300).save_pretrained(folder / "words")
    ids = {"max_length": 128, "eos_id": 0, "bos_id": 1, "mask_id": 2, "eot_id": 5}
    language = {"vocab_size": 300, "width": 32, "depth": 1, "heads": 4, "kv_heads": 4, "ffn_width": 32, **ids}
    vision = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 2, "ffn_width": 16}
    tree = {
        "model": {"type": "llada_v", "language": language, "vision": vision},
        "tokenizer": str(folder / "words"),
        "data": {"sources": [{"shards": [str(folder / "shards")], "tasks": [{"type": "caption"}]}], "batch_size": 4},
        "objective": {"type": "masked"},
        "train": {"samples": 12, "log_every_samples": 4, "optim": {"lr": 0.01}},
        "device": "cpu",
        "out": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(tree))
    return path


def test_check_prints_a_row_per_parameter(net):
    out = invoke("mup", "check", str(net), "--base-width", "16")
    assert "rule mup; forward scales: readout_scale 0.25" in out
    row = next(line for line in out.splitlines() if line.startswith("blocks.0.mlp.fc1.weight"))
    assert row.split()[1:] == ["hidden", "256x64", "4", "0.5", "0.25", "4", "1"]
    tree = json.loads(invoke("mup", "check", str(net), "--base-width", "16", "--optimizer", "sgd", "--json"))
    assert {r["lr"] for r in tree["rows"] if r["role"] == "hidden"} == {1.0}
    assert {r["lr"] for r in tree["rows"] if r["role"] == "output"} == {4.0}


def test_check_reads_checkpoints_and_recipes(recipe, tmp_path):
    build(TEXT).save_pretrained(tmp_path / "model")
    assert "lm_head.weight" in invoke("mup", "check", str(tmp_path / "model"), "--base-width", "8")
    out = invoke("mup", "check", str(recipe), "mup.base_width=16")
    assert [line for line in out.splitlines() if "connector.2.weight" in line and " hidden " in line]


@pytest.mark.parametrize("suffix", [".html", ".svg", ".png"])
def test_check_draws_the_coordinate_check(net, tmp_path, suffix):
    file = tmp_path / f"plot{suffix}"
    options = ("--base-width", "16", "--widths", "16,32", "--steps", "1", "--seeds", "1")
    out = invoke("mup", "check", str(net), "--plot", str(file), *options)
    assert "muP: " in out
    assert "standard: " in out
    data = file.read_bytes()
    assert data.startswith({".html": b"<!DOCTYPE", ".svg": b"<svg", ".png": b"\x89PNG"}[suffix])
    assert suffix == ".png" or b"muP, t = 1" in data


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mup", "check", "NET", "--rule", "ntk"), "rule 'ntk' is not known; one of sp, mup, depth"),
        (("mup", "check", "NET", "--plot", "x.gif", "--widths", "16,32", "--steps", "1"), "is an .html, .svg or .png"),
        (("mup", "check", "NET", "--plot", "x.svg", "--widths", "16;32"), "expected whole numbers with commas"),
        (("mup", "sweep", "NET", "--lrs", "2^x"), "expected a number such as 0.001 or 2^-10"),
        (("mup", "plot", "FOLDER"), "holds no sweep.json"),
    ],
)
def test_bad_words_are_sentences(net, tmp_path, words, message):
    given = [str(net) if w == "NET" else str(tmp_path) if w == "FOLDER" else w for w in words]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_file_without_a_network_is_refused(tmp_path):
    (tmp_path / "empty.yaml").write_text("train: {}")
    result = CliRunner().invoke(app, ["mup", "check", str(tmp_path / "empty.yaml")])
    assert result.exit_code == 2
    assert "holds no model" in result.output


def test_info_counts_operations_of_checkpoints_and_recipes(net, tmp_path):
    build(CONFIGS["mmdit"]).save_pretrained(tmp_path / "model")
    tree = json.loads(invoke("info", str(tmp_path / "model"), "--flops", "--json"))
    assert tree["count"]["training_flops"] == 6 * tree["count"]["macs"]
    text = invoke("info", str(net), "--flops")
    assert "a recipe without weights" in text
    assert "multiply-accumulates" in text


def test_training_under_mup_draws_scales_and_rates_of_the_plan(recipe, tmp_path):
    changes = {"mup": {"base_width": 8}, "out": str(tmp_path / "run")}
    result = train.run(str(recipe), changes, progress=False)
    model = load_model(result.model_dir)
    assert model.config.language.width == 32
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert math.isfinite(first["loss"])
    # Stopped and resumed, the same bytes: the factors are a function of the recipe.
    changes = {**changes, "out": str(tmp_path / "again")}
    again = train.run(str(recipe), changes, progress=False)
    one, two = (load_model(r.model_dir).state_dict() for r in (result, again))
    assert all(one[k].equal(two[k]) for k in one)


def test_a_sweep_goes_on_where_it_was_and_writes_what_it_found(recipe, tmp_path, monkeypatch):
    grid = Grid(widths=(16, 32), lrs=(2.0**-5, 2.0**-9), rules=("sp", "mup"))
    ran = []
    real = mup_sweep._tail_loss

    def counting(log: Path) -> float:
        ran.append(log)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return real(log)

    monkeypatch.setattr(mup_sweep, "_tail_loss", counting)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(str(recipe), [], grid, tmp_path / "sweep")
    done = len(list((tmp_path / "sweep" / "points").glob("*/result.json")))
    assert done == 2
    sweep = run_sweep(str(recipe), [], grid, tmp_path / "sweep")
    assert len(ran) == 3 + 6 - done
    # At the base the two parametrisations are one, and its runs are made once.
    alone = dataclasses.replace(grid, widths=(16,), rules=("mup",))
    assert run_sweep(str(recipe), [], alone, tmp_path / "alone").loss("mup", 16, 2.0**-5) == sweep.loss(
        "sp", 16, 2.0**-5
    )
    for lr in grid.lrs:
        assert sweep.loss("sp", 16, lr) == sweep.loss("mup", 16, lr)
        assert sweep.loss("sp", 32, lr) != sweep.loss("mup", 32, lr)
    assert Sweep.load(tmp_path / "sweep") == sweep
    with pytest.raises(ConfigError, match="finished with another recipe or other changes; name another folder"):
        run_sweep(str(recipe), ["train.samples=16"], grid, tmp_path / "sweep")
    found = train.load_config(tmp_path / "sweep" / "transferred.yaml")
    assert found.train.optim.lr == sweep.best("mup", 16)
    assert (found.mup.base_width, found.model.language.width) == (16, 32)
    assert "log2 learning rate" in (tmp_path / "sweep" / "curves.html").read_text()
    text = invoke("mup", "plot", str(tmp_path / "sweep"), "--to", str(tmp_path / "u.svg"))
    assert text.strip() == str(tmp_path / "u.svg")
    table = sweep.table()
    assert "mup: the best rate moves by 2^" in table
    assert table.splitlines()[0].split() == ["rule", "width", "2^-5", "2^-9", "best"]


def test_a_sweep_runs_its_points_in_processes(recipe, tmp_path):
    words = ("--widths", "16,32", "--lrs", "2^-7", "--rules", "mup", "--jobs", "2", "--json")
    tree = json.loads(invoke("mup", "sweep", str(recipe), *words, "--out", str(tmp_path / "sweep")))
    assert tree["moved_log2"] == {"mup": 0.0}
    assert all(math.isfinite(loss) for loss in tree["losses"].values())


def test_a_point_that_blows_up_counts_as_infinite(recipe, tmp_path):
    grid = Grid(widths=(16, 32), lrs=(2.0**-9, 1e30), rules=("mup",))
    sweep = run_sweep(str(recipe), ["train.samples=40"], grid, tmp_path / "sweep")
    assert sweep.best("mup", 16) == 2.0**-9
    assert Sweep.load(tmp_path / "sweep") == sweep


def test_a_plot_of_nothing_is_refused_by_its_suffix(tmp_path):
    with pytest.raises(ConfigError, match=r"is an \.html, \.svg or \.png file"):
        draw(tmp_path / "x.pdf", [], "title", [])
