"""The demo's own recipes in two processes: the same global batches and losses as in one, to 1e-5."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import mmdiff
from data_pipelines.pack import write_shards
from data_pipelines.reader import iter_samples
from mmdiff import config
from mmdiff.commands import data
from mmdiff.io.atomic import save_json

STEPS = 2
STAGES = ("image_tokenizer", "vision", "reader", "unified")
"""In the demo's order: each one starts from what those before it made."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with some of the demo's pictures, its tokenizer and its classes."""
    folder = tmp_path_factory.mktemp("demo")
    samples = [s for s, _ in itertools.islice(iter_samples(["embedded:emoji/train"]), 0, None, 29) if s is not None]
    members = ((s.key, {suffix: s.members[suffix] for suffix in s.members}) for s in samples)
    write_shards(members, folder / "pictures", "some")
    data.tokenizer(["embedded:emoji/train"], vocab_size=1024, out=folder / "tokenizer")
    save_json(folder / "classes.json", sorted({str(s.info()["subgroup"]) for s in samples}))
    return folder


def overrides(made: Path, stage: str, out: Path) -> list[str]:
    """Where a recipe finds what the stages before it made; few samples, every step logged."""
    tree = config.read_yaml(config.find_recipe(f"demo/{stage}.yaml"))
    batch, sources = tree["data"]["batch_size"], len(tree["data"]["sources"])
    shards = made / ("codes" if stage == "unified" else "pictures")
    extra = {
        "image_tokenizer": [],
        "vision": [f"tokenizer={made}/tokenizer"],
        "reader": [f"tokenizer={made}/tokenizer", f"init_parts.vision={made}/vision/model"],
        "unified": [
            f"tokenizer={made}/tokenizer",
            f"init_from={made}/reader/model",
            f"image_tokenizer={made}/image_tokenizer/model",
            f"classes={made}/classes.json",
        ],
    }[stage]
    return [
        *extra,
        *(f"data.sources.{i}.shards=[{shards}]" for i in range(sources)),
        f"train.samples={STEPS * batch}",
        f"train.log_every_samples={batch}",
        "train.step_timeout_s=40",
        "train.first_step_timeout_s=60",
        f"out={out}",
    ]


def run_both(zygote: Any, made: Path, one: Path, two: Path, stage: str, shared: list[str], spread: list[str]) -> None:
    """The same recipe in one process and in two, the second with further changes; losses must agree."""
    for out, ranks, changes in ((one, 0, shared), (two, 2, [*shared, *spread])):
        codes = zygote.train(f"demo/{stage}.yaml", [*overrides(made, stage, out), *changes], ranks)
        assert codes == [0] * max(ranks, 1), zygote.said()[-3000:]
    logs = [[json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()] for out in (one, two)]
    assert len(logs[0]) == len(logs[1]) == STEPS
    for a, b in zip(*logs, strict=True):
        assert a["samples"] == b["samples"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5, rel=1e-5)
        assert a["losses"] == pytest.approx(b["losses"], abs=1e-5, rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_see_the_batches_and_losses_of_one(zygote, made, tmp_path, stage):
    if stage == "unified":
        encoder = made / "image_tokenizer" / "model"
        data.cache([str(made / "pictures")], encoder=encoder, out=made / "codes", batch=64, fit="square", device="cpu")
    run_both(zygote, made, made / stage, tmp_path / "two", stage, [], [])
    assert (tmp_path / "two" / "model" / "manifest.json").is_file()


FSDP = ["train.parallel.type=fsdp", "train.gradient_checkpointing=true"]


def test_spread_weights_give_the_losses_of_one_process_and_a_model_that_anybody_loads(zygote, made, tmp_path):
    run_both(zygote, made, tmp_path / "one", tmp_path / "two", "unified", [], FSDP)
    a, b = (mmdiff.load(tmp_path / name / "model").model for name in ("one", "two"))
    for (name, mine), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=name)


def test_an_adapter_is_trained_beside_spread_weights(zygote, made, tmp_path):
    lora = ["train.lora={rank: 2, also: [codes]}", "train.optim.factors={}"]
    run_both(zygote, made, tmp_path / "one", tmp_path / "two", "unified", lora, FSDP)
    assert (tmp_path / "two" / "adapter" / "adapter_config.json").is_file()
