"""Reporters: what reaches them, and that a run does not depend on them."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdiff.batch import Example, collate
from mmdiff.errors import MissingExtraError
from mmdiff.training.loop import fit
from mmdiff.training.reporters import numbers_of
from mmdiff.training.throughput import Throughput, work_of


class Recorder(ModuleType):
    """Stands in for wandb or trackio."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> None:
        self.calls.append(("init", options))

    def log(self, values: dict, step: int) -> None:
        self.calls.append(("log", (step, values)))

    def finish(self) -> None:
        self.calls.append(("finish", None))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_log_line_and_probe_reaches_the_reporter(toy, tmp_path, monkeypatch, name):
    module = Recorder(name)
    monkeypatch.setitem(sys.modules, name, module)

    def probe(model, samples):
        return {"score": 0.5, "note": "text is left out"}

    probe.every_samples, probe.name = 24, "judge"
    config = replace(toy.CONFIG, samples=24, report=(name,), project="mine")
    for resume in (False, True):
        fit(
            toy.Net(),
            toy.objective,
            toy.Loader(),
            config,
            tmp_path / "run",
            resume=resume,
            probes=[probe],
            progress=False,
        )
    kinds = [kind for kind, _ in module.calls]
    assert kinds == ["init", "log", "log", "log", "finish", "init", "finish"]
    first, again = (options for kind, options in module.calls if kind == "init")
    assert (first["project"], first["name"], first["config"]["samples"]) == ("mine", "run", 24)
    assert first.get("id") == again.get("id")
    assert (first.get("id") is not None) == (name == "wandb")
    logged = [values for kind, values in module.calls if kind == "log"]
    assert [step for step, _ in logged] == [12, 24, 24]
    assert {"loss", "lr", "losses/a", "tokens_per_second", "data_wait", "mfu", "samples"} <= logged[0][1].keys()
    assert logged[2][1] == {"judge/score": 0.5, "samples": 24}


def test_tensorboard_gets_the_numbers_by_sample(toy, tmp_path, monkeypatch):
    written: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int | None) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, samples: int) -> None:
            written.append((name, samples))

        def close(self) -> None:
            written.append(("closed", 0))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = replace(toy.CONFIG, samples=12, report=("tensorboard",))
    fit(toy.Net(), toy.objective, toy.Loader(), config, tmp_path / "run", progress=False)
    assert written[0] == (str(tmp_path / "run" / "tensorboard"), None)
    assert ("losses/a", 12) in written
    assert written[-1] == ("closed", 0)


def test_a_reporter_that_is_not_installed_is_named_with_its_command(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = replace(toy.CONFIG, report=("wandb",))
    with pytest.raises(MissingExtraError, match=r"pip install 'mmdiff\[wandb\]'"):
        fit(toy.Net(), toy.objective, toy.Loader(), config, tmp_path / "run", progress=False)


def test_numbers_are_found_by_path():
    record = {"samples": 3, "loss": 1, "losses": {"a": 2.0}, "event": "x", "done": True, "mfu": None}
    assert numbers_of(record) == {"loss": 1.0, "losses/a": 2.0}


def example(length: int) -> Example:
    ids = torch.arange(length)
    none = torch.zeros(length, dtype=torch.bool)
    pixels = torch.zeros(1, 3, 4, 4)
    return Example(key="k", task="t", ids=ids, labels=ids, weights=ids.float(), droppable=none, pixels=pixels)


def test_work_is_counted_in_real_tokens_images_and_slots():
    assert work_of(collate([example(3), example(5)])) == {"tokens": 8.0, "images": 2.0, "slots": 10.0}


def test_operations_of_forward_and_backward_count_once_and_recomputed_ones_do_not():
    batch, layer = collate([example(4)]), nn.Linear(8, 8, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    found = []
    for recomputes in (False, True):
        throughput = Throughput(torch.device("cpu"), torch.float32, recomputes)
        with throughput.counted(batch) as forward_is_done:
            if recomputes:
                layer(x)
            out = layer(x)
            forward_is_done()
            out.sum().backward()
        found.append(throughput._per_slot)
    assert found == [3 * 2 * 8 * 8, (4 - 2) * 2 * 8 * 8]
    assert 0 < throughput.mfu(1e6) < 1


def test_attention_on_a_cpu_counts():
    throughput = Throughput(torch.device("cpu"), torch.float32, False)
    q = torch.ones(1, 2, 16, 4, requires_grad=True)
    with throughput.counted(collate([example(16)])) as forward_is_done:
        out = F.scaled_dot_product_attention(q, q, q)
        forward_is_done()
        out.sum().backward()
    forward = 2 * 2 * (2 * 16 * 16 * 4)
    assert throughput._per_slot >= 3 * forward / 16


def test_without_operations_the_share_is_unknown():
    throughput = Throughput(torch.device("cpu"), torch.float32, False)
    with throughput.counted(collate([example(2)])):
        pass
    assert throughput.mfu(100.0) is None
