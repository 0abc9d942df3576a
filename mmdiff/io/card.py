"""The model card that `save_pretrained` writes, and the licence that a card names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmdiff

__all__ = ["licence_of", "render"]


def render(
    name: str,
    summary: str,
    config: Mapping[str, Any],
    *,
    parameters: int,
    licence: str | None,
    parts: Mapping[str, str],
) -> str:
    """The text of README.md.

    Args:
        name: Title.
        summary: What kind of network it is.
        config: Its configuration, plain data.
        parameters: Number of weights.
        licence: Identifier such as ``apache-2.0``; None leaves it open, visibly.
        parts: What lies beside the weights: file -> what it is.
    """
    head = ["---", "library_name: mmdiff", *([f"license: {licence}"] if licence else []), "tags:"]
    head += ["- masked-diffusion", f"- {config.get('type', 'model')}", "---", ""]
    body = [
        f"# {name}",
        "",
        f"A {summary}, {parameters:,} parameters, written by mmdiff {mmdiff.__version__}.",
        "",
        "```python",
        "import mmdiff",
        "",
        'model = mmdiff.load("path or id of this folder")',
        "print(model.capabilities)",
        "```",
        "",
        "| file | what it is |",
        "|---|---|",
        *(f"| `{file}` | {what} |" for file, what in parts.items()),
        "",
        "## Licence",
        "",
        licence or "Not stated. Fill in the licence of the weights and of the data before passing them on.",
        "",
        "## Limits",
        "",
        "Outputs follow the data the model was trained on, with its errors and its biases; check them before use.",
        "",
        "## Configuration",
        "",
        "| field | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _flat(config)),
        "",
    ]
    return "\n".join([*head, *body])


def licence_of(folder: Path) -> str | None:
    """The licence that the model card in a folder names; None if there is no card or it names none."""
    try:
        with (folder / "README.md").open(encoding="utf-8") as file:
            text = file.read(1 << 16)
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*(\S.*?)[ \t]*$", front[1], re.MULTILINE) if front else None
    return found[1].strip("'\"") if found else None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in tree.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows
