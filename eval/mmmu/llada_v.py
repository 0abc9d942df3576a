"""How LLaDA-V is asked in its published evaluation, around lmms-eval's prompts.

Two masked tokens, two steps: one for the letter and one for the end. The wrapper's oddities decide the number, so they
are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["SETTINGS", "aspect_ratio", "final_response", "generation_words", "user_message"]

SETTINGS: dict[str, Any] = {"gen_length": 2, "block_length": 2, "gen_steps": 2, "think_mode": "no_think"}
"""Of MMMU, MMMU-Pro and the other multiple-choice tasks, beside temperature 0 and low-confidence remasking."""

_DEFAULTS = {"temperature": 0, "cfg": 0.0, "remasking": "low_confidence", "gen_length": 2, "block_length": 2}
_SUFFIXES = {"think": " /think", "no_think": " /no_think"}


def user_message(context: str, images: int, settings: Mapping[str, Any]) -> str:
    """The user's turn: a marker per image and the wish to think or not, unless the text has markers of its own.

    Args:
        context: The prompt.
        images: Number of images.
        settings: Of the task; ``think_mode`` counts.
    """
    if not images or "<image>" in context:
        return context
    return f"{' '.join(['<image>'] * images)}\n{context}{_SUFFIXES.get(settings.get('think_mode', ''), '')}"


def aspect_ratio(images: int, own: str) -> str:
    """How each image is cut: the checkpoint's own way for one image, padded for several, whatever the task wishes."""
    return own if images == 1 else "pad"


def generation_words(settings: Mapping[str, Any], *, images: int) -> dict[str, Any]:
    """What the published model's ``generate`` is called with.

    Args:
        settings: Of the task; ``until`` is dropped, ``gen_steps`` becomes ``steps`` unless that is given.
        images: Number of images; with any, the end of a turn is a stopping text.
    """
    words: dict[str, Any] = {"pad_token_id": 0, "use_cache": False, **_DEFAULTS}
    words |= {k: v for k, v in settings.items() if k not in ("until", "image_aspect_ratio")}
    words.setdefault("steps", words.get("gen_steps", 2))
    if images:
        words["stopping_criteria"] = [*words.get("stopping_criteria", ()), "<|eot_id|>"]
    return words


def final_response(decoded: str) -> str:
    """The response that is scored: one final full stop goes, then outer space."""
    return decoded.removesuffix(".").strip()
