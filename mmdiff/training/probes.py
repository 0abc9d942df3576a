"""Probes: looking at a model during training without leaving a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from mmdiff.training.optim import EMA

__all__ = ["Probe", "call", "crossed", "due", "name_of"]


class Probe(Protocol):
    """Looks at the model during training: draws samples, measures something.

    It sees the averaged weights, in evaluation mode and without gradients; whatever it does to modes or to PyTorch's
    random numbers is undone. After a kill it may be called again for the same count. A mapping of plain data that it
    returns is written to log.jsonl, under its attribute ``name`` if it has one.

    Attributes:
        every_samples: An interval, or the sample counts (0 is before the first step) at which it is called.
    """

    every_samples: int | Sequence[int]

    def __call__(self, model: nn.Module, samples_seen: int) -> Mapping[str, Any] | None:
        """Look."""


def due(probe: Probe, before: int, after: int) -> bool:
    """Whether a step from ``before`` to ``after`` samples reaches a count of the probe; -1 is before the beginning."""
    every = probe.every_samples
    if isinstance(every, int):
        return before >= 0 and crossed(every, before, after)
    return any(before < count <= after for count in every)


def crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of ``every`` lies in (before, after]."""
    return after // every > before // every


def name_of(probe: Probe) -> str:
    """What the probe is called in the log."""
    return str(getattr(probe, "name", type(probe).__name__))


def call(probe: Probe, model: nn.Module, ema: EMA | None, samples: int) -> dict[str, Any] | None:
    """Let the probe look at the averaged weights (the plain ones without ``ema``); what it wants to have logged."""
    with torch.no_grad(), _evaluating(model), ema.swapped() if ema else nullcontext():
        result = probe(model, samples)
    return dict(result) if isinstance(result, Mapping) else None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
