"""Pictures of coordinate checks and sweeps: charts of `eval.svg` on a page, in one SVG, or in a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from mmdiff.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from eval.svg import Curve
    from mmdiff.commands.mup_sweep import Sweep
    from mmdiff.scale.coordinates import CoordReport

__all__ = ["Chart", "draw", "draw_check", "draw_sweep"]

Chart = tuple[str, str]
"""(title, SVG element)."""

_RULES = {"sp": "standard parametrisation", "mup": "muP", "depth": "muP, width and depth"}
_CELL = (340, 210)
_HEAD = 30
_STYLE = (
    "text{font:11px sans-serif;fill:#5b6472}.title{font:600 13px sans-serif;fill:#14181f}"
    ".grid{stroke:#e3e6eb}.line{fill:none;stroke-width:1.6}"
    ".s0{stroke:#4f46e5}.s1{stroke:#0d9488}.s2{stroke:#d97706}.s3{stroke:#db2777}.s4{stroke:#0284c7}.s5{stroke:#65a30d}"
)


def draw_check(path: Path, reports: Mapping[str, CoordReport], title: str) -> None:
    """Draw coordinate checks, a row of charts per form and a chart per step.

    Raises:
        ConfigError: The file's suffix is none that can be drawn.
    """
    groups = [
        (f"{name}, t = {t}: |slope| up to {_steepest(report, t):.2f}", _module_lines(report, t))
        for name, report in reports.items()
        for t in _steps(report)
    ]
    charts = _charts(groups, x_label="log2 width", y_label="log2 size")
    notes = [f"{name}: {report.verdict()}" for name, report in reports.items()]
    scale = "Upwards: log2 of mean |x|, from 0 at the smallest width, on one scale; a line for each module's output."
    per_row = max((len(_steps(report)) for report in reports.values()), default=1)
    draw(path, charts, title, [*notes, scale], per_row=per_row)


def draw_sweep(path: Path, sweep: Sweep) -> None:
    """Draw loss against rate, a chart per rule and a line per width; errors as in `draw_check`."""
    from eval.svg import Curve

    lrs = sorted(sweep.grid.lrs)
    xs = [math.log2(lr) for lr in lrs]
    groups = [
        (
            f"{_RULES[rule]}: loss",
            [Curve(name=str(w), xs=xs, ys=[sweep.loss(rule, w, lr) for lr in lrs]) for w in sweep.grid.widths],
        )
        for rule in sweep.grid.rules
    ]
    charts = _charts(groups, x_label="log2 learning rate", y_label="loss")
    names = [f"width {width}" for width in sweep.grid.widths]
    moved = sweep.table().splitlines()[-len(charts) :]
    draw(path, charts, "Learning rate against width", moved, legend=names, per_row=len(charts))


def draw(
    path: Path,
    charts: Sequence[Chart],
    title: str,
    notes: Sequence[str],
    *,
    legend: Sequence[str] = (),
    per_row: int = 4,
) -> None:
    """Write charts to a file: a page (``.html``), or one picture (``.svg``, ``.png``).

    ``legend`` names the lines, which are the same in every chart.

    Raises:
        ConfigError: Another suffix.
        MissingExtraError: PNG without the package that draws it.
    """
    from mmdiff.io.atomic import save_text

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".html":
        save_text(path, _page(charts, title, notes, legend, per_row))
    elif path.suffix == ".svg":
        save_text(path, _picture(charts, notes, legend, per_row))
    elif path.suffix == ".png":
        path.write_bytes(_png(_picture(charts, notes, legend, per_row)))
    else:
        raise ConfigError(f"{path}: a plot is an .html, .svg or .png file")


def _steps(report: CoordReport) -> list[int]:
    return sorted({c.t for c in report.curves})


def _steepest(report: CoordReport, t: int) -> float:
    return max((abs(c.slope or 0.0) for c in report.curves if c.t == t), default=0.0)


def _module_lines(report: CoordReport, t: int) -> list[Curve]:
    """Log2 of every module's mean |x| at a step, moved to 0 at the smallest width."""
    from eval.svg import Curve

    xs = [math.log2(w) for w in report.widths]
    lines = []
    for c in report.curves:
        if c.t == t and c.slope is not None and math.isfinite(c.slope):
            means = [math.log2(fmean(row)) for row in c.sizes]
            lines.append(Curve(name=c.module, xs=xs, ys=[m - means[0] for m in means]))
    return lines


def _charts(groups: Sequence[tuple[str, list[Curve]]], *, x_label: str, y_label: str) -> list[Chart]:
    """A chart per group of lines, all on one vertical scale."""
    from eval.svg import line_chart

    reach = [y for _, lines in groups for line in lines for y in line.ys if math.isfinite(y)]
    ends = [min(reach), max(reach)] if reach else []
    return [
        (title, line_chart(lines, x_label=x_label, y_label=y_label, smooth=False, reach=ends))
        for title, lines in groups
    ]


def _page(charts: Sequence[Chart], title: str, notes: Sequence[str], legend: Sequence[str], per_row: int) -> str:
    from eval.html import card, page, section

    boxes = "".join(card(name, svg) for name, svg in charts)
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    keys = "".join(f'<li><i class="s{i % 6}"></i>{escape(name)}</li>' for i, name in enumerate(legend))
    key = f'<ul class="legend">{keys}</ul>' if legend else ""
    columns = f"grid-template-columns:repeat({per_row},minmax(0,1fr))"
    body = f'{key}<div class="cols" style="{columns}">{boxes}</div>'
    return page(title, f"<h1>{escape(title)}</h1>{said}", [("charts", "Charts", section("charts", "Charts", body))])


def _picture(charts: Sequence[Chart], notes: Sequence[str], legend: Sequence[str], per_row: int) -> str:
    """All charts in one SVG, sentences below."""
    width, height = _CELL
    columns = min(per_row, len(charts))
    rows = math.ceil(len(charts) / columns)
    parts = []
    for i, (name, svg) in enumerate(charts):
        x, y = i % columns * width, i // columns * (height + _HEAD)
        parts.append(f'<text class="title" x="{x + 40}" y="{y + 18}">{escape(name)}</text>')
        place = f'<svg x="{x}" y="{y + _HEAD - 6}" width="{width}" height="{height}" '
        parts.append(svg.replace("<svg ", place, 1) if svg.startswith("<svg ") else "")
        parts += [_key(x + width - 90, y + 40 + 15 * number, number, line) for number, line in enumerate(legend)]
    bottom = rows * (height + _HEAD)
    parts += [f'<text x="12" y="{bottom + 18 + 16 * i}">{escape(note)}</text>' for i, note in enumerate(notes)]
    size = f"0 0 {columns * width} {bottom + 24 + 16 * len(notes)}"
    white = '<rect width="100%" height="100%" fill="#fff"/>'
    inside = f"<style>{_STYLE}</style>{white}{''.join(parts)}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}">{inside}</svg>\n'


def _key(x: int, y: int, number: int, name: str) -> str:
    """An entry of the legend: a piece of the line and its name."""
    line = f'<line class="line s{number % 6}" x1="{x}" x2="{x + 16}" y1="{y}" y2="{y}"/>'
    return f'{line}<text x="{x + 21}" y="{y + 4}">{escape(name)}</text>'


def _png(svg: str) -> bytes:
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise MissingExtraError("resvg_py", "pack", "to draw a PNG; .svg and .html need nothing") from None
    return bytes(resvg_py.svg_to_bytes(svg_string=svg))
