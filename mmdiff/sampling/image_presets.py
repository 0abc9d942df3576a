"""Generation words of class-conditional image models: from what a user says to the parts of the engine.

Defaults are the published evaluation settings of each family: eMIGM (arXiv 2503.07197), MAR (arXiv 2406.11838),
MaskGIT-pytorch (arXiv 2310.14400), Halton-MaskGIT (arXiv 2503.17076).
"""

from __future__ import annotations

from typing import Any

from mmdiff import rng
from mmdiff.diffusion.guidance import RAMPS, GuidanceSchedule
from mmdiff.diffusion.mask_schedules import GAMMAS
from mmdiff.errors import ConfigError
from mmdiff.sampling.heads import Ddpm, DpmSolver
from mmdiff.sampling.maskgit import (
    Cumulative,
    HaltonCounts,
    MaskRatio,
    RampedCfg,
    Redraw,
    Rounded,
    Tempered,
    halton_multipliers,
)
from mmdiff.sampling.orders import Ordered, SharedReveal, halton_ranks, permuted
from mmdiff.sampling.presets import guidance_scale, step_count
from mmdiff.sampling.samplers import Multinomial
from mmdiff.sampling.schedules import Cosine, Independent
from mmdiff.sampling.selectors import Random, RandomTopK

__all__ = ["code_parts", "latent_parts"]

_LATENT = {
    # steps, head steps, interval of guidance
    "exact": (128, 14, (0.18, 0.6)),
    "fast": (16, 8, (0.1, 0.3)),
    "turbo": (8, 8, (0.1, 0.3)),
}
_MAR_STEPS = {"exact": 256, "fast": 64, "turbo": 32}
_CODE_STEPS = {"exact": 32, "fast": 16, "turbo": 8}
_EMIGM_GUIDANCE, _MAR_GUIDANCE, _CODE_GUIDANCE, _HALTON_GUIDANCE = 4.0, 3.0, 4.0, 3.0


def latent_parts(
    *,
    slots: int,
    rows: int,
    tokens: int,
    source: rng.Source,
    start: int = 1,
    mar: bool = False,
    preset: str = "fast",
    compat: str | None = None,
    num_inference_steps: int | None = None,
    steps: int | None = None,
    order: str | None = None,
    mask_schedule: str = "exp",
    guidance: float | None = None,
    cfg_scale: float | None = None,
    guidance_schedule: str | None = None,
    guidance_interval: tuple[float, float] | list[float] | None = None,
    solver: str | None = None,
    head_steps: int | None = None,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Parts for continuous tokens.

    Args:
        slots: Most tokens that are drawn in a row.
        rows: B.
        tokens: N.
        source: Draws an order that is fixed beforehand.
        start: Slots of the canvas before the image.
        mar: Whether the defaults are MAR's: cosine counts in a fixed random order, DDPM, guidance that grows.
        preset: ``exact`` the most steps that are published, ``fast`` 16 (MAR 64), ``turbo`` 8 (32).
        compat: ``"reference"``: all rows reveal as many tokens as the first, drawn from one generator.
        num_inference_steps: Passes of the network; never more than slots.
        steps: Alias of ``num_inference_steps``.
        order: ``random`` (each token by chance), ``mar`` (fixed counts, fixed random order), ``halton``.
        mask_schedule: gamma(t) of ``random``: linear, cosine, poly-0.5, exp, log.
        guidance: Weight of the class; 1 = none.
        cfg_scale: Alias: guidance - 1.
        guidance_schedule: How guidance grows: constant, linear, power, cubic, exp, cosine.
        guidance_interval: (low, high]: times at which a guided step ends; 1 is all noise.
        solver: ``dpm`` or ``ddpm``.
        head_steps: Evaluations of the head per token.
        temperature: Noise of ``ddpm``; 1 with ``dpm``.

    Raises:
        ConfigError: A value out of range, or words that contradict each other.
    """
    _known("preset", preset, tuple(_LATENT))
    _known("compat", compat, (None, "reference"))
    _known("mask_schedule", mask_schedule, tuple(GAMMAS))
    order = order or ("mar" if mar else "random")
    _known("order", order, ("random", "mar", "halton"))
    default, head, interval = (_MAR_STEPS[preset], 100, (0.0, 1.0)) if mar else _LATENT[preset]
    head = head if head_steps is None else head_steps
    passes = min(step_count(num_inference_steps, steps) or default, slots)
    scale = guidance_scale(guidance, cfg_scale)
    scale = (_MAR_GUIDANCE if mar else _EMIGM_GUIDANCE) if scale is None else scale
    low_high: Any = interval if guidance_interval is None else tuple(guidance_interval)
    if len(low_high) != 2:
        raise ConfigError(f"guidance_interval {list(low_high)} must be two numbers, such as [0.1, 0.3]")
    _known("guidance_schedule", guidance_schedule, (None, *RAMPS))
    ramp: Any = guidance_schedule or ("linear" if mar else "constant")
    return {
        **_latent_order(order, compat, mask_schedule, passes, rows, tokens, source, start),
        "sampler": _solver(solver or ("ddpm" if mar else "dpm"), head, temperature),
        "guidance": GuidanceSchedule(scale, ramp, low_high, reserve=int(order == "mar")),
    }


def code_parts(
    *,
    slots: int,
    grid: int,
    halton: bool = False,
    preset: str = "fast",
    num_inference_steps: int | None = None,
    steps: int | None = None,
    order: str | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    order_temperature: float | None = None,
    guidance: float | None = None,
    cfg_scale: float | None = None,
    guidance_schedule: str | None = None,
) -> dict[str, Any]:
    """Parts for discrete tokens of a class-conditional network.

    Args:
        slots: Most tokens that are drawn in a row.
        grid: Tokens per side.
        halton: Whether the defaults are Halton-MaskGIT's.
        preset: ``exact`` 32 passes, ``fast`` 16, ``turbo`` 8.
        num_inference_steps: Passes; never more than slots.
        steps: Alias of ``num_inference_steps``.
        order: ``confidence`` (surest first, with noise), ``halton`` (known tokens are drawn again in each pass),
            ``random``, ``google`` (the original MaskGIT's counts).
        temperature: Of the drawn codes.
        top_k: Keep this many codes when drawing.
        top_p: Keep this much probability when drawing.
        order_temperature: Noise in the order by confidence, annealed to 0. Default 4.5.
        guidance: Weight of the class; 1 = none.
        cfg_scale: Alias: guidance - 1.
        guidance_schedule: ``linear`` (none in the first pass) or ``constant``.

    Raises:
        ConfigError: A value out of range, or words that contradict each other.
    """
    _known("preset", preset, tuple(_CODE_STEPS))
    order = order or ("halton" if halton else "confidence")
    _known("order", order, ("confidence", "halton", "random", "google"))
    ramp = guidance_schedule or ("constant" if order == "halton" else "linear")
    _known("guidance_schedule", ramp, ("constant", "linear"))
    if temperature <= 0:
        raise ConfigError(f"temperature {temperature} must be above 0: image codes are drawn, not chosen")
    if order_temperature is not None and order not in ("confidence", "google"):
        raise ConfigError(f"order_temperature is noise in an order by confidence; order {order!r} has none")
    if order_temperature is not None and order_temperature < 0:
        raise ConfigError(f"order_temperature {order_temperature} must not be negative; 0 = no noise")
    passes = min(step_count(num_inference_steps, steps) or _CODE_STEPS[preset], slots)
    scale = guidance_scale(guidance, cfg_scale)
    scale = (_HALTON_GUIDANCE if halton else _CODE_GUIDANCE) if scale is None else scale
    return {
        **_code_order(order, passes, grid, 4.5 if order_temperature is None else order_temperature),
        "sampler": Multinomial(temperature, top_k, top_p),
        "guidance": None if scale == 1 else _code_guidance(scale, ramp),
    }


def _code_guidance(scale: float, ramp: str) -> Any:
    from mmdiff.sampling.guidance import Cfg

    return RampedCfg(scale) if ramp == "linear" else Cfg(scale)


def _code_order(order: str, passes: int, grid: int, noise: float) -> dict[str, Any]:
    if order == "halton":
        rank = Ordered(halton_ranks(grid, start=1))
        return {
            "schedule": HaltonCounts(passes),
            "selector": Tempered(rank, halton_multipliers(passes)),
            "editor": Redraw(),
        }
    if order == "random":
        return {"schedule": Cumulative(passes), "selector": Random()}
    if order == "google":
        return {"schedule": MaskRatio(passes), "selector": RandomTopK(noise)}
    return {"schedule": Rounded(passes), "selector": RandomTopK(noise, anneal="before")}


def _latent_order(
    order: str, compat: str | None, gamma: Any, passes: int, rows: int, tokens: int, source: rng.Source, start: int
) -> dict[str, Any]:
    if compat == "reference" and order == "random":
        return {"selector": SharedReveal(gamma, passes)}
    if order == "random":
        return {"schedule": Independent(gamma, passes), "selector": Random()}
    counts = Cosine(passes, precision="float64")
    if order == "mar":
        return {"schedule": counts, "selector": permuted(source, rows, tokens, start=start)}
    side = round(tokens**0.5)
    return {"schedule": counts, "selector": Ordered(halton_ranks(side, start=start))}


def _solver(name: str, steps: int, temperature: float) -> DpmSolver | Ddpm:
    _known("solver", name, ("dpm", "ddpm"))
    if name == "ddpm":
        return Ddpm(steps, temperature)
    if temperature != 1:
        raise ConfigError("temperature scales the noise of solver ddpm; dpm adds none: leave it out or take ddpm")
    return DpmSolver(steps)


def _known(word: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{word} {value!r}; known: {', '.join(str(c) for c in choices if c is not None)}")
