"""Generation words of networks that draw codes of their text vocabulary: MMaDA.

Defaults are those of the published inference.

Source: MMaDA (arXiv 2505.15809), published inference code.
"""

from __future__ import annotations

from mmdiff.errors import ConfigError
from mmdiff.sampling.blocks import Whole
from mmdiff.sampling.guidance import Cfg
from mmdiff.sampling.maskgit import MaskRatio
from mmdiff.sampling.presets import Parts, guidance_scale, step_count
from mmdiff.sampling.samplers import Multinomial
from mmdiff.sampling.selectors import RandomTopK, TopConfidence

__all__ = ["vocabulary_parts"]

_STEPS = {"exact": 15, "fast": 15, "turbo": 8}
_GUIDANCE = 4.5
_SCHEDULES = {"cosine": "cosine", "linear": "uniform", "pow2": "pow2", "sigmoid": "sigmoid"}


def vocabulary_parts(
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
    """Parts for image codes: surest first, with noise that falls fast.

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
    if preset not in _STEPS:
        raise ConfigError(f"preset {preset!r}; known: {', '.join(_STEPS)}")
    if mask_schedule not in _SCHEDULES:
        raise ConfigError(f"mask_schedule {mask_schedule!r}; known: {', '.join(_SCHEDULES)}")
    if temperature <= 0 or order_temperature < 0:
        raise ConfigError(
            f"temperature {temperature} must be above 0 (image codes are drawn, not chosen), and order_temperature "
            f"{order_temperature} must not be negative"
        )
    passes = min(step_count(num_inference_steps, steps) or _STEPS[preset], slots)
    scale = guidance_scale(guidance, cfg_scale)
    scale = _GUIDANCE if scale is None else scale
    noisy = RandomTopK(order_temperature, "compound", passes=passes)
    return Parts(
        blocks=Whole(),
        schedule=MaskRatio(passes, _SCHEDULES[mask_schedule], tokens=tokens),
        selector=noisy if order_temperature else TopConfidence(),
        sampler=Multinomial(temperature, top_k, top_p),
        guidance=None if scale == 1 else Cfg(scale),
    )
