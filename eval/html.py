"""The page around a report: style sheet, tables, pictures as data. Text from outside is escaped here."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Sequence
from html import escape

from mmdiff.errors import ConfigError

__all__ = ["card", "escape", "page", "picture", "png_size", "section", "table"]

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PNG = b"\x89PNG\r\n\x1a\n"


def picture(png: bytes, alt: str, *, css: str = "", width: int | None = None) -> str:
    """An ``img`` element that carries its PNG.

    Args:
        png: The encoded picture.
        alt: What it shows, in words.
        css: Class.
        width: Width on the page in CSS pixels; None: the picture's own.

    Raises:
        ConfigError: The bytes are no PNG.
    """
    own_width, own_height = png_size(png, alt)
    shown = width or own_width
    height = round(own_height * shown / own_width)
    data = base64.b64encode(png).decode("ascii")
    kind = f' class="{css}"' if css else ""
    return (
        f'<img{kind} src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}" '
        f'width="{shown}" height="{height}" loading="lazy" decoding="async">'
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, css: str = "") -> str:
    """A table of text; the first column names the row, numbers are set to the right."""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join(_row(row) for row in rows)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def png_size(png: bytes, name: str = "") -> tuple[int, int]:
    """Width and height of a PNG, from its header.

    Raises:
        ConfigError: The bytes are no PNG.
    """
    if not png.startswith(_PNG) or len(png) < 33:
        raise ConfigError(
            f"picture {name!r} is not a PNG ({len(png):,} bytes); encode it with mmdiff.images.encode_png"
        )
    width, height = struct.unpack(">II", png[16:24])
    return width, height


def card(title: str, body: str, note: str = "", *, wide: bool = False) -> str:
    """A box with a title (text), a body (markup) and a note (text); ``wide``: a whole row of a grid of boxes."""
    tail = f'<p class="note">{escape(note)}</p>' if note else ""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card{" wide" if wide else ""}">{head}{body}{tail}</div>'


def section(anchor: str, title: str, body: str, lead: str = "") -> str:
    """A section with an anchor; ``lead`` is a sentence of text below its title."""
    intro = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{intro}{body}</section>'


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole document.

    Args:
        title: Of the window.
        header: Markup of the head of the page.
        sections: (anchor, name in the navigation, markup).
    """
    links = "".join(f'<a href="#{anchor}">{escape(name)}</a>' for anchor, name, _ in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # Nothing may be fetched or run, whatever text got into the page.
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body>"
        f'<header class="top"><div class="wrap">{header}</div></header>'
        f'<nav aria-label="Sections"><div class="wrap">{links}</div></nav>'
        f'<main class="wrap">{"".join(markup for _, _, markup in sections)}</main>'
        "</body></html>\n"
    )


def _row(cells: Sequence[str]) -> str:
    out = []
    for i, cell in enumerate(cells):
        text = str(cell)
        if i == 0:
            out.append(f'<th scope="row">{escape(text)}</th>')
        else:
            css = ' class="num"' if text[:1].isdigit() or text[:1] in "-+\N{MINUS SIGN}\N{EN DASH}" else ""
            out.append(f"<td{css}>{escape(text)}</td>")
    return f"<tr>{''.join(out)}</tr>"


_CSS = """
:root{--bg:#f6f7f9;--card:#fff;--ink:#14181f;--soft:#5b6472;--line:#e3e6eb;--accent:#4f46e5;--good:#0f7b4f;
--good-bg:#e2f5ec; --bad:#b4232c;--bad-bg:#fdeaea;--warn:#8a5a00;--c0:#4f46e5;--c1:#0d9488;--c2:#d97706;
--c3:#db2777;--c4:#0284c7;--c5:#65a30d; --shadow:0 1px 2px rgba(16,24,40,.05),0 1px 3px rgba(16,24,40,.06)}
@media (prefers-color-scheme:dark){:root{--bg:#0e1116;--card:#161b22;--ink:#e8ebf0;--soft:#98a2b3;--line:#272e38;
--accent:#8b8bff; --good:#4ade9b;--good-bg:#10291f;--bad:#ff7b7f;--bad-bg:#331719;--warn:#e7b551;--c0:#8b8bff;
--c1:#2dd4bf;--c2:#f5b041;--c3:#f472b6; --c4:#38bdf8;--c5:#a3e635;--shadow:none}} *{box-sizing:border-box} html{
scroll-behavior:smooth;-webkit-text-size-adjust:100%} body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.55 Inter,ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto, "Helvetica Neue",Arial,sans-serif;
-webkit-font-smoothing:antialiased} .wrap{max-width:1180px;margin:0 auto;padding:0 20px} .top{
background:var(--card);border-bottom:1px solid var(--line)} .top .wrap{padding-top:40px;padding-bottom:28px} h1{
font-size:clamp(1.6rem,1.1rem + 2.2vw,2.4rem);line-height:1.15;letter-spacing:-.025em;margin:0 0 10px;
font-weight:700} h2{font-size:1.35rem;letter-spacing:-.015em;margin:0 0 6px;font-weight:680} h3{font-size:.95rem;
margin:0 0 10px;font-weight:620} p{margin:0 0 10px} .lead{color:var(--soft);max-width:74ch;margin-bottom:18px}
.note{color:var(--soft);font-size:.83rem;line-height:1.5;margin:10px 0 0;max-width:82ch} .facts{display:flex;
flex-wrap:wrap;gap:8px;margin-top:16px} .chip{border:1px solid var(--line);border-radius:999px;padding:3px 12px;
font-size:.82rem;color:var(--soft)} .chip.good{color:var(--good);background:var(--good-bg);border-color:transparent;
font-weight:620} .chip.bad{color:var(--bad);background:var(--bad-bg);border-color:transparent;font-weight:620} nav{
position:sticky;top:0;z-index:2;background:color-mix(in srgb,var(--bg) 88%,transparent);backdrop-filter:blur(10px);
border-bottom:1px solid var(--line)} nav .wrap{display:flex;gap:20px;overflow-x:auto;scrollbar-width:none} nav a{
color:var(--soft);text-decoration:none;font-size:.88rem;padding:11px 0;white-space:nowrap} nav a:hover,
nav a:focus-visible{color:var(--accent)} section{padding:38px 0 4px;scroll-margin-top:40px} section:last-child{
padding-bottom:64px} .card{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:18px 20px;
box-shadow:var(--shadow);margin-bottom:16px; min-width:0} .cols{display:grid;gap:16px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))} .cols.two{
grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr))} 
.cols>.card{margin:0}.cols>.card.wide{grid-column:1/-1}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums} th,td{
padding:9px 14px 9px 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:middle}
tbody tr:last-child>*{border-bottom:0} table thead th{color:var(--soft);font-weight:560;font-size:.78rem;
white-space:nowrap;border-bottom-width:1px} tbody th{font-weight:560} td.num{white-space:nowrap} td.wide{
min-width:160px;width:17%}table.gates tbody th{min-width:215px} table.gates td.num,
table.gates thead th:nth-child(n+3){text-align:right}table.gates td.num{padding-right:18px}
table.gates thead th:nth-child(n+3){padding-right:18px}table.gates th:last-child,table.gates td:last-child{
padding-right:0;text-align:right} .sub{display:block;color:var(--soft);font-weight:400;font-size:.8rem;
line-height:1.4;margin-top:2px} .mark{display:inline-flex;align-items:center;gap:5px;border-radius:999px;
padding:2px 10px;font-size:.78rem;font-weight:640;white-space:nowrap} .mark.good{color:var(--good);
background:var(--good-bg)} .mark.bad{color:var(--bad);background:var(--bad-bg)} svg.chart{width:100%;height:auto;
display:block} svg .grid{stroke:var(--line);stroke-width:1} svg .tick{fill:var(--soft);font-size:11px;
font-variant-numeric:tabular-nums} svg .axis{fill:var(--soft);font-size:11px} svg polyline{fill:none;
stroke-linejoin:round;stroke-linecap:round} svg .line{stroke-width:2} svg .raw{stroke-width:1;opacity:.28} svg .s0{
stroke:var(--c0)}svg .s1{stroke:var(--c1)}svg .s2{stroke:var(--c2)}svg .s3{stroke:var(--c3)}svg .s4{
stroke:var(--c4)}svg .s5{stroke:var(--c5)} svg .point{fill:currentColor} .legend{display:flex;flex-wrap:wrap;
gap:4px 16px;font-size:.8rem;color:var(--soft);margin:0 0 6px;padding:0;list-style:none} .legend i{
display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:7px;vertical-align:middle} .legend .s0{
background:var(--c0)}.legend .s1{background:var(--c1)}.legend .s2{background:var(--c2)}.legend .s3{
background:var(--c3)} .legend .s4{background:var(--c4)}.legend .s5{background:var(--c5)} .now{float:right;
color:var(--soft);font-weight:450;font-variant-numeric:tabular-nums} svg.range{width:100%;min-width:150px;
max-width:260px;height:auto;display:block} svg .rail{stroke:var(--line);stroke-width:3;stroke-linecap:round}
svg .base{fill:var(--card);stroke:var(--soft);stroke-width:1.5} svg .threshold{stroke:var(--ink);stroke-width:1.5;
stroke-dasharray:3 2.5} svg .whisker,svg .cap{stroke-width:3}svg .cap{stroke-width:2} svg .whisker.good,
svg .cap.good{stroke:var(--good)}svg .whisker.bad,svg .cap.bad{stroke:var(--bad)} svg .dot.good{fill:var(--good)}
svg .dot.bad{fill:var(--bad)} .items{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,
310px),1fr))} .item{display:flex;gap:14px;background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:14px;box-shadow:var(--shadow)} .item>div{min-width:0;flex:1} .pic{border-radius:10px;background:#fff;
flex:none;object-fit:contain} .q{color:var(--soft);font-size:.86rem;margin:0 0 3px;line-height:1.4} .a{
font-weight:600;margin:0 0 4px;line-height:1.35;overflow-wrap:anywhere} .t{font-size:.84rem;color:var(--soft);
margin:0;line-height:1.45;overflow-wrap:anywhere} .t b{color:var(--ink);font-weight:560} .item .mark{float:right;
margin-left:8px} .a u{text-decoration:underline wavy var(--bad) 1px;text-underline-offset:4px} .gridpic{
max-width:100%;height:auto;border-radius:10px;display:block;background:#fff} .film{display:flex;gap:16px;
overflow-x:auto;padding-bottom:6px} .film figure{margin:0;flex:none;width:min(300px,78vw)} figcaption{
font-size:.83rem;color:var(--soft);margin-top:7px;font-variant-numeric:tabular-nums} .near{display:flex;gap:14px;
align-items:flex-start;overflow-x:auto}.near figure{flex:none} .near figure{margin:0}.near figcaption{
margin-top:3px;font-size:.74rem;text-align:center} .near .from{padding-right:14px;
border-right:1px solid var(--line)} pre{background:var(--bg);border:1px solid var(--line);border-radius:10px;
padding:14px 16px;overflow-x:auto;margin:0; font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace} dl{
display:grid;grid-template-columns:minmax(120px,max-content) 1fr;gap:6px 22px;margin:0;font-size:.9rem} dt{
color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums} .bar{display:grid;
grid-template-columns:minmax(120px,260px) 1fr 110px;gap:12px;align-items:center;font-size:.88rem;padding:3px 0}
.bar div{background:var(--line);border-radius:6px;height:10px;overflow:hidden} .bar i{display:block;height:100%;
background:var(--accent)} .bar b{font-weight:560;font-variant-numeric:tabular-nums} @media (max-width:640px){
.wrap{padding:0 14px}.card{padding:15px}dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:8px} table.gates thead{
display:none}table.gates,table.gates tbody,table.gates tr{display:block} table.gates tr{padding:12px 0;
border-bottom:1px solid var(--line)}table.gates tr:last-child{border:0} table.gates th,table.gates td{display:block;
border:0;padding:2px 0} table.gates td.wide{width:100%;padding:4px 0}table.gates svg.range{max-width:none}
table.gates td.none{display:none!important} table.gates td[data-name]{display:inline-block;margin-right:14px}
table.gates td[data-name]::before{content:attr(data-name) " ";color:var(--soft);font-size:.8rem}} @media print{nav{
display:none}.card,.item{box-shadow:none;break-inside:avoid}}
"""
