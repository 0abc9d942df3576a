"""What every ``mmdiff eval`` command does with its result: a table for people, JSON for machines, a folder to keep."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["BatchSize", "JsonOut", "Numbers", "Out", "device_of", "finish", "hashes_of", "printed", "shown"]

Numbers = Sequence[tuple[str, str, str]]
"""(name, value, note) of each number, for the terminal and for the page."""

JsonOut = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for result.json and report.html; or a .json file for the result.")
]
BatchSize = Annotated[int, typer.Option("--batch", "--batch-size", min=1, help="Items per pass of the network.")]


def finish(
    result: Any,
    lines: list[str],
    as_json: bool,
    out: Path | None,
    *,
    measure: str,
    settings: Mapping[str, Any],
    page: Callable[[], str],
    hashes: Mapping[str, str | None] | None = None,
    items: Any = None,
) -> None:
    """Print the result and keep it; only the first of several processes does.

    Args:
        result: Dataclass of the measure.
        lines: The table.
        as_json: Print JSON instead.
        out: File or folder.
        measure: Name of the measure.
        settings: What was asked for.
        page: Makes the page; called only where one is written.
        hashes: Of weights and files.
        items: What happened to each item.
    """
    from eval.files import write_json
    from eval.run_folder import write_record

    if int(os.environ.get("RANK", "0")):
        return
    tree = dataclasses.asdict(result)
    if out is not None and out.suffix == ".json":
        write_json(out, tree)
    elif out is not None:
        write_record(out, measure, result, settings=settings, page=page(), hashes=hashes, items=items)
    typer.echo(json.dumps(tree, indent=2) if as_json else "\n".join(lines))


def printed(numbers: Numbers) -> list[str]:
    """The numbers as lines of a table."""
    width = max((len(name) for name, _, _ in numbers), default=0)
    return [f"{name:{width}}  {value}{f'   ({note})' if note else ''}" for name, value, note in numbers]


def shown(numbers: Numbers) -> list[Any]:
    """The numbers as parts of a page."""
    from eval.page import Line

    return [Line(name=name, value=value, note=note) for name, value, note in numbers]


def hashes_of(**sources: str | Path | None) -> dict[str, str | None]:
    """SHA-256 of each source that is a file, a folder of files or ``model:PATH``; of others, such as hub ids, None."""
    from eval.statistics import file_sha256
    from mmdiff.commands.workers import digest

    found: dict[str, str | None] = {}
    for name, source in sources.items():
        if source is None:
            continue
        path = Path(source)
        if str(source).startswith("model:"):
            found[name] = digest(str(source).removeprefix("model:"))
        elif path.is_dir():
            found[name] = file_sha256(sorted(p for p in path.rglob("*") if p.is_file()))
        else:
            found[name] = file_sha256(path) if path.is_file() else None
    return found


def device_of(device: str | None) -> str:
    """The device of this process: what was asked for, else its own GPU, else the CPU."""
    if device is not None:
        return device
    import torch

    local = os.environ.get("LOCAL_RANK", "0")
    return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
