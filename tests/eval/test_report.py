"""The report is one well-formed page that fetches and runs nothing, whatever text it is given."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from eval.report import (
    CaptionItem,
    Curve,
    DemoReport,
    Gate,
    Grid,
    Neighbours,
    QaItem,
    TableSpec,
    loss_charts,
    render,
    write_report,
)
from mmdiff.errors import ConfigError
from mmdiff.images import encode_png

HOSTILE = '<script>alert(\'x\')</script>" onload="y" & <img src=http://evil.example/x.png> ]]> \u202e {{}}'
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Checker(HTMLParser):
    """Keeps the stack of open elements; every end must match."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.stack == []
    return checker


def png(colour: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    return encode_png(Image.new("RGB", size, colour))


def full(text: str) -> DemoReport:
    records = [{"samples": i * 10, "losses": {text: 1 / (i + 1), "vqa": 2.0}} for i in range(400)]
    charts = loss_charts([*records, {"samples": 5000, "note": text}], stage=text)
    baselines = (("blind", 0.1), (text, 0.2))
    return DemoReport(
        title=text,
        summary=text,
        facts=(text,),
        gates=(
            Gate(name=text, value=0.8, lower=0.75, threshold=0.7, passed=True, note=text, baselines=baselines),
            Gate(name="kid", value=0.02, threshold=0.01, passed=False, percent=False, smaller_is_better=True),
            Gate(name="odd", value=float("nan"), threshold=0.5, passed=False),
        ),
        charts=charts,
        progress=((2000, png()), (0, png("blue"))),
        captions=(CaptionItem(image=png(), caption=text, truth="a dog", note=text),),
        answers=(QaItem(image=png(), question=text, answer=text, truth=text, blind_answer=text),),
        grids=(Grid(title=text, png=png(size=(900, 90)), note=text),),
        tables=(TableSpec(title=text, columns=("set", text), rows=((text, "1.0"), ("x", text)), note=text),),
        neighbours=(Neighbours(image=png(), label=text, nearest=((png(), text),)),),
        environment=((text, text),),
        commands=(text,),
        notes=(text,),
    )


def test_page_is_well_formed_and_hostile_text_stays_text() -> None:
    plain, hostile = check(render(full("plain"))), check(render(full(HOSTILE)))
    assert [tag for tag, _ in hostile.tags if tag not in ("u",)] == [tag for tag, _ in plain.tags if tag != "u"]
    names = {name for _, attributes in hostile.tags for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert "<script>alert('x')</script>" in "".join(hostile.text)


def test_page_fetches_and_runs_nothing() -> None:
    checker = check(render(full("plain")))
    tags = {tag for tag, _ in checker.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    sources = [a[n] for _, a in checker.tags for n in ("src", "href") if n in a]
    assert all(s is not None and (s.startswith("data:image/png;base64,") or s.startswith("#")) for s in sources)
    assert not re.search(r"url\(|@import", render(full("plain")))


def test_pictures_and_sections_are_all_there() -> None:
    data = full("plain")
    checker = check(render(data))
    pictures = [a for tag, a in checker.tags if tag == "img"]
    assert len(pictures) == 2 + 1 + 1 + 1 + 2
    assert all(a["alt"] and a["width"] and a["height"] for a in pictures)
    assert base64.b64decode(str(pictures[0]["src"]).partition(",")[2]) == png("blue")  # progress in order of samples
    anchors = {a["id"] for tag, a in checker.tags if tag == "section"}
    links = {str(a["href"])[1:] for tag, a in checker.tags if tag == "a"}
    assert anchors == links == {
        "verdict", "learning", "captions", "answers", "pictures", "distances", "originality", "run"
    }  # fmt: skip
    text = " ".join(checker.text)
    for wanted in ("80.0 %", "75.0 %", "1 of 3 promises kept", "kept", "missed"):
        assert wanted in text


def test_wrong_words_of_a_caption_are_marked() -> None:
    item = CaptionItem(image=png(), caption="a red dog", truth="a blue dog")
    text = render(DemoReport(title="t", captions=(item,)))
    assert "<u>red</u> dog" in text
    assert "a blue dog" in text
    assert "wrong" in text


def test_an_empty_report_and_odd_curves_are_drawn() -> None:
    check(render(DemoReport(title="nothing")))
    odd = loss_charts([{"samples": 1, "losses": {"a": float("nan")}}, {"samples": 2, "losses": {"b": 3.0}}])
    check(render(DemoReport(title="odd", charts=odd)))
    assert odd[1].curves == (Curve(name="b", xs=[2.0], ys=[3.0]),)


def test_writing_replaces_the_page_whole_and_is_deterministic(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "report.html"
    first = write_report(full("one"), path).read_bytes()
    assert write_report(full("one"), path).read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_something_that_is_no_png_is_refused() -> None:
    with pytest.raises(ConfigError, match="PNG"):
        render(DemoReport(title="t", grids=(Grid(title="g", png=b"GIF89a"),)))
