"""``python -m eval.geneval``: judge detections or sum up results; drawing and detecting is ``mmdiff eval geneval``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmdiff.errors import ConfigError

from ..cli import finish
from .files import pictures_of, read_detections, read_results
from .scoring import GenEvalResult, score, summarise

__all__ = ["main", "score_files"]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m eval.geneval RESULTS | --detections FILE IMAGES``: JSON on stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eval.geneval", description="Judge pictures of GenEval's prompts.")
    parser.add_argument("source", help="results .jsonl; or, with --detections, the folder of pictures")
    parser.add_argument("--detections", help="JSON lines: filename and detections, colours included")
    given = parser.parse_args(argv)
    return finish(lambda: score_files(given.source, detections=given.detections))


def score_files(source: str | Path, *, detections: str | Path | None = None) -> GenEvalResult:
    """Scores of a results file, or of a folder of pictures whose objects were detected elsewhere.

    Raises:
        ConfigError: A file that is not such a one, or pictures and detections that do not agree.
    """
    if detections is None:
        if Path(source).is_dir():
            raise ConfigError(f"{source}: a folder of pictures needs detections; `mmdiff eval geneval` makes them")
        return summarise(read_results(source))
    folder = Path(source)
    prompts = {str(path.relative_to(folder)): metadata for path, metadata in pictures_of(folder).items()}
    return score(read_detections(detections), prompts)
