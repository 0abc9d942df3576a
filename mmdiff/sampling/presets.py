"""Presets and generation words: from what a user says to the parts of the engine.

Presets: ``exact`` gives the published baseline's tokens (one token per pass unless steps are given). ``fast`` decides
every token the model is at least 90 % sure of, and keeps the keys and values outside the current block (Fast-dLLM's
published pair); ``turbo`` does the same at 70 %. The cost in quality of ``fast`` and ``turbo`` depends on the model;
measure it with ``mmdiff eval``. Explicit words override the preset.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from mmdiff.errors import ConfigError
from mmdiff.sampling.blocks import Blocks, Fixed, Whole
from mmdiff.sampling.caches import Cache, Dual
from mmdiff.sampling.constraints import Constraint
from mmdiff.sampling.exits import Eos, Exit
from mmdiff.sampling.guidance import Cfg, Guidance
from mmdiff.sampling.samplers import Greedy, Gumbel, Multinomial, Sampler
from mmdiff.sampling.schedules import Cosine, Linear, Schedule
from mmdiff.sampling.selectors import Random, RandomTopK, Selector, TopConfidence
from mmdiff.sampling.thresholds import Threshold

__all__ = ["Parts", "Preset", "guidance_scale", "image_parts", "step_count", "text_parts"]

Preset = Literal["exact", "fast", "turbo"]
_THRESHOLD = {"fast": 0.9, "turbo": 0.7}
_IMAGE_STEPS = {"exact": 32, "fast": 16, "turbo": 8}
_IMAGE_GUIDANCE = 3.0
_BLOCK = 32


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Arguments of `mmdiff.sampling.decode`."""

    blocks: Blocks
    schedule: Schedule | None
    selector: Selector
    sampler: Sampler
    cache: Cache | None = None
    exit: Exit | None = None
    guidance: Guidance | None = None
    constraint: Constraint | None = None

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def text_parts(
    *,
    gen_length: int,
    end_ids: tuple[int, ...],
    preset: str = "fast",
    compat: str | None = None,
    block_length: int | None = None,
    num_inference_steps: int | None = None,
    steps: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    threshold: float | None = None,
    guidance: float | None = None,
    cfg_scale: float | None = None,
    remasking: str | None = None,
    forbid: tuple[int, ...] = (),
    postpone: tuple[int, ...] = (),
) -> Parts:
    """Parts for text.

    Args:
        gen_length: Slots to generate.
        end_ids: Ids that end an answer, the filler first.
        preset: ``exact``, ``fast`` or ``turbo``.
        compat: ``"reference"``: LLaDA's published sampler with its ties, divisibility rules and float64.
        block_length: Slots per block; default 32, at most ``gen_length``.
        num_inference_steps: Passes in all; each decides an equal share (excludes ``threshold``).
        steps: Alias of ``num_inference_steps``.
        temperature: 0 = most probable token.
        top_k: Keep this many classes when drawing.
        top_p: Keep this much probability when drawing.
        threshold: Decide every token of at least this probability, at least one per pass.
        guidance: Weight of the prompt; 1 = none.
        cfg_scale: Alias: guidance - 1.
        remasking: ``low_confidence`` or ``random``: which tokens wait (excludes ``threshold``).
        forbid: Ids that are never generated (LLaDA's ``logits_eos_inf``).
        postpone: Ids that are decided last (LLaDA's ``confidence_eos_eot_inf``). The published code, and so
            ``compat="reference"``, forgets end of text, ``end_ids[0]``, when it draws at a temperature.

    Raises:
        ConfigError: A value out of range, or words that contradict each other.
    """
    _check_preset(preset, compat)
    steps = step_count(num_inference_steps, steps)
    scale = guidance_scale(guidance, cfg_scale)
    block = min(_BLOCK, gen_length) if block_length is None else block_length
    if not 1 <= block <= gen_length:
        raise ConfigError(f"block_length {block} must be between 1 and gen_length {gen_length}")
    reference = compat == "reference"
    if reference:
        preset = "exact"
        _check_divides(gen_length, block, steps)
        if temperature > 0:
            postpone = tuple(i for i in postpone if i != end_ids[0])
    schedule, selector = _text_order(preset, threshold, steps, remasking, reference)
    return Parts(
        blocks=Fixed(block),
        schedule=schedule,
        selector=selector,
        sampler=_sampler(temperature, top_k, top_p, reference),
        cache=None if preset == "exact" else Dual(),
        exit=None if preset == "exact" else Eos(end_ids),
        guidance=None if scale in (None, 1) else Cfg(scale),
        constraint=Constraint(forbid, postpone) if forbid or postpone else None,
    )


def image_parts(
    *,
    slots: int,
    preset: str = "fast",
    num_inference_steps: int | None = None,
    steps: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    order_temperature: float = 1.0,
    guidance: float | None = None,
    cfg_scale: float | None = None,
) -> Parts:
    """Parts for image codes: cosine schedule, confidence with annealed noise, guided.

    Args:
        slots: Image tokens to generate.
        preset: ``exact`` 32 passes, ``fast`` 16, ``turbo`` 8.
        num_inference_steps: Passes; never more than slots.
        steps: Alias of ``num_inference_steps``.
        temperature: Of the drawn codes; 0 = most probable.
        top_k: Keep this many codes when drawing.
        top_p: Keep this much probability when drawing.
        order_temperature: Noise in the order of the slots, annealed to 0; 0 = most probable first.
        guidance: Weight of the prompt; 1 = none. Default 3.
        cfg_scale: Alias: guidance - 1.

    Raises:
        ConfigError: A value out of range, or words that contradict each other.
    """
    _check_preset(preset, None)
    passes = step_count(num_inference_steps, steps) or _IMAGE_STEPS[preset]
    scale = guidance_scale(guidance, cfg_scale)
    scale = _IMAGE_GUIDANCE if scale is None else scale
    if order_temperature < 0:
        raise ConfigError(f"order_temperature {order_temperature} must not be negative")
    return Parts(
        blocks=Whole(),
        schedule=Cosine(min(passes, slots)),
        selector=RandomTopK(order_temperature) if order_temperature else TopConfidence(),
        sampler=_sampler(temperature, top_k, top_p, reference=False),
        guidance=None if scale == 1 else Cfg(scale),
    )


def step_count(num_inference_steps: int | None, steps: int | None) -> int | None:
    """The number of passes, from the word or its alias.

    Raises:
        ConfigError: Both are given, or the number is below 1.
    """
    if num_inference_steps is not None and steps is not None:
        raise ConfigError("steps is another name of num_inference_steps: give one of them")
    passes = steps if num_inference_steps is None else num_inference_steps
    if passes is not None and passes < 1:
        raise ConfigError(f"num_inference_steps {passes} must be at least 1")
    return passes


def guidance_scale(guidance: float | None, cfg_scale: float | None) -> float | None:
    """Guidance with 1 = none, from the word or LLaDA's alias (``cfg_scale`` = guidance - 1).

    Raises:
        ConfigError: Both are given.
    """
    if guidance is not None and cfg_scale is not None:
        raise ConfigError("cfg_scale is guidance - 1: give one of them")
    return guidance if cfg_scale is None else 1 + cfg_scale


def _check_preset(preset: str, compat: str | None) -> None:
    if preset not in _IMAGE_STEPS:
        raise ConfigError(f"preset {preset!r}; known: {', '.join(_IMAGE_STEPS)}")
    if compat not in (None, "reference"):
        raise ConfigError(f"compat {compat!r}; known: reference")


def _check_divides(gen_length: int, block: int, steps: int | None) -> None:
    if gen_length % block:
        raise ConfigError(f"block_length {block} must divide gen_length {gen_length} with compat='reference'")
    blocks = gen_length // block
    if steps is not None and steps % blocks:
        raise ConfigError(f"num_inference_steps {steps} must be a multiple of the {blocks} blocks in reference mode")


def _text_order(
    preset: str, threshold: float | None, steps: int | None, remasking: str | None, reference: bool
) -> tuple[Schedule | None, Selector]:
    if remasking not in (None, "low_confidence", "random"):
        raise ConfigError(f"remasking {remasking!r}; known: low_confidence, random")
    if threshold is not None and (steps is not None or remasking is not None):
        other = "num_inference_steps" if steps is not None else "remasking"
        raise ConfigError(f"threshold and {other} contradict each other: both say which tokens are decided in a pass")
    if threshold is not None and threshold < 0:
        raise ConfigError(f"threshold {threshold} is a probability; above 1 means one token per pass")
    if preset == "exact" or steps is not None or remasking is not None:
        if threshold is not None:
            return None, Threshold(threshold)
        return Linear(steps, published=reference), Random() if remasking == "random" else TopConfidence(
            published_ties=reference
        )
    return None, Threshold(_THRESHOLD[preset] if threshold is None else threshold)


def _sampler(temperature: float, top_k: int | None, top_p: float | None, reference: bool) -> Sampler:
    cut = top_k is not None or top_p is not None
    if temperature < 0:
        raise ConfigError(f"temperature {temperature} must not be negative")
    if cut and (temperature == 0 or reference):
        why = "compat='reference' draws from all classes" if reference else "temperature 0 draws nothing"
        raise ConfigError(f"top_k and top_p cut off what is drawn, but {why}: set a temperature or leave them out")
    if temperature == 0:
        return Greedy(torch.float64 if reference else torch.float32)
    return Gumbel(temperature) if reference else Multinomial(temperature, top_k, top_p)
