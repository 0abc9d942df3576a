"""``mmdiff caption``: describe image files, or whole shards of them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
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
from mmdiff.commands.workers import digest, local_device, rank_and_world, sigterm_as_interrupt
from mmdiff.errors import EXIT_STOPPED

__all__ = ["caption"]

_BATCH = 16


def caption(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] IMAGE...",
            help="Checkpoint (folder or hub id; a single word is an image, for the model in the package), then image "
            "files; with --out, shards.",
        ),
    ],
    prompt: Annotated[str | None, typer.Option(help="What to ask for.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder: describe every picture of shards; an interrupted run goes on there.")
    ] = None,
    field: Annotated[str, typer.Option(help="With --out: JSON field that gets the text.")] = "caption",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images per pass; default 16, with --out the fastest.")
    ] = None,
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
    """Describe images: one caption per file, in the order given; with --out whole shards, resumable."""
    from tqdm import tqdm

    from mmdiff.pipelines import VisionLanguage

    model, images = model_first(words, 1)
    options: dict[str, Any] = said(
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
        model,
        device=device or (None if device_map else local_device()),
        dtype=dtype,
        quantize=quantize,
        adapter=adapter,
        device_map=device_map,
    )
    if out is not None:
        asked = {**options, "dtype": dtype, "quantize": quantize, "adapter": adapter and digest(adapter)}
        _bulk(vlm, model, images, out, asked, options, batch=batch, field=field, as_json=as_json)
        return
    batch = batch or _BATCH
    start, found = time.perf_counter(), []
    with tqdm(total=len(images), unit="image", disable=len(images) <= batch) as bar:
        for part in _parts(images, batch):
            found += vlm.caption(part, **options)
            bar.update(len(part))
    typer.echo(summary(vlm.trace, len(found), time.perf_counter() - start), err=True)
    if as_json:
        rows = [{"image": i, "image_id": Path(i).stem, "caption": c} for i, c in zip(images, found, strict=True)]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for image, text in zip(images, found, strict=True):
        typer.echo(text if len(images) == 1 else f"{image}\t{text}")


def _bulk(
    vlm: Any,
    model: str,
    shards: Sequence[str],
    out: Path,
    asked: dict[str, Any],
    words: dict[str, Any],
    *,
    batch: int | None,
    field: str,
    as_json: bool,
) -> None:
    from mmdiff.commands.caption_shards import caption_shards

    rank, world = rank_and_world()
    settings = {"checkpoint": digest(model), **asked}
    try:
        with sigterm_as_interrupt():
            report = caption_shards(
                lambda pictures: vlm.caption(pictures, **words),
                shards,
                out,
                settings,
                batch=batch,
                field=field,
                rank=rank,
                world=world,
            )
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was described is kept: the same command goes on in {out}", err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    skipped = ", ".join(f"{n} {reason}" for reason, n in report.skipped.items()) or "none"
    speed = f"{report.captioned} of {report.samples} samples described now in {report.seconds:.1f} s"
    typer.echo(f"{speed}, {report.batch} per pass; skipped: {skipped}", err=True)
    typer.echo(json.dumps(asdict(report)) if as_json else str(out))


def _parts(items: Sequence[str], size: int) -> Iterator[list[str]]:
    for i in range(0, len(items), size):
        yield list(items[i : i + size])
