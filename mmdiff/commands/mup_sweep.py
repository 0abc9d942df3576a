"""Sweeps of a training recipe over widths, rates and parametrisations: resumable, several points at a time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

from mmdiff.errors import ConfigError, MmdiffError

__all__ = ["Grid", "Point", "Sweep", "run_sweep"]

TAIL = 0.2
"""Share of a run, at its end, over which the training loss is averaged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What is tried.

    Attributes:
        widths: The first is the base of every muP rule.
        lrs: Learning rates.
        rules: Parametrisations.
        seeds: Repetitions.
    """

    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    rules: tuple[str, ...]
    seeds: int = 1

    def point(self, rule: str, width: int, lr: float, seed: int) -> Point:
        """One run; at the base, where every factor is 1, that of the first rule stands for all."""
        return Point(rule=self.rules[0] if width == self.widths[0] else rule, width=width, lr=lr, seed=seed)

    def points(self) -> list[Point]:
        """Every run once, all of a seed before the next."""
        every = itertools.product(range(self.seeds), self.rules, self.widths, self.lrs)
        return list(dict.fromkeys(self.point(r, w, lr, s) for s, r, w, lr in every))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run."""

    rule: str
    width: int
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.rule}-{self.width}-lr{math.log2(self.lr):.3f}-seed{self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What came of a sweep.

    Attributes:
        grid: What was tried.
        losses: Name of a point -> mean loss over the end of its run; infinite if it did not stay finite.
    """

    grid: Grid
    losses: Mapping[str, float]

    def loss(self, rule: str, width: int, lr: float) -> float:
        """Mean over seeds."""
        return fmean(self.losses[self.grid.point(rule, width, lr, s).name] for s in range(self.grid.seeds))

    def best(self, rule: str, width: int) -> float:
        """The rate of the smallest loss."""
        return min(self.grid.lrs, key=lambda lr: self.loss(rule, width, lr))

    def moved(self, rule: str) -> float:
        """How far the best rate moves from the first width to the last, in powers of two."""
        first, last = (self.best(rule, self.grid.widths[i]) for i in (0, -1))
        return math.log2(last / first)

    def table(self) -> str:
        """Losses, the best rates and how far they move, as text."""
        lrs = sorted(self.grid.lrs, reverse=True)
        head = f"{'rule':<6}{'width':>6}" + "".join(f"{f'2^{math.log2(lr):g}':>10}" for lr in lrs) + f"{'best':>10}"
        lines = [head]
        for rule, width in itertools.product(self.grid.rules, self.grid.widths):
            row = "".join(f"{self.loss(rule, width, lr):>10.4f}" for lr in lrs)
            lines.append(f"{rule:<6}{width:>6}{row}{f'2^{math.log2(self.best(rule, width)):g}':>10}")
        return "\n".join(
            [*lines, *(f"{rule}: the best rate moves by 2^{self.moved(rule):+g}" for rule in self.grid.rules)]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON; an infinite loss is null."""
        losses = {name: loss if math.isfinite(loss) else None for name, loss in self.losses.items()}
        best = {r: {str(w): self.best(r, w) for w in self.grid.widths} for r in self.grid.rules}
        moved = {r: self.moved(r) for r in self.grid.rules}
        return {"grid": dataclasses.asdict(self.grid), "losses": losses, "best": best, "moved_log2": moved}

    @classmethod
    def load(cls, folder: Path) -> Sweep:
        """Read ``sweep.json`` of a folder.

        Raises:
            ConfigError: There is none.
        """
        file = folder / "sweep.json"
        if not file.is_file():
            raise ConfigError(f"{folder}: holds no sweep.json; it is no folder of a finished sweep")
        tree = json.loads(file.read_text(encoding="utf-8"))
        grid: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tree["grid"].items()}
        losses = {name: math.inf if loss is None else loss for name, loss in tree["losses"].items()}
        return cls(grid=Grid(**grid), losses=losses)


def run_sweep(config: str, overrides: list[str], grid: Grid, out: Path, *, jobs: int = 1) -> Sweep:
    """Run what is missing of a sweep, and write ``sweep.json``, ``curves.html`` and ``transferred.yaml``.

    Args:
        config: Training recipe; its model gives everything but the width.
        overrides: Changes for every point.
        grid: What is tried.
        out: Folder; finished points in it are kept, a point that was stopped goes on from its checkpoint.
        jobs: Points at the same time, each in a process of its own.

    Raises:
        ConfigError: The recipe has no model, or its width cannot be set.
        MmdiffError: A point ended in an error other than a loss that blows up.
    """
    from mmdiff.commands.mup_page import draw_sweep
    from mmdiff.io.atomic import save_json

    out.mkdir(parents=True, exist_ok=True)
    points = grid.points()
    work = [(config, overrides, point, grid.widths[0], str(out / "points" / point.name)) for point in points]
    if jobs == 1:
        losses = [_run_point(*w) for w in work]
    else:
        # Processes are started afresh: a forked one would share threads that PyTorch has already started.
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            losses = list(pool.map(_run_point, *zip(*work, strict=True)))
    sweep = Sweep(grid=grid, losses={p.name: loss for p, loss in zip(points, losses, strict=True)})
    save_json(out / "sweep.json", sweep.to_dict())
    draw_sweep(out / "curves.html", sweep)
    _write_transferred(config, overrides, sweep, out / "transferred.yaml")
    return sweep


def _run_point(config: str, overrides: list[str], point: Point, base_width: int, folder: str) -> float:
    """Mean loss over the end of a run, from its result if it has one already."""
    from mmdiff.commands.train import run
    from mmdiff.io.atomic import save_json

    result = Path(folder) / "result.json"
    changes = _changes(config, overrides, point, base_width, folder)
    recipe = _recipe(config, changes)
    if result.is_file():
        return _finished(result, recipe)
    try:
        report = run(config, changes, resume=(Path(folder) / "config.yaml").is_file(), progress=False)
        if report.fit is not None and report.fit.stopped:
            raise ConfigError(f"{folder}: stopped and saved; start the same sweep again to go on")
        loss = _tail_loss(Path(folder) / "log.jsonl")
    except MmdiffError as error:
        if "finite" not in str(error):
            raise
        loss = math.inf
    known = {"loss": loss if math.isfinite(loss) else None, **dataclasses.asdict(point)}
    save_json(result, {**known, "recipe": recipe})
    return loss


def _recipe(config: str, changes: list[str]) -> str:
    """What a point trains, wherever it is written."""
    from mmdiff import config as configs
    from mmdiff.commands.train import load_config

    tree = configs.to_dict(load_config(config, changes))
    return configs.fingerprint({key: value for key, value in tree.items() if key != "out"})


def _finished(result: Path, recipe: str) -> float:
    """The loss of a finished point.

    Raises:
        ConfigError: It was made by another recipe.
    """
    tree = json.loads(result.read_text(encoding="utf-8"))
    if tree.get("recipe") != recipe:
        raise ConfigError(
            f"{result}: this point was finished with another recipe or other changes; name another folder with --out, "
            "or remove this one"
        )
    return math.inf if tree["loss"] is None else float(tree["loss"])


def _changes(config: str, overrides: list[str], point: Point, base_width: int, folder: str) -> list[str]:
    """Overrides of a point: the network at its width, the rule, the rate, the seed."""
    from mmdiff import config as configs
    from mmdiff.commands.mup import network_of
    from mmdiff.scale.family import with_size

    network = configs.to_dict(with_size(network_of(config, overrides), width=point.width))
    rest = [o for o in overrides if not o.startswith("model.")]
    mup = {"base_width": base_width, "rule": point.rule}
    return [
        *rest,
        f"model={json.dumps(network)}",
        f"mup={json.dumps(mup)}",
        f"train.optim.lr={point.lr!r}",
        f"train.seed={point.seed}",
        f"out={json.dumps(folder)}",
    ]


def _tail_loss(log: Path) -> float:
    """Mean of the training loss over the last part of a run."""
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = [(row["samples"], row["loss"]) for row in lines if row.get("loss") is not None]
    if not losses:
        raise ConfigError(f"{log}: holds no losses; lower train.log_every_samples")
    last = losses[-1][0]
    return fmean(loss for samples, loss in losses if samples >= (1 - TAIL) * last)


def _write_transferred(config: str, overrides: list[str], sweep: Sweep, path: Path) -> None:
    """The recipe of the target with the best rate of the base under muP."""
    from mmdiff import config as configs
    from mmdiff.commands.train import load_config
    from mmdiff.io.atomic import save_text

    rules = [rule for rule in sweep.grid.rules if rule != "sp"]
    if not rules:
        return
    base = sweep.grid.widths[0]
    mup = {"base_width": base, "rule": rules[0]}
    best = sweep.best(rules[0], base)
    spec = load_config(config, [*overrides, f"mup={json.dumps(mup)}", f"train.optim.lr={best!r}"])
    save_text(path, f"# Learning rate found at width {base} under {rules[0]}.\n{configs.dump(spec)}")
