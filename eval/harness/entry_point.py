"""What lmms-eval loads to know the model ``mmdiff``; the model itself is imported when it is asked for."""

from __future__ import annotations

from typing import Any

__all__ = ["manifest"]


def manifest() -> Any:
    """The manifest of lmms-eval's plug-in group."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("mmdiff", simple_class_path="eval.harness.lmms.MmdiffLmms")
