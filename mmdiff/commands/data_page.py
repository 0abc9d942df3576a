"""The page of ``mmdiff data stats``: counts, histograms and pictures of shards in one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipelines.stats import Stats

__all__ = ["write_page"]

_HISTOGRAMS = (
    ("images", "Images per sample", ""),
    ("longer_side", "Longer side of the images", "Pixels."),
    ("image_bytes", "Size of the images", "Bytes as stored."),
    ("caption_lengths", "Length of the captions", "Words."),
    ("caption_tokens", "Tokens of the captions", "Tokens of the given tokenizer."),
    ("answer_tokens", "Tokens of the answers", "With their end of turn: what training may mask and learn."),
    ("turns", "Turns of the conversations", ""),
)
_TOPS = (
    ("members", "Members", "Samples by suffix."),
    ("image_sizes", "Image sizes", "The commonest, width by height."),
    ("commonest_concepts", "Concepts", "The commonest."),
    ("questions", "Kinds of questions", ""),
    ("answers", "Answers", "The commonest."),
    ("reasons", "Unusable samples", "By reason; what training would skip. See: mmdiff data lint."),
)
_BAR = "height:10px;border-radius:3px;background:var(--c0);min-width:2px"
_ROW = "display:grid;grid-template-columns:9.5em 1fr 6em;gap:10px;align-items:center;font-size:.84rem;margin:3px 0"
_PICTURES = "display:flex;flex-wrap:wrap;gap:10px;align-items:flex-end"


def write_page(path: Path, stats: Stats, shards: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: The file.
        stats: What was counted, with thumbnails.
        shards: How the shards were named.
    """
    from data_pipelines.ranges import shown
    from eval.html import page, section

    names = ", ".join(shown(name) for name in shards)
    parts = [
        ("counts", "Counts", section("counts", "Counts", _boxes(stats, _TOPS))),
        ("sizes", "Sizes and lengths", section("sizes", "Sizes and lengths", _boxes(stats, _HISTOGRAMS))),
    ]
    if stats.thumbnails:
        lead = f"{len(stats.thumbnails)} of the samples, evenly spread over the shards."
        parts.append(("pictures", "Pictures", section("pictures", "Pictures", _pictures(stats), lead)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(f"Data: {names}", _header(stats, names), parts), encoding="utf-8")


def _header(stats: Stats, names: str) -> str:
    facts = [
        f"{stats.samples:,} samples",
        f"{stats.shards:,} shards",
        f"{stats.bytes / 1e6:,.1f} MB",
        f"{stats.captions:,} captions, {stats.distinct_captions:,} different",
        f"{stats.caption_words:g} words per caption",
        f"{stats.concepts:,} concepts",
    ]
    chips = "".join(f'<span class="chip">{escape(fact)}</span>' for fact in facts)
    kind = "bad" if stats.unusable else "good"
    chips += f'<span class="chip {kind}">{stats.unusable:,} unusable</span>'
    return f'<h1>What the shards hold</h1><p>{escape(names)}</p><div class="facts">{chips}</div>'


def _boxes(stats: Stats, wanted: Sequence[tuple[str, str, str]]) -> str:
    from eval.html import card

    found = [(title, getattr(stats, name), note) for name, title, note in wanted]
    return f'<div class="cols">{"".join(card(t, _bars(counts), note) for t, counts, note in found if counts)}</div>'


def _bars(counts: Mapping[str, int]) -> str:
    most = max(counts.values()) or 1
    rows = []
    for name, count in counts.items():
        label = f'<span title="{escape(name, quote=True)}" style="overflow-wrap:anywhere">{escape(_short(name))}</span>'
        bar = f'<div style="{_BAR};width:{100 * count / most:.1f}%"></div>' if count else "<div></div>"
        rows.append(f'<div style="{_ROW}">{label}{bar}<span style="text-align:right">{count:,}</span></div>')
    return "".join(rows)


def _pictures(stats: Stats) -> str:
    from eval.html import card, picture

    shown = "".join(
        f'<span title="{escape(name, quote=True)}">{picture(png, name)}</span>' for name, png in stats.thumbnails
    )
    return card("", f'<div style="{_PICTURES}">{shown}</div>')


def _short(name: str, most: int = 40) -> str:
    return (name if len(name) <= most else name[: most - 1] + "\N{HORIZONTAL ELLIPSIS}") or "(none)"
