"""``mmdiff bench``: what it measures, what it prints, what it refuses. No test looks at how fast anything was."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmdiff.cli import app
from mmdiff.commands import bench_measures
from mmdiff.commands.bench import _lines, measure
from mmdiff.errors import ConfigError, ShardError

SMALL = ["model.widths=[8,8,8]", "model.stem=4", "data.batch_size=2"]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Everything, as short as possible."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_measures, "_ITEMS", 1)
        patch.setattr(bench_measures, "_PROMPTS", ("a red apple",))
        return measure("demo/image_tokenizer.yaml", SMALL, seconds=0)


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [n for value in tree.values() for n in numbers(value)]
    return [float(tree)] if isinstance(tree, int | float) else []


def test_every_part_is_measured_and_every_number_is_one(found):
    assert list(found) == ["device", "loader", "training", "presets"]
    assert all(math.isfinite(n) and n >= 0 for n in numbers(found))
    assert json.loads(json.dumps(found)) == found


def test_the_loader_stands_beside_raw_reads_of_the_same_bytes(found):
    rates = found["loader"]
    assert rates["samples"] == 2800
    assert rates["share"] == pytest.approx(rates["read"] / rates["raw"])
    assert rates["decoded"] > 0
    assert (rates["disk_bytes"] is None) == (sys.platform == "darwin")


def test_a_training_step_is_told_in_samples_operations_and_memory(found):
    rates = found["training"]["demo/image_tokenizer.yaml"]
    assert rates["batch_size"] == 2
    assert rates["samples"] == rates["images"] > 0
    assert rates["share"] == pytest.approx(rates["flops"] / found["device"]["float32_flops"])
    assert rates["peak_bytes"] > 1e6
    assert 0 <= rates["data_wait"] <= 1


def test_every_preset_of_the_model_in_the_package_is_measured(found):
    by_use = found["presets"]["seconds_per_item"]
    assert set(by_use) >= {"caption", "text_image"}
    assert all(list(by_preset) == ["exact", "fast", "turbo"] for by_preset in by_use.values())
    assert all(isinstance(seconds, float) for by_preset in by_use.values() for seconds in by_preset.values())


def test_the_table_has_a_line_for_each_thing_and_words_for_what_is_unknown(found):
    text = "\n".join(_lines(found))
    for words in ("matrix products", "of raw reads", "ms per step", "of the peak", "caption: exact", "x)"):
        assert words in text
    found = json.loads(json.dumps(found))
    found["loader"] |= {"share": None, "raw": None, "disk_bytes": None, "decoded": None}
    found["training"]["demo/image_tokenizer.yaml"] |= {"share": None}
    found["presets"]["seconds_per_item"] = {"text_image": {"exact": "no such preset", "fast": 0.5, "turbo": 0.1}}
    text = "\n".join(_lines(found))
    for words in ("disk unknown; decoding none", "an unknown share", "exact: no such preset, fast 500, turbo 100"):
        assert words in text


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--only", "disc"], ConfigError.exit_code, "--only disc: not a part; there are device, loader"),
        (["no/such.yaml"], ConfigError.exit_code, "no/such.yaml"),
        (["train.seed=1"], ConfigError.exit_code, "expected a recipe before changes"),
        (["demo/vision.yaml", "--only", "device"], ConfigError.exit_code, "--only leaves out"),
        (["demo/image_tokenizer.yaml", "modle=1"], ConfigError.exit_code, "did you mean 'model'"),
        (["--only", "loader", "--shards", "nowhere"], ShardError.exit_code, "nowhere"),
        (["demo/reader.yaml", "--only", "training"], 4, "runs/demo"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(words, code, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == code, result.output
    assert sentence in result.stderr
    assert not list(Path(tmp_path).iterdir())


def test_json_is_one_object_and_progress_is_on_stderr(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["bench", "--only", "device", "--seconds", "0", "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["device"]["float32_flops"] > 0
    assert result.stderr == "measuring: device\n"
    assert not list(tmp_path.iterdir())
