"""Training started as users of several devices start it: torchrun and accelerate, and how such a run is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmdiff.io.atomic import verify_manifest

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # With --cpu accelerate starts a single process unless there is MPI.
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}
RECIPE = ["demo/image_tokenizer.yaml", "model.widths=[8,8,8]", "model.stem=4", "data.batch_size=4"]
RECIPE += ["train.log_every_samples=4", "train.step_timeout_s=60", "train.first_step_timeout_s=100"]


def start(launcher: str, *more: str, errors: Path) -> subprocess.Popen[bytes]:
    """In a session of its own, so that all its processes can be signalled together."""
    line = [sys.executable, *LAUNCHERS[launcher], "-m", "mmdiff", "train", *RECIPE, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with errors.open("wb") as file:
        return subprocess.Popen(
            line, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=file, start_new_session=True
        )


def wait_for_a_step(process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the first line of the log, or the end of the process."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and log.stat().st_size:
            return
        time.sleep(0.05)


@pytest.mark.parametrize(("launcher", "send"), [("torchrun", os.killpg), ("accelerate", os.kill)])
def test_r17_a_launched_run_saves_when_its_processes_or_its_launcher_are_stopped(launcher, send, tmp_path):
    run_dir, errors = tmp_path / "run", tmp_path / "stderr"
    process = start(launcher, "train.samples=4000000", f"out={run_dir}", errors=errors)
    try:
        wait_for_a_step(process, run_dir / "log.jsonl")
        send(process.pid, signal.SIGTERM)
        process.wait(60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    said = errors.read_text()
    # What the launchers themselves give back: they do not pass on the 75 of the processes.
    assert process.returncode not in (0, 75), said[-2000:]
    assert said.count("SIGTERM: saving after this step") == 2, said[-2000:]
    assert "leaving without saving" not in said
    (saved,) = (run_dir / "checkpoints").iterdir()
    verify_manifest(saved)
    assert int(saved.name.removeprefix("step_")) > 0
