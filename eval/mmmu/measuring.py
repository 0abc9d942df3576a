"""Asking a model MMMU's questions in one of the published ways, scoring, and writing every official file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from ..asking import Asked, ask_all
from ..files import write_json, write_text
from ..processes import barrier, rank_and_world
from ..run_folder import RunFolder
from . import llada_v
from .data import Document, read_documents
from .files import response_record, write_tree
from .prompts import PROMPTS, interleaved, vision_prompt
from .scoring import MmmuResult, format_table, score
from .subjects import ORDER

__all__ = ["STYLES", "Measured", "Style", "asked", "measure"]


@dataclass(frozen=True, kw_only=True)
class Style:
    """A published way of asking.

    Attributes:
        prompt: One of `eval.mmmu.prompts.PROMPTS`.
        scoring: One of `eval.mmmu.scoring.PROTOCOLS`.
        vision_scoring: The same for screenshots (MMMU-Pro vision).
        vision: Style of the text beside a screenshot.
        words: Generation options.
        suffix: What follows the prompt where there are pictures.
        clean: What becomes of a response before it is scored.
    """

    prompt: str
    scoring: str
    vision_scoring: str = "mmmu-pro"
    vision: str = "direct"
    words: Mapping[str, Any]
    suffix: str = ""
    clean: Callable[[str], str] = str.strip


_LONG = {"gen_length": 64, "block_length": 64, "num_inference_steps": 64, "temperature": 0.0}
_TWO = {"gen_length": 2, "block_length": 2, "num_inference_steps": 2, "temperature": 0.0, "preset": "exact"}

STYLES: dict[str, Style] = {
    "official": Style(prompt="official", scoring="official", words=_LONG, clean=str),
    "lmms-eval": Style(prompt="lmms-eval", scoring="lmms-eval", words=_LONG),
    "llada-v": Style(
        prompt="lmms-eval",
        scoring="llada-v",
        vision_scoring="exact",
        words=_TWO,
        suffix=" /no_think",
        clean=llada_v.final_response,
    ),
    "pro-direct": Style(prompt="pro-direct", scoring="mmmu-pro", words=_LONG, clean=str),
    "pro-cot": Style(prompt="pro-cot", scoring="mmmu-pro", vision="cot", words=_LONG | {"gen_length": 512}, clean=str),
}
"""Name -> way of asking. ``llada-v`` asks MMMU-Pro standard with lmms-eval's prompt for it."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A finished run.

    Attributes:
        result: The score.
        documents: The questions.
        responses: Cleaned responses by id.
        raw: Responses as the model wrote them.
    """

    result: MmmuResult
    documents: Sequence[Document]
    responses: Mapping[str, str]
    raw: Mapping[str, str]


def measure(
    model: Any,
    source: str | Path = "MMMU/MMMU",
    *,
    out: str | Path,
    style: str = "official",
    split: str = "validation",
    part: str | None = None,
    subjects: Sequence[str] = ORDER,
    limit: int | None = None,
    batch: int = 1,
    words: Mapping[str, Any] | None = None,
    checkpoint: str = "",
    name: str = "model",
) -> Measured:
    """Ask, score, and write the official files into ``out``; an interrupted run goes on there.

    Args:
        model: A `mmdiff.VisionLanguage`, or anything with its ``ask``.
        source: Local folder or dataset id, see `eval.mmmu.data.read_documents`.
        out: Folder of the answers and results.
        style: One of `STYLES`.
        split: ``dev``, ``validation`` or ``test``.
        part: Configuration of MMMU-Pro; None: MMMU.
        subjects: Which subjects.
        limit: Only the first so many questions of each subject.
        batch: Questions per pass.
        words: Generation options over those of the style.
        checkpoint: Hash of the model, for the record.
        name: Of the model, in file names.

    Raises:
        ConfigError: Unknown style, no questions, or a folder with answers of other settings.
    """
    if style not in STYLES:
        raise ConfigError(f"style {style!r}; known: {', '.join(STYLES)}")
    how = STYLES[style]
    documents = _limited(read_documents(source, split=split, subjects=subjects, part=part), limit)
    options = dict(how.words) | dict(words or {})
    settings: dict[str, Any] = {"benchmark": part or "MMMU", "source": str(source), "split": split, "style": style}
    settings |= {"subjects": list(subjects), "limit": limit, "words": options, "checkpoint": checkpoint}
    run = RunFolder(out, settings)
    raw = ask_all(
        lambda pictures, prompts: list(model.ask(pictures, prompts, **options)),
        [asked(document, how, part) for document in documents],
        run,
        batch=batch,
    )
    responses = {identity: how.clean(text) for identity, text in raw.items()}
    scoring = how.vision_scoring if part == "vision" else how.scoring
    result = score(responses, [d.record() for d in documents], protocol=scoring)
    done = Measured(result=result, documents=documents, responses=responses, raw=raw)
    if rank_and_world()[0] == 0:
        _write(Path(out), done, part, style, name)
    barrier()
    return done


def asked(document: Document, how: Style, part: str | None = None) -> Asked:
    """The question as the model gets it.

    Raises:
        ConfigError: The text speaks of a picture that the question does not have.
    """
    if part == "vision":
        return Asked(id=document.id, prompt=vision_prompt(how.vision) + how.suffix, pictures=[document.images["image"]])
    pro_text = part is not None and how.prompt == "lmms-eval"
    prompt = PROMPTS["lmms-eval-pro" if pro_text else how.prompt](document.record())
    if missing := [name for name in prompt.images if name not in document.images]:
        raise ConfigError(f"{document.id}: the text speaks of {missing[0]}, which the question does not have")
    pictures = [document.images[name] for name in prompt.images]
    marked = interleaved(prompt.text) == prompt.text and "<image>" in prompt.text
    suffix = how.suffix if pictures and not marked else ""
    return Asked(id=document.id, prompt=prompt.text + suffix, pictures=pictures)


def _limited(documents: Sequence[Document], limit: int | None) -> list[Document]:
    counts: dict[str, int] = {}
    kept = []
    for document in documents:
        counts[document.subject] = counts.get(document.subject, 0) + 1
        if limit is None or counts[document.subject] <= limit:
            kept.append(document)
    return kept


def _write(out: Path, done: Measured, part: str | None, style: str, name: str) -> None:
    records = [response_record(d.record(), done.responses[d.id]) for d in done.documents]
    write_json(out / "submission.json", dict(done.raw))
    if part is None:
        said = {i.id: i.prediction for i in done.result.items if isinstance(i.prediction, str)}
        write_json(out / "predictions.json", {d.id: said.get(d.id, done.responses[d.id]) for d in done.documents})
        write_tree(out / "subjects", records, done.result)
    else:
        setting, method = ("vision" if part == "vision" else "standard"), STYLES[style].vision
        write_text(out / f"{name}_{setting}_{method}.jsonl", _pro_lines(done))
    write_text(out / "table.txt", format_table(done.result.table) + "\n")


def _pro_lines(done: Measured) -> str:
    """MMMU-Pro's own form: the document, the response, and what it was judged to be."""
    judged = {item.id: item for item in done.result.items}
    lines = []
    for document in done.documents:
        own = judged[document.id]
        added = {"response": done.responses[document.id], "pred_indexs": own.prediction, "if_right": own.correct}
        lines.append(json.dumps(document.record() | added, ensure_ascii=False) + "\n")
    return "".join(lines)
