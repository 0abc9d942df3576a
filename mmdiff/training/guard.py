"""Counting the steps that gave no finite loss and gradient, and deciding when to give up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Guard"]

_IN_A_ROW = 3
_MANY, _WINDOW = 10, 1000


class Guard:
    """Steps that were left out: three in a row, or ten of a thousand, are too many."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._keys: list[str] = []

    def good(self) -> None:
        """The present step was fine."""
        self._keys = []

    def bad(self, step: int, keys: Sequence[str]) -> None:
        """Step number ``step`` was left out; ``keys`` are its samples."""
        self._steps = [*(s for s in self._steps if s > step - _WINDOW), step]
        self._keys = [*self._keys, *keys]

    def complaint(self, step: int) -> str | None:
        """The reason to give up after step number ``step``, with the samples' keys; None if there is none."""
        if not self._steps or self._steps[-1] != step:
            return None
        in_a_row = self._steps[-_IN_A_ROW:] == list(range(step - _IN_A_ROW + 1, step + 1))
        if not in_a_row and len(self._steps) < _MANY:
            return None
        return (
            f"{len(self._steps)} of the last {min(step, _WINDOW):,} steps gave no finite loss and gradient, the last "
            f"one at step {step:,} with samples {_some(self._keys)}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"steps": self._steps, "keys": self._keys}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self._steps, self._keys = list(saved["steps"]), list(saved["keys"])


def _some(keys: Sequence[str], most: int = 24) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
