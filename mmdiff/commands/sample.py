"""``mmdiff sample``: many pictures for a measurement, one seed each, resumable.

Picture i is a function of the checkpoint, the options, its label and seed0 + i; the batch size and the number of
processes only change the speed. Under torchrun or accelerate every process draws its share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdiff.commands.options import TINY, Device, Dtype, Guidance, Json, Model, Preset, Steps, Temperature, said
from mmdiff.commands.workers import digest, local_device, rank_and_world, sigterm_as_interrupt
from mmdiff.errors import EXIT_STOPPED, ConfigError, SampleError
from mmdiff.io.atomic import replacing

__all__ = ["Plan", "sample"]

_SHARD = 1000
_GRID = 8
"""Rows of the picture of denoising steps."""
_MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What decides every pixel: written to the folder, and compared when a run goes on.

    Attributes:
        checkpoint: SHA-256 over the checkpoint's files.
        labels: Class numbers, drawn in turn.
        prompts: Texts, drawn in turn, instead of labels.
        seed0: Seed of picture 0.
        options: Generation words.
        image_tokenizer: SHA-256 over the files of an image tokenizer that was named; None = the checkpoint's own.
        dtype: Precision of the weights; None = as stored.
        size: Side of the pictures, pixels.
    """

    checkpoint: str
    labels: list[int]
    prompts: list[str]
    seed0: int
    options: dict[str, Any]
    image_tokenizer: str | None
    dtype: str | None
    size: int

    def subject(self, i: int) -> Any:
        """Label or prompt of picture i: in turn, so that any number of pictures is balanced."""
        subjects: Sequence[Any] = self.labels or self.prompts
        return subjects[i % len(subjects)]


def sample(
    num: Annotated[int, typer.Option(min=1, help="Pictures in all.")],
    out: Annotated[Path, typer.Option(help="Folder; an interrupted run goes on there.")],
    model: Model = TINY,
    labels: Annotated[str | None, typer.Option(help="Class numbers such as 0-9,17; default all classes.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file, one prompt per line, instead of labels.")] = None,
    image_tokenizer: Annotated[
        str | None, typer.Option(help="Image tokenizer or autoencoder, if the checkpoint's folder holds none.")
    ] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Also write OUT/samples.npz (arr_0 uint8, arr_1 labels).")] = False,
    shards: Annotated[
        bool, typer.Option("--shards", help="Also write OUT/shards/sample-00000.tar ... (png and cls members).")
    ] = False,
    grid: Annotated[
        Path | None, typer.Option(help="Also write a picture of the denoising steps of the first 8 pictures.")
    ] = None,
    words: Annotated[
        list[str] | None, typer.Option("--set", help="Further generation word, such as order=halton; repeatable.")
    ] = None,
    seed0: Annotated[int, typer.Option(help="Seed of the first picture; picture i has seed0 + i.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per pass.")] = 32,
    preset: Preset = None,
    steps: Steps = None,
    temperature: Temperature = None,
    guidance: Guidance = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Draw pictures with balanced classes; existing ones are checked and kept."""
    from mmdiff.pipelines import ImageGenerator

    rank, world = rank_and_world()
    generator = ImageGenerator.from_pretrained(
        model, device=device or local_device(), dtype=dtype, image_tokenizer=image_tokenizer
    )
    options = said(preset=preset, num_inference_steps=steps, temperature=temperature, guidance=guidance)
    plan = _plan(model, generator, labels, prompts, seed0, dtype, image_tokenizer, options | _words(words or []))
    out.mkdir(parents=True, exist_ok=True)
    _agree(out / _MANIFEST, plan, num, main=rank == 0)
    start = time.perf_counter()
    mine = range(rank, num, world)
    todo = _missing(out, mine, plan.size)
    try:
        with sigterm_as_interrupt():
            _draw(generator, plan, out, [mine[i : i + batch] for i in range(0, len(mine), batch)], todo)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the finished pictures are kept: the same command goes on in {out}", err=True)
        raise typer.Exit(EXIT_STOPPED) from None
    if npz:
        _pack(out, plan, num)
    if shards:
        _shards(out, plan, num)
    if grid is not None and rank == 0:
        _grid(generator, plan, grid, min(num, _GRID))
    result = {"out": str(out), "images": num, "drawn": len(todo), "seconds": round(time.perf_counter() - start, 3)}
    typer.echo(json.dumps(result) if as_json else str(out))


def path_of(out: Path, i: int) -> Path:
    """Where picture i lies: 00000/000000.png."""
    return out / f"{i // _SHARD:05d}" / f"{i:06d}.png"


def _draw(generator: Any, plan: Plan, out: Path, batches: Sequence[Sequence[int]], todo: Sequence[int]) -> None:
    from tqdm import tqdm

    from mmdiff.images import encode_png

    missing = set(todo)
    with tqdm(total=len(todo), unit="image", desc="drawing") as bar:
        for part in batches:
            if missing.isdisjoint(part):
                continue
            # A batch is drawn whole even if one picture is missing: the same batch gives the same bytes.
            subjects = [plan.subject(i) for i in part]
            what: dict[str, Any] = {"labels": subjects} if plan.labels else {"prompts": subjects}
            images = generator(**what, seeds=[plan.seed0 + i for i in part], **plan.options).images
            for i, image in zip(part, images, strict=True):
                if i in missing:
                    _write(path_of(out, i), encode_png(image))
            bar.update(len(missing.intersection(part)))


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path, len(data)) as draft:
        draft.write_bytes(data)


def _missing(out: Path, wanted: Sequence[int], size: int) -> list[int]:
    """Pictures that are not there whole; each one that is there is decoded."""
    from tqdm import tqdm

    for draft in out.glob("*/.*.tmp-*"):
        # Another process may be writing its own; only what a dead one left behind goes away.
        if not _alive(draft.name.rpartition("-")[2]):
            draft.unlink(missing_ok=True)
    there = [i for i in wanted if path_of(out, i).exists()]
    whole = {
        i for i in tqdm(there, unit="image", desc="checking", disable=not there) if _is_whole(path_of(out, i), size)
    }
    return [i for i in wanted if i not in whole]


def _is_whole(path: Path, size: int) -> bool:
    from mmdiff.images import open_image

    try:
        return open_image(path).size == (size, size)
    except (SampleError, ConfigError):
        return False


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _plan(
    model: str,
    generator: Any,
    labels: str | None,
    prompts: Path | None,
    seed0: int,
    dtype: str | None,
    image_tokenizer: str | None,
    options: dict[str, Any],
) -> Plan:
    if labels is not None and prompts is not None:
        raise ConfigError("give --labels or --prompts, not both")
    texts: list[str] = []
    numbers: list[int] = []
    if prompts is not None:
        texts = _read_prompts(prompts)
    else:
        generator.require("class_image")
        numbers = _numbers(labels, generator.classes)
    return Plan(
        checkpoint=digest(model),
        labels=numbers,
        prompts=texts,
        seed0=seed0,
        options=options,
        image_tokenizer=None if image_tokenizer is None else digest(image_tokenizer),
        dtype=dtype,
        size=generator.painter.size,
    )


def _words(texts: Sequence[str]) -> dict[str, Any]:
    """``word=value`` texts, values as in YAML."""
    from mmdiff import config

    out: dict[str, Any] = {}
    for text in texts:
        word, equals, value = text.partition("=")
        if not equals or not word:
            raise ConfigError(f"--set {text!r}: expected word=value, such as order=halton")
        out[word] = config.value_of(value)
    return out


def _numbers(text: str | None, classes: int) -> list[int]:
    """Class numbers of text such as ``0-9,17``; all classes for None."""
    if text is None:
        return list(range(classes))
    out: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"--labels {text!r}: expected numbers and ranges such as 0-9,17")
        out += range(int(first), int(last if dash else first) + 1)
    wrong = [n for n in out if n >= classes]
    if not out or wrong:
        raise ConfigError(f"--labels {text!r}: {wrong[:5]} not among the checkpoint's classes 0 to {classes - 1}")
    return out


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from None
    texts = [line for line in lines if line]
    if not texts:
        raise ConfigError(f"{path}: holds no prompts")
    return texts


def _agree(path: Path, plan: Plan, num: int, *, main: bool) -> None:
    """Write the manifest, or make sure that the folder's one tells the same pictures."""
    from mmdiff import config

    mine = asdict(plan)
    if path.exists():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"{path}: is not a manifest of `mmdiff sample`; give another folder") from None
        differing = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
        if differing:
            raise ConfigError(
                f"{path.parent}: holds pictures of other settings ({', '.join(differing)} differ); give another folder"
            )
    if main:
        tree = {"num": num, "config": mine, "hash": config.fingerprint(mine)}
        _write(path, (json.dumps(tree, indent=1) + "\n").encode())


def _pack(out: Path, plan: Plan, num: int) -> None:
    """All pictures in one file, in the layout of ADM's sample batches."""
    import numpy as np

    from mmdiff.images import open_image

    missing = [i for i in range(num) if not path_of(out, i).exists()]
    if missing:
        typer.echo(f"{len(missing)} pictures of other processes are not there yet; --npz is left to the last", err=True)
        return
    arrays: dict[str, Any] = {"arr_0": np.stack([np.asarray(open_image(path_of(out, i))) for i in range(num)])}
    if plan.labels:
        arrays["arr_1"] = np.array([plan.subject(i) for i in range(num)], dtype=np.int64)
    needed = sum(array.nbytes for array in arrays.values())
    with replacing(out / "samples.npz", needed) as draft, draft.open("wb") as file:
        np.savez(file, **arrays)


def _shards(out: Path, plan: Plan, num: int) -> None:
    """All pictures as webdataset shards."""
    from data_pipelines.pack import write_shards

    missing = [i for i in range(num) if not path_of(out, i).exists()]
    if missing:
        typer.echo(
            f"{len(missing)} pictures of other processes are not there yet; --shards is left to the last", err=True
        )
        return

    def rows() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(num):
            name = "cls" if plan.labels else "txt"
            yield f"{i:06d}", {"png": path_of(out, i).read_bytes(), name: str(plan.subject(i)).encode()}

    write_shards(rows(), out / "shards", "sample", _SHARD)


def _grid(generator: Any, plan: Plan, path: Path, rows: int) -> None:
    from mmdiff.images import encode_png

    what: dict[str, Any] = {"labels" if plan.labels else "prompts": [plan.subject(i) for i in range(rows)]}
    _write(path, encode_png(generator.denoising(**what, seeds=[plan.seed0 + i for i in range(rows)], **plan.options)))
