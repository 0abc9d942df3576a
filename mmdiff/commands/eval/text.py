"""``mmdiff eval vqa|caption|nll``: short answers, captions and likelihoods, from files or by a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmdiff.commands.eval.output import BatchSize, JsonOut, Out, device_of, finish
from mmdiff.commands.options import Dtype, GenLength, Preset, Steps, said

__all__ = ["caption", "nll", "vqa"]

_Pictures = Annotated[Path | None, typer.Option(help="Folder of the pictures of a JSON file.")]
_Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many.")]
_Device = Annotated[str | None, typer.Option(help="Where the model runs; default a GPU if there is one.")]


def vqa(
    predictions: Annotated[
        str, typer.Argument(help="JSON or JSON lines: question_id, answer; or model:PATH to ask a model.")
    ],
    references: Annotated[str, typer.Argument(help="JSON or JSON lines: question_id, answer, kind; VQAv2; or shards.")],
    protocol: Annotated[str, typer.Option(help="exact, vqav2 or vqav2-normalised.")] = "exact",
    images: _Pictures = None,
    questions: Annotated[Path | None, typer.Option(help="VQAv2's file of questions.")] = None,
    prompt: Annotated[str, typer.Option(help="Added to every question on a line of its own.")] = "",
    limit: _Limit = None,
    batch: BatchSize = 8,
    gen_length: GenLength = None,
    steps: Steps = None,
    preset: Preset = None,
    device: _Device = None,
    dtype: Dtype = None,
    as_json: JsonOut = False,
    out: Out = None,
) -> None:
    """Accuracy of short answers, per kind, beside the commonest answer."""
    from eval import records

    words = said(gen_length=gen_length, num_inference_steps=steps, preset=preset)
    settings = {"predictions": predictions, "references": references, "protocol": protocol, "prompt": prompt}
    done = None
    if predictions.startswith("model:"):
        items = records.questions(references, images, questions)
        done = _asked(predictions, items, out, "vqa", protocol, prompt, limit, batch, words, device, dtype)
        result = done.result
    else:
        from mmdiff.commands.eval.measures import evaluate

        result = evaluate("vqa", predictions, references, protocol=protocol)
    lines = [f"{'kind':24} {'n':>6} {'accuracy':>9} {'macro':>7} {'commonest answer':>17}"]
    for k in (*result.kinds, *result.answer_types):
        lines.append(f"{k.kind[:24]:24} {k.n:6} {k.accuracy:9.1%} {k.macro_accuracy:7.1%} {k.commonest_accuracy:17.1%}")
    lines.append(
        f"{'all':24} {result.n:6} {result.accuracy:9.1%} {result.macro_accuracy:7.1%} {result.commonest_accuracy:17.1%}"
    )
    _finish(result, lines, as_json, out, "vqa", settings | {"words": words, "limit": limit}, done)


def caption(
    predictions: Annotated[
        str, typer.Argument(help="JSON or JSON lines: image_id, caption; or model:PATH to let a model describe.")
    ],
    references: Annotated[str, typer.Argument(help="JSON or JSON lines: image_id, caption(s); COCO; or shards.")],
    protocol: Annotated[str, typer.Option(help="coco, coco-java, simple or tokenised.")] = "coco",
    meteor: Annotated[bool, typer.Option("--meteor", help="Also METEOR, which needs Java.")] = False,
    images: _Pictures = None,
    prompt: Annotated[str, typer.Option(help="What the model is asked; default what it was trained with.")] = "",
    limit: _Limit = None,
    batch: BatchSize = 8,
    gen_length: GenLength = None,
    steps: Steps = None,
    preset: Preset = None,
    device: _Device = None,
    dtype: Dtype = None,
    as_json: JsonOut = False,
    out: Out = None,
) -> None:
    """BLEU, ROUGE-L, CIDEr-D, METEOR and named attributes of captions."""
    from eval import records

    words = said(gen_length=gen_length, num_inference_steps=steps, preset=preset)
    settings = {"predictions": predictions, "references": references, "protocol": protocol, "prompt": prompt}
    done = None
    if predictions.startswith("model:"):
        items = records.captioned(references, images)
        done = _asked(predictions, items, out, "caption", protocol, prompt, limit, batch, words, device, dtype)
        result = done.result
    else:
        from mmdiff.commands.eval.measures import evaluate

        result = evaluate("caption", predictions, references, protocol=protocol, meteor=meteor)
    lines = [f"exact    {result.exact:.1%} of {result.n}"]
    lines += [f"BLEU-{n}   {value:.3f}" for n, value in enumerate(result.bleu, 1)]
    lines += [f"ROUGE-L  {result.rouge_l:.3f}", f"CIDEr-D  {result.cider:.3f}"]
    lines += [f"METEOR   {result.meteor:.3f}"] if result.meteor is not None else []
    lines += [
        f"{a.name:8} {a.accuracy:.1%} of {a.n} (macro {a.macro_accuracy:.1%}, commonest {a.commonest_accuracy:.1%})"
        for a in result.attributes
    ]
    _finish(result, lines, as_json, out, "caption", settings | {"words": words, "limit": limit}, done)


def nll(
    model: Annotated[str, typer.Argument(help="Checkpoint: folder or hub id.")],
    texts: Annotated[str, typer.Argument(help="JSON or JSON lines: answer, maybe prompt; or shards with captions.")],
    samples: Annotated[int, typer.Option(min=1, help="Random masks per text.")] = 32,
    limit: _Limit = None,
    seed: Annotated[int, typer.Option(help="Of the masks.")] = 0,
    device: _Device = None,
    dtype: Dtype = None,
    as_json: JsonOut = False,
    out: Out = None,
) -> None:
    """Negative log-likelihood (a bound, estimated with random masks) and perplexity of true texts."""
    from eval import nll as measure
    from eval.files import read_records
    from eval.records import captioned, is_shards
    from mmdiff.images import decode
    from mmdiff.pipelines import load
    from mmdiff.text import CAPTION_PROMPT

    if is_shards(texts):
        pictured = captioned(texts)[:limit]
        records: list[dict[str, Any]] = [
            {"prompt": CAPTION_PROMPT, "answer": p.truth["captions"][0], "image": decode(p.image())} for p in pictured
        ]
    else:
        records = read_records(texts)[:limit]
    loaded = load(model, device=device_of(device), dtype=dtype)
    result = measure.measure(loaded, records, samples=samples, seed=seed)
    lines = [
        f"{result.n} texts, {result.tokens} tokens, {samples} masks each",
        f"nats per text   {result.nll:.3f} ({result.interval.lower:.3f} to {result.interval.upper:.3f})",
        f"nats per token  {result.nll_per_token:.4f}",
        f"perplexity      {result.perplexity:.3f}",
        f"bits per byte   {result.bits_per_byte:.4f}",
    ]
    settings = {"model": model, "texts": texts, "samples": samples, "seed": seed, "limit": limit}
    _finish(result, lines, as_json, out, "nll", settings, None)


def _asked(
    predictions: str,
    items: list[Any],
    out: Path | None,
    task: str,
    protocol: str,
    prompt: str,
    limit: int | None,
    batch: int,
    words: dict[str, Any],
    device: str | None,
    dtype: str | None,
) -> Any:
    from eval.describe import describe
    from eval.processes import joined
    from mmdiff.commands.workers import digest
    from mmdiff.errors import ConfigError
    from mmdiff.pipelines import VisionLanguage

    if out is None or out.suffix == ".json":
        raise ConfigError("a model's answers are kept: say in which folder with --out FOLDER")
    path = predictions.removeprefix("model:")
    with joined():
        return describe(
            VisionLanguage.from_pretrained(path, device=device_of(device), dtype=dtype),
            items,
            out,
            task=task,
            protocol=protocol,
            prompt=prompt,
            limit=limit,
            batch=batch,
            words=words,
            checkpoint=digest(path),
        )


def _finish(
    result: Any, lines: list[str], as_json: bool, out: Path | None, measure: str, settings: dict[str, Any], done: Any
) -> None:
    items = None
    if done is not None:
        items = [{"id": i.id, "prompt": i.prompt, "said": done.said[i.id], "truth": i.truth} for i in done.items]
    finish(
        result,
        lines,
        as_json,
        out,
        measure=measure,
        settings=settings,
        page=lambda: _page(result, lines, measure, settings, done),
        items=items,
    )


def _page(result: Any, lines: list[str], measure: str, settings: dict[str, Any], done: Any) -> str:
    from eval.page import Gallery, Line, Shown, render, thumbnail

    parts: list[Any] = [Line(name=line, value="") for line in lines]
    if done is not None:
        scores = result.cider_per_image if measure == "caption" else result.scores
        order = sorted(range(len(scores)), key=lambda i: scores[i])
        for title, chosen in (("Worst", order[:12]), ("Best", order[::-1][:12])):
            shown = []
            for i in chosen:
                item = done.items[i]
                truth = item.truth.get("captions", item.truth.get("answer", item.truth.get("answers")))
                text = (*filter(None, [item.prompt]), f"said: {done.said[item.id]}", f"truth: {truth}")
                image = (thumbnail(item.image()), f"score {scores[i]:.2f}")
                shown.append(Shown(pictures=(image,), text=text))
            parts.append(Gallery(title=title, items=tuple(shown)))
    return render(measure, "What was said, beside what is true.", parts, facts=settings)
