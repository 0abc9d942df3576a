"""Published numbers to stand beside one's own, and what makes them comparable. Facts, with their source.

A number of another protocol, another count of images or another answer parser is another number; `comparison` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmdiff.errors import ConfigError

__all__ = ["PUBLISHED", "Published", "comparison"]


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        name: Model and setting.
        value: The number, in the measure's own unit.
        source: Where it was published.
        more: Further columns as they are quoted.
    """

    name: str
    value: float
    source: str
    more: str = ""


_EMIGM = "eMIGM paper, table 2 or 3"
_GENEVAL = "GenEval README"
_DIMOO = "Lumina-DiMOO README"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "imagenet256": (
        Published("eMIGM-XS, 128 steps", 3.62, _EMIGM, "sFID 5.47, IS 224.91, precision 0.80, recall 0.51"),
        Published("eMIGM-S, 128 steps", 2.87, _EMIGM, "sFID 5.53, IS 254.48, precision 0.80, recall 0.54"),
        Published("eMIGM-B, 128 steps", 2.32, _EMIGM, "sFID 4.63, IS 278.97, precision 0.81, recall 0.57"),
        Published("eMIGM-L, 128 steps", 1.72, _EMIGM, "sFID 4.63, IS 304.16, precision 0.80, recall 0.60"),
        Published("eMIGM-H, 128 steps", 1.57, _EMIGM, "sFID 4.68, IS 305.99, precision 0.80, recall 0.63"),
        Published("MAR-B", 2.31, "MAR paper", "IS 281.7, precision 0.82, recall 0.57"),
        Published("MAR-L", 1.78, "MAR paper", "IS 296.0, precision 0.81, recall 0.60"),
        Published("MAR-H", 1.55, "MAR paper", "IS 303.7, precision 0.81, recall 0.62"),
        Published("DiT-XL/2", 2.27, _EMIGM),
        Published("MaskGIT, 8 steps", 6.18, "MaskGIT paper"),
        Published("ADM-G-U", 3.94, "guided-diffusion README", "sFID 6.14, IS 215.84, precision 0.83, recall 0.53"),
    ),
    "imagenet512": (
        Published("eMIGM-XS, 64 steps", 4.45, _EMIGM),
        Published("eMIGM-S, 64 steps", 3.29, _EMIGM),
        Published("eMIGM-B, 64 steps", 2.31, _EMIGM),
        Published("eMIGM-L, 64 steps", 1.77, _EMIGM),
        Published("MAR", 1.73, _EMIGM),
        Published("DiT-XL/2", 3.04, _EMIGM),
        Published("MaskGIT, 12 steps", 7.32, "MaskGIT paper"),
    ),
    "mmmu": (
        Published("LLaDA-V 8B", 0.486, "LLaDA-V paper", "MMMU-Pro standard 0.352, vision 0.186"),
        Published("LLaMA3-V 8B", 0.454, "LLaDA-V paper"),
        Published("LaViDa-LLaDA", 0.433, "LaViDa paper"),
        Published("LaViDa-Dream", 0.426, "LaViDa paper"),
        Published("MMaDA-8B", 0.302, "MMaDA README", "VLMEvalKit: another parser"),
        Published("Lumina-DiMOO 8B", 0.586, _DIMOO, "VLMEvalKit with a judge model"),
        Published("always A", 242 / 900, "counted from the validation answers"),
    ),
    "geneval": (
        Published("CLIP retrieval", 0.35, _GENEVAL),
        Published("minDALL-E", 0.23, _GENEVAL),
        Published("SD 1.5", 0.43, _GENEVAL),
        Published("SD 2.1", 0.50, _GENEVAL),
        Published("SDXL", 0.55, _GENEVAL),
        Published("Show-o 1.3B", 0.53, "Show-o README"),
        Published("MMaDA 8B", 0.63, "MMaDA README"),
        Published("D-DiT 2B", 0.65, _DIMOO),
        Published("Lumina-DiMOO 8B", 0.88, _DIMOO),
    ),
}
"""Benchmark -> numbers."""


def comparison(benchmark: str, own: float, *, lower_is_better: bool) -> Sequence[tuple[str, str, str, str]]:
    """Rows (name, value, source, more) with one's own number in its place, best first.

    Raises:
        ConfigError: Nothing is published here for that benchmark.
    """
    if benchmark not in PUBLISHED:
        raise ConfigError(f"nothing published is known for {benchmark!r}; known: {', '.join(PUBLISHED)}")
    rows = [*PUBLISHED[benchmark], Published("this run", own, "")]
    ordered = sorted(rows, key=lambda p: p.value if lower_is_better else -p.value)
    return [(p.name, f"{p.value:.3f}" if abs(p.value) <= 1 else f"{p.value:.2f}", p.source, p.more) for p in ordered]
