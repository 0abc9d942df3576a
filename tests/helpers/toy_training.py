"""A training run of a tiny network on made-up batches, for tests that kill and resume it.

Run as a script it reads JSON requests ``{"run_dir": ..., "env": {...}}`` line by line, forks a child for each (so that
torch is imported once), prints the child's pid and, after another line, its return code (negative: the signal).
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import socket
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
from mmdiff.config import parse
from mmdiff.errors import EXIT_STOPPED, MmdiffError, ShardError
from mmdiff.training.loop import FitReport, TrainConfig, fit
from mmdiff.training.microbatch import split
from mmdiff.training.objective import Losses
from mmdiff.training.parallel.step import ParallelConfig

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


class Plain(nn.Module):
    """The same without draws and running statistics, with blocks: equal for any number of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(16, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.out, self.rare = nn.Linear(8, 16), nn.Linear(8, 1)
        self.out.weight = self.embed.weight
        generator = rng.generator(0, "init")
        for p in self.parameters():
            nn.init.normal_(p, 0, 0.3, generator=generator)

    def forward(self, ids):
        hidden = self.embed(ids).mean(1)
        for block in self.blocks:
            hidden = hidden + block(hidden).tanh()
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


def objective(model, batch: Batch, source: rng.Source) -> Losses:
    """Predict the first id from noised ids; every third part also uses the rare head."""
    noise = (rng.uniform(source, batch.ids.shape) * 16).long()
    swap = rng.uniform(source, batch.ids.shape) < 0.3
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


def slow_objective(model, batch: Batch, source: rng.Source) -> Losses:
    """Takes long enough for signals to arrive in the middle."""
    time.sleep(float(os.environ.get("TOY_SLEEP", "0")))
    return objective(model, batch, source)


class Rows(Loader):
    """This process's rows of each batch; writes their keys to ``TOY_KEYS`` and misbehaves as ``TOY_DO`` says."""

    def __iter__(self):
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        while True:
            batch = split(self.batch(self.position), world)[rank]
            self.position += BATCH
            self._misbehave(self.position)
            if path := os.environ.get("TOY_KEYS"):
                with Path(f"{path}.{rank}").open("a") as file:
                    file.write(json.dumps([self.position, batch.keys]) + "\n")
            yield batch

    def where(self):
        return "shard-7.tar"

    def _misbehave(self, position: int) -> None:
        what, _, at = os.environ.get("TOY_DO", "").partition("@")
        if position != int(at or -1):
            return
        if what == "hang":
            time.sleep(60)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "raise":
            raise ValueError("the sky fell")
        if what == "shard":
            raise ShardError("shard-7.tar is gone")


class Uneven:
    """Two means with other numbers of summands in every part; one is absent from many."""

    def __call__(self, model, batch: Batch, source: rng.Source) -> Losses:
        swap, on = rng.uniform(source, batch.ids.shape) < 0.3, self._on(batch)
        logits, rare = model(batch.ids.masked_fill(swap, 0))
        rows = nn.functional.cross_entropy(logits, batch.ids[:, 0], reduction="none")
        sums = {"rows": rows.sum()}
        if bool(on.any()):
            sums["rare"] = rare[on].square().sum()
        at = int(batch.keys[0].removeprefix("sample-")) // BATCH * BATCH
        if os.environ.get("TOY_DO") == f"nan_loss@{at}":
            sums["rows"] = sums["rows"] * float("nan")
        if os.environ.get("TOY_DO") == f"nan_gradient@{at}":
            # The square root of 0 is 0, its slope infinite.
            sums["rows"] = sums["rows"] + (model.rare.weight * 0).square().sum().sqrt()
        terms = {t: [rows[i].detach() for i, u in enumerate(batch.tasks) if u == t] for t in set(batch.tasks)}
        return Losses(rows.mean(), {t: (torch.stack(r).sum(), len(r)) for t, r in terms.items()}, sums)

    def counts(self, model, batch: Batch, source: rng.Source) -> dict[str, float]:
        return {"rows": float(len(batch)), "rare": float(self._on(batch).sum())}

    def _on(self, batch: Batch) -> torch.Tensor:
        return batch.ids[:, 1] > 9


def train(run_dir: Path, plain: bool = False, **changes) -> FitReport:
    """The run, resumed if ``run_dir`` holds a part of it; ``plain`` is the one for several processes."""
    parallel = parse(ParallelConfig, changes.pop("parallel", {"type": "ddp"}), "parallel")
    scales = changes.pop("scales", None)
    config = replace(CONFIG, parallel=parallel, **changes)
    if plain:
        return fit(Plain(), Uneven(), Rows(), config, run_dir, resume=True, progress=False, scales=scales)
    return fit(Net(), slow_objective, Loader(), config, run_dir, resume=True, progress=False)


def _child(request) -> None:
    os.environ.update(request.get("env", {}))
    code = 0
    if folder := os.environ.get("TOY_PATH"):
        sys.path.insert(0, folder)
    if limit := os.environ.get("TOY_FILE_LIMIT"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        if "recipe" in request:
            report = importlib.import_module("mmdiff.commands.train").run(**request["recipe"], progress=False).fit
        else:
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
        request = json.loads(line)
        if "recipe" in request:
            importlib.import_module("mmdiff.commands.recipe")
        pids = []
        for env in _launched(request.get("ranks", 0), request.get("env_of", {})):
            pid = os.fork()
            if pid == 0:
                _child({**request, "env": {**request.get("env", {}), **env}})
            pids.append(pid)
        print("pid", *pids, flush=True)
        # Not reaped before it is asked for, so that the pid stays the child's and may be signalled.
        sys.stdin.readline()
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print("code", *codes, flush=True)


def _launched(ranks: int, env_of: dict) -> list[dict]:
    """What torchrun tells each process; one process that is told nothing if there are no ranks."""
    if not ranks:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**common, "RANK": str(r), **env_of.get(str(r), {})} for r in range(ranks)]


if __name__ == "__main__":
    serve()
