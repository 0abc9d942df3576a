"""The command line of ``mmdiff demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmdiff.errors import EXIT_STOPPED

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    minutes: Annotated[
        float | None, typer.Option(help="About how long it may take; default: the recipes' fixed sample counts.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of every stage; default 0.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
) -> None:
    """Train on real pictures, then caption, answer, draw and measure; writes report.html.

    Runs on a CPU in about ten minutes and needs no network. Everything it makes lies in the run's folder; the trained
    model is OUT/model/model, ready for the other commands.
    """
    from mmdiff.commands.demo.page import summary
    from mmdiff.commands.demo.stages import StoppedError, run_stages
    from mmdiff.commands.demo.state import DemoState

    state = DemoState.open(out, seed=seed, minutes=minutes, resume=resume)
    try:
        report = run_stages(state)
    except StoppedError:
        typer.echo(f"Stopped and saved. Continue with: mmdiff demo --resume --out {out}", err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    results = json.loads((out / "evaluation" / "results.json").read_text())
    typer.echo(json.dumps(results, indent=1) if as_json else summary(results))
    typer.echo(f"report: {report}", err=as_json)
    typer.echo(f"model:  {out / 'model' / 'model'}", err=as_json)
