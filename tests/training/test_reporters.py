"""Reporters: what reaches them, and that a run does not depend on them."""

from __future__ import annotations

import ast
import importlib.machinery
import json
import os
import re
import signal
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdiff.batch import Example, Packing, collate
from mmdiff.config import parse
from mmdiff.errors import ConfigError, MissingExtraError
from mmdiff.training import loop
from mmdiff.training.loop import TrainConfig, fit
from mmdiff.training.report import TIMING_FIELDS
from mmdiff.training.reporters import EXTRAS, numbers_of
from mmdiff.training.throughput import Throughput, work_of

ROOT = Path(__file__).parents[2]


class Recorder(ModuleType):
    """Stands in for wandb or trackio; fails where it is told to."""

    def __init__(self, name: str, failing: str = "") -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls: list[tuple[str, Any]] = []
        self.failing = failing

    def init(self, **options: Any) -> None:
        self._called("init", options)

    def log(self, values: dict, step: int) -> None:
        self._called("log", (step, values))

    def finish(self) -> None:
        self._called("finish", None)

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.calls]

    def _called(self, kind: str, given: Any) -> None:
        print("hello from a service")
        self.calls.append((kind, given))
        if kind == self.failing:
            raise OSError(28, "No space left on device")


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
    assert module.kinds() == ["init", "log", "log", "log", "finish", "init", "finish"]
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

        def flush(self) -> None:
            written.append(("flushed", 0))

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", Recorder("tensorboard"))
    config = replace(toy.CONFIG, samples=12, report=("tensorboard",))
    fit(toy.Net(), toy.objective, toy.Loader(), config, tmp_path / "run", progress=False)
    assert written[0] == (str(tmp_path / "run" / "tensorboard"), None)
    assert ("losses/a", 12) in written
    assert written[-1] == ("closed", 0)


@pytest.mark.parametrize("name", EXTRAS)
def test_a_reporter_that_is_not_installed_is_named_before_the_folder_is_made(toy, tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = replace(toy.CONFIG, report=(name,))
    with pytest.raises(MissingExtraError, match=rf"{name} is needed .*pip install 'mmdiff\[{EXTRAS[name]}\]'"):
        fit(toy.Net(), toy.objective, toy.Loader(), config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_every_extra_that_a_message_names_is_one_that_can_be_installed():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, extra in EXTRAS.items():
        assert any(requirement.startswith(name) for requirement in known[extra])
    named = set()
    for path in (path for room in ("mmdiff", "data_pipelines", "eval") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "MissingExtraError":
                named |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    assert {"lora", "pack", "remote"} < named <= set(known)


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_reporter_that_fails_is_told_once_and_the_run_goes_on(toy, tmp_path, monkeypatch, capsys, failing):
    module = Recorder("wandb", failing)
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = replace(toy.CONFIG, samples=36, report=("wandb",))
    report = fit(toy.Net(), toy.objective, toy.Loader(), config, tmp_path / "run", progress=False)
    assert report.samples == 36
    assert module.kinds().count(failing) == 1
    assert module.kinds()[-1] == failing
    out, err = capsys.readouterr()
    assert not out
    told = [line for line in err.splitlines() if "wandb" in line]
    assert told == [
        "wandb gets no more numbers (OSError: [Errno 28] No space left on device); training goes on, log.jsonl has all"
    ]


def test_r29_addresses_reach_a_service_without_their_secrets(toy, tmp_path, monkeypatch):
    module = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = replace(toy.CONFIG, samples=4, report=("wandb",), project="https://me:hush@host/a?token=hush")
    fit(toy.Net(), toy.objective, toy.Loader(), config, tmp_path / "run", progress=False)
    assert module.calls[0][1]["config"]["project"] == "https://host/a"
    assert module.calls[0][1]["config"]["samples"] == 4


def test_reporters_are_closed_when_a_run_is_stopped_and_when_it_fails(toy, tmp_path, monkeypatch):
    module = Recorder("trackio")
    monkeypatch.setitem(sys.modules, "trackio", module)
    config = replace(toy.CONFIG, report=("trackio",))

    def stopped(model, batch, source):
        if batch.keys[0] == "sample-4":
            os.kill(os.getpid(), signal.SIGTERM)
        return toy.objective(model, batch, source)

    def broken(model, batch, source):
        raise ValueError("broken")

    assert fit(toy.Net(), stopped, toy.Loader(), config, tmp_path / "a", progress=False).stopped
    assert module.kinds() == ["init", "finish"]
    with pytest.raises(ValueError, match="broken"):
        fit(toy.Net(), broken, toy.Loader(), config, tmp_path / "b", progress=False)
    assert module.kinds() == ["init", "finish"] * 2


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"report": ["tensorbord"]}, "report.0: unknown value 'tensorbord'; did you mean 'tensorboard'"),
        ({"report": "wandb"}, "report"),
        ({"project": ""}, "project"),
        ({"reports": []}, "did you mean 'report'"),
    ],
)
def test_wrong_reporters_are_refused_in_words(tree, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse(TrainConfig, {"samples": 1, **tree}, "mine.yaml")


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


def test_packed_rows_and_codes_count_what_the_network_runs_over():
    batch = collate([example(3), example(5), example(2)])
    packed = replace(batch, packing=Packing(((0, 2), (1,)), (3, 5, 2)))
    assert work_of(packed) == {"tokens": 10.0, "images": 3.0, "slots": 10.0}
    codes = replace(collate([example(0), example(0)]), pixels=None, latents=torch.zeros(2, 1, 4, 4, dtype=torch.long))
    assert work_of(codes) == {"tokens": 32.0, "images": 2.0, "slots": 2.0}


def test_operations_of_forward_and_backward_count_once():
    batch, layer = collate([example(4)]), nn.Linear(8, 8, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    throughput = Throughput(torch.device("cpu"), torch.float32)
    for _ in range(2):
        with throughput.counted(batch):
            layer(x).sum().backward()
    assert throughput.per_slot == 3 * 2 * 8 * 8
    assert 0 < throughput.mfu(1e6) < 1


def test_a_forward_pass_alone_stands_for_a_step():
    batch, layer = collate([example(4)]), nn.Linear(8, 8, bias=False)
    throughput = Throughput(torch.device("cpu"), torch.float32)
    with torch.no_grad(), throughput.counted(batch, forward_only=True):
        layer(torch.ones(4, 8))
    assert throughput.per_slot == 3 * 2 * 8 * 8


def test_attention_on_a_cpu_counts():
    throughput = Throughput(torch.device("cpu"), torch.float32)
    q = torch.ones(1, 2, 16, 4, requires_grad=True)
    with throughput.counted(collate([example(16)])):
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    forward = 2 * 2 * (2 * 16 * 16 * 4)
    assert throughput.per_slot >= 3 * forward / 16


def test_without_operations_the_share_is_unknown():
    throughput = Throughput(torch.device("cpu"), torch.float32)
    with throughput.counted(collate([example(2)])):
        pass
    assert throughput.mfu(100.0) is None


def run_of(toy, run_dir: Path, monkeypatch, net=None, **changes) -> tuple[list[dict], dict[str, bytes], Throughput]:
    """Log without times, bytes of the newest checkpoint's tensors, and what was counted."""
    made: list[Throughput] = []
    monkeypatch.setattr(loop, "Throughput", lambda *given: made.append(Throughput(*given)) or made[-1])
    config = replace(toy.CONFIG, samples=48, **changes)
    fit((net or toy.Net)(), toy.objective, toy.Loader(), config, run_dir, progress=False)
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in lines]
    newest = max(p for p in (run_dir / "checkpoints").iterdir() if re.fullmatch(r"step_\d+", p.name))
    return log, {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}, made[0]


@pytest.mark.parametrize("compiled", [False, True], ids=["watched", "apart"])
def test_counting_leaves_losses_running_statistics_and_draws_as_they_are(toy, tmp_path, monkeypatch, compiled):
    monkeypatch.setattr(loop, "compiling", lambda model, on: loop.nullcontext())
    *with_it, counted = run_of(toy, tmp_path / "a", monkeypatch, compile=compiled)
    assert counted.per_slot
    monkeypatch.setattr(loop._Run, "_count_apart", lambda *given: None)
    monkeypatch.setattr(Throughput, "counted", lambda *given: loop.nullcontext())
    *without, uncounted = run_of(toy, tmp_path / "b", monkeypatch)
    assert uncounted.per_slot is None
    assert with_it == without


def test_blocks_that_are_computed_twice_count_once(toy, tmp_path, monkeypatch):
    each = [
        run_of(toy, tmp_path / str(again), monkeypatch, toy.Plain, gradient_checkpointing=again)[2].per_slot
        for again in (False, True)
    ]
    assert each[0] == each[1]


def test_every_log_line_tells_speeds_share_of_the_peak_and_waiting(toy, tmp_path):
    fit(toy.Net(), toy.objective, toy.Loader(), replace(toy.CONFIG, samples=48), tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    for line in lines:
        assert line.keys() >= TIMING_FIELDS
        assert line["tokens_per_second"] == pytest.approx(5 * line["samples_per_second"], rel=0.01)
        assert 0 <= line["mfu"] < 1
