"""The demo's report: one self-contained page that opens anywhere, with nothing to fetch and no script.

This file says what is on the page; `eval.html` how a page looks; `eval.svg` how a line is drawn. All numbers and
pictures are handed in: nothing is measured here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .html import card, escape, page, picture, png_size, section, table
from .svg import Curve, line_chart, range_mark, short
from .vqa import normalise_exact

__all__ = [
    "CaptionItem",
    "Chart",
    "Curve",
    "DemoReport",
    "Gate",
    "Grid",
    "Neighbours",
    "QaItem",
    "TableSpec",
    "loss_charts",
    "render",
    "write_report",
]


_NARROW = 552
"""Widest picture that shares a row with another, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A promise and whether it was kept.

    Attributes:
        name: What is promised, such as "caption is exactly right".
        value: What was measured.
        threshold: What was promised.
        passed: Whether the promise was kept.
        lower: The bound that was held against the threshold (one-sided 95 %); None where there is no sample.
        note: How it was measured, N included.
        baselines: ``(name, value)``: untrained model, model that sees no image, commonest answer, chance.
        percent: Whether numbers are shares, to be shown as percentages.
        smaller_is_better: Whether the value must be at most the threshold.
    """

    name: str
    value: float
    threshold: float
    passed: bool
    lower: float | None = None
    note: str = ""
    baselines: tuple[tuple[str, float], ...] = ()
    percent: bool = True
    smaller_is_better: bool = False


@dataclass(frozen=True, kw_only=True)
class QaItem:
    """One question about one picture.

    Attributes:
        image: PNG.
        question: As asked.
        answer: As answered.
        truth: The true answer.
        blind_answer: Answer of the model that sees no image; None if there is none.
    """

    image: bytes
    question: str
    answer: str
    truth: str
    blind_answer: str | None = None


@dataclass(frozen=True, kw_only=True)
class CaptionItem:
    """One caption.

    Attributes:
        image: PNG.
        caption: As written by the model.
        truth: The true caption.
        note: Such as "novel concept".
    """

    image: bytes
    caption: str
    truth: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A line chart.

    Attributes:
        title: Above it.
        curves: Its lines.
        x_label: Of the horizontal axis.
        y_label: What the values are, for readers who cannot see it.
        note: Below it.
    """

    title: str
    curves: tuple[Curve, ...]
    x_label: str = "samples seen"
    y_label: str = "loss"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A picture made of many.

    Attributes:
        title: Above it.
        png: The picture.
        note: What is in it: classes or prompts, novel or known.
    """

    title: str
    png: bytes
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table of text.

    Attributes:
        title: Above it.
        columns: Heads.
        rows: Cells; the first names the row.
        note: Below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """A generated image and the training images nearest to it.

    Attributes:
        image: PNG of the generated one.
        label: What was asked for.
        nearest: ``(PNG, caption)`` such as its name and distance, nearest first.
    """

    image: bytes
    label: str
    nearest: tuple[tuple[bytes, str], ...]


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """Everything on the page; an empty part leaves its section out.

    Attributes:
        title: Head of the page.
        summary: One or two sentences below it.
        facts: Short facts beside the verdict: date, seconds, machine.
        gates: The promises.
        charts: Loss curves; see `loss_charts`.
        progress: ``(samples seen, PNG)`` of the same prompts as training went on.
        captions: Captions beside their pictures.
        answers: Answers beside their pictures.
        grids: Generated images.
        tables: Distances and other tables.
        neighbours: Nearest training images of generated ones.
        environment: Versions, threads, seconds per stage, hashes of configurations.
        commands: What to run to get this page again.
        notes: What the numbers do not say, one sentence each.
    """

    title: str
    summary: str = ""
    facts: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = ()
    charts: tuple[Chart, ...] = ()
    progress: tuple[tuple[int, bytes], ...] = ()
    captions: tuple[CaptionItem, ...] = ()
    answers: tuple[QaItem, ...] = ()
    grids: tuple[Grid, ...] = ()
    tables: tuple[TableSpec, ...] = ()
    neighbours: tuple[Neighbours, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    commands: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def loss_charts(records: Sequence[Mapping[str, Any]], *, stage: str = "") -> tuple[Chart, ...]:
    """One chart per task from the records of ``log.jsonl``.

    Args:
        records: Mappings with ``samples`` and ``losses`` (task -> value); records without losses are passed over.
        stage: Name of the run, put before each title.
    """
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for record in records:
        for task, value in (record.get("losses") or {}).items():
            if "samples" in record and isinstance(value, (int, float)):
                xs, ys = lines.setdefault(str(task), ([], []))
                xs.append(float(record["samples"]))
                ys.append(float(value))
    head = f"{stage}: " if stage else ""
    curves = [Curve(name=task, xs=xs, ys=ys) for task, (xs, ys) in sorted(lines.items())]
    return tuple(Chart(title=f"{head}{curve.name}", curves=(curve,)) for curve in curves)


def write_report(data: DemoReport, path: Path) -> Path:
    """Write the page; it appears whole or not at all.

    Raises:
        ConfigError: One of the pictures is no PNG.
    """
    text = render(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)
    return path


def render(data: DemoReport) -> str:
    """The page as text; the same data gives the same bytes."""
    parts = [
        ("verdict", "Verdict", bool(data.gates), _gates),
        ("learning", "Learning", bool(data.charts or data.progress), _learning),
        ("captions", "Captions", bool(data.captions), _captions),
        ("answers", "Answers", bool(data.answers), _answers),
        ("pictures", "Pictures", bool(data.grids), _grids),
        ("distances", "Distances", bool(data.tables), _tables),
        ("originality", "Originality", bool(data.neighbours), _neighbours),
        ("run", "This run", bool(data.environment or data.commands or data.notes), _run),
    ]
    sections = [(anchor, name, build(data)) for anchor, name, present, build in parts if present]
    return page(data.title, _header(data), sections)


def _header(data: DemoReport) -> str:
    chips = [f'<span class="chip">{escape(fact)}</span>' for fact in data.facts]
    if data.gates:
        kept = sum(g.passed for g in data.gates)
        state = "good" if kept == len(data.gates) else "bad"
        chips.insert(0, f'<span class="chip {state}">{kept} of {len(data.gates)} promises kept</span>')
    summary = f'<p class="lead">{escape(data.summary)}</p>' if data.summary else ""
    return f'<h1>{escape(data.title)}</h1>{summary}<div class="facts">{"".join(chips)}</div>'


def _gates(data: DemoReport) -> str:
    names = list(dict.fromkeys(name for g in data.gates for name, _ in g.baselines))
    columns = ["Promise", "", "Measured", "95 % bound", "Promised", *names, "Kept"]
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    rows = "".join(_gate_row(g, names) for g in data.gates)
    body = f'<div class="scroll"><table class="gates"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    note = "Dot: measured; bar: to its one-sided 95 % bound; dashed line: promised; rings: baselines."
    lead = "What this run promised, what it measured, and what models that know nothing score on the same items."
    return section("verdict", "Verdict", f'<div class="card">{body}<p class="note">{note}</p></div>', lead)


def _gate_row(gate: Gate, names: Sequence[str]) -> str:
    def show(number: float | None) -> str:
        if number is None:
            return "\N{EN DASH}"
        return f"{100 * number:.1f} %" if gate.percent else short(number)

    known = dict(gate.baselines)
    cells = [("Measured", f"<strong>{show(gate.value)}</strong>"), ("95 % bound", show(gate.lower))]
    side = "\N{LESS-THAN OR EQUAL TO}" if gate.smaller_is_better else "\N{GREATER-THAN OR EQUAL TO}"
    cells.append(("Promised", f"{side} {show(gate.threshold)}"))
    cells += [(name, show(known.get(name))) for name in names]
    note = f'<span class="sub">{escape(gate.note)}</span>' if gate.note else ""
    chart = range_mark(gate.value, gate.lower, gate.threshold, gate.baselines, passed=gate.passed, share=gate.percent)
    body = "".join(_cell(name, text) for name, text in cells)
    mark = _mark(gate.passed, "kept", "missed")
    return f'<tr><th scope="row">{escape(gate.name)}{note}</th><td class="wide">{chart}</td>{body}<td>{mark}</td></tr>'


def _cell(name: str, text: str) -> str:
    css = "num none" if text == "\N{EN DASH}" else "num"
    return f'<td class="{css}" data-name="{escape(name, quote=True)}">{text}</td>'


def _learning(data: DemoReport) -> str:
    charts = "".join(_chart(chart) for chart in data.charts)
    body = f'<div class="cols">{charts}</div>' if charts else ""
    if data.progress:
        frames = "".join(
            f"<figure>{picture(png, f'samples after {seen:,}', css='gridpic', width=300)}"
            f"<figcaption>after {seen:,} samples</figcaption></figure>"
            for seen, png in sorted(data.progress, key=lambda p: p[0])
        )
        gap = ' style="margin-top:16px"' if charts else ""
        title = "<h3>The same prompts and seeds as training goes on</h3>"
        body += f'<div class="card"{gap}>{title}<div class="film">{frames}</div></div>'
    return section("learning", "Learning", body, "Loss of each task; faint: as logged, bold: running mean.")


def _chart(chart: Chart) -> str:
    title = escape(chart.title)
    last = chart.curves[0].ys[-1] if len(chart.curves) == 1 and chart.curves[0].ys else None
    now = f'<span class="now">{short(last)}</span>' if last is not None else ""
    legend = ""
    if len(chart.curves) > 1:
        keys = "".join(f'<li><i class="s{i % 6}"></i>{escape(c.name)}</li>' for i, c in enumerate(chart.curves))
        legend = f'<ul class="legend">{keys}</ul>'
    drawing = line_chart(chart.curves, x_label=chart.x_label, y_label=chart.y_label)
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    return f'<div class="card"><h3>{title}{now}</h3>{legend}{drawing}{note}</div>'


def _captions(data: DemoReport) -> str:
    def item(c: CaptionItem) -> str:
        right = normalise_exact(c.caption) == normalise_exact(c.truth)
        note = f'<p class="q">{escape(c.note)}</p>' if c.note else ""
        truth = "" if right else f'<p class="t">truth: <b>{escape(c.truth)}</b></p>'
        said = _marked_words(c.caption, c.truth)
        return _item(c.image, c.truth, right, f'{note}<p class="a">{said}</p>{truth}')

    right = sum(normalise_exact(c.caption) == normalise_exact(c.truth) for c in data.captions)
    lead = (
        f"Shown: {right} of {len(data.captions)} right, word for word. Words that are not in the truth are underlined."
    )
    body = "".join(item(c) for c in data.captions)
    return section("captions", "Captions", f'<div class="items">{body}</div>', lead)


def _answers(data: DemoReport) -> str:
    def item(q: QaItem) -> str:
        right = normalise_exact(q.answer) == normalise_exact(q.truth)
        truth = "" if right else f'<p class="t">truth: <b>{escape(q.truth)}</b></p>'
        blind = "" if q.blind_answer is None else f'<p class="t">without the picture: {escape(q.blind_answer)}</p>'
        said = escape(q.answer) or "<i>(nothing)</i>"
        text = f'<p class="q">{escape(q.question)}</p><p class="a">{said}</p>{truth}{blind}'
        return _item(q.image, q.truth, right, text)

    right = sum(normalise_exact(q.answer) == normalise_exact(q.truth) for q in data.answers)
    lead = f"Shown: {right} of {len(data.answers)} right."
    body = "".join(item(q) for q in data.answers)
    return section("answers", "Answers", f'<div class="items">{body}</div>', lead)


def _grids(data: DemoReport) -> str:
    body = "".join(
        card(g.title, picture(g.png, g.title, css="gridpic"), g.note, wide=png_size(g.png)[0] > _NARROW)
        for g in data.grids
    )
    body = f'<div class="cols two">{body}</div>'
    return section("pictures", "Pictures", body, "Drawn by the model, not chosen: the seeds are the first ones.")


def _tables(data: DemoReport) -> str:
    body = "".join(card(t.title, table(t.columns, t.rows), t.note) for t in data.tables)
    lead = "Distances between sets of images mean something only beside their floor: real against real at the same N."
    return section("distances", "Distances", body, lead)


def _neighbours(data: DemoReport) -> str:
    def one(n: Neighbours) -> str:
        near = "".join(
            f"<figure>{picture(png, text, css='pic', width=72)}<figcaption>{escape(text)}</figcaption></figure>"
            for png, text in n.nearest
        )
        drawn = picture(n.image, n.label, css="pic", width=72)
        own = f'<figure class="from">{drawn}<figcaption>generated</figcaption></figure>'
        return card(n.label, f'<div class="near">{own}{near}</div>')

    lead = "Each generated picture and the training pictures nearest to it: is it drawn, or remembered?"
    body = "".join(one(n) for n in data.neighbours)
    return section("originality", "Originality", f'<div class="cols two">{body}</div>', lead)


def _run(data: DemoReport) -> str:
    body = ""
    if data.notes:
        body += card("What these numbers do not say", "".join(f"<p>{escape(n)}</p>" for n in data.notes))
    if data.commands:
        body += card("Run it again", f"<pre>{escape(chr(10).join(data.commands))}</pre>")
    if data.environment:
        pairs = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in data.environment)
        body += card("Environment", f"<dl>{pairs}</dl>")
    return section("run", "This run", body)


def _item(image: bytes, alt: str, right: bool, text: str) -> str:
    mark = _mark(right, "right", "wrong")
    return f'<div class="item">{picture(image, alt, css="pic", width=84)}<div>{mark}{text}</div></div>'


def _mark(good: bool, yes: str, no: str) -> str:
    sign, word, css = ("\N{CHECK MARK}", yes, "good") if good else ("\N{BALLOT X}", no, "bad")
    return f'<span class="mark {css}">{sign} {word}</span>'


def _marked_words(text: str, truth: str) -> str:
    """The text with the words underlined that the truth does not have."""
    known = set(re.findall(r"\w+", truth.casefold()))
    out = []
    for piece in re.findall(r"\w+|\W+", text):
        wrong = piece[0].isalnum() and piece.casefold() not in known
        out.append(f"<u>{escape(piece)}</u>" if wrong else escape(piece))
    return "".join(out) or "<i>(nothing)</i>"
