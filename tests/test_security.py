"""SECURITY.md's table: every line names tests that exist; and those of its lines that have no other place."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from mmdiff.commands import doctor
from mmdiff.text import Tokenizer

ROOT = Path(__file__).parents[1]


def rows() -> list[list[str]]:
    """Cells of the table, without its head."""
    lines = [line for line in (ROOT / "SECURITY.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_line_of_the_table_names_tests_that_exist(row: list[str]) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row[-1])
    assert len(row) == 4
    assert named
    for path, name in named:
        tree = ast.parse((ROOT / path).read_text("utf-8"))
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, f"{path}::{name}"


def test_doctor_warns_when_the_guard_of_pytorch_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert [text for text in doctor.examine()["warnings"] if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in text]
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    assert not [text for text in doctor.examine()["warnings"] if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" in text]


@pytest.mark.parametrize(
    ("name", "version", "warned"),
    [
        ("torch", "2.9.1+cpu", True),
        ("torch", "2.10.0", False),
        ("transformers", "5.2.0", True),
        ("transformers", "5.10.0.dev0", False),
        ("diffusers", "0.37.1", True),
        ("diffusers", "1.0", False),
    ],
)
def test_doctor_warns_of_versions_with_known_holes(
    name: str, version: str, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda each: version if each == name else installed(each))
    found = [text for text in doctor.examine()["warnings"] if text.startswith(f"{name} {version} has a known hole")]
    assert bool(found) == warned


def test_a_foreign_chat_template_is_not_rendered(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["a red square", "a blue square"] * 4, 300)
    tokenizer.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    told = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    hostile = "{{ cycler.__init__.__globals__.os.system('touch " + str(tmp_path / "sentinel") + "') }}owned"
    settings.write_text(json.dumps({**told, "chat_template": hostile, "auto_map": {"AutoTokenizer": ["x.X", None]}}))
    (tmp_path / "chat_template.jinja").write_text(hostile)
    messages = [{"role": "user", "content": "a red square"}]
    other = Tokenizer.from_pretrained(tmp_path)
    assert other.chat(messages) == tokenizer.chat(messages)
    assert not (tmp_path / "sentinel").exists()
