"""``mmdiff data build|pack|index|lint|stats|reshard|split|dedup|cache|tokenizer``: making and knowing shards."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from mmdiff.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["app", "build", "cache", "dedup", "index", "lint", "pack", "reshard", "split", "stats", "tokenizer"]

app = typer.Typer(help="Make shards, check them, look into them.", no_args_is_help=True)

_JSON = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_SHARDS = Annotated[
    list[str], typer.Argument(help="Shards: files, folders, globs, braces, URLs, or embedded:emoji/train.")
]
_WORKERS = Annotated[int, typer.Option("--workers", min=1, max=256, help="Processes; the result is the same.")]
_OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace shards of that name.")]


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
        str, typer.Argument(help="Folder of images, JSON of LLaVA, COCO or VQA, parquet file or folder, or shards.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the shards.")],
    kind: Annotated[
        str, typer.Option(help="auto, captions, images, classes, llava, coco, vqa, table or shards.")
    ] = "auto",
    images: Annotated[Path | None, typer.Option(help="Folder of the images of a JSON file.")] = None,
    answers: Annotated[Path | None, typer.Option(help="Annotations that belong to VQA's questions.")] = None,
    captions: Annotated[
        Path | None, typer.Option(help="JSON {key: caption} instead of the captions in shards.")
    ] = None,
    name: Annotated[str, typer.Option(help="First part of the shards' names.")] = "shard",
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples per shard.")] = 2000,
    workers: _WORKERS = 1,
    check: Annotated[
        bool, typer.Option("--check", help="Decode every image; one that cannot be is unreadable.")
    ] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out and count unreadable samples.")] = False,
    overwrite: _OVERWRITE = False,
    as_json: _JSON = False,
) -> None:
    """Pack images and texts into shards with indexes; run again after an interruption, it goes on."""
    from data_pipelines.importers import Decoded, Extra, open_rows
    from data_pipelines.pack import pack as write

    rows = open_rows(source, kind, Extra(images=images, answers=answers, captions=captions))
    rows = Decoded(rows) if check else rows
    with _counter(len(rows)) as tick:
        report = write(
            rows, out, name, samples_per_shard, workers=workers, skip_bad=skip_bad, overwrite=overwrite, tick=tick
        )
    _print(report if as_json else _packed(report, out), as_json)


@app.command()
def reshard(
    shards: _SHARDS,
    out: Annotated[Path, typer.Option("--out", help="Folder for the new shards.")],
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples per new shard.")] = 2000,
    name: Annotated[str, typer.Option(help="First part of the shards' names.")] = "shard",
    shuffle: Annotated[int | None, typer.Option(help="Seed of a new order; default: the present one.")] = None,
    workers: _WORKERS = 1,
    overwrite: _OVERWRITE = False,
    as_json: _JSON = False,
) -> None:
    """Write the samples of shards into shards of another size."""
    from data_pipelines.sets import reshard as write

    with _counter(_samples(shards)) as tick:
        report = write(
            shards,
            out,
            samples_per_shard,
            name=name,
            shuffle=shuffle,
            workers=workers,
            overwrite=overwrite,
            tick=tick,
        )
    _print(report if as_json else _packed(report, out), as_json)


@app.command()
def split(
    shards: _SHARDS,
    out: Annotated[Path, typer.Option("--out", help="Folder in which each part gets a folder.")],
    parts: Annotated[str, typer.Option(help="Names and shares, such as train=0.98,test=0.02.")] = "train=0.9,test=0.1",
    seed: Annotated[int, typer.Option(help="Another seed, another split.")] = 0,
    near: Annotated[bool, typer.Option("--near", help="Also keep together pictures that look alike.")] = False,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples per new shard.")] = 2000,
    workers: _WORKERS = 1,
    overwrite: _OVERWRITE = False,
    as_json: _JSON = False,
) -> None:
    """Split shards by the content of their pictures: the same picture is never in two parts."""
    from data_pipelines.sets import split as divide

    with _counter(2 * _samples(shards)) as tick:
        report = divide(
            shards,
            out,
            _shares(parts),
            seed=seed,
            near=near,
            samples_per_shard=samples_per_shard,
            workers=workers,
            overwrite=overwrite,
            tick=tick,
        )
    counts = ", ".join(f"{name} {part.samples:,}" for name, part in report.parts.items())
    text = f"{counts} samples in {out}; {report.groups:,} groups share pictures, {report.unreadable:,} unreadable"
    _print(report if as_json else text, as_json)


@app.command()
def dedup(
    shards: _SHARDS,
    out: Annotated[Path | None, typer.Option("--out", help="File for all groups as JSON.")] = None,
    workers: _WORKERS = 1,
    as_json: _JSON = False,
) -> None:
    """Report identical and similar pictures; give a training and a test set to see what they have in common."""
    from data_pipelines.sets import dedup as look

    with _counter(_samples(shards)) as tick:
        report = look(shards, workers=workers, tick=tick)
    if out is not None:
        out.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n", encoding="utf-8")
    _print(report, as_json)


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
def stats(
    shards: _SHARDS,
    page: Annotated[
        Path | None, typer.Option(help="Also write a page with histograms and pictures: FILE.html.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder of a tokenizer, to count tokens.")] = None,
    as_json: _JSON = False,
) -> None:
    """Count what shards hold."""
    from data_pipelines.stats import stats as count

    tokens = None
    if tokenizer is not None:
        from mmdiff.text import Tokenizer

        read = Tokenizer.from_pretrained(tokenizer)

        def tokens(text: str) -> int:
            return len(read.encode(text))

    report = count(shards, tokens=tokens, thumbnails=60 if page is not None else 0, progress=_bar)
    if page is not None:
        from mmdiff.commands.data_page import write_page

        write_page(page, report, shards)
    typer.echo(json.dumps(report.counts()) if as_json else str(report))


@app.command()
def cache(
    shards: _SHARDS,
    encoder: Annotated[Path, typer.Option("--encoder", help="Image tokenizer or autoencoder: a model.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the new shards.")],
    batch: Annotated[int, typer.Option(min=1, help="Images per pass.")] = 64,
    fit: Annotated[str, typer.Option(help="How rectangles become squares: square, crop or pad.")] = "square",
    flips: Annotated[bool, typer.Option("--flips", help="Also encode mirrored images.")] = False,
    size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels; default: the encoder's own. Codes: the network's grid.")
    ] = None,
    others: Annotated[
        bool, typer.Option("--others", help="Also encode the further images of a sample, which edits begin from.")
    ] = False,
    latents: Annotated[
        bool, typer.Option("--latents", help="Of a scalar-quantised tokenizer take the values instead of the codes.")
    ] = False,
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
            f"{encoder}: is an {type(model).__name__}, which does not turn images into codes or latents; give an image "
            "tokenizer or an autoencoder"
        )
    model.eval()
    side = size or model.config.image_size
    factor = getattr(model.config, "factor", 1)
    if side % factor:
        raise ConfigError(f"--size {side}: not a multiple of the encoder's downsampling, {factor}")
    if latents and not hasattr(model, "latents"):
        raise ConfigError(f"--latents: a {type(model).__name__} has no values behind its codes; leave it out")
    member, how_to = ("latents", model.latents) if latents else _encoding(model)

    seen = _Seen(member)

    def encode(pixels: Tensor) -> Tensor:
        made = how_to(pixels.to(device))
        seen.add(made)
        return made

    how = cast(Literal["square", "crop", "pad"], fit)
    report = write_codes(
        shards,
        out,
        encode,
        side,
        batch,
        identity_of(encoder),
        fit=how,
        member=member,
        flips=flips,
        others=others,
        progress=_bar,
    )
    result = {**dataclasses.asdict(report), "shards": [str(s) for s in report.shards]}
    rows, columns = report.grid
    skipped = sum(report.skipped.values())
    text = f"{report.samples:,} samples with {rows}x{columns} {member} in {out}, {skipped:,} left out"
    if member == "codes":
        result |= {"codes_used": len(seen.codes), "codebook": model.codebook}
        text += f"; {len(seen.codes):,} of {model.codebook:,} codes used"
    elif rms := seen.size:
        result["latent_size"] = rms
        text += f"; root mean square {rms:.3g}"
        if not 0.5 <= rms <= 2:
            text += f", where image models expect about 1: multiply 'scale' in {encoder}/config.json by {1 / rms:.3g}"
            text += ", delete its manifest.json, and cache again"
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


@contextlib.contextmanager
def _counter(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and remaining time, to be moved on by numbers of samples."""
    from tqdm import tqdm

    with tqdm(total=total, unit=" samples", disable=None, smoothing=0.05) as bar:

        def tick(done: int) -> None:
            bar.update(done)

        yield tick


def _samples(shards: list[str]) -> int:
    from data_pipelines.source import open_shards

    return sum(len(index) for index in open_shards(shards))


def _packed(report: Any, out: Path) -> str:
    shards = "1 shard" if len(report.shards) == 1 else f"{len(report.shards):,} shards"
    text = f"{report.samples:,} samples in {shards} in {out}"
    if report.resumed:
        text += f", {report.resumed:,} of them finished before"
    if report.skipped:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(report.skipped.items()))
        text += f"; {sum(report.skipped.values()):,} samples left out ({reasons})"
    return text


def _shares(parts: str) -> dict[str, float]:
    shares: dict[str, float] = {}
    for part in parts.split(","):
        name, _, share = part.partition("=")
        if not re.fullmatch(r"[\w.+-]+", name) or not re.fullmatch(r"\d*\.?\d+", share) or name in shares:
            raise ConfigError(f"--parts {parts}: expected names and shares, such as train=0.98,test=0.02")
        shares[name] = float(share)
    return shares


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


class _Seen:
    """What an encoder made of all images: which codes, or how large the latents are.

    Args:
        member: What is stored: codes, latents or moments.
    """

    def __init__(self, member: str) -> None:
        self.codes: set[int] = set()
        self._member = member
        self._squares, self._numbers = 0.0, 0

    def add(self, made: Tensor) -> None:
        """Take in a batch."""
        if self._member == "codes":
            self.codes.update(made.unique().tolist())
            return
        squares = made.double().square()
        if self._member == "moments":
            mean, log_variance = made.double().chunk(2, dim=1)
            squares = mean.square() + log_variance.exp()
        self._squares += float(squares.sum())
        self._numbers += squares.numel()

    @property
    def size(self) -> float:
        """Root mean square of the latents that training draws from what is stored; 0 before the first."""
        return math.sqrt(self._squares / self._numbers) if self._numbers else 0.0


def identity_of(folder: Path) -> str:
    """A hash of the encoder's weights and, where latents are stored in a scale, that scale."""
    import hashlib

    digest = hashlib.sha256()
    for path in [folder] if folder.is_file() else sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    config = folder / "config.json"
    if config.is_file():
        saved = json.loads(config.read_text(encoding="utf-8"))
        scale = saved.get("config", saved).get("scale")
        digest.update(b"" if scale is None else str(float(scale)).encode())
    return digest.hexdigest()[:16]
