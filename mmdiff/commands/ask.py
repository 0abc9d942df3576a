"""``mmdiff ask``: one question about one image."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdiff.commands.options import (
    Adapter,
    Device,
    DeviceMap,
    Dtype,
    GenLength,
    Guidance,
    Json,
    Preset,
    Quantize,
    Seed,
    Steps,
    Temperature,
    Threshold,
    model_first,
    said,
    summary,
)

__all__ = ["ask"]


def ask(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] IMAGE QUESTION",
            help="Checkpoint (folder or hub id; without it the model in the package), image file, question.",
        ),
    ],
    preset: Preset = None,
    gen_length: GenLength = None,
    steps: Steps = None,
    threshold: Threshold = None,
    temperature: Temperature = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    adapter: Adapter = None,
    device_map: DeviceMap = None,
    as_json: Json = False,
) -> None:
    """Answer a question about an image."""
    from mmdiff.pipelines import VisionLanguage

    model, asked = model_first(words, 2)
    if len(asked) != 2:
        raise typer.BadParameter("expected [MODEL] IMAGE QUESTION; put a question of several words into quotes")
    image, question = Path(asked[0]), asked[1]
    options: dict[str, Any] = said(
        preset=preset,
        gen_length=gen_length,
        num_inference_steps=steps,
        threshold=threshold,
        temperature=temperature,
        guidance=guidance,
        seeds=seed,
    )
    vlm = VisionLanguage.from_pretrained(
        model, device=device, dtype=dtype, quantize=quantize, adapter=adapter, device_map=device_map
    )
    start = time.perf_counter()
    answer = vlm.ask(image, question, **options)
    typer.echo(summary(vlm.trace, 1, time.perf_counter() - start), err=True)
    result = {"image": str(image), "question": question, "answer": answer}
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else answer)
