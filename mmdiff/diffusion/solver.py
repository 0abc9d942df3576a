"""DPM-Solver++ for the per-token heads, with all schedule arithmetic done beforehand.

A plan is plain numbers: for each evaluation the label the network is given and five coefficients. The loop that uses
it is four lines (`mmdiff.sampling.heads`). Labels and coefficients do not depend on the tokens, so a plan is made once.

Source: DPM-Solver++ (arXiv 2211.01095), singlestep; options of eMIGM's published evaluation (arXiv 2503.07197).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = ["Evaluation", "NoiseLevels", "orders", "plan"]

_LAMBDA_FLOOR = -5.1
"""Knots below this log signal-to-noise ratio are dropped, for numerical stability."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the network, and the update it completes.

    With y the state, x its value at the start of the outer step and m the estimate of the clean token, of which m0
    was the first in the outer step: m = (y - sigma * eps) / alpha; y = carry * x + first * m0 + change * (m - m0).

    Attributes:
        time: Continuous time in (0, 1].
        label: Timestep the network is given.
        alpha: Signal at that time.
        sigma: Noise at that time.
        opens: Whether it is the first of its outer step.
        carry: See above.
        first: See above.
        change: See above; 0 at the first.
    """

    time: float
    label: float
    alpha: float
    sigma: float
    opens: bool
    carry: float
    first: float
    change: float


class NoiseLevels:
    """Signal and noise as functions of continuous time, piecewise linear in log alpha between the steps.

    All arithmetic is float32, in the published order: the last knots before t = 1 are steep, and float64 moves the
    result by up to 5e-4 of its largest value.

    Args:
        betas: Float64 [S], noise per training step.
    """

    def __init__(self, betas: Float[Tensor, "S"]) -> None:
        log_alpha = 0.5 * torch.log(1 - betas).cumsum(0)
        ratio = log_alpha - 0.5 * torch.log(1 - torch.exp(2 * log_alpha))
        # Ratios fall with the index, so those to be dropped are the last ones.
        kept = int((ratio >= _LAMBDA_FLOOR).sum())
        self.steps = len(betas)
        self.log_alpha = log_alpha[:kept].float()
        self.t = torch.linspace(0, 1, kept + 1)[1:]

    @property
    def last(self) -> float:
        """The smallest time, where sampling ends: 1 / knots."""
        return 1 / len(self.t)

    def log_signal(self, t: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """Log alpha(t)."""
        return _interpolate(t, self.t, self.log_alpha)

    def ratio(self, t: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """lambda(t) = log alpha - log sigma."""
        signal = self.log_signal(t)
        return signal - 0.5 * torch.log(1 - torch.exp(2 * signal))

    def time_of(self, ratio: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """The time of a lambda."""
        signal = -0.5 * torch.logaddexp(torch.zeros(1), -2 * ratio)
        return _interpolate(signal.reshape(ratio.shape), self.log_alpha.flip(0), self.t.flip(0))

    def label(self, t: float) -> float:
        """Timestep the network is given at time t; stretched by S / knots, as published."""
        return float((torch.tensor(t) - 1 / len(self.t)) * self.steps)


def orders(steps: int) -> list[int]:
    """Orders of the outer steps that use ``steps`` evaluations, at most 3 each.

    >>> orders(8), orders(14), orders(9), orders(10)
    ([3, 3, 2], [3, 3, 3, 3, 2], [3, 3, 2, 1], [3, 3, 3, 1])

    Raises:
        ConfigError: Fewer than one.
    """
    if steps < 1:
        raise ConfigError(f"{steps} evaluations of the head; at least 1")
    outer = steps // 3 + 1
    if steps % 3 == 0:
        return [3] * (outer - 2) + [2, 1]
    return [3] * (outer - 1) + [steps % 3]


@dataclass(frozen=True)
class _Segment:
    """One outer step: times of its evaluations and of its end."""

    levels: NoiseLevels
    start: Tensor
    end: Tensor
    order: int

    @cached_property
    def inner(self) -> tuple[Tensor, ...]:
        """Float32 scalars: r1 and r2 (as far as the order has them)."""
        low, high = self.levels.ratio(self.start), self.levels.ratio(self.end)
        times = self.levels.time_of(torch.linspace(low.item(), high.item(), self.order + 1))
        ratios = self.levels.ratio(times)
        return tuple((ratios[i] - ratios[0]) / (ratios[-1] - ratios[0]) for i in range(1, self.order))

    def evaluations(self) -> list[Evaluation]:
        levels, s, t = self.levels, self.start, self.end
        lam = levels.ratio(s)
        h = levels.ratio(t) - lam
        times = [s, *(levels.time_of(lam + r * h) for r in self.inner)]
        ends = [*times[1:], t]
        out = []
        for i, (at, to) in enumerate(zip(times, ends, strict=True)):
            last = i + 1 == self.order
            step = h if last else self.inner[i] * h
            phi = torch.expm1(-step)
            signal, noise = levels.log_signal(to).exp(), self._sigma(to)
            change = self._change(i, last, step, phi, signal)
            out.append(
                Evaluation(
                    time=at.item(),
                    label=levels.label(at.item()),
                    alpha=levels.log_signal(at).exp().item(),
                    sigma=self._sigma(at).item(),
                    opens=i == 0,
                    carry=(noise / self._sigma(s)).item(),
                    first=(-signal * phi).item(),
                    change=change.item(),
                )
            )
        return out

    def _change(self, i: int, last: bool, step: Tensor, phi: Tensor, signal: Tensor) -> Tensor:
        """Weight of the difference of the newest estimate to the first."""
        if i == 0:
            return torch.zeros(())
        if self.order == 2:
            return -(0.5 / self.inner[0]) * signal * phi
        slope = phi / step + 1
        return (1 / self.inner[1] if last else self.inner[1] / self.inner[0]) * signal * slope

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - torch.exp(2 * self.levels.log_signal(t)))


def outer_times(levels: NoiseLevels, steps: int) -> Float[Tensor, "K"]:
    """Times at which the outer steps begin and end: evenly spaced in lambda, from 1 to the smallest time."""
    first, last = levels.ratio(torch.tensor(1.0)), levels.ratio(torch.tensor(levels.last))
    return levels.time_of(torch.linspace(first.item(), last.item(), len(orders(steps)) + 1))


def plan(betas: Float[Tensor, "S"], steps: int) -> tuple[Evaluation, ...]:
    """All evaluations of a run of ``steps``.

    Args:
        betas: Float64 [S], noise per training step.
        steps: Evaluations of the network.

    Raises:
        ConfigError: Fewer than one step.
    """
    levels = NoiseLevels(betas)
    times = outer_times(levels, steps)
    segments = [_Segment(levels, times[i], times[i + 1], order) for i, order in enumerate(orders(steps))]
    return tuple(e for segment in segments for e in segment.evaluations())


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (knots, values), extended beyond the ends by the outermost pieces."""
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    x0, x1, y0, y1 = knots[right - 1], knots[right], values[right - 1], values[right]
    return y0 + (x - x0) * (y1 - y0) / (x1 - x0)
