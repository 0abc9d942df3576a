"""``mmdiff generate``: text from prompts, or pictures if an output folder is given."""

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
from mmdiff.errors import ConfigError

__all__ = ["generate"]


def generate(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT...",
            help="Checkpoint (folder or hub id; a single word is a prompt, for the model in the package), then texts.",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Draw pictures into this folder (or this .png for one).")] = None,
    image: Annotated[
        str | None, typer.Option(help="Picture that the prompts are instructions about, each drawn with it in sight.")
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
    """Continue texts; with --out draw a picture for each prompt instead (seeds count up from --seed).

    With --image as well, change that picture as each prompt says, with a model that has learnt to.
    """
    from mmdiff.pipelines import load

    model, prompts = model_first(words, 1)
    pipeline = load(model, device=device, dtype=dtype, quantize=quantize, adapter=adapter, device_map=device_map)
    options: dict[str, Any] = said(
        preset=preset, num_inference_steps=steps, temperature=temperature, guidance=guidance, threshold=threshold
    )
    start = time.perf_counter()
    maker: Any
    if out is not None:
        if gen_length is not None:
            raise ConfigError("--gen-length is for text; drop it, or drop --out")
        maker = pipeline.images
        made = _draw(maker, prompts, out, seed, options, image)
    else:
        if image is not None:
            raise ConfigError("--image is for pictures that are drawn: give --out too; to ask about it: mmdiff ask")
        maker = pipeline.text
        made = maker.generate(prompts, **said(gen_length=gen_length), seeds=seed, **options)
    typer.echo(summary(maker.trace, len(made), time.perf_counter() - start), err=True)
    if as_json:
        key = "text" if out is None else "image"
        rows = [{"prompt": p, key: m} for p, m in zip(prompts, made, strict=True)]
        typer.echo(json.dumps(rows, ensure_ascii=False, indent=1))
        return
    for result in made:
        typer.echo(result)


def _draw(maker: Any, prompts: list[str], out: Path, seed: int, words: dict[str, Any], image: str | None) -> list[str]:
    from mmdiff.images import encode_png

    single = out.suffix.lower() == ".png"
    if single and len(prompts) > 1:
        raise ConfigError(f"{out} is one file for {len(prompts)} prompts; give a folder")
    seeds = [seed + i for i in range(len(prompts))]
    if image is None:
        images = maker(prompts=prompts, seeds=seeds, **words).images
    else:
        images = maker.edit([image] * len(prompts), None, prompts, seeds, **words)
    paths = [out] if single else [out / f"{i:04d}.png" for i in range(len(prompts))]
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(image))
    return [str(p) for p in paths]
