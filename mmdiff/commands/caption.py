"""``mmdiff caption``: describe image files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
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
    Image,
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

__all__ = ["caption"]


def caption(
    model: Model,
    images: Image,
    prompt: Annotated[str | None, typer.Option(help="What to ask for.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per pass.")] = 16,
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
    """Describe images: one caption per file, in the order given."""
    from tqdm import tqdm

    from mmdiff.pipelines import VisionLanguage

    words: dict[str, Any] = said(
        preset=preset,
        gen_length=gen_length,
        num_inference_steps=steps,
        threshold=threshold,
        temperature=temperature,
        guidance=guidance,
        seeds=seed,
        prompt=prompt,
    )
    vlm = VisionLanguage.from_pretrained(
        model, device=device, dtype=dtype, quantize=quantize, adapter=adapter, device_map=device_map
    )
    start, found = time.perf_counter(), []
    with tqdm(total=len(images), unit="image", disable=len(images) <= batch) as bar:
        for part in _parts(images, batch):
            found += vlm.caption(part, **words)
            bar.update(len(part))
    typer.echo(summary(vlm.trace, len(found), time.perf_counter() - start), err=True)
    if as_json:
        rows = [{"image": str(i), "image_id": i.stem, "caption": c} for i, c in zip(images, found, strict=True)]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for image, text in zip(images, found, strict=True):
        typer.echo(text if len(images) == 1 else f"{image}\t{text}")


def _parts(items: Sequence[Path], size: int) -> Iterator[list[Path]]:
    for i in range(0, len(items), size):
        yield list(items[i : i + size])
