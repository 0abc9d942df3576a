"""Generation options of the harnesses in our words, and cutting at stop texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmdiff.errors import ConfigError

__all__ = ["STYLES", "cut", "generation_words", "tokens_of"]

STYLES = ("plain", "llada-v")
"""``llada-v``: two tokens unless the task says otherwise, the wish not to think, one final full stop removed."""

_SAME = {
    *("gen_length", "block_length", "num_inference_steps", "steps", "temperature", "top_p", "top_k", "threshold"),
    *("guidance", "cfg_scale", "remasking", "preset", "compat", "seeds"),
}
_NAMES = {"gen_steps": "steps", "cfg": "cfg_scale"}
_LENGTHS = ("max_gen_toks", "max_new_tokens")


def generation_words(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options for `mmdiff.TextGenerator` from a harness's ``gen_kwargs``.

    What the harness names differently is translated; what only autoregressive models have (beams, sampling switches)
    is dropped. ``max_new_tokens`` is the length unless the task or the user gives ``gen_length``.

    Args:
        given: Of the request.
        defaults: Said with ``--model_args``; the request wins.
    """
    words = {_NAMES.get(k, k): v for k, v in {**defaults, **given}.items()}
    kept = {k: v for k, v in words.items() if k in _SAME and v is not None}
    length = next((int(words[k]) for k in _LENGTHS if words.get(k)), None)
    if length is not None:
        kept.setdefault("gen_length", length)
    if "num_inference_steps" in kept:
        kept.pop("steps", None)
    return kept


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text up to the first stop text."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text


def tokens_of(style: str) -> dict[str, Any]:
    """Default options of a style.

    Raises:
        ConfigError: Unknown style.
    """
    if style not in STYLES:
        raise ConfigError(f"style {style!r}; known: {', '.join(STYLES)}")
    return {"gen_length": 2, "block_length": 2, "steps": 2, "preset": "exact"} if style == "llada-v" else {}
