"""The training loop: counts in samples, resumes to the bit, survives bad batches, stops when asked.

It is given a built model, an objective, a loader and probes. Where a run's files live and how they are written is in
`mmdiff.training.state`; optimizer, schedule and average are in `mmdiff.training.optim`; what several processes do
together is in `mmdiff.training.parallel`, and with one of them all of it is the identity.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mmdiff import config as configs
from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.config import Field, config
from mmdiff.errors import CheckpointError, ConfigError, MmdiffError, ShardError
from mmdiff.training import optim, state
from mmdiff.training.finetune import LoraConfig, attach
from mmdiff.training.guard import Guard
from mmdiff.training.microbatch import split
from mmdiff.training.objective import Objective
from mmdiff.training.optim import OptimConfig, ScheduleConfig
from mmdiff.training.parallel import sharding
from mmdiff.training.parallel.group import Group, joined
from mmdiff.training.parallel.step import DdpConfig, FsdpConfig, ParallelConfig, Step, spread
from mmdiff.training.parallel.together import Tally, drawn, row_sources, totals, widened
from mmdiff.training.parallel.watch import Watch
from mmdiff.training.probes import Probe, call, crossed, due, name_of
from mmdiff.training.randomness import own_randomness, seed_layers
from mmdiff.training.recompute import compiling, recomputing
from mmdiff.training.report import Clock, Log, Meter, Progress
from mmdiff.training.reporters import Reporter, ReporterName, check_reporters, numbers_of, open_reporters
from mmdiff.training.saving import Saver
from mmdiff.training.signals import StopFlag
from mmdiff.training.throughput import Throughput, work_of

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
    compile: bool = False
    """Compile each block on first use: minutes at the start, faster steps after; needs a C++ compiler on a CPU."""
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
    checkpoint_async: bool = False
    """Write checkpoints beside the training, from a copy of the state in main memory; the next waits for the former."""
    checkpoint_failed: Literal["stop", "continue"] = "stop"
    """After a checkpoint could not be written, such as on a full disk: end the run, or go on and try again at the next;
    the last one of a run has to succeed."""
    report: tuple[ReporterName, ...] = ()
    """Where log lines are shown beside log.jsonl: tensorboard, wandb, trackio."""
    project: str = Field("mmdiff", min_length=1)
    """Name under which wandb and trackio collect runs."""
    parallel: ParallelConfig = Field(default_factory=DdpConfig)
    """How several processes share the work; no effect on one."""
    step_timeout_s: float = Field(600.0, gt=0)
    """Seconds after which a step of several processes counts as hanging and ends the run; half of them give a warning.
    """
    first_step_timeout_s: float = Field(1800.0, gt=0)
    """The same for the first step after a start, and for saving and probes."""


class Loader(Protocol):
    """Batches in an order that is a function of the position; with several processes, this one's rows of each.

    Optional attributes: ``skipped`` (reason -> number of samples) is logged; ``where()`` names what is being read;
    ``fill_id`` is the id with which rows were filled to equal length.
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
    log as one that was not. SIGTERM, SIGINT or SIGUSR1 saves after the present step and returns. Started by torchrun or
    accelerate in several processes, all of them call this; steps, losses and checkpoints are those of one process.

    Args:
        model: Moved to ``device``; afterwards it holds the plain weights, `state.load_average` gives the averaged ones.
            With FSDP it stays spread over the processes.
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
            Or another process failed, is gone or hangs; its rank and last step are named.
    """
    run_dir, device = Path(run_dir), torch.device(device)
    with ExitStack() as stack:
        group = stack.enter_context(joined(config.first_step_timeout_s))
        group.first(lambda: check_reporters(config.report))
        group.first(lambda: state.claim(run_dir, config if run_config is None else run_config, resume=resume))
        where = getattr(loader, "where", lambda: "the loader's data")
        watch = stack.enter_context(Watch(group, config.step_timeout_s, config.first_step_timeout_s, where))
        stop = stack.enter_context(StopFlag())
        stack.enter_context(own_randomness(device))
        if config.lora is not None:
            attach(model, config.lora, config.seed)
        stack.enter_context(compiling(model, config.compile))
        throughput = Throughput(device, _dtype_of(model, config))
        stack.enter_context(recomputing(model, config.gradient_checkpointing, again=throughput.uncounted))
        run = _Run(model, objective, loader, config, run_dir, device, scales, group, watch, throughput)
        run.restore()
        stack.callback(run.close)
        if group.leads:
            tree = configs.to_dict(config if run_config is None else run_config)
            run.reporters = stack.enter_context(
                open_reporters(config.report, run_dir, config.project, tree, run.samples)
            )
        run.progress = Progress(progress and group.leads, config.samples, run.samples, description)
        stack.callback(run.progress.close)
        return run.train(stop, _suited(list(probes), config, group))


def _dtype_of(model: nn.Module, config: TrainConfig) -> torch.dtype:
    """Dtype of most matrix products."""
    half = config.autocast is not None or {p.dtype for p in model.parameters()} == {torch.bfloat16}
    return torch.bfloat16 if half else torch.float32


def _suited(probes: list[Probe], config: TrainConfig, group: Group) -> list[Probe]:
    if probes and group.world > 1 and isinstance(config.parallel, FsdpConfig):
        raise ConfigError("probes need whole weights, which train.parallel.type=fsdp spreads; set it to ddp")
    return probes


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
        scales: Mapping[str, tuple[float, float]] | None,
        group: Group,
        watch: Watch,
        throughput: Throughput,
    ) -> None:
        self.model, self.objective, self.loader, self.config = model, objective, loader, config
        self.run_dir, self.device, self.group, self.watch = run_dir, device, group, watch
        if group.world == 1 or isinstance(config.parallel, DdpConfig):
            # FSDP moves the weights itself, block by block: whole they might not fit.
            model.to(device)
        optim.freeze(model, config.optim)
        self.passes, self.tally = spread(Step(model, objective), config.parallel, group, device), Tally(group)
        self.saver = Saver(state.Checkpoints(run_dir, config.keep), group)
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
        self.reporters: Sequence[Reporter] = ()
        self.throughput = throughput

    def restore(self) -> None:
        """Go to the newest checkpoint, or to the beginning; the log is cut to what belongs there."""
        snapshot = self.saver.newest()
        log_size = 0
        if snapshot is not None:
            self._load(snapshot)
            log_size = snapshot.state["log_bytes"]
        self.watch.begin(self.steps)
        self.loader_before = self._loader_skipped()
        self.log = Log(self.run_dir / "log.jsonl", log_size, on=self.group.leads)

    def _load(self, snapshot: state.Snapshot) -> None:
        saved, path = snapshot.state, self.saver.path(snapshot.samples)
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

    def save(self, *, final: bool = True) -> Path:
        """Write a checkpoint of the present state; unless it is the ``final`` one, it may be on its way afterwards."""
        self.watch.doing("saving")
        started = time.perf_counter()
        tensors: dict[str, Mapping[str, Tensor]] = {
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
        path = self.saver.path(self.samples)
        try:
            snapshot = self.saver.save(self.samples, tensors, plain, later=self.config.checkpoint_async and not final)
        except CheckpointError as error:
            if final or self.config.checkpoint_failed == "stop":
                raise
            self._go_on_unsaved(error)
            return path
        self.saved_at = self.samples
        seconds = time.perf_counter() - started
        if self.save_seconds is None:
            self.progress.say(f"{path}: {snapshot.nbytes / 1e6:,.1f} MB saved in {seconds:.1f} s")
        self.save_seconds = seconds
        self.clock.leave_out(seconds)
        self.watch.doing("computing")
        return path

    def _go_on_unsaved(self, error: CheckpointError) -> None:
        self.log.write(
            {"samples": self.samples, "step": self.steps, "event": "checkpoint_failed", "message": str(error)}
        )
        self.progress.say(f"{error}; training goes on, as train.checkpoint_failed says")
        self.watch.doing("computing")

    def skip_counts(self) -> dict[str, int]:
        """Reason -> how often data was not used by any process, since the run began."""
        new = self._loader_skipped()
        new.subtract(self.loader_before)
        counts = self.skipped.copy()
        for each in self.group.gather(dict(new)):
            counts.update(each)
        return {k: n for k, n in sorted(counts.items()) if n > 0}

    def losses(self) -> dict[str, float]:
        """Smoothed losses, per task and in all."""
        return {name: value for name, value in self.meter.smoothed().items() if name != "grad_norm"}

    def _loader_skipped(self) -> Counter[str]:
        return Counter(getattr(self.loader, "skipped", {}))

    def train(self, stop: StopFlag, probes: Sequence[Probe]) -> FitReport:
        """Steps until the end or until ``stop`` is raised on any process; the last state is saved."""
        began, first = time.perf_counter(), self.samples
        if self.samples == 0 and self.saved_at is None:
            self._call_probes(probes, -1)
        self.batches = iter(self.loader)
        self.model.train()
        self.clock = Clock()
        while self.samples < self.config.samples and not self._told_to(stop):
            before = self.samples
            self._step()
            last = self.samples >= self.config.samples
            if last or crossed(self.config.log_every_samples, before, self.samples):
                self._write_line()
            self._call_probes(probes, before)
            if last or crossed(self.config.checkpoint_every_samples, before, self.samples):
                self.save(final=last)
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

    def _told_to(self, stop: StopFlag) -> bool:
        self.watch.doing("waiting")
        return self.group.any(stop.raised)

    def _step(self) -> None:
        asked = time.perf_counter()
        batch = self._next()
        rows = len(batch) * self.group.world
        self.clock.count(time.perf_counter() - asked, samples=rows)
        after = self.samples + rows
        optim.set_lr(self.optimizer, self._lr(after))
        self.watch.doing("computing")
        terms, norm = self._backward(batch)
        self.samples, self.steps = after, self.steps + 1
        loss = terms["loss"][0]
        if math.isfinite(loss) and math.isfinite(norm):
            self._clip(norm)
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(after, rows)
            self.meter.add({**terms, "grad_norm": (norm, 1)}, rows)
            self.guard.good()
        else:
            self._leave_out(batch, "non_finite_gradient" if math.isfinite(loss) else "non_finite_loss")
        self.optimizer.zero_grad(set_to_none=True)
        self.watch.completed(self.steps)
        self.progress.advance(rows, self.losses())

    def _next(self) -> Batch:
        """This process's rows of the next batch; all processes have theirs, or all raise."""
        self.watch.doing("reading")
        batch, failure = None, None
        try:
            batch = next(self.batches, None)
        except ShardError as error:
            failure = error
        self.watch.doing("waiting")
        length = batch.ids.shape[1] if batch is not None else 0
        failed, ended, longest = self.group.most([failure is not None, batch is None and failure is None, length])
        if failed:
            # The data cannot be used any more; the steps before are not lost.
            if self.saved_at != self.samples:
                self.save()
            raise failure or ShardError("another process found its data unusable; its message says why")
        if ended or batch is None:
            raise ConfigError(
                f"the loader ended after {self.samples:,} samples and train.samples is {self.config.samples:,}; "
                "lower it, or give a loader without end"
            )
        return widened(batch, int(longest), getattr(self.loader, "fill_id", None))

    def _backward(self, batch: Batch) -> tuple[dict[str, tuple[float, float]], float]:
        """Gradients of the global batch; (per-task and total loss as (sum, number), norm)."""
        seed, first = self.config.seed, self.samples + self.group.rank * len(batch)
        seed_layers(self.device, rng.derive(seed, "layers", first))
        step_draws = rng.generator(seed, "together", self.samples)
        parts = split(drawn(self.objective, self.model, batch, self.group, step_draws), self.config.accumulate)
        starts = [first + n for n in accumulate((len(part) for part in parts), initial=0)]

        def source(n: int) -> list[torch.Generator]:
            return row_sources(seed, starts[n], len(parts[n]))

        sums = totals(self.objective, self.model, parts, [source(n) for n in range(len(parts))], self.group)
        if self.config.compile and self.throughput.per_slot is None:
            self._count_apart(parts[0], source(0), sums)
            seed_layers(self.device, rng.derive(seed, "layers", first))
        names, numbers = [], []
        for n, part in enumerate(parts):
            last = n + 1 == len(parts)
            with nullcontext() if last else self.passes.apart(), self.throughput.counted(part):
                with optim.arithmetic(self.device, self.config.autocast):
                    total, terms = self.passes.run(part.to(self.device), source(n), sums)
                # Without a single target in the part there is nothing to differentiate.
                if total.requires_grad:
                    (total * self.group.world).backward()
            names += [("loss", 1.0), *((name, count) for name, (_, count) in terms.items() if count)]
            numbers += [total, *(value for value, count in terms.values() if count)]
        self.passes.settle()
        return self._sums(names, numbers, work_of(batch))

    @torch.no_grad()
    def _count_apart(self, part: Batch, source: rng.Source, sums: Mapping[str, float]) -> None:
        """Count the operations of compiled blocks, which a counter cannot see, in a forward pass that leaves no trace.

        The training itself has to run compiled from its first step on, or a resumed run would round otherwise.
        """
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.compiler.set_stance("force_eager"), self.throughput.counted(part, forward_only=True):
            with optim.arithmetic(self.device, self.config.autocast):
                self.passes.run(part.to(self.device), source, sums)
        for buffer, before in buffers:
            buffer.copy_(before)

    def _sums(
        self, names: Sequence[tuple[str, float]], numbers: Sequence[Tensor], work: Mapping[str, float]
    ) -> tuple[dict[str, tuple[float, float]], float]:
        """Losses of all parts and processes added up, and the norm of the gradient."""
        norm, spread_out = sharding.norm(p.grad for p in self.parameters if p.grad is not None)
        # One transfer for all numbers: each one would wait for the device.
        *values, own = torch.stack([n.detach().float().to(self.device) for n in [*numbers, norm]]).tolist()
        terms: dict[str, tuple[float, float]] = {}
        for (name, count), value in zip(names, values, strict=True):
            total, number = terms.get(name, (0.0, 0.0))
            terms[name] = (total + value, number + count)
        self.watch.doing("waiting")
        terms, (squares, *done) = self.tally(terms, [own**2, *work.values()])
        self.clock.count(**dict(zip(work, done, strict=True)))
        self.watch.doing("computing")
        terms["loss"] = (terms["loss"][0], 1.0)
        replicas = getattr(self.config.parallel, "replicas", 1)
        return terms, math.sqrt(squares / replicas) if spread_out else own if math.isfinite(squares) else squares

    def _clip(self, norm: float) -> None:
        gradients = [sharding.local(p.grad) for p in self.parameters if p.grad is not None]
        if self.config.grad_clip is not None and gradients:
            share = (self.config.grad_clip / (torch.tensor(norm) + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, share.to(self.device))

    def _lr(self, samples: int) -> float:
        return self.config.optim.lr * optim.factor(self.config.schedule, samples, self.config.samples)

    def _write_line(self) -> None:
        means = self.meter.take()
        rates, waited = self.clock.read()
        speed = rates.get("samples", 0.0)
        record = {
            "samples": self.samples,
            "step": self.steps,
            "lr": self._lr(self.samples),
            "loss": means.pop("loss", None),
            "grad_norm": means.pop("grad_norm", None),
            "losses": means,
            "skipped": self.skip_counts(),
            "samples_per_second": round(speed, 3),
            "tokens_per_second": round(rates.get("tokens", 0.0), 1),
            "images_per_second": round(rates.get("images", 0.0), 2),
            "mfu": self._mfu(rates.get("slots", 0.0) / self.group.world),
            "data_wait": round(waited, 4),
            "eta_s": round(max(self.config.samples - self.samples, 0) / max(speed, 1e-9), 1),
        }
        self.log.write(record)
        self._report(record)
        self.progress.line(record)

    def _mfu(self, slots_per_second: float) -> float | None:
        # The others wait for the first process at their next step, and the measuring counts for no one's speed.
        started = time.perf_counter()
        share = self.throughput.mfu(slots_per_second) if self.group.leads else None
        self.clock.leave_out(time.perf_counter() - started)
        return share

    def _report(self, record: Mapping[str, Any], prefix: str = "") -> None:
        numbers = numbers_of(record, prefix)
        for reporter in self.reporters:
            reporter.log(numbers, self.samples)

    def close(self) -> None:
        """End what runs in the background and close the log."""
        if hasattr(self, "batches") and hasattr(self.batches, "close"):
            self.batches.close()
        self.saver.close()
        self.log.close()

    def _leave_out(self, batch: Batch, reason: str) -> None:
        self.skipped[reason] += 1
        keys = [key for each in self.group.gather(list(batch.keys)) for key in each]
        self.guard.bad(self.steps, keys)
        self.log.write({"samples": self.samples, "step": self.steps, "event": reason, "keys": keys})
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
        for probe in (p for p in probes if due(p, before, self.samples)):
            started = time.perf_counter()
            self.watch.doing("looking")
            result = call(probe, self.model, self.ema, self.samples) if self.group.leads else None
            if result is not None:
                self.log.write({"samples": self.samples, "step": self.steps, "probe": name_of(probe), **result})
                self._report(result, f"{name_of(probe)}/")
            self.group.wait()
            self.watch.doing("computing")
            self.clock.leave_out(time.perf_counter() - started)
