"""Datasets that package registries hold, built as shards; see ``registry``."""

from __future__ import annotations

from .questions import balanced_questions
from .registry import DATASETS, build
from .report import BuildReport

__all__ = ["DATASETS", "BuildReport", "balanced_questions", "build"]
