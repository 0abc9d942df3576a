"""GenEval from end to end: draw four pictures per prompt, find their objects, judge, and write the official files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdiff.errors import ConfigError, SampleError
from mmdiff.images import encode_png, open_image

from ..files import write_text
from ..processes import barrier, rank_and_world
from ..run_folder import RunFolder
from .colors import ColorClassifier
from .files import pictures_of, prepare_folder, sample_path, write_results
from .rules import Detection, Options, judge
from .scoring import GenEvalResult, Picture, summarise, summary_text

__all__ = ["draw", "measure", "opened", "verdict_of"]


def draw(
    generator: Any,
    prompts: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    samples: int = 4,
    seed: int = 42,
    batch: int = 4,
    words: Mapping[str, Any] | None = None,
    checkpoint: str = "",
) -> None:
    """Draw the pictures of all prompts in the official layout; pictures that are there are kept.

    Picture j of every prompt has the seed ``seed + j``, so a picture depends on its prompt and number alone.

    Args:
        generator: A `mmdiff.ImageGenerator`, or anything that is called like one.
        prompts: Metadata of the prompts.
        folder: Where to.
        samples: Pictures per prompt.
        seed: Of the first picture of each prompt.
        batch: Pictures per pass.
        words: Generation options.
        checkpoint: Hash of the model, for the record.

    Raises:
        ConfigError: The folder holds pictures of other prompts or settings.
    """
    from tqdm import tqdm

    rank, world = rank_and_world()
    RunFolder(folder, {"samples": samples, "seed": seed, "words": dict(words or {}), "checkpoint": checkpoint})
    if rank == 0:
        prepare_folder(folder, prompts)
    barrier()
    every = [(p, s) for p in range(len(prompts)) for s in range(samples)][rank::world]
    todo = {(p, s) for p, s in every if not _is_whole(sample_path(folder, p, s))}
    with tqdm(total=len(todo), unit="image", desc="drawing", disable=None) as bar:
        for start in range(0, len(every), batch):
            part = every[start : start + batch]
            if todo.isdisjoint(part):
                continue
            # A batch is drawn whole even if one picture is missing: the same batch gives the same bytes.
            texts = [str(prompts[p]["prompt"]) for p, _ in part]
            images = generator(prompts=texts, seeds=[seed + s for _, s in part], **dict(words or {})).images
            for place, image in zip(part, images, strict=True):
                if place in todo:
                    _keep(sample_path(folder, *place), encode_png(image))
            bar.update(len(todo.intersection(part)))
    barrier()


def measure(
    folder: str | Path,
    *,
    out: str | Path,
    detector: Callable[[Any], Sequence[Detection]],
    colors: ColorClassifier,
    options: Options | None = None,
    samples: int | None = None,
) -> GenEvalResult:
    """Judge a folder of pictures, whoever made them; an interrupted run goes on.

    Args:
        folder: In the official layout.
        out: Folder of ``results.jsonl``, ``detections.jsonl`` and ``summary.txt``.
        detector: PIL image -> objects, such as `eval.geneval.detector.Detector`.
        colors: Judge of colours.
        options: See `Options`.
        samples: Pictures that every prompt must have; None: as many as the others.

    Raises:
        ConfigError: A picture is missing or damaged, or ``out`` holds verdicts of other settings.
    """
    options = options or Options()
    folder = Path(folder)
    prompts = {p.relative_to(folder).as_posix(): m for p, m in pictures_of(folder, samples=samples).items()}
    settings = {"images": str(folder), "detector": getattr(detector, "name", "given"), "colors": colors.name}
    run = RunFolder(out, settings | {"options": vars(options)})
    rank, world = rank_and_world()
    done = run.done()
    for name in _bar([n for n in list(prompts)[rank::world] if n not in done]):
        verdict, found = _judged(folder / name, prompts[name], detector, colors, options)
        run.append(name, correct=verdict.correct, reason=verdict.reason, details=verdict.details, detections=found)
    barrier()
    done = run.done()
    pictures = [verdict_of(str(folder / name), metadata, done[name]) for name, metadata in prompts.items()]
    result = summarise(pictures)
    if rank == 0:
        write_results(Path(out) / "results.jsonl", pictures)
        lines = [json.dumps({"filename": n, "detections": done[n]["detections"]}) + "\n" for n in prompts]
        write_text(Path(out) / "detections.jsonl", "".join(lines))
        write_text(Path(out) / "summary.txt", summary_text(result) + "\n")
    barrier()
    return result


def _judged(
    path: Path,
    metadata: Mapping[str, Any],
    detector: Callable[[Any], Sequence[Detection]],
    colors: Any,
    options: Options,
) -> tuple[Any, list[dict[str, Any]]]:
    """Verdict on a picture, and its detections as plain data with the colours that were asked for."""
    image = opened(path)
    found = detector(image)
    named: dict[int, str] = {}

    def classify(name: str, objects: Sequence[Detection]) -> list[str]:
        told = colors(image, name, objects, options)
        named.update({id(one): color for one, color in zip(objects, told, strict=True)})
        return told

    verdict = judge(metadata, found, classify=classify, options=options)
    least = min(options.threshold, options.counting_threshold)
    kept = [d for d in found if np.float32(d.score) > np.float32(least)]
    rows = [
        {"class": d.name, "box": [float(x) for x in d.box], "score": float(np.float32(d.score))}
        | ({"color": named[id(d)]} if id(d) in named else {})
        for d in kept
    ]
    return verdict, rows


def verdict_of(name: str, metadata: Mapping[str, Any], record: Mapping[str, Any]) -> Picture:
    """A judged picture of its prompt and of ``correct``, ``reason`` and ``details``."""
    return Picture(
        filename=name,
        tag=metadata["tag"],
        prompt=metadata["prompt"],
        correct=bool(record["correct"]),
        reason=record["reason"],
        metadata=json.dumps(metadata),
        details=json.dumps(record["details"]),
    )


def opened(path: Path) -> Any:
    """A decoded picture.

    Raises:
        ConfigError: It cannot be decoded.
    """
    try:
        return open_image(path)
    except SampleError as error:
        raise ConfigError(f"{path}: cannot be decoded ({error}); draw it again") from None


def _is_whole(path: Path) -> bool:
    try:
        return path.is_file() and bool(open_image(path).size)
    except (SampleError, ConfigError):
        return False


def _keep(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.tmp")
    draft.write_bytes(data)
    draft.replace(path)


def _bar(names: Sequence[str]) -> Any:
    from tqdm import tqdm

    return tqdm(names, unit="image", desc="judging", disable=None)
