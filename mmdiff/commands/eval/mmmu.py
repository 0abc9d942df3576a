"""``mmdiff eval mmmu``: ask a model MMMU's or MMMU-Pro's questions, or score files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmdiff.commands.eval.output import BatchSize, JsonOut, device_of, finish, hashes_of
from mmdiff.commands.options import Dtype, said

__all__ = ["mmmu"]


def mmmu(
    model: Annotated[
        str, typer.Argument(help="Checkpoint; or predictions to score: JSON, or folder SUBJECT/output.json.")
    ],
    data: Annotated[
        str, typer.Argument(help="Questions: folder or dataset id; or the official answer file of the predictions.")
    ] = "MMMU/MMMU",
    out: Annotated[
        Path | None, typer.Option(help="Folder of answers and results; an interrupted run goes on there.")
    ] = None,
    style: Annotated[
        str, typer.Option(help="How it is asked and parsed: official, lmms-eval, llada-v, pro-direct, pro-cot.")
    ] = "official",
    split: Annotated[str, typer.Option(help="dev, validation or test.")] = "validation",
    pro: Annotated[
        str | None, typer.Option(help="MMMU-Pro: 'standard (10 options)', 'standard (4 options)' or vision.")
    ] = None,
    subject: Annotated[str, typer.Option(help="ALL, or short or full names with commas.")] = "ALL",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many questions of each subject.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Score files that lack questions.")] = False,
    batch: BatchSize = 1,
    gen_length: Annotated[int | None, typer.Option(min=1, help="Tokens of an answer; default: the style's.")] = None,
    block_length: Annotated[int | None, typer.Option(min=1, help="Tokens decided together.")] = None,
    steps: Annotated[int | None, typer.Option("--num-inference-steps", "--steps", min=1, help="Passes.")] = None,
    compare: Annotated[str | None, typer.Option(help="published: print known numbers beside it.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs; default a GPU if there is one.")] = None,
    dtype: Dtype = None,
    as_json: JsonOut = False,
) -> None:
    """MMMU and MMMU-Pro: accuracy by subject and discipline, official files, resumable, many processes."""
    from eval import mmmu as benchmark
    from eval.mmmu.subjects import subjects_of
    from eval.processes import joined

    if _is_predictions(model):
        _of_files(model, None if Path(model).is_dir() else data, partial, compare, as_json, out)
        return
    from mmdiff.commands.workers import digest
    from mmdiff.errors import ConfigError
    from mmdiff.pipelines import VisionLanguage

    if out is None:
        raise ConfigError("say where the answers go: --out FOLDER")
    words = said(gen_length=gen_length, block_length=block_length, num_inference_steps=steps)
    with joined():
        done = benchmark.measure(
            VisionLanguage.from_pretrained(model, device=device_of(device), dtype=dtype),
            data,
            out=out,
            style=style,
            split=split,
            part=pro,
            subjects=subjects_of(subject),
            limit=limit,
            batch=batch,
            words=words,
            checkpoint=digest(model),
            name=Path(model).name or "model",
        )
    settings: dict[str, Any] = {
        "model": model,
        "data": data,
        "style": style,
        "split": split,
        "pro": pro,
        "subject": subject,
    }
    settings |= {"limit": limit, "words": {**benchmark.STYLES[style].words, **words}, "fallback seed": 42}
    finish(
        done.result,
        _lines(done.result, compare),
        as_json,
        out,
        measure="mmmu",
        settings=settings,
        page=lambda: _page(done.result, settings, done),
        hashes={"checkpoint": digest(model)},
        items=[{"id": d.id, "answer": d.answer, "response": done.raw[d.id]} for d in done.documents],
    )


def _of_files(
    predictions: str, answers: str | None, partial: bool, compare: str | None, as_json: bool, out: Path | None
) -> None:
    from eval import mmmu as benchmark

    result = benchmark.score_files(predictions, answers, incomplete=partial)
    settings = {"predictions": predictions, "answers": answers, "partial": partial, "fallback seed": 42}
    finish(
        result,
        _lines(result, compare),
        as_json,
        out,
        measure="mmmu",
        settings=settings,
        page=lambda: _page(result, settings, None),
        hashes=hashes_of(predictions=predictions, answers=answers),
    )


def _is_predictions(text: str) -> bool:
    path = Path(text)
    return path.suffix in (".json", ".jsonl") or (path.is_dir() and any(path.glob("*/output.json")))


def _lines(result: Any, compare: str | None) -> list[str]:
    from eval.mmmu.scoring import format_table

    lines = [format_table(result.table), ""]
    lines.append(
        f"{result.n} questions, {result.fallbacks} answered at random because nothing could be parsed; "
        f"{result.without_luck:.3f} with those counted as wrong"
    )
    if result.unanswered:
        lines.append(f"partial: {result.unanswered} questions have no answer and are not counted")
    if compare is not None:
        lines += ["", *(f"{name:24} {value:>8}  {more or source}" for name, value, source, more in _rows(result))]
    return lines


def _rows(result: Any) -> Any:
    from eval.published import comparison

    return comparison("mmmu", result.accuracy, lower_is_better=False)


def _page(result: Any, settings: dict[str, Any], done: Any) -> str:
    from eval.page import Bars, Gallery, Line, Table, render

    parts: list[Any] = [
        Line(name="accuracy", value=f"{result.accuracy:.3f}", note=f"{result.n} questions, protocol {result.protocol}"),
        Line(
            name="without luck", value=f"{result.without_luck:.3f}", note=f"{result.fallbacks} random fallbacks wrong"
        ),
        Bars(
            title="By subject",
            shares=tuple((row.name, row.acc, f"{row.acc:.1%} of {row.num}") for row in result.table if row.num),
        ),
    ]
    if done is not None:
        for title, good in (("Wrong answers", False), ("Right answers", True)):
            items = tuple(_shown(done, item) for item in result.items if item.correct == good)
            parts.append(Gallery(title=title, items=items[:24]))
    columns = ("Model", "MMMU", "Source", "More")
    parts.append(Table(title="Published", columns=columns, rows=tuple(_rows(result)), note="MMMU validation."))
    return render("MMMU", "Questions about pictures from thirty subjects.", parts, facts=settings)


def _shown(done: Any, item: Any) -> Any:
    from eval.page import Shown, thumbnail

    document = next(d for d in done.documents if d.id == item.id)
    pictures = tuple((thumbnail(data), name) for name, data in document.images.items())
    said = item.prediction if isinstance(item.prediction, str) else done.responses[item.id]
    text = (document.question, f"said: {said}{' (at random)' if item.fallback else ''}", f"truth: {document.answer}")
    return Shown(pictures=pictures, text=(item.id, *text), good=item.correct)
