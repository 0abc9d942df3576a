"""Generation words of networks that draw codes of their text vocabulary: MMaDA and Lumina-DiMOO.

Defaults are those of the published inference.

Source: MMaDA (arXiv 2505.15809) and Lumina-DiMOO (arXiv 2510.06308), published inference code.
"""

from __future__ import annotations

from mmdiff.errors import ConfigError
from mmdiff.sampling.blocks import Whole
from mmdiff.sampling.caches import MaxLogit
from mmdiff.sampling.guidance import Cfg
from mmdiff.sampling.maskgit import MaskRatio
from mmdiff.sampling.presets import Parts, guidance_scale, step_count
from mmdiff.sampling.samplers import Greedy, Gumbel, Multinomial
from mmdiff.sampling.schedules import Cosine
from mmdiff.sampling.selectors import RandomTopK, TopConfidence

__all__ = ["lumina_parts", "mmada_parts"]

_MMADA_STEPS = {"exact": 15, "fast": 15, "turbo": 8}
_LUMINA_STEPS = {"exact": 64, "fast": 64, "turbo": 16}
_MMADA_GUIDANCE, _LUMINA_GUIDANCE = 4.5, 5.0
_SCHEDULES = {"cosine": "cosine", "linear": "uniform", "pow2": "pow2", "sigmoid": "sigmoid"}


def mmada_parts(
    *,
    slots: int,
    tokens: int,
    preset: str = "fast",
    num_inference_steps: int | None = None,
    steps: int | None = None,
    mask_schedule: str = "cosine",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    order_temperature: float = 1.0,
    guidance: float | None = None,
    cfg_scale: float | None = None,
) -> Parts:
    """Parts for MMaDA's image codes: surest first, with noise that falls fast.

    Args:
        slots: Image tokens to draw.
        tokens: N, image tokens of the whole picture; the schedule's share is taken of them.
        preset: ``exact`` and ``fast`` 15 passes, ``turbo`` 8.
        num_inference_steps: Passes; never more than slots.
        steps: Alias of ``num_inference_steps``.
        mask_schedule: cosine, linear, pow2 or sigmoid.
        temperature: Of the drawn codes.
        top_k: Keep this many codes when drawing.
        top_p: Keep this much probability when drawing.
        order_temperature: Noise in the order of the slots; 0 = most probable first.
        guidance: Weight of the prompt; 1 = none. Default 4.5.
        cfg_scale: Alias: guidance - 1.

    Raises:
        ConfigError: A value out of range, or words that contradict each other.
    """
    _known("mask_schedule", mask_schedule, tuple(_SCHEDULES))
    if temperature <= 0:
        raise ConfigError(f"temperature {temperature} must be above 0: image codes are drawn, not chosen")
    passes = _passes(preset, _MMADA_STEPS, num_inference_steps, steps, slots)
    scale = _scale(guidance, cfg_scale, _MMADA_GUIDANCE)
    return Parts(
        blocks=Whole(),
        schedule=MaskRatio(passes, _SCHEDULES[mask_schedule], tokens=tokens),
        selector=_order(RandomTopK(order_temperature, "compound", passes=passes)),
        sampler=Multinomial(temperature, top_k, top_p),
        guidance=None if scale == 1 else Cfg(scale),
    )


def lumina_parts(
    *,
    slots: int,
    tokens: int,
    preset: str = "fast",
    num_inference_steps: int | None = None,
    steps: int | None = None,
    temperature: float = 1.0,
    order_temperature: float = 1.0,
    guidance: float | None = None,
    cfg_scale: float | None = None,
) -> Parts:
    """Parts for Lumina-DiMOO's image codes: surest first, with noise that stays.

    Args:
        slots: Image tokens to draw.
        tokens: N, image tokens of the whole picture.
        preset: ``exact`` 64 passes; ``fast`` the same with the published cache; ``turbo`` 16 passes with it.
        num_inference_steps: Passes; never more than slots.
        steps: Alias of ``num_inference_steps``.
        temperature: Of the drawn codes; 0 = most probable.
        order_temperature: Noise in the order of the slots; 0 = most probable first.
        guidance: Weight of the prompt; 1 = none. Default 5.
        cfg_scale: Alias: guidance - 1.

    Raises:
        ConfigError: A value out of range, or words that contradict each other.
    """
    if temperature < 0:
        raise ConfigError(f"temperature {temperature} must not be negative")
    passes = _passes(preset, _LUMINA_STEPS, num_inference_steps, steps, slots)
    scale = _scale(guidance, cfg_scale, _LUMINA_GUIDANCE)
    return Parts(
        blocks=Whole(),
        schedule=Cosine(passes),
        selector=_order(RandomTopK(order_temperature, "constant", passes=passes)),
        sampler=Gumbel(temperature) if temperature else Greedy(),
        cache=None if preset == "exact" else MaxLogit(passes),
        guidance=None if scale == 1 else Cfg(scale),
    )


def _passes(preset: str, known: dict[str, int], num_inference_steps: int | None, steps: int | None, slots: int) -> int:
    _known("preset", preset, tuple(known))
    return min(step_count(num_inference_steps, steps) or known[preset], slots)


def _scale(guidance: float | None, cfg_scale: float | None, default: float) -> float:
    said = guidance_scale(guidance, cfg_scale)
    return default if said is None else said


def _order(noisy: RandomTopK) -> RandomTopK | TopConfidence:
    if noisy.temperature < 0:
        raise ConfigError(f"order_temperature {noisy.temperature} must not be negative")
    return noisy if noisy.temperature else TopConfidence()


def _known(word: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{word} {value!r}; known: {', '.join(choices)}")
