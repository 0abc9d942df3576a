"""Options that the commands of inference share. Light: typer only."""

from __future__ import annotations

from typing import Annotated, Any

import typer

__all__ = [
    "TINY",
    "Adapter",
    "Device",
    "DeviceMap",
    "Dtype",
    "GenLength",
    "Guidance",
    "Json",
    "Model",
    "Preset",
    "Quantize",
    "Seed",
    "Steps",
    "Temperature",
    "Threshold",
    "model_first",
    "said",
    "summary",
]

Model = Annotated[str, typer.Argument(help="Checkpoint: folder or hub id; default the model in the package.")]
Device = Annotated[str | None, typer.Option(help="Where it runs; default a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default as stored.")]
Quantize = Annotated[str | None, typer.Option(help="nf4 or int8: hold the backbone in 4 or 8 bits.")]
Adapter = Annotated[str | None, typer.Option(help="LoRA adapter in peft's layout: folder or hub id.")]
DeviceMap = Annotated[str | None, typer.Option(help="auto or balanced: spread over all devices; instead of --device.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Preset = Annotated[str | None, typer.Option(help="exact, fast (default) or turbo.")]
GenLength = Annotated[int | None, typer.Option(min=1, help="Tokens of an answer, at most.")]
Steps = Annotated[int | None, typer.Option("--num-inference-steps", "--steps", min=1, help="Passes of the network.")]
Threshold = Annotated[float | None, typer.Option(help="Decide tokens of at least this probability.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="0 = most probable; above, drawn at random.")]
Guidance = Annotated[float | None, typer.Option(help="Weight of the prompt; 1 = none.")]
Seed = Annotated[int, typer.Option(help="Seed of random draws.")]


TINY = "tiny"
"""The model that ships with the package."""


def model_first(words: list[str], others: int) -> tuple[str, list[str]]:
    """The model and the other words; with exactly as many words as there are others, the model is the embedded one.

    Args:
        words: What stands on the command line.
        others: Fewest words that are no model.

    Raises:
        typer.BadParameter: Fewer.
    """
    if len(words) < others:
        raise typer.BadParameter(f"{len(words)} given, at least {others} needed (and a model in front, or none)")
    return (TINY, words) if len(words) == others else (words[0], words[1:])


def said(**words: Any) -> dict[str, Any]:
    """The options that were given."""
    return {k: v for k, v in words.items() if v is not None}


def summary(trace: Any, items: int, seconds: float) -> str:
    """What a run cost, for stderr: time, and passes and tokens per pass and row of the last batch."""
    line = f"{items} done in {seconds:.1f} s"
    if trace is None or not trace.nfe:
        return line
    line = f"{line}; last batch: {trace.nfe} passes"
    tokens = int(trace.committed.sum())  # none in a flow, which moves every value in every pass
    return f"{line}, {tokens / sum(trace.row_nfe):.2f} tokens per pass and item" if tokens else line
