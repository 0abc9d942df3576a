"""MMMU and MMMU-Pro: questions about pictures, asked, parsed and scored as the published tools do.

`score` is pure: responses and documents in, a table out. Prompts are in `prompts`, the rules that read an answer out
of a response in `parsing`, the official files in `files`, LLaDA-V's way of asking in `llada_v`.
"""

from __future__ import annotations

from .command import main, score_files
from .measuring import STYLES, Measured, measure
from .scoring import PROTOCOLS, MmmuResult, Row, score

__all__ = ["PROTOCOLS", "STYLES", "Measured", "MmmuResult", "Row", "main", "measure", "score", "score_files"]
