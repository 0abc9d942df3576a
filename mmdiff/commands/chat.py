"""``mmdiff chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from mmdiff.commands.options import (
    TINY,
    Adapter,
    Device,
    DeviceMap,
    Dtype,
    GenLength,
    Model,
    Preset,
    Quantize,
    Seed,
    Steps,
    Temperature,
    Threshold,
    said,
)
from mmdiff.errors import MmdiffError

__all__ = ["chat"]

_HELP = "/image PATH shows a picture with your next message, /reset starts anew, /quit ends"


def chat(
    model: Model = TINY,
    preset: Preset = None,
    gen_length: GenLength = None,
    steps: Steps = None,
    threshold: Threshold = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    adapter: Adapter = None,
    device_map: DeviceMap = None,
) -> None:
    """Talk to a model; on a terminal the answer is shown while it is being written."""
    from mmdiff.pipelines import load

    pipeline = load(model, device=device, dtype=dtype, quantize=quantize, adapter=adapter, device_map=device_map)
    talker: Any = pipeline.vision if "caption" in pipeline.capabilities else pipeline.text
    words = said(
        preset=preset,
        gen_length=gen_length,
        num_inference_steps=steps,
        threshold=threshold,
        temperature=temperature,
        seeds=seed,
    )
    typer.echo(_HELP, err=True)
    messages: list[dict[str, Any]] = []
    waiting: list[Path] = []
    for line in _lines():
        if line == "/quit":
            break
        if line == "/reset":
            messages, waiting = [], []
        elif line.startswith("/image"):
            _take_image(line, waiting)
        elif line:
            content = [{"type": "image", "image": p} for p in waiting] + [{"type": "text", "text": line}]
            asked = [*messages, {"role": "user", "content": content}]
            try:
                answer = _answer(talker, asked, words)
            except MmdiffError as error:
                typer.echo(f"error: {error}", err=True)
                continue
            messages, waiting = [*asked, {"role": "assistant", "content": answer or "…"}], []


def _lines() -> Any:
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _take_image(line: str, waiting: list[Path]) -> None:
    path = Path(line.removeprefix("/image").strip())
    if path.is_file():
        waiting.append(path)
        typer.echo(f"{path} goes with your next message", err=True)
    else:
        typer.echo(f"{path}: no such file", err=True)


def _answer(talker: Any, messages: list[dict[str, Any]], words: dict[str, Any]) -> str:
    live = sys.stdout.isatty()
    answer, shown = "", 0
    for answer in talker.chat(messages, stream=True, **words):
        if live:
            line = " ".join(answer.split())
            typer.echo("\r" + line.ljust(shown), nl=False)
            shown = len(line)
    if live:
        typer.echo("\r" + " " * shown + "\r", nl=False)
    typer.echo(answer)
    return answer
