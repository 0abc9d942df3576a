"""Generation words of rectified flow: from what a user says to schedule, solver and guidance.

Source: 40 steps of Euler at guidance 4.5 are the published settings of SD3.5-large (arXiv 2403.03206, model card).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmdiff.diffusion.flow import schedule
from mmdiff.errors import ConfigError
from mmdiff.sampling.flow import SOLVERS
from mmdiff.sampling.presets import guidance_scale, step_count

__all__ = ["FlowParts", "flow_parts"]

_PRESETS = {"exact": (40, "euler"), "fast": (20, "multistep"), "turbo": (10, "multistep")}
_GUIDANCE = 4.5


@dataclass(frozen=True, kw_only=True)
class FlowParts:
    """How a velocity is integrated.

    Attributes:
        sigmas: Float32 [steps + 1], from 1 to 0.
        solver: A name in `mmdiff.sampling.flow.SOLVERS`.
        guidance: Weight of the condition; 1 = none.
        interval: (low, high]: sigmas at which it is applied.
    """

    sigmas: Float[Tensor, "S"]
    solver: str
    guidance: float
    interval: tuple[float, float]

    def at(self, sigma: float) -> float:
        """The guidance at a sigma."""
        low, high = self.interval
        return self.guidance if low < sigma <= high else 1.0


def flow_parts(
    *,
    preset: str = "fast",
    num_inference_steps: int | None = None,
    steps: int | None = None,
    solver: str | None = None,
    shift: float = 1.0,
    guidance: float | None = None,
    cfg_scale: float | None = None,
    guidance_interval: tuple[float, float] | list[float] | None = None,
) -> FlowParts:
    """Parts for a flow-matching network.

    Args:
        preset: ``exact`` 40 steps of Euler, ``fast`` 20 of the multistep solver, ``turbo`` 10 of it.
        num_inference_steps: Steps.
        steps: Alias of ``num_inference_steps``.
        solver: ``euler``, ``heun`` (two passes per step) or ``multistep``.
        shift: More steps at high noise, for larger images; that of the training.
        guidance: Weight of the prompt or class; 1 = none.
        cfg_scale: Alias: guidance - 1.
        guidance_interval: (low, high]: shares of noise at which guidance is applied; default everywhere.

    Raises:
        ConfigError: A value out of range, or words that contradict each other.
    """
    if preset not in _PRESETS:
        raise ConfigError(f"preset {preset!r}; known: {', '.join(_PRESETS)}")
    count, name = _PRESETS[preset]
    if (solver or name) not in SOLVERS:
        raise ConfigError(f"solver {solver!r}; known: {', '.join(SOLVERS)}")
    if shift <= 0:
        raise ConfigError(f"shift {shift} must be above 0; 1 = none")
    interval = (0.0, 1.0) if guidance_interval is None else tuple(guidance_interval)
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ConfigError(f"guidance_interval {list(interval)} must be two numbers with 0 <= low < high <= 1")
    scale = guidance_scale(guidance, cfg_scale)
    return FlowParts(
        sigmas=_sigmas(step_count(num_inference_steps, steps) or count, shift),
        solver=solver or name,
        guidance=_GUIDANCE if scale is None else scale,
        interval=(float(interval[0]), float(interval[1])),
    )


def _sigmas(steps: int, shift: float) -> Float[Tensor, "S"]:
    """The schedule; a single step goes from noise to data at once."""
    return torch.tensor([1.0, 0.0]) if steps == 1 else schedule(steps, shift)
