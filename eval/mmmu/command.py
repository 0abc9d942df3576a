"""``python -m eval.mmmu``: score official files; answering questions with a model is ``mmdiff eval mmmu``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..cli import finish
from .files import read_answers, read_predictions, read_tree
from .scoring import PROTOCOLS, MmmuResult, score

__all__ = ["main", "score_files"]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m eval.mmmu PREDICTIONS [ANSWERS]``: the result as JSON on stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eval.mmmu", description="Score answers to MMMU's questions.")
    parser.add_argument("predictions", help="JSON {id: answer}, or a folder SUBJECT/output.json with the questions")
    parser.add_argument("answers", nargs="?", help="the official answer file; not for a folder")
    parser.add_argument("--protocol", choices=list(PROTOCOLS))
    parser.add_argument("--partial", action="store_true", help="score the questions that have an answer")
    given = parser.parse_args(argv)
    return finish(
        lambda: score_files(given.predictions, given.answers, protocol=given.protocol, incomplete=given.partial)
    )


def score_files(
    predictions: str | Path, answers: str | Path | None = None, *, protocol: str | None = None, incomplete: bool = False
) -> MmmuResult:
    """`score` of files.

    Args:
        predictions: Official predictions ``{id: answer}``, or a folder ``SUBJECT/output.json`` of raw responses.
        answers: The official answer file; None for a folder, whose records hold the truth.
        protocol: One of `PROTOCOLS`; None: ``answers`` with an answer file (its predictions are letters), ``official``
            for a folder.
        incomplete: Score the questions that have an answer.
    """
    if answers is None:
        said, references = read_tree(predictions)
        return score(said, references, protocol=protocol or "official", incomplete=incomplete)
    return score(
        read_predictions(predictions), read_answers(answers), protocol=protocol or "answers", incomplete=incomplete
    )
