"""`evaluate`: what ``mmdiff eval NAME`` does, from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

__all__ = ["MEASURES", "evaluate"]


def evaluate(name: str, *inputs: Any, **options: Any) -> Any:
    """What ``mmdiff eval NAME`` does, from Python.

    Args:
        name: ``fid``, ``vqa``, ``caption``, ``mmmu``, ``geneval`` or ``nll``.
        *inputs: What the command takes. ``fid``, ``vqa`` and ``caption`` compare two things: paths as on the command
            line; ``fid`` also takes uint8 arrays [N, H, W, 3] and iterables of them, ``vqa`` and ``caption`` also take
            what their ``score`` takes. ``mmmu``: predictions and answers (paths, or what its ``score`` takes), or a
            model. ``geneval``: detections and prompts, or paths. ``nll``: a model and records of prompt and answer.
        **options: As the options of the command, such as ``features="inception"`` or ``protocol="vqav2"``.

    Returns:
        The measure's frozen dataclass, such as ``FidResult``.

    Raises:
        ConfigError: Unknown name, or inputs that cannot be scored.
    """
    if name not in MEASURES:
        raise ConfigError(f"measure {name!r}; known: {', '.join(MEASURES)}")
    if name in _PAIRS and len(inputs) != 2:
        raise ConfigError(f"{name} compares two things, got {len(inputs)}")
    return MEASURES[name](*inputs, **options)


def _fid(first: Any, second: Any, **options: Any) -> Any:
    from eval.fid import compare

    return compare(first, second, **options)


def _vqa(first: Any, second: Any, **options: Any) -> Any:
    from eval import vqa

    if _is_path(first):
        return vqa.score_files(first, second, **options)
    return vqa.score(first, second, **options)


def _caption(first: Any, second: Any, **options: Any) -> Any:
    from eval import caption

    if _is_path(first):
        return caption.score_files(first, second, **options)
    return caption.score(first, second, **options)


def _mmmu(first: Any, second: Any = None, **options: Any) -> Any:
    from eval import mmmu

    if _is_path(first):
        return mmmu.score_files(first, second, **options)
    if hasattr(first, "ask"):
        return mmmu.measure(first, second, **options).result
    return mmmu.score(first, second, **options)


def _geneval(first: Any, second: Any = None, **options: Any) -> Any:
    from eval import geneval

    if _is_path(first):
        return geneval.score_files(first, detections=second, **options)
    return geneval.score(first, second, **options)


def _nll(first: Any, second: Any, **options: Any) -> Any:
    from eval import nll

    return nll.measure(first, second, **options)


MEASURES: dict[str, Callable[..., Any]] = {
    "fid": _fid,
    "vqa": _vqa,
    "caption": _caption,
    "mmmu": _mmmu,
    "geneval": _geneval,
    "nll": _nll,
}
"""Name -> what computes it."""

_PAIRS = ("fid", "vqa", "caption", "nll")


def _is_path(value: object) -> bool:
    return isinstance(value, (str, Path))
