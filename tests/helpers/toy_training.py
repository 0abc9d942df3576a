"""A training run of a tiny network on made-up batches, for tests that kill and resume it.

Run as a script it reads JSON requests ``{"run_dir": ..., "env": {...}}`` line by line, forks a child for each (so that
torch is imported once), prints the child's pid and, after another line, its return code (negative: the signal).
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mmdiff import rng
from mmdiff.batch import IGNORE, Batch
from mmdiff.errors import EXIT_STOPPED, MmdiffError
from mmdiff.training.loop import FitReport, TrainConfig, fit
from mmdiff.training.objective import Losses

BATCH = 4
CONFIG = TrainConfig(
    samples=240,
    seed=3,
    accumulate=2,
    ema_halflife_samples=60,
    checkpoint_every_samples=20,
    log_every_samples=12,
    optim={"lr": 0.01, "factors": {"embed": 0.5}},
    schedule={"warmup_samples": 20, "final": 0.1},
)


class Net(nn.Module):
    """Has what makes resuming hard: dropout, running statistics, tied weights, and a head that is not always used."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)
        self.out = nn.Linear(8, 16)
        self.out.weight = self.embed.weight
        self.rare = nn.Linear(8, 1)
        generator = rng.generator(seed, "init")
        for p in self.parameters():
            nn.init.normal_(p, 0, 0.3, generator=generator)

    def forward(self, ids):
        hidden = self.drop(self.norm(self.embed(ids).mean(1)))
        return self.out(hidden), self.rare(hidden)


class Loader:
    """Batch number n is a function of n."""

    def __init__(self) -> None:
        self.position = 0
        self.skipped: Counter[str] = Counter()

    def __iter__(self):
        while True:
            batch = self.batch(self.position)
            self.position += len(batch)
            if self.position % 28 == 0:
                self.skipped["undecodable_image"] += 1
            yield batch

    def batch(self, position: int) -> Batch:
        generator = rng.generator(7, "data", position)
        ids = torch.randint(0, 16, (BATCH, 5), generator=generator)
        on = torch.ones_like(ids, dtype=torch.bool)
        return Batch(
            keys=tuple(f"sample-{position + i}" for i in range(BATCH)),
            tasks=("a", "b") * (BATCH // 2),
            ids=ids,
            labels=ids.masked_fill(~on, IGNORE),
            weights=on.float(),
            droppable=~on,
            valid=on,
        )

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, saved):
        self.position = saved["position"]


def objective(model, batch: Batch, generator: torch.Generator) -> Losses:
    """Predict the first id from noised ids; every third part also uses the rare head."""
    noise = torch.randint(0, 16, batch.ids.shape, generator=generator)
    swap = torch.rand(batch.ids.shape, generator=generator) < 0.3
    logits, rare = model(torch.where(swap, noise, batch.ids))
    rows = nn.functional.cross_entropy(logits, batch.ids[:, 0], reduction="none")
    total = rows.mean()
    if int(batch.ids[0, 0]) % 3 == 0:
        total = total + rare.square().mean()
    terms = {}
    for task in dict.fromkeys(batch.tasks):
        mine = torch.tensor([t == task for t in batch.tasks])
        terms[task] = (rows.detach()[mine].sum(), int(mine.sum()))
    return Losses(total, terms)


def slow_objective(model, batch: Batch, generator: torch.Generator) -> Losses:
    """Takes long enough for signals to arrive in the middle."""
    time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
    return objective(model, batch, generator)


def train(run_dir: Path, **changes) -> FitReport:
    """The run, resumed if ``run_dir`` holds a part of it."""
    config = replace(CONFIG, **changes)
    return fit(Net(), slow_objective, Loader(), config, run_dir, resume=True, progress=False)


def _child(request) -> None:
    os.environ.update(request.get("env", {}))
    code = 0
    if limit := os.environ.get("TOY_FILE_LIMIT"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        report = train(Path(request["run_dir"]), **request.get("changes", {}))
        code = EXIT_STOPPED if report.stopped else 0
    except BaseException as error:
        # The limit would hold for the file behind stderr, too.
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        code = getattr(error, "exit_code", 70)
        if not isinstance(error, MmdiffError):
            traceback.print_exc()
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer requests; see the module's text."""
    torch.set_num_threads(1)
    # What a first step loads late (about a second) is loaded here once, for all children.
    importlib.import_module("torch._dynamo")
    importlib.import_module("ruamel.yaml")
    while line := sys.stdin.readline():
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        print(f"pid {pid}", flush=True)
        # Not reaped before it is asked for, so that the pid stays the child's and may be signalled.
        sys.stdin.readline()
        _, status = os.waitpid(pid, 0)
        print(f"code {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    serve()
