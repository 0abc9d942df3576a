"""Multimodal masked diffusion: train, caption, answer, generate and evaluate with one masked-denoising engine.

The public names are imported on first use, so that ``import mmdiff`` is instant and loads neither torch nor any
other large library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mmdiff.commands.eval import evaluate
    from mmdiff.commands.train import train
    from mmdiff.pipelines import ImageGenerator, TextGenerator, Video, VisionLanguage, load

__all__ = [
    "ImageGenerator",
    "TextGenerator",
    "Video",
    "VisionLanguage",
    "__version__",
    "evaluate",
    "load",
    "train",
]

_HOMES = {
    "ImageGenerator": "mmdiff.pipelines",
    "TextGenerator": "mmdiff.pipelines",
    "Video": "mmdiff.pipelines",
    "VisionLanguage": "mmdiff.pipelines",
    "evaluate": "mmdiff.commands.eval",
    "load": "mmdiff.pipelines",
    "train": "mmdiff.commands.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmdiff' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
