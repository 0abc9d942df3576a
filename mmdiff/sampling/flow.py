"""Integrating a velocity from noise to data: Euler, Heun, and the two-step multistep solver.

The velocity is a callable (x, sigma) -> x-shaped tensor, guidance included; sigmas come from
`mmdiff.diffusion.flow.schedule` and end at 0.

Source: Euler as in SD3 (arXiv 2403.03206); Heun and the role of the last step as in EDM (arXiv 2206.00364),
algorithm 1; the multistep solver is DPM-Solver++(2M) (arXiv 2211.01095) for straight paths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.diffusion.flow import guide
from mmdiff.errors import ConfigError

__all__ = ["SOLVERS", "Velocity", "guided", "integrate"]

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], sigma [B]) -> velocity of the shape of x."""


def integrate(
    velocity: Velocity,
    noise: Float[Tensor, "B *C"],
    sigmas: Float[Tensor, "S"],
    *,
    solver: str = "euler",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Float[Tensor, "B *C"]:
    """Follow the velocity from ``noise`` at sigmas[0] to data at sigmas[-1].

    Args:
        velocity: Called once per step; ``heun`` calls it twice, but for the last step.
        noise: Float [B, ...], standard normal, if sigmas[0] is 1.
        sigmas: Float [steps + 1], decreasing.
        solver: Order 1 (``euler``), order 2 with two calls (``heun``), order 2 with one call (``multistep``).
        on_step: Called after each step with its number and the state.

    Raises:
        ConfigError: Unknown solver, or sigmas that do not decrease.
    """
    if solver not in SOLVERS:
        raise ConfigError(f"solver {solver!r} is not known; one of {', '.join(SOLVERS)}")
    levels = sigmas.tolist()
    if any(b >= a for a, b in itertools.pairwise(levels)):
        raise ConfigError(f"sigmas must decrease, got {levels}")
    step = SOLVERS[solver](velocity)
    x = noise
    for i, (now, to) in enumerate(itertools.pairwise(levels)):
        x = step(x, now, to)
        if on_step is not None:
            on_step(i, x)
    return x


def guided(velocity: Callable[[Tensor, Tensor, bool], Tensor], guidance: float) -> Velocity:
    """A velocity with guidance from one with and without condition.

    Args:
        velocity: (x, sigma, conditional) -> velocity.
        guidance: Strength; at 1 the unconditional branch is not computed.
    """

    def mixed(x: Tensor, sigma: Tensor) -> Tensor:
        conditional = velocity(x, sigma, True)
        return conditional if guidance == 1 else guide(conditional, velocity(x, sigma, False), guidance)

    return mixed


class _Euler:
    """X + (to - now) v."""

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity

    def at(self, x: Tensor, sigma: float) -> Tensor:
        """The velocity, with one sigma for all rows."""
        return self.velocity(x, torch.full((len(x),), sigma, dtype=torch.float32, device=x.device))

    def __call__(self, x: Tensor, now: float, to: float) -> Tensor:
        return x + (to - now) * self.at(x, now)


class _Heun(_Euler):
    """The mean of the velocities at both ends; the last step, whose end has no noise, is Euler's."""

    def __call__(self, x: Tensor, now: float, to: float) -> Tensor:
        v = self.at(x, now)
        ahead = x + (to - now) * v
        return ahead if to == 0 else x + (to - now) * (v + self.at(ahead, to)) / 2


class _Multistep(_Euler):
    """Estimates of the data, extrapolated along log((1 - sigma) / sigma) from the last two."""

    def __init__(self, velocity: Velocity) -> None:
        super().__init__(velocity)
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, now: float, to: float) -> Tensor:
        data = x - now * self.at(x, now)
        place = _log_ratio(now)
        estimate, before = data, self.last
        self.last = (place, data)
        if to == 0:
            return data
        if before is not None and torch.isfinite(before[0]):
            # Weights of the second-order formula; r is the last step over this one.
            r = (place - before[0]) / (_log_ratio(to) - place)
            estimate = data + (data - before[1]) / (2 * r)
        return to / now * x + (1 - to / now) * estimate


SOLVERS: dict[str, Callable[[Velocity], _Euler]] = {"euler": _Euler, "heun": _Heun, "multistep": _Multistep}
"""Name -> solver."""


def _log_ratio(sigma: float) -> Tensor:
    level = torch.tensor(sigma, dtype=torch.float64)
    return torch.log(1 - level) - torch.log(level)
