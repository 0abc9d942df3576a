"""GenEval: are the objects, counts, colours and places of a prompt in the picture?

`score` is pure: detections in, verdicts and a summary out. The rules are in `rules`, prompts in `prompts`, colours in
`colors`, the detector's post-processing in `mask2former`, the official folder and result files in `files`.
"""

from __future__ import annotations

from .command import main, score_files
from .measuring import draw, measure
from .rules import Options
from .scoring import GenEvalResult, Picture, TaskScore, score

__all__ = [
    "GenEvalResult",
    "Options",
    "Picture",
    "TaskScore",
    "draw",
    "main",
    "measure",
    "score",
    "score_files",
]
