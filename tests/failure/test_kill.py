"""Runs that are killed, stopped or robbed of their disk (R1, R2, R13, R14, R17)."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mmdiff.errors import EXIT_STOPPED
from mmdiff.io.atomic import verify_manifest
from mmdiff.training.report import TIMING_FIELDS


@pytest.fixture(scope="module")
def whole(zygote, tmp_path_factory) -> Path:
    """The run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert zygote.run(run_dir) == 0
    return run_dir


def log_of(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in lines]


def newest(run_dir: Path) -> Path:
    return max(p for p in (run_dir / "checkpoints").iterdir() if re.fullmatch(r"step_\d+", p.name))


def assert_same_run(run_dir: Path, other: Path) -> None:
    """Tensors byte for byte, the log, and the state but for the log's length (speeds have more or fewer digits)."""
    a, b = newest(run_dir), newest(other)
    assert a.name == b.name
    for name in ("model", "ema", "optimizer"):
        assert (a / f"{name}.safetensors").read_bytes() == (b / f"{name}.safetensors").read_bytes(), name
    states = [json.loads((p / "state.json").read_text()) for p in (a, b)]
    for state in states:
        state.pop("log_bytes")
    assert states[0] == states[1]
    assert log_of(run_dir) == log_of(other)
    assert not list((run_dir / "checkpoints").glob("*.tmp-*"))


def kill_at_random(zygote: Any, run_dir: Path, seed: int, kills: int, sleep: float) -> int:
    """Kill -9 ``kills`` times at random moments of a run that is restarted each time, then let it end."""
    draw, died = random.Random(seed), 0
    for _ in range(kills):
        pid = zygote.start(run_dir, TOY_SLEEP=str(sleep))
        time.sleep(draw.uniform(0.0, 0.5))
        os.kill(pid, signal.SIGKILL)
        died += zygote.wait() == -signal.SIGKILL
    assert zygote.run(run_dir) == 0
    return died


def test_r01_a_run_killed_at_random_times_equals_the_uninterrupted_one(zygote, whole, tmp_path):
    died = kill_at_random(zygote, tmp_path / "run", seed=1, kills=4, sleep=0.004)
    assert died >= 2
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_r01_twenty_runs_killed_at_random_times_equal_the_uninterrupted_one(zygote, whole, tmp_path, seed):
    for i in range(4):
        kill_at_random(zygote, tmp_path / f"run{i}", seed=100 * seed + i, kills=5, sleep=0.002)
        assert_same_run(tmp_path / f"run{i}", whole)


def test_r02_a_kill_inside_any_step_of_saving_leaves_a_whole_checkpoint_and_resumes_exactly(zygote, tmp_path):
    changes = {"samples": 36, "checkpoint_every_samples": 12}
    assert zygote.run(tmp_path / "whole", changes) == 0
    for point in range(1, 200):
        run_dir = tmp_path / f"run{point}"
        code = zygote.run(run_dir, changes, MMDIFF_FAULT=f"after:{point}")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        for manifest in run_dir.glob("checkpoints/step_*/manifest.json"):
            if ".tmp-" not in manifest.parent.name:
                verify_manifest(manifest.parent)
        assert zygote.run(run_dir, changes) == 0
        assert_same_run(run_dir, tmp_path / "whole")
    # Three checkpoints with eighteen points each, and a deletion.
    assert point > 55


def test_r17_sigterm_saves_that_step_and_resuming_is_exact(zygote, whole, tmp_path):
    run_dir = tmp_path / "run"
    pid = zygote.start(run_dir, TOY_SLEEP="0.02")
    wait_for_checkpoint(run_dir)
    os.kill(pid, signal.SIGTERM)
    assert zygote.wait() == EXIT_STOPPED
    saved = json.loads((newest(run_dir) / "state.json").read_text())
    assert saved["loader"]["position"] == saved["samples"] < 240
    assert zygote.run(run_dir) == 0
    assert_same_run(run_dir, whole)


def test_r17_a_second_signal_ends_the_run_at_once_and_the_last_checkpoint_stands(zygote, whole, tmp_path):
    run_dir = tmp_path / "run"
    pid = zygote.start(run_dir, TOY_SLEEP="0.3")
    while not (run_dir / "log.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.05)
    os.kill(pid, signal.SIGINT)
    assert zygote.wait() == 128 + signal.SIGINT
    assert not list((run_dir / "checkpoints").iterdir())
    assert zygote.run(run_dir) == 0
    assert_same_run(run_dir, whole)


def wait_for_checkpoint(run_dir: Path) -> None:
    for _ in range(2000):
        if list((run_dir / "checkpoints").glob("step_*/manifest.json")):
            return
        time.sleep(0.005)
    pytest.fail("no checkpoint within 10 s")


@pytest.mark.parametrize("limit", [100, 700, 1500, 2500])
def test_r13_a_full_disk_leaves_the_former_checkpoint_and_says_what_is_needed(zygote, whole, tmp_path, limit):
    run_dir = tmp_path / "run"
    assert zygote.run(run_dir, MMDIFF_FAULT="after:30") == -signal.SIGKILL
    before = newest(run_dir)
    code = zygote.run(run_dir, TOY_FILE_LIMIT=str(limit))
    message = zygote.errors.read_text().splitlines()[-1]
    assert code == 4, message
    verify_manifest(before)
    assert not list((run_dir / "checkpoints").glob("*.tmp-*"))
    assert "CheckpointError" in message
    assert str(run_dir) in message
    assert re.search(r"needs [\d,]+ bytes", message)
    assert zygote.run(run_dir) == 0
    assert_same_run(run_dir, whole)


def checkpoints_of(run_dir: Path) -> dict[str, dict[str, bytes]]:
    """Tensors and state of every checkpoint; what depends on the speed is left out."""
    found = {}
    for path in sorted((run_dir / "checkpoints").glob("step_*")):
        files = {name: (path / f"{name}.safetensors").read_bytes() for name in ("model", "ema", "optimizer")}
        state = {k: v for k, v in json.loads((path / "state.json").read_text()).items() if k != "log_bytes"}
        found[path.name] = {**files, "state": json.dumps({**state, "config": ""}).encode()}
    return found


def test_r30_checkpoints_written_beside_the_training_hold_the_state_of_their_step(zygote, tmp_path):
    changes = {"samples": 60, "checkpoint_every_samples": 12, "keep": 9}
    assert zygote.run(tmp_path / "plain", changes) == 0
    # A point of saving takes longer than the twelve samples between two of them: they queue up.
    assert zygote.run(tmp_path / "later", {**changes, "checkpoint_async": True}, MMDIFF_FAULT="slow:0.02") == 0
    plain, later = checkpoints_of(tmp_path / "plain"), checkpoints_of(tmp_path / "later")
    assert len(plain) == 5
    assert plain == later


def test_r30_a_crash_while_a_checkpoint_is_on_its_way_leaves_the_former(zygote, whole, tmp_path):
    for point in (29, 37, 44, 51):
        run_dir = tmp_path / f"run{point}"
        changes = {"checkpoint_async": True}
        assert zygote.run(run_dir, changes, MMDIFF_FAULT=f"after:{point}") == -signal.SIGKILL
        verify_manifest(newest(run_dir))
        assert zygote.run(run_dir, {}) == 0
        assert_same_run(run_dir, whole)


def test_r30_a_checkpoint_that_fails_on_its_way_ends_the_run_with_its_message(zygote, tmp_path):
    code = zygote.run(tmp_path / "run", {"checkpoint_async": True}, TOY_FILE_LIMIT="1500")
    assert code == 4
    assert "the checkpoint could not be written (File too large)" in zygote.said().splitlines()[-1]


def test_r13_training_goes_on_without_a_checkpoint_if_it_was_told_to(zygote, tmp_path):
    changes = {"samples": 60, "checkpoint_every_samples": 20, "log_every_samples": 60, "checkpoint_failed": "continue"}
    code = zygote.run(tmp_path / "run", changes, TOY_FILE_LIMIT="2500")
    assert code == 4
    events = [line for line in log_of(tmp_path / "run") if line.get("event") == "checkpoint_failed"]
    assert [line["samples"] for line in events] == [20, 40]
    assert "File too large" in events[0]["message"]
    assert zygote.run(tmp_path / "run", changes) == 0
    assert newest(tmp_path / "run").name == "step_0000000060"


def test_r20_the_same_seed_gives_the_same_bytes(zygote, whole, tmp_path):
    assert zygote.run(tmp_path / "again") == 0
    assert_same_run(tmp_path / "again", whole)
    assert zygote.run(tmp_path / "other", {"seed": 4}) == 0
    model = "model.safetensors"
    assert (newest(tmp_path / "other") / model).read_bytes() != (newest(whole) / model).read_bytes()
