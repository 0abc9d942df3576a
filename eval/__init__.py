"""Measures: files, features or answers in, numbers with their uncertainty out.

Every measure has a pure ``score(predictions_or_features, references, *, protocol)`` that returns a frozen dataclass.
Nothing here trains or samples; networks reach this room by name only (`eval.features`).
"""

from __future__ import annotations

__all__ = ["MMDIFF_PACKAGE"]

MMDIFF_PACKAGE = "mmdiff"
"""Marker by which the command line tells this package from a user's own folder of the same name."""
