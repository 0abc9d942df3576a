"""The words users may say, and the shapes they may say them in: batches, seeds, defaults of the checkpoint."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, TypedDict, get_type_hints

import torch

from mmdiff import rng
from mmdiff.errors import ConfigError
from mmdiff.sampling import Canvas, Step

__all__ = [
    "ImageWords",
    "PromptedScoreWords",
    "ScoreWords",
    "TextWords",
    "batch_of",
    "generated",
    "literal",
    "report_steps",
    "share_left",
    "sources",
    "with_defaults",
    "zip_batches",
]

Callback = Callable[[Any, int, float, dict[str, Any]], Any]
Generators = torch.Generator | Sequence[torch.Generator]


class TextWords(TypedDict, total=False):
    """Options of everything that generates text; see `mmdiff.sampling.presets.text_parts`."""

    gen_length: int
    preset: str
    compat: str | None
    block_length: int
    num_inference_steps: int
    steps: int
    temperature: float
    top_k: int
    top_p: float
    threshold: float
    guidance: float
    cfg_scale: float
    remasking: str
    stop: str | Sequence[str]
    seeds: int | Sequence[int]
    generator: Generators
    callback_on_step_end: Callback


class ScoreWords(TypedDict, total=False):
    """Options of likelihoods; see `mmdiff.pipelines.scoring.Scoring`."""

    method: Literal["sampled", "confidence"]
    guidance: float
    batch_size: int


class PromptedScoreWords(ScoreWords, total=False):
    """Options of likelihoods of answers to questions."""

    compat: str | None


class ImageWords(TypedDict, total=False):
    """Options of everything that draws; see `mmdiff.sampling.presets` and `mmdiff.sampling.image_presets`."""

    preset: str
    compat: str | None
    order: str
    mask_schedule: str
    guidance_schedule: str
    guidance_interval: Sequence[float]
    solver: str
    head_steps: int
    shift: float
    num_inference_steps: int
    steps: int
    temperature: float
    top_k: int
    top_p: float
    order_temperature: float
    guidance: float
    cfg_scale: float
    callback_on_step_end: Callback


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("a whole number", lambda v: isinstance(v, Integral) and not isinstance(v, bool)),
    float: ("a number", _is_number),
    str: ("a word", lambda v: isinstance(v, str)),
    Sequence[float]: ("a list of numbers", lambda v: isinstance(v, (list, tuple)) and all(map(_is_number, v))),
}
"""Kind of a word -> (its name, test of a value)."""

_ALIASES = {"num_inference_steps": "steps", "guidance": "cfg_scale"}


def with_defaults(words: Mapping[str, Any], defaults: Mapping[str, Any], known: type) -> dict[str, Any]:
    """What the user said, over what the checkpoint recommends.

    Raises:
        ConfigError: A word nobody knows; the nearest known one is named. Or a value of another kind.
    """
    names = list(known.__annotations__)
    for word in words:
        if word not in names:
            near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
            raise ConfigError(
                f"unknown option {word!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {names}")
            )
    said = {k: v for k, v in words.items() if v is not None}
    kinds = get_type_hints(known)
    for word, value in said.items():
        expected, fits = _KINDS.get(kinds[word], ("", lambda _: True))
        if not fits(value):
            raise ConfigError(f"option {word} = {value!r}: expected {expected}")
    kept = {k: v for k, v in defaults.items() if k in names and _ALIASES.get(k) not in said}
    return {**kept, **said}


def batch_of(value: Any) -> tuple[list[Any], bool]:
    """(items, whether a list was given)."""
    return (list(value), True) if isinstance(value, (list, tuple)) else ([value], False)


def literal(value: Any) -> str:
    """A text as the user wrote it.

    Raises:
        ConfigError: It is no text.
    """
    if not isinstance(value, str):
        raise ConfigError(f"expected text, got {type(value).__name__}")
    return value


def zip_batches(**values: Any) -> tuple[list[tuple[Any, ...]], bool]:
    """Items of several arguments side by side: lists zip, single values are repeated.

    Returns:
        (one tuple per item, whether any argument was a list).

    Raises:
        ConfigError: Two lists of different lengths, or an empty one.
    """
    lists = {name: list(v) for name, v in values.items() if isinstance(v, (list, tuple))}
    sizes = {len(v) for v in lists.values()}
    if len(sizes) > 1 or 0 in sizes:
        told = ", ".join(f"{name} has {len(v)}" for name, v in lists.items())
        raise ConfigError(f"lists must have the same length, at least 1: {told}")
    n = sizes.pop() if sizes else 1
    columns = [lists.get(name, [value] * n) for name, value in values.items()]
    return list(zip(*columns, strict=True)), bool(lists)


def sources(
    rows: int, stream: str, seeds: int | Sequence[int] | None, generator: Generators | None
) -> list[torch.Generator]:
    """One generator per row.

    Args:
        rows: B.
        stream: What is generated; keeps the numbers of text and images apart.
        seeds: One for all rows or one per row; None = 0.
        generator: Instead of seeds: one per row.

    Raises:
        ConfigError: Both, or a number other than B.
    """
    if seeds is not None and generator is not None:
        raise ConfigError("give seeds or generator, not both")
    if generator is not None:
        given = [generator] if isinstance(generator, torch.Generator) else list(generator)
        if len(given) != rows:
            raise ConfigError(f"{len(given)} generators for {rows} items; give one per item")
        return given
    numbers = [seeds or 0] * rows if seeds is None or isinstance(seeds, int) else list(seeds)
    if len(numbers) != rows:
        raise ConfigError(f"{len(numbers)} seeds for {rows} items; give one per item, or one for all")
    if strange := [s for s in numbers if not isinstance(s, Integral)]:
        raise ConfigError(f"seed {strange[0]!r}: expected a whole number")
    return [rng.generator(s, stream) for s in numbers]


def report_steps(pipeline: Any, callback: Callback | None) -> Callable[[Step], Any] | None:
    """The engine's callback that calls ``callback(pipeline, step, t, {"tokens": ...})``; t = share still masked."""
    if callback is None:
        return None

    def call(step: Step) -> None:
        callback(pipeline, step.number, share_left(step.canvas), {"tokens": generated(step.canvas)})

    return call


def share_left(canvas: Canvas) -> float:
    """Share of the slots to be generated that are still masked."""
    todo = int(canvas.undecided.sum())
    return todo / max(1, todo + int((canvas.order >= 0).sum()))


def generated(canvas: Canvas) -> torch.Tensor:
    """Tokens, or continuous ones, after the prompt."""
    state = canvas.tokens if canvas.values is None else canvas.values
    return state[:, canvas.start :]
