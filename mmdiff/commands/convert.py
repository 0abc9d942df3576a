"""``mmdiff convert``: checkpoints between published layouts and ours, and PyTorch pickles to safetensors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from mmdiff.errors import ConfigError

__all__ = ["convert"]


def convert(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder, hub id, PyTorch file (.pth .pt .ckpt .bin), or RUN/checkpoints/step_... of a training run."
        ),
    ],
    dst: Annotated[Path, typer.Argument(help="New or empty folder; for a PyTorch file also NAME.safetensors.")],
    to: Annotated[
        str | None,
        typer.Option(help="mmdiff or a published layout; default: ours, and from ours where it came from."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16: change the precision, and keep the layout unless --to says."),
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Where in a PyTorch file the tensors are; default: model_ema if it is there.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="LoRA adapter in peft's layout to merge into SRC; DST is written in our layout.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Convert a checkpoint: same tensors, dtypes and bytes, other names; or other dtypes. Nothing in it is run."""
    from mmdiff.commands.export import export_checkpoint, is_run_checkpoint
    from mmdiff.io.convert import convert as run
    from mmdiff.pipelines.base import dtype_of

    if adapter is not None:
        if dtype is not None:
            raise ConfigError("--adapter keeps the precision; convert the result with --dtype afterwards")
        _merge(src, dst, adapter, to=to, root=root, as_json=as_json)
        return
    if is_run_checkpoint(Path(src)):
        if to not in (None, "mmdiff") or root is not None or dtype is not None:
            raise ConfigError(f"{src}: a run's checkpoint is written in our layout; convert the result afterwards")
        written = export_checkpoint(Path(src), dst)
        typer.echo(json.dumps({"source": src, "target": str(written)}) if as_json else f"{src}: model in {written}")
        return
    done = run(src, dst, to=to, root=root, dtype=dtype_of(dtype))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done)))
        return
    where = ", ".join(done.files)
    typer.echo(f"{done.source} -> {done.target}: {done.tensors} tensors, {done.nbytes:,} bytes in {dst} ({where})")


def _merge(src: str, dst: Path, adapter: str, *, to: str | None, root: str | None, as_json: bool) -> None:
    """Write SRC with an adapter merged into its weights, and what else lies in SRC."""
    from mmdiff.io.card import licence_of
    from mmdiff.models.registry import resolve
    from mmdiff.pipelines import load

    if to not in (None, "mmdiff") or root is not None:
        raise ConfigError("--adapter writes our layout; leave out --to and --root, and convert the result afterwards")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ConfigError(f"{dst}: not an empty folder; give a new one")
    merged = load(src, device="cpu", adapter=adapter)
    merged.save_pretrained(dst, license=licence_of(resolve(src)))
    tree = {"source": src, "adapter": adapter, "target": str(dst)}
    typer.echo(json.dumps(tree) if as_json else f"{src} with {adapter} merged: {dst}")
