"""Training in several processes beside one: speed, work and losses on the demo's image tokenizer and the same batches.

Run: ``python benchmarks/processes.py [--processes 2] [--steps 16] [--batch 48] [--rounds 3] [--strategy ddp|fsdp]``.
Every process has one thread, so one core each; they talk through gloo. One process and several take turns in every
round. Printed are

* the clock: medians of samples per second over all lines of the logs but the first of each run; the efficiency is
  their ratio over the number of processes. It means something only while every process has a core of its own.
* the work: processor time per sample of all processes together, start and first steps taken off by a shorter run; the
  efficiency is that of one process over it. Other programs on the machine hardly disturb it, and it leaves out what
  processes wait for each other.
* the largest difference between the losses of the two, which should be rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIRST = 4
"""Steps of the shorter run, and between two lines of the log."""


@dataclass
class Runs:
    """What was measured of one number of processes.

    Attributes:
        speeds: Samples per second of the lines of the logs.
        work: Processor seconds per sample of each run.
        losses: Of the last run, line by line.
    """

    speeds: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    options = parser.parse_args(argv)
    if options.steps < 3 * FIRST:
        parser.error(f"--steps {options.steps}: at least {3 * FIRST}")
    runs = {1: Runs(), options.processes: Runs()}
    for _ in range(options.rounds):
        for processes, found in runs.items():
            measure(options, processes, found)
    sys.stdout.write("\n".join(report(runs[1], runs[options.processes], options.processes, options.strategy)) + "\n")


def measure(options: argparse.Namespace, processes: int, found: Runs) -> None:
    """A short run and a long one."""
    _, start = trained(options, processes, FIRST)
    lines, whole = trained(options, processes, options.steps)
    found.speeds += [line["samples_per_second"] for line in lines[1:]]
    found.work.append((whole - start) / (options.batch * (options.steps - FIRST)))
    found.losses = [line["loss"] for line in lines]


def trained(options: argparse.Namespace, processes: int, steps: int) -> tuple[list[dict[str, Any]], float]:
    """Log lines of a run, and the processor seconds of all of its processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    changes = {
        "data.batch_size": options.batch,
        "train.samples": options.batch * steps,
        "train.log_every_samples": options.batch * FIRST,
        "train.parallel.type": options.strategy,
        # So small that rounding is not amplified: losses can be compared, and speed does not depend on it.
        "train.optim.lr": 1e-5,
        "device": "cpu",
    }
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["-m", "mmdiff", "train", "demo/image_tokenizer.yaml", *(f"{k}={v}" for k, v in changes.items())]
        command = [sys.executable, *(launcher if processes > 1 else []), *words, f"out={out}"]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
    return lines, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def report(one: Runs, many: Runs, processes: int, strategy: str) -> list[str]:
    """Lines to print."""
    clock = [statistics.median(runs.speeds) for runs in (one, many)]
    work = [1000 * statistics.median(runs.work) for runs in (one, many)]
    apart = max(abs(a - b) for a, b in zip(one.losses, many.losses, strict=True))
    names = ("1 process", f"{processes} processes, {strategy}")
    rows = zip(names, clock, work, strict=True)
    return [
        *(
            f"{name:20} {speed:8.1f} samples/s  {each:8.2f} ms of processor time per sample"
            for name, speed, each in rows
        ),
        f"by the clock: ratio {clock[1] / clock[0]:.2f}, efficiency {clock[1] / clock[0] / processes:.0%}",
        f"by the work: efficiency {work[0] / work[1]:.0%}",
        f"losses differ by at most {apart:.1e}",
    ]


if __name__ == "__main__":
    main()
