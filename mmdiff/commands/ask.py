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
    Model,
    Preset,
    Quantize,
    Seed,
    Steps,
    Temperature,
    Threshold,
    said,
    summary,
)

__all__ = ["ask"]


def ask(
    model: Model,
    image: Annotated[Path, typer.Argument(help="Image file.")],
    question: Annotated[str, typer.Argument(help="What you want to know.")],
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

    words: dict[str, Any] = said(
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
    answer = vlm.ask(image, question, **words)
    typer.echo(summary(vlm.trace, 1, time.perf_counter() - start), err=True)
    result = {"image": str(image), "question": question, "answer": answer}
    typer.echo(json.dumps(result, ensure_ascii=False) if as_json else answer)
