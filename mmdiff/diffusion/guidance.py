"""How strong guidance is at which moment: schedules over what is revealed, and intervals of time.

Source: eMIGM (arXiv 2503.07197), section on the time interval; MAR (arXiv 2406.11838) for the linear schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.errors import ConfigError

__all__ = ["RAMPS", "GuidanceSchedule", "RampName"]

RampName = Literal["constant", "linear", "power", "cubic", "exp", "cosine"]
"""Published names of the schedules."""

RAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "linear": lambda q: q,
    "power": lambda q: q**2,
    "cubic": lambda q: q**3,
    "exp": lambda q: 1 - torch.exp(-5 * q),
    "cosine": lambda q: torch.cos(math.pi / 2 * (1 - q)),
}
"""Share of the full guidance, by the share q of tokens that are known after the step."""


@dataclass(frozen=True)
class GuidanceSchedule:
    """Strength of guidance over a run.

    Attributes:
        scale: Full strength; 1 = none.
        ramp: How it grows with what is known.
        interval: (low, high): guidance is on in steps whose end time s has low < s <= high; elsewhere the
            unconditional branch is not evaluated. Two equal numbers: never.
        reserve: Tokens that count as unknown to the end (MAR: 1, so that its last step is not quite at full strength).
    """

    scale: float
    ramp: RampName = "constant"
    interval: tuple[float, float] = (0.0, 1.0)
    reserve: int = 0

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"guidance interval ({low}, {high}): expected 0 <= low <= high <= 1")
        if self.ramp not in RAMPS:
            raise ConfigError(f"guidance schedule {self.ramp!r}; known: {', '.join(RAMPS)}")

    def active(self, end: float) -> bool:
        """Whether a step that ends at time ``end`` is guided (compared in float32, as published)."""
        low, high = torch.tensor(self.interval, dtype=torch.float32).tolist()
        return self.scale != 1 and low < float(torch.tensor(end, dtype=torch.float32)) <= high

    def at(self, known: Int[Tensor, "*B"], tokens: int) -> Float[Tensor, "*B"]:
        """Scale, float64, when ``known`` of ``tokens`` are revealed, this step's included."""
        share = known.clamp_max(tokens - self.reserve).double() / tokens
        return 1 + (self.scale - 1) * RAMPS[self.ramp](share)
