"""The page of one evaluation: numbers, tables, bars, and pictures beside what was said about them.

Parts are plain data; `eval.html` knows how a page looks. The same parts give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .html import card, escape, page, picture, section, table

__all__ = ["Bars", "Gallery", "Line", "Shown", "Table", "render", "thumbnail"]

_THUMBNAIL = 128


@dataclass(frozen=True, kw_only=True)
class Line:
    """One headline number.

    Attributes:
        name: What it is.
        value: As text.
        note: How it is to be read.
    """

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table.

    Attributes:
        title: Above it.
        columns: Heads.
        rows: Cells.
        note: Below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Shares as bars, such as accuracies by subject.

    Attributes:
        title: Above them.
        shares: (name, share 0...1, text behind the bar).
        note: Below them.
    """

    title: str
    shares: tuple[tuple[str, float, str], ...]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One item with its pictures.

    Attributes:
        pictures: PNG and caption of each.
        text: Lines below them.
        good: Whether it is right; None where there is no right and wrong.
    """

    pictures: tuple[tuple[bytes, str], ...]
    text: tuple[str, ...] = ()
    good: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Items side by side.

    Attributes:
        title: Above them.
        items: The items.
        note: Below the title.
    """

    title: str
    items: tuple[Shown, ...]
    note: str = ""


def render(
    title: str, summary: str, parts: Sequence[Line | Table | Bars | Gallery], *, facts: Mapping[str, Any] | None = None
) -> str:
    """The page as text.

    Args:
        title: Head of the page.
        summary: A sentence below it.
        parts: What is on it; empty galleries are left out.
        facts: What decided the numbers, at the end.
    """
    lines = [p for p in parts if isinstance(p, Line)]
    sections = []
    if lines:
        body = table(("Measure", "Value", "Note"), [(x.name, x.value, x.note) for x in lines])
        sections.append(("numbers", "Numbers", section("numbers", "Numbers", f'<div class="card">{body}</div>')))
    for number, part in enumerate(p for p in parts if not isinstance(p, Line)):
        anchor = f"part{number}"
        if markup := _part(part, anchor):
            sections.append((anchor, part.title, markup))
    if facts:
        pairs = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
        sections.append(("run", "This run", section("run", "This run", card("What decided it", f"<dl>{pairs}</dl>"))))
    head = f'<h1>{escape(title)}</h1><p class="lead">{escape(summary)}</p>'
    return page(title, head, sections)


def thumbnail(image: Any, side: int = _THUMBNAIL) -> bytes:
    """A PNG of at most ``side`` pixels.

    Args:
        image: PIL image, uint8 array [H, W, 3], or encoded picture.
        side: Longest side.
    """
    from PIL import Image

    from mmdiff.images import decode

    if isinstance(image, bytes):
        image = decode(image)
    elif not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return buffer.getvalue()


def _part(part: Table | Bars | Gallery, anchor: str) -> str:
    if isinstance(part, Table):
        body = card("", table(part.columns, part.rows), part.note)
    elif isinstance(part, Bars):
        body = card("", "".join(_bar(*share) for share in part.shares), part.note)
    elif part.items:
        return section(anchor, part.title, f'<div class="items">{"".join(map(_shown, part.items))}</div>', part.note)
    else:
        return ""
    return section(anchor, part.title, body)


def _bar(name: str, share: float, text: str) -> str:
    width = 100 * min(1.0, max(0.0, share))
    return (
        f'<div class="bar"><span>{escape(name)}</span><div><i style="width:{width:.1f}%"></i></div>'
        f"<b>{escape(text)}</b></div>"
    )


def _shown(item: Shown) -> str:
    figures = "".join(
        f"<figure>{picture(png, caption, css='pic')}<figcaption>{escape(caption)}</figcaption></figure>"
        for png, caption in item.pictures
    )
    mark = ""
    if item.good is not None:
        sign, css = ("\N{CHECK MARK} right", "good") if item.good else ("\N{BALLOT X} wrong", "bad")
        mark = f'<span class="mark {css}">{sign}</span>'
    text = "".join(f'<p class="t">{escape(line)}</p>' for line in item.text)
    return f'<div class="item"><div><div class="near">{figures}</div>{mark}{text}</div></div>'
