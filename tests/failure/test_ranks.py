"""Runs of several processes: the same as one process, on any number of them, whatever happens to one (R3, R16-R18)."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdiff.errors import EXIT_STOPPED, ShardError
from mmdiff.io.atomic import verify_manifest

CHANGES = {"samples": 48, "checkpoint_every_samples": 16, "log_every_samples": 4, "ema_halflife_samples": 16}
CHANGES |= {"step_timeout_s": 20.0, "first_step_timeout_s": 40.0}
FSDP = {"type": "fsdp"}


@pytest.fixture(scope="module")
def alone(zygote, tmp_path_factory) -> Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert zygote.run_ranks(run_dir, 1, CHANGES) == [0]
    return run_dir


def newest(run_dir: Path) -> Path:
    return max(p for p in (run_dir / "checkpoints").iterdir() if re.fullmatch(r"step_\d+", p.name))


def log_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def assert_close(run_dir: Path, other: Path) -> None:
    """Losses, gradients, weights, averages and moments to 1e-5."""
    a, b = log_of(run_dir), log_of(other)
    assert [line["samples"] for line in a] == [line["samples"] for line in b]
    for x, y in zip(a, b, strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=1e-5)
        assert x["grad_norm"] == pytest.approx(y["grad_norm"], abs=1e-5)
        assert x["losses"] == pytest.approx(y["losses"], abs=1e-5)
    assert newest(run_dir).name == newest(other).name
    for name in ("model", "ema", "optimizer"):
        torch.testing.assert_close(
            load_file(newest(run_dir) / f"{name}.safetensors"),
            load_file(newest(other) / f"{name}.safetensors"),
            rtol=1e-5,
            atol=1e-5,
        )


@pytest.mark.parametrize("changes", [{"accumulate": 1}, {"accumulate": 2}, {"parallel": FSDP}], ids=str)
def test_two_processes_give_the_losses_and_weights_of_one(zygote, alone, tmp_path, changes):
    assert zygote.run_ranks(tmp_path / "run", 2, {**CHANGES, **changes}) == [0, 0]
    assert_close(tmp_path / "run", alone)


def test_groups_of_a_mup_plan_hold_where_weights_are_spread_and_after_a_stop(zygote, tmp_path):
    changes = {**CHANGES, "scales": {"blocks.0.weight": (0.25, 4.0), "embed.weight": (2.0, 1.0)}}
    assert zygote.run_ranks(tmp_path / "one", 1, changes) == [0]
    spread = {**changes, "parallel": FSDP}
    assert zygote.run_ranks(tmp_path / "two", 2, spread, {"1": {"TOY_DO": "term@28"}}) == [EXIT_STOPPED] * 2
    assert zygote.run_ranks(tmp_path / "two", 2, spread) == [0, 0]
    assert_close(tmp_path / "two", tmp_path / "one")


def test_replicas_of_spread_weights_give_the_losses_of_one_process(zygote, alone, tmp_path):
    codes = zygote.run_ranks(tmp_path / "run", 4, {**CHANGES, "parallel": {**FSDP, "replicas": 2}})
    assert codes == [0] * 4, zygote.said()[-2000:]
    assert_close(tmp_path / "run", alone)


def test_spread_weights_travel_in_bfloat16(zygote, alone, tmp_path):
    changes = {**CHANGES, "parallel": {**FSDP, "dtype": "bfloat16"}, "autocast": "bfloat16"}
    assert zygote.run_ranks(tmp_path / "run", 2, changes) == [0, 0]
    losses = [[line["loss"] for line in log_of(run_dir)] for run_dir in (tmp_path / "run", alone)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert load_file(newest(tmp_path / "run") / "model.safetensors")["out.bias"].dtype == torch.float32


@pytest.mark.parametrize("parallel", [{"type": "ddp"}, FSDP], ids=lambda p: p["type"])
def test_the_first_process_alone_reports_and_its_speeds_are_those_of_all(zygote, tmp_path, parallel):
    (tmp_path / "wandb.py").write_text(
        "import json, os\n"
        "from pathlib import Path\n"
        "def note(*given):\n"
        "    with (Path(__file__).parent / f'rank{os.environ[\"RANK\"]}').open('a') as file:\n"
        "        file.write(json.dumps(given) + '\\n')\n"
        "def init(**options): note('init', options['name'])\n"
        "def log(values, step): note('log', step, values)\n"
        "def finish(): note('finish')\n"
    )
    env_of = {str(rank): {"TOY_PATH": str(tmp_path)} for rank in range(2)}
    changes = {**CHANGES, "samples": 16, "report": ("wandb",), "parallel": parallel}
    assert zygote.run_ranks(tmp_path / "run", 2, changes, env_of) == [0, 0], zygote.said()[-2000:]
    first, *lines, last = map(json.loads, (tmp_path / "rank0").read_text().splitlines())
    assert (first, last) == (["init", "run"], ["finish"])
    assert not (tmp_path / "rank1").exists()
    assert [step for _, step, _ in lines] == [4, 8, 12, 16]
    for _, _, values in lines:
        assert values["tokens_per_second"] == pytest.approx(5 * values["samples_per_second"], rel=0.01)
        assert values["mfu"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"type": "ddp"}, FSDP], ids=lambda p: p["type"])
def test_compiled_blocks_give_the_same_losses(zygote, alone, tmp_path, parallel):
    changes = {**CHANGES, "step_timeout_s": 200, "first_step_timeout_s": 200, "compile": True, "parallel": parallel}
    assert zygote.run_ranks(tmp_path / "run", 2, changes) == [0, 0]
    assert_close(tmp_path / "run", alone)


@pytest.mark.parametrize("parallel", [{"type": "ddp"}, FSDP], ids=lambda p: p["type"])
def test_r03_a_run_goes_on_with_another_number_of_processes_and_every_sample_comes_once(
    zygote, alone, tmp_path, parallel
):
    run_dir = tmp_path / "run"
    for ranks, stop in ((1, 16), (2, 36), (1, None)):
        stopping = {"TOY_DO": f"term@{stop}"} if stop else {}
        env_of = {str(r): {"TOY_KEYS": str(tmp_path / f"keys{stop}"), **stopping} for r in range(ranks)}
        codes = zygote.run_ranks(run_dir, ranks, {**CHANGES, "parallel": parallel}, env_of)
        assert codes == [EXIT_STOPPED if stop else 0] * ranks, zygote.said()[-2000:]
    assert_close(run_dir, alone)
    batches: dict[int, list[str]] = {}
    for path in sorted(tmp_path.glob("keys*")):
        for position, keys in map(json.loads, path.read_text().splitlines()):
            batches.setdefault(position, []).extend(keys)
    assert batches == {p: [f"sample-{i}" for i in range(p - 4, p)] for p in range(4, 49, 4)}


def test_r16_when_one_process_is_killed_the_other_ends_and_names_it(zygote, tmp_path):
    began = time.monotonic()
    codes = zygote.run_ranks(tmp_path / "run", 2, CHANGES, {"1": {"TOY_DO": "kill@28"}})
    assert codes[1] == -signal.SIGKILL
    assert codes[0] > 0
    assert time.monotonic() - began < 15
    message = zygote.said().splitlines()[-1]
    assert "rank 1 is gone; this is rank 0, last completed step 6" in message
    verify_manifest(newest(tmp_path / "run"))
    assert newest(tmp_path / "run").name == "step_0000000016"


def test_r16_when_one_process_hangs_all_end_after_the_timeout_and_say_where(zygote, tmp_path):
    changes = {**CHANGES, "step_timeout_s": 4.0}
    began = time.monotonic()
    pids = zygote.start_ranks(tmp_path / "run", 2, changes, {"1": {"TOY_DO": "hang@28"}})
    codes = zygote.wait_ranks()
    assert all(code > 0 for code in codes), (codes, pids)
    assert time.monotonic() - began < 4 + 5 + 6
    said = zygote.said()
    assert "rank 1: last completed step 6, reading: nothing for 2 s; reading shard-7.tar" in said
    assert "in _misbehave" in said
    assert re.search(r"rank 0: last completed step 6, waiting: nothing for 4 s, .*rank 1 is reading after step 6", said)
    verify_manifest(newest(tmp_path / "run"))


def test_r16_an_exception_of_one_process_ends_all_with_its_message(zygote, tmp_path):
    codes = zygote.run_ranks(tmp_path / "run", 2, CHANGES, {"1": {"TOY_DO": "raise@28"}})
    assert all(code > 0 for code in codes)
    said = zygote.said()
    assert "rank 1 failed after step 6: the sky fell; this is rank 0, last completed step 6" in said


def test_unusable_data_of_one_process_saves_the_steps_before_and_ends_all(zygote, tmp_path):
    codes = zygote.run_ranks(tmp_path / "run", 2, CHANGES, {"1": {"TOY_DO": "shard@28"}})
    assert codes == [ShardError.exit_code] * 2
    assert newest(tmp_path / "run").name == "step_0000000024"


def test_r17_a_signal_to_one_of_two_processes_saves_and_stops_both_and_resuming_is_exact(zygote, alone, tmp_path):
    run_dir = tmp_path / "run"
    assert zygote.run_ranks(run_dir, 2, CHANGES, {"1": {"TOY_DO": "term@28"}}) == [EXIT_STOPPED] * 2
    assert newest(run_dir).name == "step_0000000028"
    assert zygote.run_ranks(run_dir, 2, CHANGES) == [0, 0]
    assert_close(run_dir, alone)


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("parallel", [{"type": "ddp"}, FSDP], ids=lambda p: p["type"])
def test_r18_what_is_not_finite_on_one_process_is_a_step_of_none(zygote, tmp_path, where, parallel):
    changes = {**CHANGES, "samples": 16, "checkpoint_every_samples": 4, "keep": 9, "parallel": parallel}
    changes |= {"ema_halflife_samples": None}
    assert zygote.run_ranks(tmp_path / "run", 2, changes, {"1": {"TOY_DO": f"nan_{where}@8"}}) == [0, 0]
    states = {p.name[-2:]: load_file(p / "model.safetensors") for p in (tmp_path / "run/checkpoints").glob("step_*")}
    assert all(torch.equal(states["08"][name], states["12"][name]) for name in states["08"])
    assert any(not torch.equal(states["12"][name], states["16"][name]) for name in states["08"])
    event = next(line for line in log_of(tmp_path / "run") if "event" in line)
    assert event["event"] == f"non_finite_{where}"
    assert event["keys"] == [f"sample-{i}" for i in range(8, 12)]
    assert log_of(tmp_path / "run")[-1]["skipped"] == {f"non_finite_{where}": 1}


def test_the_second_signal_ends_a_process_at_once(zygote, tmp_path):
    pids = zygote.start_ranks(tmp_path / "run", 2, {**CHANGES, "samples": 480_000})
    while not (tmp_path / "run/log.jsonl").exists():
        time.sleep(0.02)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    assert zygote.wait_ranks() == [EXIT_STOPPED] * 2
