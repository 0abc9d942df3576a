"""``mmdiff eval``: the measures of `eval`, on files and folders and with models."""

from __future__ import annotations

import typer

from mmdiff.commands.eval import fid, geneval, mmmu, text
from mmdiff.commands.eval.measures import MEASURES, evaluate

__all__ = ["MEASURES", "app", "evaluate"]

app = typer.Typer(help="Measure: images, answers, captions, benchmarks.", no_args_is_help=True)
app.command("fid")(fid.fid)
app.command("mmmu")(mmmu.mmmu)
app.command("geneval")(geneval.geneval)
app.command("vqa")(text.vqa)
app.command("caption")(text.caption)
app.command("nll")(text.nll)
