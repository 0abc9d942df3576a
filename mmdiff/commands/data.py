"""``mmdiff data build|pack|index|lint|stats|cache|tokenizer``: making shards and looking into them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from mmdiff.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["app", "build", "cache", "index", "lint", "pack", "stats", "tokenizer"]

app = typer.Typer(help="Make shards, check them, look into them.", no_args_is_help=True)

_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_SHARDS = Annotated[
    list[str], typer.Argument(help="Shards: files, folders, globs, braces, URLs, or embedded:emoji/train.")
]


@app.command()
def build(
    name: Annotated[str, typer.Argument(help="Dataset, such as emoji or cifar10.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the shards.")],
    size: Annotated[int | None, typer.Option(min=8, help="Side of the images in pixels; default: its own.")] = None,
    source: Annotated[str | None, typer.Option(help="Downloaded files to use instead of fetching them.")] = None,
    as_json: _JSON = False,
) -> None:
    """Fetch and build a known dataset."""
    from data_pipelines.datasets.registry import build as build_dataset

    report = build_dataset(name, out, size=size, source=source)
    counts = ", ".join(f"{split} {count:,}" for split, count in report.counts.items())
    _print(report if as_json else f"{name}: {counts} samples in {report.out} ({report.bytes:,} bytes)", as_json)


@app.command()
def pack(
    source: Annotated[
        Path, typer.Argument(help="Folder of images with texts, folder of class folders, or LLaVA JSON.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the shards.")],
    kind: Annotated[str, typer.Option(help="auto, captions, classes or llava.")] = "auto",
    images: Annotated[Path | None, typer.Option(help="Folder of the images of a LLaVA JSON.")] = None,
    name: Annotated[str, typer.Option(help="First part of the shards' names.")] = "shard",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 2000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace shards of that name.")] = False,
    as_json: _JSON = False,
) -> None:
    """Pack images and texts into shards with indexes."""
    from data_pipelines.importers import read_folder
    from data_pipelines.index import index_name, read_index
    from data_pipelines.pack import write_shards

    if not overwrite and any(out.glob(f"{name}-*.tar")):
        raise ConfigError(f"{out}: holds shards named {name}-*.tar already; add --overwrite, or choose another --name")
    shards = write_shards(_bar(read_folder(source, kind, images)), out, name, samples_per_shard)
    samples = sum(len(read_index(index_name(shard))) for shard in shards)
    result = {"shards": [str(s) for s in shards], "samples": samples}
    typer.echo(json.dumps(result) if as_json else f"{samples:,} samples in {len(shards):,} shards in {out}")


@app.command()
def index(
    shards: _SHARDS,
    force: Annotated[bool, typer.Option("--force", help="Also replace indexes that exist.")] = False,
    as_json: _JSON = False,
) -> None:
    """Write the index of each shard beside it."""
    from data_pipelines.index import build_index, index_name, read_index, write_index
    from data_pipelines.source import expand

    counts: dict[str, int] = {}
    for url in _bar([url for spec in shards for url in expand(spec)]):
        if "://" in url:
            raise ConfigError("indexes are written beside local shards; copy the index of a remote shard beside it")
        path = Path(index_name(url))
        if force or not path.is_file():
            write_index(build_index(url), path)
        counts[url] = len(read_index(path))
    if as_json:
        typer.echo(json.dumps(counts))
    else:
        typer.echo(f"{sum(counts.values()):,} samples in {len(counts):,} shards are indexed")


@app.command()
def lint(
    shards: _SHARDS,
    fast: Annotated[bool, typer.Option("--fast", help="Do not decode images.")] = False,
    as_json: _JSON = False,
) -> None:
    """Say what is wrong with shards; exit code 3 if something is."""
    from data_pipelines.lint import lint as look

    report = look(shards, images=not fast, progress=_bar)
    _print(report, as_json)
    if report.errors:
        raise typer.Exit(3)


@app.command()
def stats(shards: _SHARDS, as_json: _JSON = False) -> None:
    """Count what shards hold."""
    from data_pipelines.stats import stats as count

    _print(count(shards, progress=_bar), as_json)


@app.command()
def cache(
    shards: _SHARDS,
    encoder: Annotated[Path, typer.Option("--encoder", help="Image tokenizer or autoencoder: a model.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the new shards.")],
    batch: Annotated[int, typer.Option(min=1, help="Images per pass.")] = 64,
    fit: Annotated[str, typer.Option(help="How rectangles become squares: square, crop or pad.")] = "square",
    flips: Annotated[bool, typer.Option("--flips", help="Also encode mirrored images.")] = False,
    device: Annotated[str, typer.Option(help="Where the encoder runs.")] = "cpu",
    as_json: _JSON = False,
) -> None:
    """Encode every image once and write shards that hold codes, latents or moments too."""
    from data_pipelines.cache import cache as write_codes
    from mmdiff.models.registry import load_model

    if fit not in ("square", "crop", "pad"):
        raise ConfigError(f"--fit {fit}: expected square, crop or pad")
    model: Any = load_model(encoder, device=device)
    if not hasattr(model, "encode") or not hasattr(model.config, "image_size"):
        raise ConfigError(
            f"{encoder}: a {type(model).__name__} does not turn images into codes; give an image tokenizer"
        )
    model.eval()

    member, how_to = _encoding(model)

    def encode(pixels: Tensor) -> Tensor:
        return how_to(pixels.to(device))

    how = cast(Literal["square", "crop", "pad"], fit)
    report = write_codes(
        shards,
        out,
        encode,
        model.config.image_size,
        batch,
        identity_of(encoder),
        fit=how,
        member=member,
        flips=flips,
        progress=_bar,
    )
    result = {**dataclasses.asdict(report), "shards": [str(s) for s in report.shards]}
    rows, columns = report.grid
    skipped = sum(report.skipped.values())
    text = f"{report.samples:,} samples with {rows}x{columns} {member} in {out}, {skipped:,} left out"
    typer.echo(json.dumps(result) if as_json else text)


@app.command()
def tokenizer(
    shards: _SHARDS,
    vocab_size: Annotated[int, typer.Option("--vocab-size", min=300, help="Largest number of ids.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for tokenizer.json.")],
    as_json: _JSON = False,
) -> None:
    """Train a text tokenizer on the captions, questions and answers of shards."""
    from data_pipelines.stats import texts_of
    from mmdiff.text import Tokenizer

    trained = Tokenizer.train(_bar(texts_of(shards)), vocab_size)
    trained.save_pretrained(out)
    result = {"vocab_size": trained.vocab_size, "out": str(out)}
    typer.echo(json.dumps(result) if as_json else f"{trained.vocab_size:,} ids in {out}")


def _bar(items: Iterable[Any]) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(items, unit=" items", disable=None)  # on stderr, and only where somebody watches


def _print(report: Any, as_json: bool) -> None:
    if not as_json:
        typer.echo(str(report))
        return
    tree = dataclasses.asdict(report) if dataclasses.is_dataclass(report) and not isinstance(report, type) else report
    typer.echo(json.dumps(tree, default=str))


def _encoding(model: Any) -> tuple[str, Any]:
    """What an encoder makes of images: the member's name, and the function.

    Moments are stored in the scale of the image model: training then needs no constant of the autoencoder.
    """
    import math

    import torch

    if hasattr(model, "codebook"):
        return "codes", model.encode
    if not hasattr(model, "moments"):
        return "latents", model.encode

    def scaled(pixels: Tensor) -> Tensor:
        mean, log_variance = model.moments(pixels).chunk(2, dim=1)
        scale = model.config.scale
        return torch.cat((mean * scale, log_variance.clamp(-30, 20) + 2 * math.log(scale)), dim=1)

    return "moments", scaled


def identity_of(folder: Path) -> str:
    """A hash of the encoder's weights, so that codes can be told apart later."""
    import hashlib

    digest = hashlib.sha256()
    for path in [folder] if folder.is_file() else sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]
