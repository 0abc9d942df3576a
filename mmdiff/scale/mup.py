"""muP: parametrisations under which tuned values carry over from a small network to a large one.

Source: Tensor Programs V (arXiv 2203.03466).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

__all__ = ["fold", "unfold"]


def fold(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Write forward multipliers into weights, for programs that know of none.

    Args:
        state: State dict of a network with multipliers.
        scales: Name of a readout's weight -> factor of its input. The bias is outside and stays.
    """
    return {name: t * scales[name] if name in scales else t for name, t in state.items()}


def unfold(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The inverse of `fold`; arguments as there."""
    return fold(state, {name: 1 / scale for name, scale in scales.items()})
