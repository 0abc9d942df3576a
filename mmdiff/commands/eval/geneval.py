"""``mmdiff eval geneval``: draw the prompts with a model, or judge a folder that anyone made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmdiff.commands.eval.output import BatchSize, JsonOut, Numbers, device_of, finish, hashes_of, printed, shown
from mmdiff.commands.options import Dtype, Guidance, Preset, Steps, Temperature, said

__all__ = ["geneval"]


def geneval(
    source: Annotated[
        str,
        typer.Argument(help="Checkpoint that draws; a folder of pictures in the official layout; or results .jsonl."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder of pictures and verdicts; an interrupted run goes on.")
    ] = None,
    detector: Annotated[
        str | None, typer.Option(help="Mask2Former: folder or hub id; 'tiny' (random, for trying the plumbing).")
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(help="open_clip MODEL/WEIGHTS that judges colours; default ViT-L-14/openai (tiny: random)."),
    ] = None,
    detections: Annotated[Path | None, typer.Option(help="Detections made elsewhere, colours included.")] = None,
    scorer: Annotated[Path | None, typer.Option(help="NOT official: a scorer trained here judges instead.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer of that scorer; default: its own folder.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Metadata file; default the 553 prompts, made again.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 4,
    limit: Annotated[int | None, typer.Option(min=1, help="Only every so many-th prompt, this many in all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first picture of each prompt.")] = 42,
    batch: BatchSize = 4,
    preset: Preset = None,
    steps: Steps = None,
    temperature: Temperature = None,
    guidance: Guidance = None,
    compare: Annotated[str | None, typer.Option(help="published: print known numbers beside it.")] = None,
    device: Annotated[str | None, typer.Option(help="Where networks run; default a GPU if there is one.")] = None,
    dtype: Dtype = None,
    as_json: JsonOut = False,
) -> None:
    """GenEval: objects, counts, colours and places of prompts, by the official rules and files."""
    from eval.processes import joined
    from mmdiff.errors import ConfigError

    words = said(preset=preset, num_inference_steps=steps, temperature=temperature, guidance=guidance)
    settings: dict[str, Any] = {"source": source, "samples": samples, "seed": seed, "words": words, "clip": clip}
    settings |= {"detector": detector, "detections": detections, "scorer": scorer, "prompts": prompts, "limit": limit}
    folder = Path(source)
    drawn = not (source.endswith(".jsonl") or (folder.is_dir() and any(folder.glob("[0-9]*/metadata.jsonl"))))
    if compare is not None and (scorer is not None or detector == "tiny"):
        raise ConfigError(
            "--compare: what a scorer or a random detector says is not GenEval, and stands beside nothing"
        )
    if (drawn or detector) and out is None:
        raise ConfigError("say where pictures and verdicts go: --out FOLDER")
    checkpoint = None
    with joined():
        if drawn:
            from mmdiff.commands.workers import digest

            checkpoint = digest(source)
            assert out is not None
            folder = out / "images"
            _draw(source, folder, prompts, limit, samples, seed, batch, words, checkpoint, device_of(device), dtype)
        result, label, numbers = _judge(
            source, folder, drawn, out, detector, clip, detections, scorer, tokenizer, device_of(device)
        )
    finish(
        result,
        _lines(result, label, compare, numbers),
        as_json,
        out,
        measure="geneval" if label.startswith("official") else "not-geneval",
        settings=settings | {"judged by": label},
        page=lambda: _page(result, folder, label, numbers, settings),
        hashes={"checkpoint": checkpoint} | hashes_of(detections=detections, prompts=prompts, scorer=scorer),
    )


def _draw(
    model: str,
    folder: Path,
    file: Path | None,
    limit: int | None,
    samples: int,
    seed: int,
    batch: int,
    words: dict[str, Any],
    checkpoint: str,
    device: str,
    dtype: str | None,
) -> None:
    from eval.geneval import draw
    from eval.geneval.prompts import official_prompts, read_prompts
    from mmdiff.pipelines import ImageGenerator

    every = read_prompts(file) if file is not None else official_prompts()
    chosen = every[:: max(1, len(every) // limit)][:limit] if limit else every
    generator = ImageGenerator.from_pretrained(model, device=device, dtype=dtype)
    draw(generator, chosen, folder, samples=samples, seed=seed, batch=batch, words=words, checkpoint=checkpoint)


def _judge(
    source: str,
    folder: Path,
    drawn: bool,
    out: Path | None,
    detector: str | None,
    clip: str | None,
    detections: Path | None,
    scorer: Path | None,
    tokenizer: Path | None,
    device: str,
) -> tuple[Any, str, Numbers]:
    """The result, who judged, and what else they say."""
    from eval import geneval

    if scorer is not None:
        from eval.geneval.by_scorer import LABEL, judge_by_scorer, open_scorer

        told = judge_by_scorer(folder, *open_scorer(scorer, tokenizer))
        control = ("right if prompts were shuffled", f"{told.shuffled:.2%}", f"the control; chance {told.chance:.2%}")
        return told.result, LABEL, [control]
    if detections is not None:
        return geneval.score_files(folder, detections=detections), f"official rules on detections of {detections}", ()
    if not drawn and source.endswith(".jsonl"):
        return geneval.score_files(source), "official summary of a results file", ()
    from eval.geneval.colors import ColorClassifier
    from eval.geneval.detector import DEFAULT_DETECTOR, Detector

    tiny = detector == "tiny"
    found = Detector.tiny() if tiny else Detector.from_pretrained(detector or DEFAULT_DETECTOR, device=device)
    if tiny and clip is None:
        colors = ColorClassifier.tiny()
    else:
        model, _, weights = (clip or "ViT-L-14/openai").partition("/")
        colors = ColorClassifier.open_clip(model, weights, device=device)
    assert out is not None
    result = geneval.measure(folder, out=out / "verdicts", detector=found, colors=colors)
    return result, "NOT GenEval: random detector" if tiny else f"official rules, detector {found.name}", ()


def _lines(result: Any, label: str, compare: str | None, numbers: Numbers) -> list[str]:
    from eval.geneval.scoring import summary_text

    lines = [summary_text(result), "", *printed(numbers), f"judged by: {label}"]
    if compare is not None:
        from eval.published import comparison

        rows = comparison("geneval", result.overall, lower_is_better=False)
        lines += ["", *(f"{name:24} {value:>8}  {more or source}" for name, value, source, more in rows)]
    return lines


def _page(result: Any, folder: Path, label: str, numbers: Numbers, settings: dict[str, Any]) -> str:
    from eval.page import Bars, Gallery, Line, Shown, render, thumbnail

    parts: list[Any] = [
        Line(name="overall", value=f"{result.overall:.5f}", note="mean of the tasks"),
        Line(name="right pictures", value=f"{result.correct_images:.2%}", note=f"of {result.images}"),
        Line(name="prompts with a right picture", value=f"{result.correct_prompts:.2%}", note=f"of {result.prompts}"),
        *shown(numbers),
    ]
    bars = tuple((t.tag, t.accuracy, f"{t.accuracy:.1%} of {t.n}") for t in result.tasks)
    parts.append(Bars(title="By task", shares=bars))
    for title, good in (("Wrong pictures", False), ("Right pictures", True)):
        items = []
        for picture in [p for p in result.pictures if p.correct == good][:24]:
            path = next((q for q in (Path(picture.filename), folder / picture.filename) if q.is_file()), None)
            images = ((thumbnail(path.read_bytes()), picture.tag),) if path else ()
            items.append(Shown(pictures=images, text=(picture.prompt, *picture.reason.split("\n")), good=good))
        parts.append(Gallery(title=title, items=tuple(items)))
    if label.startswith("official"):
        return render("GenEval", f"Judged by: {label}.", parts, facts=settings)
    return render(label, "Comparable with nothing but itself.", parts, facts=settings)
