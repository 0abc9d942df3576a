from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from mmdiff import rng
from mmdiff.batch import IMAGE, Batch
from mmdiff.errors import ConfigError, MmdiffError, ShardError
from mmdiff.training import optim, state
from mmdiff.training.loop import TrainConfig, fit
from mmdiff.training.microbatch import split
from mmdiff.training.objective import Losses
from mmdiff.training.parallel.together import row_sources
from mmdiff.training.report import TIMING_FIELDS, Meter


def lines(run_dir) -> list[dict]:
    read = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in read]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in state.model_tensors(model).items()}


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def run(toy, run_dir, *, objective=None, loader=None, **options):
    config = options.pop("config", replace(toy.CONFIG, samples=48))
    model = toy.Net()
    report = fit(model, objective or toy.objective, loader or toy.Loader(), config, run_dir, progress=False, **options)
    return model, report


def test_the_loop_equals_ten_lines_of_plain_pytorch(toy, tmp_path):
    config = TrainConfig(samples=40, seed=5, grad_clip=0.1, optim={"lr": 0.01}, schedule={"kind": "constant"})

    def objective(model, batch, generator):
        loss = (model(batch.weights) + rng.uniform(generator, (4, 1))).square()
        return Losses(loss.mean(), {"a": (loss.detach().sum(), 4)})

    torch_model, model = nn.Linear(5, 1), nn.Linear(5, 1)
    model.load_state_dict(torch_model.state_dict())
    report = fit(model, objective, toy.Loader(), config, tmp_path / "run", progress=False)

    loader = toy.Loader()
    groups = [
        {"params": [torch_model.weight], "weight_decay": 0.01},
        {"params": [torch_model.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99))
    for position in range(0, 40, 4):
        optimizer.zero_grad()
        objective(torch_model, loader.batch(position), row_sources(5, position, 4)).total.backward()
        nn.utils.clip_grad_norm_(torch_model.parameters(), 0.1)
        optimizer.step()
    torch.testing.assert_close(model.weight, torch_model.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model.bias, torch_model.bias, rtol=1e-5, atol=1e-7)
    assert (report.samples, report.steps, report.stopped) == (40, 10, False)


def test_r01_resuming_after_every_checkpoint_equals_the_uninterrupted_run(toy, tmp_path):
    whole, _ = run(toy, tmp_path / "whole")

    class DiedError(Exception):
        pass

    for stop in (8, 20, 28, 44):

        class Dying(toy.Loader):
            def batch(self, position, stop=stop):
                if position >= stop:
                    raise DiedError
                return super().batch(position)

        run_dir = tmp_path / f"run{stop}"
        with pytest.raises(DiedError):
            run(toy, run_dir, loader=Dying())
        model, _ = run(toy, run_dir, resume=True)
        assert_same(weights(model), weights(whole))
        assert lines(run_dir) == lines(tmp_path / "whole")


def test_the_log_counts_samples_and_means_of_every_step(toy, tmp_path):
    seen: list[float] = []

    def objective(model, batch, generator):
        losses = toy.objective(model, batch, generator)
        seen.append(float(losses.total.detach()))
        return losses

    run(toy, tmp_path / "run", objective=objective, config=replace(toy.CONFIG, samples=30, accumulate=1))
    log = lines(tmp_path / "run")
    assert [line["samples"] for line in log] == [12, 24, 32]
    assert log[0]["loss"] == pytest.approx(sum(seen[:3]) / 3, rel=1e-6)
    assert log[2]["loss"] == pytest.approx(sum(seen[6:8]) / 2, rel=1e-6)
    assert set(log[0]["losses"]) == {"a", "b"}
    assert log[2]["skipped"] == {"undecodable_image": 1}
    assert log[0]["lr"] == pytest.approx(0.01 * 12 / 20)
    text = (tmp_path / "run" / "log.jsonl").read_text()
    assert all(field in text for field in TIMING_FIELDS)


def test_a_finished_run_resumes_to_itself(toy, tmp_path):
    model, first = run(toy, tmp_path / "run")
    log = (tmp_path / "run" / "log.jsonl").read_bytes()
    again, second = run(toy, tmp_path / "run", resume=True)
    assert_same(weights(model), weights(again))
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == log
    assert second.losses == first.losses
    assert second.skipped == first.skipped == {"undecodable_image": 1}


def test_probes_see_the_average_at_their_counts_and_leave_no_trace(toy, tmp_path):
    class Meddler:
        name = "meddler"

        def __init__(self, every):
            self.every_samples = every
            self.calls = []

        def __call__(self, model, samples_seen):
            assert not model.training
            assert not torch.is_grad_enabled()
            self.calls.append((samples_seen, model.embed.weight.detach().clone()))
            torch.rand(7)
            model.drop.train()
            model.embed.weight.fill_(5)
            return {"score": samples_seen / 2}

    every, listed = Meddler(16), Meddler([0, 5, 48])
    plain, _ = run(toy, tmp_path / "plain")
    probed, _ = run(toy, tmp_path / "probed", probes=[every, listed])
    assert_same(weights(plain), weights(probed))
    assert [count for count, _ in every.calls] == [16, 32, 48]
    assert [count for count, _ in listed.calls] == [0, 8, 48]
    average = toy.Net()
    state.load_average(tmp_path / "probed", average)
    assert torch.equal(every.calls[-1][1], average.embed.weight)
    assert not torch.equal(every.calls[-1][1], probed.embed.weight)
    told = [line for line in lines(tmp_path / "probed") if "probe" in line]
    assert {"samples": 32, "step": 8, "probe": "meddler", "score": 16.0} in told


def test_a_run_does_not_touch_pytorchs_global_random_state(toy, tmp_path):
    model = toy.Net()
    before = torch.get_rng_state()
    fit(model, toy.objective, toy.Loader(), replace(toy.CONFIG, samples=12), tmp_path / "run", progress=False)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_r18_a_step_that_is_not_finite_changes_nothing_and_is_counted(toy, tmp_path, where):
    snapshots = {}

    class Watch:
        every_samples = 4

        def __call__(self, model, samples_seen):
            snapshots[samples_seen] = weights(model)

    def objective(model, batch, generator):
        losses = toy.objective(model, batch, generator)
        if batch.keys[0] != "sample-8":
            return losses
        if where == "loss":
            return Losses(losses.total * float("nan"), losses.terms)
        # The square root of 0 is 0, its slope infinite.
        return Losses(losses.total + (model.rare.weight * 0).square().sum().sqrt(), losses.terms)

    config = replace(toy.CONFIG, samples=16, accumulate=1, ema_halflife_samples=None)
    _, report = run(toy, tmp_path / "run", objective=objective, config=config, probes=[Watch()])
    names = [n for n in snapshots[8] if "running" not in n and "num_batches" not in n]
    assert all(torch.equal(snapshots[8][n], snapshots[12][n]) for n in names)
    assert any(not torch.equal(snapshots[12][n], snapshots[16][n]) for n in names)
    assert report.skipped[f"non_finite_{where}"] == 1
    event = next(line for line in lines(tmp_path / "run") if "event" in line)
    assert event["keys"] == [f"sample-{i}" for i in range(8, 12)]


def test_r18_the_weights_are_those_of_a_run_without_that_batch(toy, tmp_path):
    config = TrainConfig(samples=24, optim={"lr": 0.01}, schedule={"kind": "constant"})

    def objective(model, batch, generator):
        bad = batch.keys[0] == "sample-8"
        loss = model(batch.weights).square().mean() * float("inf" if bad else 1)
        return Losses(loss, {})

    class Without(toy.Loader):
        def batch(self, position):
            return super().batch(position if position < 8 else position + 4)

    a, b = nn.Linear(5, 1), nn.Linear(5, 1)
    b.load_state_dict(a.state_dict())
    fit(a, objective, toy.Loader(), config, tmp_path / "a", progress=False)
    fit(b, objective, Without(), replace(config, samples=20), tmp_path / "b", progress=False)
    assert torch.equal(a.weight, b.weight)


def test_three_bad_steps_in_a_row_save_and_name_their_samples(toy, tmp_path):
    def objective(model, batch, generator):
        losses = toy.objective(model, batch, generator)
        bad = 12 <= int(batch.keys[0].removeprefix("sample-")) < 24
        return Losses(losses.total * (float("nan") if bad else 1.0), losses.terms)

    with pytest.raises(MmdiffError) as caught:
        run(toy, tmp_path / "run", objective=objective)
    assert type(caught.value) is MmdiffError
    assert "sample-12" in str(caught.value)
    assert "sample-23" in str(caught.value)
    assert state.Checkpoints(tmp_path / "run", 2).latest().name == "step_0000000024"
    _, report = run(toy, tmp_path / "run", objective=objective, resume=True)
    assert report.samples == 48
    assert report.skipped["non_finite_loss"] == 3


def test_ten_bad_steps_of_a_thousand_are_too_many(toy, tmp_path):
    def objective(model, batch, generator):
        losses = toy.objective(model, batch, generator)
        bad = int(batch.keys[0].removeprefix("sample-")) % 8 == 0
        return Losses(losses.total * (float("nan") if bad else 1.0), losses.terms)

    with pytest.raises(MmdiffError, match="10 of the last 19 steps"):
        run(toy, tmp_path / "run", objective=objective, config=replace(toy.CONFIG, accumulate=1))


def test_accumulation_equals_the_whole_batch_for_a_mean_loss(toy, tmp_path):
    def objective(model, batch, generator):
        rows = model(batch.ids.float()).square().mean(1)
        return Losses(rows.mean(), {"a": (rows.detach().sum(), len(batch))})

    models = [nn.Linear(5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for accumulate, model in zip((1, 3), models, strict=True):
        config = TrainConfig(samples=24, accumulate=accumulate, optim={"lr": 0.01}, log_every_samples=8)
        fit(model, objective, toy.Loader(), config, tmp_path / str(accumulate), progress=False)
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-4, atol=1e-6)
    a, b = lines(tmp_path / "1"), lines(tmp_path / "3")
    assert [x["losses"]["a"] for x in a] == pytest.approx([x["losses"]["a"] for x in b], rel=1e-4)


def batch_with(ids: torch.Tensor, pixels: torch.Tensor | None) -> Batch:
    on = torch.ones_like(ids, dtype=torch.bool)
    keys = tuple(str(i) for i in range(len(ids)))
    return Batch(keys=keys, tasks=keys, ids=ids, labels=ids, weights=on.float(), droppable=on, valid=on, pixels=pixels)


def test_splitting_keeps_each_row_with_its_images():
    ids = torch.zeros(5, 6, dtype=torch.long)
    for row, images in enumerate([1, 0, 2, 0, 1]):
        ids[row, : 2 * images] = IMAGE
    pixels = torch.arange(4.0).reshape(4, 1, 1, 1)
    parts = split(batch_with(ids, pixels), 3)
    assert [p.keys for p in parts] == [("0", "1"), ("2", "3"), ("4",)]
    assert [p.pixels.flatten().tolist() for p in parts] == [[0.0], [1.0, 2.0], [3.0]]


def test_splitting_rows_without_slots_gives_each_its_image():
    pixels = torch.arange(4.0).reshape(4, 1, 1, 1)
    parts = split(batch_with(torch.zeros(4, 0, dtype=torch.long), pixels), 2)
    assert [p.pixels.flatten().tolist() for p in parts] == [[0.0, 1.0], [2.0, 3.0]]


def test_splitting_refuses_images_that_belong_to_nobody():
    with pytest.raises(ConfigError, match=r"train\.accumulate: 3 images"):
        split(batch_with(torch.zeros(4, 2, dtype=torch.long), torch.zeros(3, 1, 1, 1)), 2)


def test_a_batch_without_targets_is_a_step_that_learns_nothing(toy, tmp_path):
    def objective(model, batch, generator):
        return Losses(torch.zeros(()), {})

    model, report = run(toy, tmp_path / "run", objective=objective)
    assert torch.equal(model.rare.weight, toy.Net().rare.weight)
    assert report.samples == 48
    assert report.losses == {"loss": 0.0}


def test_a_loader_that_ends_early_is_named(toy, tmp_path):
    class Short(toy.Loader):
        def __iter__(self):
            yield self.batch(0)

    with pytest.raises(ConfigError, match=r"ended after 4 samples and train\.samples is 48"):
        run(toy, tmp_path / "run", loader=Short())


def test_unusable_data_saves_the_steps_before(toy, tmp_path):
    class Broken(toy.Loader):
        def batch(self, position):
            if position >= 12:
                raise ShardError("gone")
            return super().batch(position)

    with pytest.raises(ShardError, match="gone"):
        run(toy, tmp_path / "run", loader=Broken())
    assert state.Checkpoints(tmp_path / "run", 2).latest().name == "step_0000000012"


def test_frozen_parameters_stay_and_are_not_averaged(toy, tmp_path):
    config = replace(toy.CONFIG, samples=20, optim=optim.OptimConfig(factors={"rare": 0.0}))
    model, _ = run(toy, tmp_path / "run", config=config)
    assert torch.equal(model.rare.weight, toy.Net().rare.weight)
    average = toy.Net()
    path = state.load_average(tmp_path / "run", average)
    assert torch.equal(average.rare.weight, model.rare.weight)
    assert not torch.equal(average.embed.weight, model.embed.weight)
    assert path.name == "step_0000000020"


def test_without_a_terminal_each_log_line_is_one_plain_line_with_losses_and_eta(toy, tmp_path, monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    fit(toy.Net(), toy.objective, toy.Loader(), replace(toy.CONFIG, samples=24), tmp_path / "run", description="toy")
    text = stderr.getvalue()
    shown = [line for line in text.splitlines() if line.startswith("toy ")]
    assert len(shown) == 2
    losses = r"loss \d\.\d+ a \d\.\d+ b \d\.\d+"
    assert re.search(rf"12/24 samples  {losses}  lr .* tokens/s  MFU .*%  data \d+%  ETA 0:", shown[0])
    assert re.search(r"MB saved in \d", text)


def test_on_a_terminal_there_is_a_bar(toy, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    fit(toy.Net(), toy.objective, toy.Loader(), replace(toy.CONFIG, samples=24), tmp_path / "run", description="toy")
    assert "100%" in stderr.getvalue()
    assert "a 2." in stderr.getvalue() or "a 3." in stderr.getvalue()


def test_the_meter_gives_means_and_smooths_with_its_halflife():
    meter = Meter(halflife=10)
    meter.add({"x": (4.0, 2)}, samples=10)
    meter.add({"x": (9.0, 1), "y": (1.0, 1)}, samples=10)
    assert meter.smoothed() == pytest.approx({"x": (2 * 0.25 + 9 * 0.5) / 0.75, "y": 1.0})
    assert meter.take() == pytest.approx({"x": 13 / 3, "y": 1.0})
    assert meter.take() == {}
