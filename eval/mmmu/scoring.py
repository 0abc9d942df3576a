"""Responses and documents in, a table by subject, discipline and overall out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmdiff.errors import ConfigError

from .parsing import open_is_correct as _open_is_correct
from .parsing import parse_choice, parse_open
from .subjects import DOMAINS, ORDER, subject_of

__all__ = ["PROTOCOLS", "Item", "MmmuResult", "Row", "format_table", "score", "table_of"]

PROTOCOLS = {
    "official": "official",
    "lmms-eval": "lmms-eval",
    "llada-v": "lmms-eval",
    "mmmu-pro": "mmmu-pro",
    "answers": None,
    "exact": None,
}
"""Protocol -> whose parser of multiple choice. ``answers``: predictions are letters already (the official
evaluation-only tool, and the test server's format), open answers are still parsed. ``exact``: the response must be the
letter (MMMU-Pro vision as LLaDA-V is measured)."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        name: Subject, ``Overall-<discipline>``, or ``Overall``.
        num: Number of questions.
        acc: Share of right answers, not rounded.
    """

    name: str
    num: int
    acc: float


@dataclass(frozen=True, kw_only=True)
class Item:
    """One scored question.

    Attributes:
        id: Of the question.
        subject: Of the question.
        prediction: A letter, or what was parsed from an open answer.
        correct: Whether it is right.
        fallback: Whether the letter was drawn at random.
    """

    id: str
    subject: str
    prediction: str | tuple[str | float, ...]
    correct: bool
    fallback: bool = False


@dataclass(frozen=True, kw_only=True)
class MmmuResult:
    """Scores of all questions.

    Attributes:
        protocol: One of `PROTOCOLS`.
        n: Number of scored questions.
        accuracy: Share of right answers.
        without_luck: The same with random fallbacks counted as wrong.
        fallbacks: Number of answers that were drawn at random.
        unanswered: Number of questions without a response, which are not in ``n``.
        table: By discipline and subject, then overall.
        items: One entry per scored question, in the order of the references.
    """

    protocol: str
    n: int
    accuracy: float
    without_luck: float
    fallbacks: int
    unanswered: int
    table: tuple[Row, ...]
    items: tuple[Item, ...]


def score(
    predictions: Mapping[str, str],
    references: Sequence[Mapping[str, Any]],
    *,
    protocol: str = "official",
    incomplete: bool = False,
    seed: int = 42,
) -> MmmuResult:
    """Score responses.

    Args:
        predictions: Raw response by id; for protocol ``answers`` the letter, or the text of an open answer.
        references: Records with ``id``, ``question_type`` (anything but ``multiple-choice`` is open), ``answer`` (a
            letter or a text, or alternatives), ``options`` (texts; multiple choice only, not needed for ``answers``),
            and ``subject`` where the id does not tell it.
        protocol: One of `PROTOCOLS`.
        incomplete: Score the questions that have a response; otherwise a missing one is an error.
        seed: Of the random fallbacks; the official tool's is 42.

    Raises:
        ConfigError: Unknown protocol; a missing, doubled or unknown id; nothing to score.

    Source: behaviour of the MMMU evaluator: random fallbacks come from one stream, drawn subject by
    subject in the order of its command line, and within a subject in the order of the references.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    documents = _checked(predictions, references, incomplete)
    draw = random.Random(seed).choice
    items: dict[str, Item] = {}
    for document in sorted(documents, key=_place):
        items[str(document["id"])] = _item(document, predictions[str(document["id"])], protocol, draw)
    scored = [items[str(d["id"])] for d in documents]
    right = [item.correct for item in scored]
    return MmmuResult(
        protocol=protocol,
        n=len(scored),
        accuracy=sum(right) / len(scored),
        without_luck=sum(item.correct and not item.fallback for item in scored) / len(scored),
        fallbacks=sum(item.fallback for item in scored),
        unanswered=len(references) - len(documents),
        table=table_of(scored),
        items=tuple(scored),
    )


def table_of(items: Sequence[Item]) -> tuple[Row, ...]:
    """Every discipline followed by those of its subjects that have questions, and the whole.

    Disciplines and the whole are means of the subjects' accuracies weighted by their numbers, as the official tool
    takes them.
    """
    by_subject: dict[str, list[bool]] = {}
    for item in items:
        by_subject.setdefault(item.subject, []).append(item.correct)
    subjects = {name: Row(name=name, num=len(v), acc=sum(v) / len(v)) for name, v in by_subject.items()}
    rows = []
    placed = set()
    for domain, members in DOMAINS.items():
        own = [subjects[name] for name in members if name in subjects]
        placed |= {row.name for row in own}
        rows += [_sum(f"Overall-{domain}", own), *own]
    rows += [row for name, row in subjects.items() if name not in placed]
    return (*rows, _sum("Overall", list(subjects.values())))


def format_table(table: Sequence[Row]) -> str:
    """The table as the official tool prints it."""
    heads = ("Subject", "Data Num", "Acc")
    cells = [(row.name, str(row.num), f"{round(row.acc, 3):g}") for row in table]
    decimals = max(len(acc.partition(".")[2]) for _, _, acc in cells)
    cells = [(name, num, _aligned(acc, decimals)) for name, num, acc in cells]
    widths = [max(len(head) + 2, *(len(c[i]) for c in cells)) for i, head in enumerate(heads)]

    def line(name: str, num: str, acc: str) -> str:
        return f"| {name:<{widths[0]}} | {num:>{widths[1]}} | {acc:>{widths[2]}} |"

    rule = f"|{'+'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(*heads), rule, *(line(*c) for c in cells)])


def _aligned(number: str, decimals: int) -> str:
    """Blanks after a number so that the decimal points of a column stand below each other."""
    whole, point, fraction = number.partition(".")
    if not decimals:
        return number
    return whole + (point + fraction).ljust(decimals + 1)


def _sum(name: str, rows: Sequence[Row]) -> Row:
    num = sum(row.num for row in rows)
    return Row(name=name, num=num, acc=sum(row.acc * row.num for row in rows) / num if num else 0)


def _item(document: Mapping[str, Any], response: str, protocol: str, draw: Any) -> Item:
    item = partial(Item, id=str(document["id"]), subject=_subject(document))
    truth = document["answer"]
    if document["question_type"] != "multiple-choice":
        parsed = parse_open(response)
        return item(prediction=tuple(parsed), correct=_open_is_correct(parsed, truth))
    letters = [truth] if isinstance(truth, str) else list(truth)
    variant = PROTOCOLS[protocol]
    if variant is None:
        return item(prediction=response, correct=response in letters)
    options = document.get("options") or ()
    try:
        choice = parse_choice(response, options, variant=variant, draw=draw)
    except ConfigError as error:
        raise ConfigError(f"{document['id']}: {error}") from None
    return item(prediction=choice.letter, correct=choice.letter in letters, fallback=choice.fallback)


def _subject(document: Mapping[str, Any]) -> str:
    return str(document["subject"]) if "subject" in document else subject_of(str(document["id"]))


def _place(document: Mapping[str, Any]) -> int:
    subject = _subject(document)
    return ORDER.index(subject) if subject in ORDER else len(ORDER)


def _checked(
    predictions: Mapping[str, str], references: Sequence[Mapping[str, Any]], incomplete: bool
) -> list[Mapping[str, Any]]:
    """The documents that have a response."""
    ids = [str(r["id"]) for r in references]
    known = set(ids)
    if len(known) < len(ids):
        doubled = next(i for n, i in enumerate(ids) if i in ids[:n])
        raise ConfigError(f"references: id {doubled} occurs more than once")
    if unknown := [i for i in predictions if i not in known]:
        raise ConfigError(f"predictions: {len(unknown)} ids that no question has, first {unknown[0]}")
    missing = [i for i in ids if i not in predictions]
    if missing and not incomplete:
        raise ConfigError(
            f"predictions: {len(missing)} of {len(ids)} ids missing, first {missing[0]}; or say --partial"
        )
    if wrong := [i for i, p in predictions.items() if not isinstance(p, str)]:
        raise ConfigError(f"predictions: {wrong[0]} is no text")
    if len(missing) == len(ids):
        raise ConfigError("no question has a response")
    return [r for r in references if str(r["id"]) in predictions]
