"""Short answers against the truth: exact match with macro averages, and VQAv2's soft accuracy.

The exact protocol is for closed sets of answers, where a model can look good by always giving the commonest one: beside
each accuracy stand the macro accuracy (every answer counts the same) and what the commonest answer would score.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from .cli import finish
from .contractions import CONTRACTIONS
from .files import by_id, read_records
from .records import questions

__all__ = [
    "PROTOCOLS",
    "KindResult",
    "VqaResult",
    "main",
    "normalise_exact",
    "normalise_vqav2",
    "score",
    "score_files",
    "strip_punctuation",
    "summarise",
    "vqav2_accuracy",
    "vqav2_cleaner",
]


@dataclass(frozen=True, kw_only=True)
class KindResult:
    """Scores of the questions of one kind.

    Attributes:
        kind: Name of the kind (VQAv2: the question type).
        n: Number of questions.
        answers: Number of different true answers.
        accuracy: Mean score, 0...1.
        macro_accuracy: Mean over the true answers of the mean score of their questions.
        commonest: The commonest true answer.
        commonest_accuracy: Score of always giving it. Its macro accuracy is 1 / ``answers``, and so is that of chance.
    """

    kind: str
    n: int
    answers: int
    accuracy: float
    macro_accuracy: float
    commonest: str
    commonest_accuracy: float


@dataclass(frozen=True, kw_only=True)
class VqaResult:
    """Scores of all questions.

    Attributes:
        protocol: One of `PROTOCOLS`.
        n: Number of questions.
        accuracy: Mean score, 0...1.
        macro_accuracy: Mean of the kinds' macro accuracies: every kind counts the same.
        commonest_accuracy: Mean score of giving each kind's commonest answer.
        kinds: One entry per kind, sorted by name.
        answer_types: One entry per ``answer_type`` of the references, sorted by name; none where they have none.
        scores: Score of each question in the order of the references, for `eval.bootstrap`.
    """

    protocol: str
    n: int
    accuracy: float
    macro_accuracy: float
    commonest_accuracy: float
    kinds: tuple[KindResult, ...]
    scores: tuple[float, ...]
    answer_types: tuple[KindResult, ...] = ()


def score(
    predictions: Mapping[Any, str] | Sequence[Any],
    references: Sequence[Mapping[str, Any]],
    *,
    protocol: str = "exact",
) -> VqaResult:
    """Score answers.

    Args:
        predictions: Answers by ``question_id``; or records with ``question_id`` and ``answer``; or plain answers in the
            order of the references.
        references: Records. ``exact``: ``answer`` and, where there are kinds, ``kind``. ``vqav2``: ``answers`` (a list
            of ``answer`` and ``answer_id``) and ``question_type``. Predictions with ids need ``question_id``.
        protocol: ``exact`` (case, outer space and a final full stop are ignored); ``vqav2`` (the official tool, its
            quirk included that unanimous answers are not normalised); ``vqav2-normalised`` (always normalised, as
            lmms-eval does).

    Raises:
        ConfigError: Unknown protocol; no references; a missing, doubled or unknown id; VQAv2 answers without ids.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    if not references:
        raise ConfigError("no references to score against")
    given = _aligned(predictions, references)
    if protocol != "exact":
        for reference in references:
            _check_ids(reference)
    rule = PROTOCOLS[protocol]
    return summarise(
        [rule(answer, reference) for answer, reference in zip(given, references, strict=True)],
        references,
        protocol=protocol,
    )


def summarise(scores: Sequence[float], references: Sequence[Mapping[str, Any]], *, protocol: str) -> VqaResult:
    """Means of given scores, overall, by kind and by type of answer.

    Args:
        scores: Of each question, 0...1.
        references: As for `score`.
        protocol: What the scores stand for.
    """
    rule = PROTOCOLS[protocol]
    truths = [_truth(reference) for reference in references]

    def tabulate(names: Sequence[str | None]) -> tuple[KindResult, ...]:
        groups: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            if name is not None:
                groups.setdefault(str(name), []).append(i)
        return tuple(
            _kind(name, [references[i] for i in rows], [truths[i] for i in rows], [scores[i] for i in rows], rule)
            for name, rows in sorted(groups.items())
        )

    table = tabulate([r.get("kind", r.get("question_type", "all")) for r in references])
    return VqaResult(
        protocol=protocol,
        n=len(references),
        accuracy=sum(scores) / len(scores),
        macro_accuracy=sum(k.macro_accuracy for k in table) / len(table),
        commonest_accuracy=sum(k.commonest_accuracy * k.n for k in table) / len(references),
        kinds=table,
        scores=tuple(scores),
        answer_types=tabulate([r.get("answer_type") for r in references]),
    )


def normalise_exact(text: str) -> str:
    """Lower case, single spaces, no final full stop."""
    return " ".join(text.split()).rstrip(".").rstrip().casefold()


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(_WORDS.split())}
_ARTICLES = {"a", "an", "the"}


def normalise_vqav2(text: str, *, variant: str = "official") -> str:
    """Answer as VQAv2 compares it.

    Args:
        text: As given.
        variant: ``official``; ``lmms-eval`` (several commas between digits count as one); ``evalai`` (commas and
            question marks go first and possessives are split, as TextVQA's processor does).

    Source: behaviour of the official VQA evaluation tool, and of lmms-eval.
    """
    text = _one_line(text)
    if variant == "evalai":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    words = (_NUMBERS.get(w, w) for w in strip_punctuation(text, variant=variant).lower().split())
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def strip_punctuation(text: str, *, variant: str = "official") -> str:
    """The punctuation step of `normalise_vqav2`."""
    out = text
    comma_number = re.search(r"\d,+\d" if variant == "lmms-eval" else r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        alone = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if alone or comma_number else " ")
    # A flag stands where the number of replacements belongs, in the official tool: so at most 32.
    return re.sub(r"\.(?!\d)", "", out, count=int(re.UNICODE))


def vqav2_accuracy(answer: str, answers: Sequence[Mapping[str, Any]], *, normalise: bool | None = None) -> float:
    """Soft accuracy of one answer: mean over annotators of min(1, matches among the *other* annotators / 3).

    Args:
        answer: The given answer.
        answers: The annotators' records with ``answer``. An annotator's others are the records that differ from theirs,
            so without distinct ``answer_id`` equal answers cancel out, as in the official tool; `score` refuses that.
        normalise: True: always, as lmms-eval does; None: unless all true answers are the same text, as the official
            tool does; False: never.

    Source: behaviour of the official VQA evaluation tool.
    """
    raw = [str(a["answer"]) for a in answers]
    clean = vqav2_cleaner(raw, normalise=normalise)
    given, truths = clean(answer), [clean(text) for text in raw]
    # The tool overwrites the answers of the records before it compares whole records.
    records = [{**a, "answer": text} for a, text in zip(answers, truths, strict=True)]
    matches = [sum(r["answer"] == given for r in records if r != own) for own in records]
    return sum(min(1.0, m / 3) for m in matches) / len(matches)


def vqav2_cleaner(raw: Sequence[str], *, normalise: bool | None = None) -> Callable[[str], str]:
    """How the tool cleans the answers of one question and the prediction for it; arguments as in `vqav2_accuracy`."""
    if normalise:
        return lambda text: normalise_vqav2(text, variant="lmms-eval")
    return normalise_vqav2 if normalise is None and len(set(raw)) > 1 else _one_line


def _exact(answer: str, reference: Mapping[str, Any]) -> float:
    return float(normalise_exact(answer) == normalise_exact(str(reference["answer"])))


def _vqav2(answer: str, reference: Mapping[str, Any]) -> float:
    return vqav2_accuracy(answer, reference["answers"])


def _vqav2_normalised(answer: str, reference: Mapping[str, Any]) -> float:
    return vqav2_accuracy(answer, reference["answers"], normalise=True)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _check_ids(reference: Mapping[str, Any]) -> None:
    ids = [a.get("answer_id") for a in reference.get("answers", ())]
    if not ids or None in ids or len(set(ids)) < len(ids):
        name = reference.get("question_id", "?")
        raise ConfigError(f"question {name}: answers need distinct answer_id; without them equal answers cancel out")


PROTOCOLS: dict[str, Callable[[str, Mapping[str, Any]], float]] = {
    "exact": _exact,
    "vqav2": _vqav2,
    "vqav2-normalised": _vqav2_normalised,
}
"""Name -> (answer, reference record) -> score of one question, 0...1."""


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m eval.vqa PRED REF``: the result as JSON on stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eval.vqa", description="Score short answers.")
    parser.add_argument("predictions", help="JSON or JSONL: question_id, answer")
    parser.add_argument("references", help="JSON or JSONL: question_id, answer, kind; or VQAv2 annotations")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="exact")
    options = parser.parse_args(argv)
    return finish(lambda: score_files(options.predictions, options.references, protocol=options.protocol))


def score_files(predictions: str | Path, references: str | Path, *, protocol: str = "exact") -> VqaResult:
    """`score` of two files; the references may also be shards, whose samples bring questions and answers."""
    truths = [item.truth for item in questions(references)]
    return score(read_records(predictions), truths, protocol=protocol)


def _aligned(predictions: Mapping[Any, str] | Sequence[Any], references: Sequence[Mapping[str, Any]]) -> list[str]:
    if isinstance(predictions, Mapping):
        predictions = [{"question_id": k, "answer": v} for k, v in predictions.items()]
    if all(isinstance(p, str) for p in predictions):
        if len(predictions) != len(references):
            raise ConfigError(f"{len(predictions)} answers for {len(references)} questions")
        return list(predictions)
    return [str(p["answer"]) for p in by_id(predictions, references, "question_id")]


def _truth(reference: Mapping[str, Any]) -> str:
    if "answer" in reference:
        return normalise_exact(str(reference["answer"]))
    return Counter(normalise_vqav2(str(a["answer"])) for a in reference["answers"]).most_common(1)[0][0]


def _kind(
    kind: str,
    references: Sequence[Mapping[str, Any]],
    truths: Sequence[str],
    scores: Sequence[float],
    rule: Callable[[str, Mapping[str, Any]], float],
) -> KindResult:
    by_answer: dict[str, list[float]] = {}
    for truth, value in zip(truths, scores, strict=True):
        by_answer.setdefault(truth, []).append(value)
    # Ties go to the first in the alphabet, so that the table does not depend on the order of the file.
    commonest = min(by_answer, key=lambda a: (-len(by_answer[a]), a))
    return KindResult(
        kind=kind,
        n=len(scores),
        answers=len(by_answer),
        accuracy=sum(scores) / len(scores),
        macro_accuracy=sum(sum(v) / len(v) for v in by_answer.values()) / len(by_answer),
        commonest=commonest,
        commonest_accuracy=sum(rule(commonest, r) for r in references) / len(references),
    )


if __name__ == "__main__":
    sys.exit(main())
