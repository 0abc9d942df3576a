"""``mmdiff convert``: checkpoints between published layouts and ours, and PyTorch pickles to safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert"]


def convert(
    src: Annotated[str, typer.Argument(help="Folder, hub id, or PyTorch file (.pth .pt .ckpt .bin).")],
    dst: Annotated[Path, typer.Argument(help="New or empty folder; for a PyTorch file also NAME.safetensors.")],
    to: Annotated[
        str | None,
        typer.Option(help="mmdiff, olmo, llama or llada-v; default: ours, and from ours where it came from."),
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Where in a PyTorch file the tensors are, such as model_ema.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a checkpoint: same tensors, dtypes and bytes, other names. Nothing in it is run."""
    from mmdiff.io.convert import convert as run

    done = run(src, dst, to=to, root=root)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
        return
    where = ", ".join(done.files)
    typer.echo(f"{done.source} -> {done.target}: {done.tensors} tensors, {done.nbytes:,} bytes in {dst} ({where})")
