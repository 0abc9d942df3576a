"""Optimizer groups, learning-rate schedule and weight average, all counted in samples.

Files are the business of `mmdiff.training.state`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mmdiff.config import Field, config
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.training.parallel.sharding import local, spread_like

__all__ = [
    "EMA",
    "OptimConfig",
    "ScheduleConfig",
    "arithmetic",
    "build",
    "decays",
    "factor",
    "fits",
    "freeze",
    "from_tensors",
    "set_lr",
    "to_tensors",
    "trainable",
]


@config
class OptimConfig:
    """AdamW (arXiv 1711.05101)."""

    lr: float = Field(1e-3, gt=0)
    """Learning rate where the schedule's factor is 1."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay of the first and of the second moment per step."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled decay, applied to parameters with two or more dimensions only."""
    no_decay: tuple[str, ...] = ()
    """Further parameters without decay: modules' names or patterns with ``*``, as in ``factors``."""
    factors: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)
    """Learning-rate factor by parameter name: a module's name or a pattern with ``*``; 0 freezes; the longest wins."""


@config
class ScheduleConfig:
    """Factor of the learning rate over the run."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    warmup_samples: int = Field(0, ge=0)
    """Samples over which the factor rises linearly from 0 to 1."""
    hold: float = Field(0.0, ge=0, lt=1)
    """Share of the run, after the warm-up, during which the factor stays 1 before it decays."""
    final: float = Field(0.0, ge=0, le=1)
    """Factor at the last sample (no effect on a constant schedule)."""


def factor(schedule: ScheduleConfig, samples: int, total: int) -> float:
    """Learning-rate factor of the step that ends at sample ``samples`` of ``total``.

    >>> factor(ScheduleConfig(kind="linear", warmup_samples=10, final=0.5), 5, 110)
    0.5
    >>> factor(ScheduleConfig(kind="linear", warmup_samples=10, final=0.5), 60, 110)
    0.75
    """
    warmup = min(1.0, samples / schedule.warmup_samples) if schedule.warmup_samples else 1.0
    if schedule.kind == "constant":
        return warmup
    done = (samples - schedule.warmup_samples) / max(total - schedule.warmup_samples, 1)
    done = min(max((done - schedule.hold) / (1 - schedule.hold), 0.0), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if schedule.kind == "cosine" else 1 - done
    return warmup * (schedule.final + (1 - schedule.final) * left)


def build(
    model: nn.Module, spec: OptimConfig, scales: Mapping[str, tuple[float, float]] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those with factor 0 are frozen here.

    Args:
        model: Its parameters may already be partly frozen; they stay so.
        spec: Rates, decay and factors.
        scales: Parameter -> further factors of its rate and of its decay, such as those of a muP plan; default 1.

    Raises:
        ConfigError: A pattern of ``spec.factors`` fits no parameter, or nothing is left to train.
    """
    factors = freeze(model, spec)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable(model).items():
        by, share = (scales or {}).get(name, (1.0, 1.0))
        decay = spec.weight_decay * share if decays(name, parameter, spec.no_decay) else 0.0
        groups.setdefault((factors[name] * by, decay), []).append(parameter)
    if not groups:
        raise ConfigError("every parameter is frozen, so there is nothing to train; check optim.factors")
    tables = [{"params": parameters, "factor": by, "weight_decay": decay} for (by, decay), parameters in groups.items()]
    # On a CPU the fused kernel takes a quarter of the time of the plain loop; foreach is slower than the loop there.
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    return torch.optim.AdamW(tables, lr=spec.lr, betas=spec.betas, eps=spec.eps, fused=fused)


def freeze(model: nn.Module, spec: OptimConfig) -> dict[str, float]:
    """Freeze the parameters whose factor is 0; the factors of all, by name.

    Raises:
        ConfigError: A pattern of ``spec.factors`` fits no parameter.
    """
    factors = _factors(model, spec.factors)
    for name, parameter in model.named_parameters():
        if factors[name] == 0:
            parameter.requires_grad_(False)
    return factors


def decays(name: str, parameter: nn.Parameter, exempt: Iterable[str]) -> bool:
    """Whether a parameter is decayed: matrices and embeddings that no pattern of ``exempt`` fits."""
    return parameter.ndim >= 2 and not any(fits(name, pattern) for pattern in exempt)


def arithmetic(device: torch.device, dtype: str | None) -> AbstractContextManager[Any]:
    """Within the block matrix products are computed in ``dtype``; None changes nothing."""
    return nullcontext() if dtype is None else torch.autocast(device.type, getattr(torch, dtype))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group to ``lr`` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["factor"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require gradients, by name; a tied one appears once, under its first name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class EMA:
    """Exponential average of the trainable parameters, in float32.

    The half-life grows with the run: it is at most ``ramp`` times the samples seen, so that early weights do not
    linger.

    Source: half-life in samples and its ramp as in the published code of EDM (arXiv 2206.00364).

    Args:
        model: Its present trainable parameters are the first average.
        halflife: Samples after which a weight counts half.
        ramp: Upper bound of the half-life as a share of the samples seen.
    """

    def __init__(self, model: nn.Module, halflife: int, ramp: float) -> None:
        self._parameters = trainable(model)
        self._halflife, self._ramp = halflife, ramp
        self.average = {name: p.detach().float().clone() for name, p in self._parameters.items()}

    def decay(self, samples: int, batch: int) -> float:
        """Weight of the old average in the step of ``batch`` samples that ends at sample ``samples``."""
        halflife = min(self._halflife, self._ramp * samples)
        return 0.5 ** (batch / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, samples: int, batch: int) -> None:
        """Move the average towards the parameters after a step; arguments as in `decay`."""
        now = [local(p.detach()).float() for p in self._parameters.values()]
        average = [local(a) for a in self.average.values()]
        torch._foreach_lerp_(average, now, 1 - self.decay(samples, batch))

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within the block the model computes with the average; afterwards its own tensors are back, untouched."""
        own = {name: p.data for name, p in self._parameters.items()}
        try:
            for name, p in self._parameters.items():
                # A copy, so that nothing in the block can write into the average.
                p.data = self.average[name].to(p.dtype, copy=True)
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = own[name]


def _factors(model: nn.Module, patterns: Mapping[str, float]) -> dict[str, float]:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise ConfigError(f"optim.factors: {pattern!r} fits no parameter; {_nearest(pattern, names)}")
    return {
        name: max(((len(p), f) for p, f in patterns.items() if fits(name, p)), default=(0, 1.0))[1] for name in names
    }


def fits(name: str, pattern: str) -> bool:
    """Whether a name is meant by a pattern with ``*``, or lies in the module that it names."""
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")


def _nearest(pattern: str, names: Iterable[str]) -> str:
    modules = dict.fromkeys(".".join(parts[:n]) for name in names for parts in [name.split(".")] for n in range(1, 4))
    near = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.3)
    return f"did you mean {' or '.join(near)}?" if near else f"names begin with {', '.join(list(modules)[:5])}"


def to_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as tensors named ``<entry>/<parameter name>``, such as ``exp_avg/head.weight``."""
    return {
        f"{entry}/{name}": value
        for name, parameter in trainable(model).items()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def from_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `to_tensors` gave; parameters that were never stepped have no entries.

    Raises:
        CheckpointError: An entry belongs to no trainable parameter or has another shape.
    """
    parameters = trainable(model)
    optimizer.state.clear()
    for key, value in tensors.items():
        entry, _, name = key.partition("/")
        parameter = parameters.get(name)
        if parameter is None or (entry != "step" and value.shape != parameter.shape):
            raise CheckpointError(
                f"optimizer state {key} {tuple(value.shape)} fits no trainable parameter of the model"
            )
        if entry == "step":
            device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
            own = torch.empty_like(value, device=device)
        else:
            own = torch.empty_like(
                parameter, dtype=value.dtype, memory_format=torch.preserve_format, requires_grad=False
            )
        local(own).copy_(local(spread_like(value, own)))
        optimizer.state[parameter][entry] = own
