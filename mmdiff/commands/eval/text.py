"""``mmdiff eval vqa|caption|nll``: short answers, captions and likelihoods, from files or by a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdiff.commands.eval.output import BatchSize, JsonOut, Out, device_of, finish, hashes_of, printed, shown
from mmdiff.commands.options import Dtype, GenLength, Preset, Steps, said

__all__ = ["caption", "nll", "vqa"]

_EACH = 12
"""Items shown of each kind."""
_RIGHT = 0.5
"""Share of people who gave an answer from which on it counts as right on the page."""
_TITLES = {"caption": "Captions", "vqa": "Answers about pictures", "nll": "Likelihood of true texts"}

_HASHED = ("model", "predictions", "references", "texts")
"""Settings that name files or checkpoints."""

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
    from eval.page import Bars, Table

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
    head = ("kind", "n", "accuracy", "macro", "commonest answer")
    kinds = [
        (k.kind, k.n, k.accuracy, k.macro_accuracy, k.commonest_accuracy) for k in (*result.kinds, *result.answer_types)
    ]
    kinds.append(("all", result.n, result.accuracy, result.macro_accuracy, result.commonest_accuracy))
    rows = [(kind, str(n), *(f"{share:.1%}" for share in shares)) for kind, n, *shares in kinds]
    lines = [f"{k[:24]:24} {n:>6} {own:>9} {macro:>7} {common:>17}" for k, n, own, macro, common in (head, *rows)]
    parts = [
        Bars(title="By kind", shares=tuple((kind, share, f"{share:.1%} of {n}") for kind, n, share, *_ in kinds)),
        Table(title="Beside the commonest answer", columns=head, rows=tuple(rows)),
    ]
    _finish(result, lines, parts, as_json, out, "vqa", settings | {"words": words, "limit": limit}, done)


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
        done = _asked(predictions, items, out, "caption", protocol, prompt, limit, batch, words, device, dtype, meteor)
        result = done.result
    else:
        from mmdiff.commands.eval.measures import evaluate

        result = evaluate("caption", predictions, references, protocol=protocol, meteor=meteor)
    numbers = [("exact", f"{result.exact:.1%}", f"of {result.n}")]
    numbers += [(f"BLEU-{n}", f"{value:.3f}", "") for n, value in enumerate(result.bleu, 1)]
    numbers += [("ROUGE-L", f"{result.rouge_l:.3f}", ""), ("CIDEr-D", f"{result.cider:.3f}", "")]
    numbers += [("METEOR", f"{result.meteor:.3f}", "")] if result.meteor is not None else []
    numbers += [
        (a.name, f"{a.accuracy:.1%}", f"of {a.n}; macro {a.macro_accuracy:.1%}, commonest {a.commonest_accuracy:.1%}")
        for a in result.attributes
    ]
    asked = settings | {"words": words, "limit": limit}
    _finish(result, printed(numbers), shown(numbers), as_json, out, "caption", asked, done)


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
    from eval.processes import joined
    from eval.records import captioned, is_shards
    from mmdiff.commands.workers import digest
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
    kept = None if out is None or out.suffix == ".json" else out
    with joined():
        loaded = load(model, device=device_of(device), dtype=dtype)
        result = measure.measure(loaded, records, samples=samples, seed=seed, out=kept, checkpoint=digest(model))
    spread = f"{result.interval.lower:.3f} to {result.interval.upper:.3f}"
    numbers = [
        ("nats per text", f"{result.nll:.3f}", spread),
        ("nats per token", f"{result.nll_per_token:.4f}", f"{result.n} texts, {result.tokens} tokens"),
        ("perplexity", f"{result.perplexity:.3f}", f"a bound, from {samples} random masks per text"),
        ("bits per byte", f"{result.bits_per_byte:.4f}", ""),
    ]
    settings = {"model": model, "texts": texts, "samples": samples, "seed": seed, "limit": limit}
    parts = [*shown(numbers), *_likelihoods(records, result.each)]
    items = [{"answer": r["answer"], "nats": nats} for r, nats in zip(records, result.each, strict=True)]
    _finish(result, printed(numbers), parts, as_json, out, "nll", settings, None, items)


def _likelihoods(records: Sequence[Mapping[str, Any]], nats: Sequence[float]) -> list[Any]:
    """The texts that the model expected least and most, beside their pictures."""
    from eval.page import Gallery, Shown, thumbnail

    order = sorted(range(len(nats)), key=lambda i: -nats[i])
    half = min(_EACH, len(nats) // 2)
    found = []
    for title, chosen in (("Least expected", order[:half]), ("Most expected", order[::-1][:half])):
        items = []
        for i in chosen:
            image = records[i].get("image")
            pictures = ((thumbnail(image), ""),) if image is not None else ()
            items.append(Shown(pictures=pictures, text=(str(records[i]["answer"]), f"{nats[i]:.2f} nats")))
        found.append(Gallery(title=title, items=tuple(items)))
    return found


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
    meteor: bool = False,
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
            meteor=meteor,
        )


def _finish(
    result: Any,
    lines: list[str],
    parts: Sequence[Any],
    as_json: bool,
    out: Path | None,
    measure: str,
    settings: dict[str, Any],
    done: Any,
    items: Any = None,
) -> None:
    if done is not None:
        items = [{"id": i.id, "prompt": i.prompt, "said": done.said[i.id], "truth": i.truth} for i in done.items]
    finish(
        result,
        lines,
        as_json,
        out,
        measure=measure,
        settings=settings,
        page=lambda: _page(result, parts, measure, settings, done),
        hashes=hashes_of(**{name: settings[name] for name in _HASHED if name in settings}),
        items=items,
    )


def _page(result: Any, parts: Sequence[Any], measure: str, settings: dict[str, Any], done: Any) -> str:
    from eval.page import render

    galleries = [] if done is None else _galleries(result, measure, done)
    return render(_TITLES[measure], "What was said, beside what is true.", [*parts, *galleries], facts=settings)


def _galleries(result: Any, measure: str, done: Any) -> list[Any]:
    """Worst and best captions; wrong and right answers."""
    from eval.page import Gallery

    scores = result.cider_per_image if measure == "caption" else result.scores
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    if measure == "caption":
        half = min(_EACH, (len(order) + 1) // 2)
        chosen = (("Worst", order[:half]), ("Best", order[::-1][: len(order) - half][:_EACH]))
    else:
        wrong = [i for i in order if scores[i] < _RIGHT]
        right = [i for i in order if scores[i] >= _RIGHT]
        chosen = (("Wrong answers", wrong[: 2 * _EACH]), ("Right answers", right[:_EACH]))
    return [
        Gallery(title=title, items=tuple(_shown(done, i, scores[i], measure) for i in own)) for title, own in chosen
    ]


def _shown(done: Any, number: int, score: float, measure: str) -> Any:
    from eval.page import Shown, thumbnail

    item = done.items[number]
    truth = item.truth.get("captions", item.truth.get("answer", item.truth.get("answers")))
    if isinstance(truth, list):
        truth = " | ".join(str(t["answer"] if isinstance(t, dict) else t) for t in truth)
    text = (*filter(None, [item.prompt]), f"said: {done.said[item.id] or '(nothing)'}", f"truth: {truth}")
    good = None if measure == "caption" else score >= _RIGHT
    note = f"CIDEr {score:.2f}" if measure == "caption" else ""
    return Shown(pictures=((thumbnail(item.image()), note),), text=text, good=good)
