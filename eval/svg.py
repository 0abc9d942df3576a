"""Line charts and range marks as inline SVG: our own few lines, no plotting library, colours from the page's CSS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Curve", "line_chart", "range_mark", "short"]

_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 10, 38
_POINTS = 240
_COLOURS = 6


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: For the legend.
        xs: Places, increasing, such as samples seen.
        ys: Values; those that are not finite are left out.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def line_chart(
    curves: Sequence[Curve], *, x_label: str, y_label: str, smooth: bool = True, reach: Sequence[float] = ()
) -> str:
    """An SVG element with axes, one line per curve and, where ``smooth``, the raw values as a faint line behind.

    ``reach`` holds values that the vertical axis includes too, so that several charts can have one scale.
    """
    points = [_finite(curve) for curve in curves]
    everything = [p for line in points for p in line]
    if not everything:
        return '<p class="note">No values were logged.</p>'
    left, right, bottom = _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    to_x, x_ticks = _axis([x for x, _ in everything], left, right, 4, tight=True)
    to_y, y_ticks = _axis([*(y for _, y in everything), *reach], bottom, _TOP, 4)
    parts = []
    for tick in y_ticks:
        y = to_y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{to_x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{short(tick)}</text>'
        )
    middle = (left + right) / 2
    parts.append(f'<text class="axis" x="{middle:.0f}" y="{_HEIGHT - 3}" text-anchor="middle">{escape(x_label)}</text>')
    for number, line in enumerate(points):
        thin = _thinned(line)
        if smooth and len(thin) > 8:
            parts.append(_path(thin, to_x, to_y, f"raw s{number % _COLOURS}"))
            thin = _smoothed(thin)
        if thin:
            parts.append(_path(thin, to_x, to_y, f"line s{number % _COLOURS}"))
    names = ", ".join(c.name for c in curves)
    label = escape(f"{y_label} against {x_label}: {names}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def range_mark(
    value: float,
    lower: float | None,
    threshold: float,
    baselines: Sequence[tuple[str, float]],
    *,
    passed: bool,
    share: bool = True,
) -> str:
    """A one-line picture of a gate: value with its bound, the threshold, and rings for the baselines.

    Args:
        value: What was measured.
        lower: Its bound; None for none.
        threshold: What was promised.
        baselines: ``(name, value)`` of each ring.
        passed: Whether it is drawn as kept or missed.
        share: Whether the rail runs from 0 to 1; otherwise from 0 to the largest number.
    """
    numbers = [value, threshold, *(v for _, v in baselines), *([lower] if lower is not None else [])]
    finite = [n for n in numbers if math.isfinite(n)]
    low, high = min(0.0, *finite), max(1.0 if share else 0.0, *finite)
    span = (high - low) or 1.0

    def at(number: float) -> float:
        return 6 + 188 * (min(max(number, low), high) - low) / span if math.isfinite(number) else 6

    parts = ['<line class="rail" x1="6" x2="194" y1="14" y2="14"/>']
    for name, number in baselines:
        title = escape(f"{name}: {short(number)}")
        parts.append(f'<circle class="base" cx="{at(number):.1f}" cy="14" r="3"><title>{title}</title></circle>')
    state = "good" if passed else "bad"
    if lower is not None:
        left, right = sorted((at(lower), at(value)))
        parts.append(f'<line class="whisker {state}" x1="{left:.1f}" x2="{right:.1f}" y1="14" y2="14"/>')
        parts.append(f'<line class="cap {state}" x1="{at(lower):.1f}" x2="{at(lower):.1f}" y1="9" y2="19"/>')
    parts.append(f'<line class="threshold" x1="{at(threshold):.1f}" x2="{at(threshold):.1f}" y1="3" y2="25"/>')
    parts.append(f'<circle class="dot {state}" cx="{at(value):.1f}" cy="14" r="5"/>')
    return f'<svg class="range" viewBox="0 0 200 28" aria-hidden="true">{"".join(parts)}</svg>'


def short(number: float) -> str:
    """A number for a tick or a table: 1234567 -> 1.23M, 0.5 -> 0.5."""
    if not math.isfinite(number):
        return "\N{EN DASH}"
    size = abs(number)
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}" if size >= 1e-4 or not size else f"{number:.1e}"


def _finite(curve: Curve) -> list[tuple[float, float]]:
    pairs = zip(curve.xs, curve.ys, strict=True)
    return [(float(x), float(y)) for x, y in pairs if math.isfinite(x) and math.isfinite(y)]


def _axis(
    values: list[float], start: float, end: float, count: int, *, tight: bool = False
) -> tuple[Callable[[float], float], list[float]]:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9) if tight else math.floor(low / step + 1e-9)
    last = math.floor(high / step + 1e-9) if tight else math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    if not tight:
        low, high = ticks[0], ticks[-1]
    return lambda v: start + (end - start) * (v - low) / (high - low), ticks


def _thinned(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS` points: means of runs, so that a spike is dampened and not lost or invented."""
    if len(line) <= _POINTS:
        return line
    edges = [round(i * len(line) / _POINTS) for i in range(_POINTS + 1)]
    runs = [line[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(x for x, _ in r) / len(r), sum(y for _, y in r) / len(r)) for r in runs]


def _smoothed(line: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving mean over about a twelfth of the line, narrower at the ends."""
    reach = max(1, len(line) // 24)
    out = []
    for i, (x, _) in enumerate(line):
        side = min(reach, i, len(line) - 1 - i)
        window = [y for _, y in line[i - side : i + side + 1]]
        out.append((x, sum(window) / len(window)))
    return out


def _path(
    line: list[tuple[float, float]], to_x: Callable[[float], float], to_y: Callable[[float], float], css: str
) -> str:
    steps = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in line)
    if len(line) == 1:
        x, y = line[0]
        return f'<circle class="{css} point" cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3"/>'
    return f'<polyline class="{css}" points="{steps}"/>'
