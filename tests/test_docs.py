"""The examples of the task pages run, word for word, on a tiny checkpoint in the place of the demo's."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mmdiff.pipelines import Pipeline
from tests.helpers import tiny

EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
DOCS = Path(__file__).parent.parent / "docs"
PAGES = {p: p.read_text() for p in sorted((DOCS / "tasks").glob("*.md"))}
RUN = {
    p: text
    for p, text in {**PAGES, DOCS / "scaling.md": (DOCS / "scaling.md").read_text()}.items()
    if "```python" in text
}
DEMO, STYLES = "runs/demo/model/model", "runs/styles/model/model"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder like the one a user is in after the demo."""
    folder = tmp_path_factory.mktemp("here")
    checkpoint = tiny.unified_checkpoint()
    Pipeline(checkpoint).save_pretrained(folder / DEMO)
    edits = {**checkpoint.defaults, "edit": checkpoint.defaults["image"]}
    Pipeline(dataclasses.replace(checkpoint, defaults=edits)).save_pretrained(folder / STYLES)
    tiny.picture(0).save(folder / "apple.png")
    return folder


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_the_examples_of_a_page_run(page, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    names: dict[str, object] = {}
    for block in EXAMPLE.findall(RUN[page]):
        exec(compile(block, page.name, "exec"), names)


def test_every_task_page_has_a_table_of_options_and_their_cost():
    assert len(PAGES) >= 3
    assert not [p.name for p in PAGES if "what it costs" not in PAGES[p]]
