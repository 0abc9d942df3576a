"""The training loop: counts in samples, resumes to the bit, survives bad batches, stops when asked.

It is given a built model, an objective, a loader and probes. Where a run's files live and how they are written is in
`mmdiff.training.state`; optimizer, schedule and average are in `mmdiff.training.optim`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from mmdiff import config as configs
from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError, MmdiffError, ShardError
from mmdiff.training import optim, state
from mmdiff.training.finetune import LoraConfig, attach
from mmdiff.training.guard import Guard
from mmdiff.training.microbatch import split
from mmdiff.training.objective import Objective
from mmdiff.training.optim import OptimConfig, ScheduleConfig
from mmdiff.training.probes import Probe, call, crossed, due, name_of
from mmdiff.training.randomness import own_randomness, seed_layers
from mmdiff.training.recompute import recomputing
from mmdiff.training.report import Clock, Log, Meter, Progress
from mmdiff.training.signals import StopFlag

__all__ = ["FitReport", "Loader", "Probe", "TrainConfig", "fit"]


@config
class TrainConfig:
    """How long to train, how, and what to keep."""

    samples: int = Field(gt=0)
    """Samples to see; the last batch is not cut."""
    seed: int = 0
    """Seed of every draw of the run."""
    accumulate: int = Field(1, gt=0)
    """Parts into which a batch is cut to save memory; a contrastive loss then compares within a part only."""
    lora: LoraConfig | None = None
    """Train an adapter beside frozen weights; null trains the weights."""
    gradient_checkpointing: bool = False
    """Keep each block's input only and compute it again in the backward pass: less memory, a third more time."""
    autocast: Literal["bfloat16"] | None = None
    """Dtype of matrix products; weights, norms and losses keep theirs. Null computes in the weights' dtype."""
    grad_clip: float | None = Field(1.0, gt=0)
    """Largest norm of the gradient; null does not clip."""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """Learning rate over the run."""
    ema_halflife_samples: int | None = Field(None, gt=0)
    """Half-life of the average of the weights, in samples; null keeps no average."""
    ema_ramp: float = Field(0.05, gt=0)
    """The half-life is at most this share of the samples seen."""
    log_every_samples: int = Field(1000, gt=0)
    """Samples between lines of log.jsonl."""
    checkpoint_every_samples: int = Field(10_000, gt=0)
    """Samples between checkpoints."""
    keep: int = Field(2, ge=2)
    """Checkpoints to keep, the newest ones."""


class Loader(Protocol):
    """Batches in an order that is a function of the position.

    An attribute ``skipped`` (reason -> number of samples), if there is one, is logged.
    """

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON data from which the batch after the last one yielded can be found."""

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from there at the next ``iter``."""


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """What came of a run.

    Attributes:
        samples: Samples seen, those before a resume included.
        steps: Steps, likewise.
        seconds: Duration of this process's part.
        samples_per_second: Speed of this process's part.
        stopped: A signal ended it before ``samples`` of the configuration; it is saved.
        losses: Smoothed losses at the end, per task and in all (``loss``).
        skipped: Why data was not used -> how often: the loader's reasons, and ``non_finite_loss`` and
            ``non_finite_gradient`` steps.
    """

    samples: int
    steps: int
    seconds: float
    samples_per_second: float
    stopped: bool
    losses: dict[str, float]
    skipped: dict[str, int]


def fit(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    resume: bool = False,
    probes: Iterable[Probe] = (),
    run_config: Any = None,
    description: str = "",
    device: torch.device | str = "cpu",
    progress: bool = True,
    scales: Mapping[str, tuple[float, float]] | None = None,
) -> FitReport:
    """Train ``model`` in place.

    A run that is killed at any moment and started again with ``resume`` gives, on a CPU, the same bytes and the same
    log as one that was not. SIGTERM, SIGINT or SIGUSR1 saves after the present step and returns.

    Args:
        model: Moved to ``device``; afterwards it holds the plain weights, `state.load_average` gives the averaged ones.
        objective: (model, batch, generator) -> losses.
        loader: Yields batches without end, or at least ``config.samples`` samples.
        config: How to train.
        run_dir: Folder of the run: log.jsonl, config.yaml, checkpoints.
        resume: Go on with the run in ``run_dir``, from nothing if it has no checkpoint yet.
        probes: Called during training; they cannot influence it.
        run_config: Configuration object that is written as config.yaml and compared on resume; default ``config``.
        description: Name of the run for the progress bar.
        device: Where to train.
        progress: Show a bar or lines on stderr.
        scales: See `mmdiff.training.optim.build`.

    Raises:
        ConfigError: The folder cannot be used, the configuration changed, or the loader ended early.
        CheckpointError: No checkpoint is whole, or one could not be written.
        MmdiffError: Three steps in a row, or ten of a thousand, gave no finite loss and gradient; the run is saved.
    """
    run_dir = Path(run_dir)
    state.claim(run_dir, config if run_config is None else run_config, resume=resume)
    with ExitStack() as stack:
        stop = stack.enter_context(StopFlag())
        stack.enter_context(own_randomness(torch.device(device)))
        if config.lora is not None:
            attach(model, config.lora, config.seed)
        stack.enter_context(recomputing(model, config.gradient_checkpointing))
        run = _Run(model.to(device), objective, loader, config, run_dir, torch.device(device), scales)
        run.restore()
        stack.callback(run.close)
        run.progress = Progress(progress, config.samples, run.samples, description)
        stack.callback(run.progress.close)
        return run.train(stop, list(probes))


class _Run:
    """State of one `fit`; see there for the arguments."""

    log: Log
    progress: Progress
    batches: Iterator[Batch]

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        loader: Loader,
        config: TrainConfig,
        run_dir: Path,
        device: torch.device,
        scales: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.model, self.objective, self.loader, self.config = model, objective, loader, config
        self.run_dir, self.device = run_dir, device
        self.checkpoints = state.Checkpoints(run_dir, config.keep)
        self.optimizer = optim.build(model, config.optim, scales)
        self.parameters = list(optim.trainable(model).values())
        halflife = config.ema_halflife_samples
        self.ema = optim.EMA(model, halflife, config.ema_ramp) if halflife else None
        self.meter, self.clock = Meter(config.log_every_samples), Clock()
        self.samples = self.steps = 0
        self.saved_at: int | None = None
        self.save_seconds: float | None = None
        self.guard = Guard()
        self.skipped: Counter[str] = Counter()  # all but the loader's own counts since this process began
        self.loader_before: Counter[str] = Counter()

    def restore(self) -> None:
        """Go to the newest checkpoint, or to the beginning; the log is cut to what belongs there."""
        self.checkpoints.clean()
        path = self.checkpoints.latest()
        log_size = 0
        if path is not None:
            snapshot = self.checkpoints.load(path)
            self._load(path, snapshot)
            log_size = snapshot.state["log_bytes"]
        self.loader_before = self._loader_skipped()
        self.log = Log(self.run_dir / "log.jsonl", log_size)

    def _load(self, path: Path, snapshot: state.Snapshot) -> None:
        saved = snapshot.state
        state.copy_into(state.model_tensors(self.model), snapshot.tensors.get("model", {}), f"{path}/model.safetensors")
        if self.ema is not None:
            state.copy_into(self.ema.average, snapshot.tensors.get("ema", {}), f"{path}/ema.safetensors")
        optim.from_tensors(self.optimizer, self.model, snapshot.tensors["optimizer"])
        self.loader.load_state_dict(saved["loader"])
        self.meter.load_state_dict(saved["meter"])
        self.samples = self.saved_at = saved["samples"]
        self.steps = saved["steps"]
        self.guard.load_state_dict(saved["guard"])
        self.skipped = Counter(saved["skipped"])

    def save(self) -> Path:
        """Write a checkpoint of the present state."""
        started = time.perf_counter()
        tensors = {
            "model": state.model_tensors(self.model),
            "optimizer": optim.to_tensors(self.optimizer, self.model),
        }
        if self.ema is not None:
            tensors["ema"] = self.ema.average
        plain = {
            "steps": self.steps,
            "seed": self.config.seed,
            "loader": self.loader.state_dict(),
            "meter": self.meter.state_dict(),
            "guard": self.guard.state_dict(),
            "skipped": self.skip_counts(),
            "log_bytes": self.log.size(),
            "config": configs.fingerprint(self.config),
            "torch": torch.__version__,
        }
        snapshot = state.Snapshot(samples=self.samples, tensors=tensors, state=plain)
        path = self.checkpoints.save(snapshot)
        self.saved_at = self.samples
        seconds = time.perf_counter() - started
        if self.save_seconds is None:
            self.progress.say(f"{path}: {snapshot.nbytes / 1e6:,.1f} MB saved in {seconds:.1f} s")
        self.save_seconds = seconds
        self.clock.leave_out(seconds)
        return path

    def skip_counts(self) -> dict[str, int]:
        """Reason -> how often data was not used, since the run began."""
        new = self._loader_skipped()
        new.subtract(self.loader_before)
        return {k: n for k, n in sorted((self.skipped + new).items())}

    def losses(self) -> dict[str, float]:
        """Smoothed losses, per task and in all."""
        return {name: value for name, value in self.meter.smoothed().items() if name != "grad_norm"}

    def _loader_skipped(self) -> Counter[str]:
        return Counter(getattr(self.loader, "skipped", {}))

    def train(self, stop: StopFlag, probes: Sequence[Probe]) -> FitReport:
        """Steps until the end or until ``stop`` is raised; the last state is saved."""
        began, first = time.perf_counter(), self.samples
        if self.samples == 0 and self.saved_at is None:
            self._call_probes(probes, -1)
        self.batches = iter(self.loader)
        self.model.train()
        self.clock = Clock()
        while self.samples < self.config.samples and not stop.raised:
            before = self.samples
            self._step()
            last = self.samples >= self.config.samples
            if last or crossed(self.config.log_every_samples, before, self.samples):
                self._write_line()
            self._call_probes(probes, before)
            if last or crossed(self.config.checkpoint_every_samples, before, self.samples):
                self.save()
            self._give_up_if_hopeless()
        if self.saved_at != self.samples:
            self.save()
        seconds = time.perf_counter() - began
        return FitReport(
            samples=self.samples,
            steps=self.steps,
            seconds=seconds,
            samples_per_second=(self.samples - first) / max(seconds, 1e-9),
            stopped=self.samples < self.config.samples,
            losses=self.losses(),
            skipped=self.skip_counts(),
        )

    def _step(self) -> None:
        asked = time.perf_counter()
        batch = self._next()
        if batch is None:
            raise ConfigError(
                f"the loader ended after {self.samples:,} samples and train.samples is {self.config.samples:,}; "
                "lower it, or give a loader without end"
            )
        self.clock.count(len(batch), time.perf_counter() - asked)
        after = self.samples + len(batch)
        optim.set_lr(self.optimizer, self._lr(after))
        terms, norm = self._backward(batch)
        self.samples, self.steps = after, self.steps + 1
        loss = terms["loss"][0]
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(after, len(batch))
            self.meter.add({**terms, "grad_norm": (norm, 1)}, len(batch))
            self.guard.good()
        else:
            self._leave_out(batch, "non_finite_gradient" if math.isfinite(loss) else "non_finite_loss")
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.advance(len(batch), self.losses())

    def _next(self) -> Batch | None:
        try:
            return next(self.batches, None)
        except ShardError:
            # The data cannot be used any more; the steps before are not lost.
            if self.saved_at != self.samples:
                self.save()
            raise

    def _backward(self, batch: Batch) -> tuple[dict[str, tuple[float, float]], float]:
        """Gradients of a batch, clipped; (per-task and total loss as (sum, number), norm before clipping)."""
        seed_layers(self.device, rng.derive(self.config.seed, "layers", self.samples))
        names, numbers, position = [], [], self.samples
        times = getattr(self.objective, "times", None)
        if self.config.accumulate > 1 and times is not None:
            # Drawn here, because a part knows nothing of the others and times are spread over all rows.
            batch = replace(batch, t=times(len(batch), rng.generator(self.config.seed, "times", position)))
        for part in split(batch, self.config.accumulate):
            generator = rng.generator(self.config.seed, "objective", position)
            with optim.arithmetic(self.device, self.config.autocast):
                losses = self.objective(self.model, part.to(self.device), generator)
            share = len(part) / len(batch)
            # Without a single target in the part there is nothing to differentiate.
            if losses.total.requires_grad:
                (losses.total * share).backward()
            names += [("loss", share), *((name, count) for name, (_, count) in losses.terms.items() if count)]
            numbers += [losses.total * share, *(total for total, count in losses.terms.values() if count)]
            position += len(part)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.config.grad_clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        # One transfer for all numbers: each one would wait for the device.
        *values, norm_value = torch.stack([n.detach().float().to(self.device) for n in [*numbers, norm]]).tolist()
        terms: dict[str, tuple[float, float]] = {}
        for (name, count), value in zip(names, values, strict=True):
            total, number = terms.get(name, (0.0, 0.0))
            terms[name] = (total + value, number + count)
        return terms, norm_value

    def _lr(self, samples: int) -> float:
        return self.config.optim.lr * optim.factor(self.config.schedule, samples, self.config.samples)

    def _write_line(self) -> None:
        means = self.meter.take()
        speed, waited = self.clock.read()
        record = {
            "samples": self.samples,
            "step": self.steps,
            "lr": self._lr(self.samples),
            "loss": means.pop("loss", None),
            "grad_norm": means.pop("grad_norm", None),
            "losses": means,
            "skipped": self.skip_counts(),
            "samples_per_second": round(speed, 3),
            "data_wait": round(waited, 4),
            "eta_s": round(max(self.config.samples - self.samples, 0) / max(speed, 1e-9), 1),
        }
        self.log.write(record)
        self.progress.line(record)

    def close(self) -> None:
        """End what runs in the background and close the log."""
        if hasattr(self, "batches") and hasattr(self.batches, "close"):
            self.batches.close()
        self.log.close()

    def _leave_out(self, batch: Batch, reason: str) -> None:
        self.skipped[reason] += 1
        self.guard.bad(self.steps, batch.keys)
        self.log.write({"samples": self.samples, "step": self.steps, "event": reason, "keys": list(batch.keys)})
        self.progress.say(f"step {self.steps:,} left out: {reason.replace('_', ' ')}")

    def _give_up_if_hopeless(self) -> None:
        complaint = self.guard.complaint(self.steps)
        if complaint:
            # A resumed run gets a new chance: what is saved does not count these steps any more.
            self.guard = Guard()
            path = self.save()
            raise MmdiffError(
                f"{complaint}; the weights are those before them and the run is saved in {path}. All keys are in "
                f"{self.log.path}. Look at the samples, or lower train.optim.lr"
            )

    def _call_probes(self, probes: Sequence[Probe], before: int) -> None:
        for probe in probes:
            if due(probe, before, self.samples):
                started = time.perf_counter()
                result = call(probe, self.model, self.ema, self.samples)
                if result is not None:
                    self.log.write({"samples": self.samples, "step": self.steps, "probe": name_of(probe), **result})
                self.clock.leave_out(time.perf_counter() - started)
