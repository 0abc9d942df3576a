"""Verdicts of many pictures, and the summary in the official words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff.errors import ConfigError

from .colors import color_of
from .rules import Classify, Detection, Options, judge

__all__ = ["GenEvalResult", "Picture", "TaskScore", "result_line", "score", "summarise", "summary_text"]

PROTOCOLS = ("official",)


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Pictures of one task.

    Attributes:
        tag: Such as ``counting``.
        correct: Right ones.
        n: All.
    """

    tag: str
    correct: int
    n: int

    @property
    def accuracy(self) -> float:
        """Share of right pictures."""
        return self.correct / self.n


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One judged picture.

    Attributes:
        filename: Path.
        tag: Task of its prompt.
        prompt: Text of its prompt.
        correct: Whether it shows the prompt.
        reason: What is missing.
        metadata: Of its prompt, as JSON.
        details: Kept objects, as JSON.
    """

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: str
    details: str


@dataclass(frozen=True, kw_only=True)
class GenEvalResult:
    """Scores of a set of pictures.

    Attributes:
        overall: Mean of the tasks' shares of right pictures.
        images: Number of pictures.
        prompts: Number of different prompts.
        correct_images: Share of right pictures.
        correct_prompts: Share of prompts with a right picture.
        tasks: By task, in the order of first appearance.
        pictures: One entry per picture.
    """

    overall: float
    images: int
    prompts: int
    correct_images: float
    correct_prompts: float
    tasks: tuple[TaskScore, ...]
    pictures: tuple[Picture, ...]


def score(
    predictions: Mapping[str, Sequence[Detection]],
    references: Mapping[str, Mapping[str, Any]],
    *,
    protocol: str = "official",
    options: Options | None = None,
    classify: Mapping[str, Classify] | None = None,
) -> GenEvalResult:
    """Judge detections.

    Args:
        predictions: Detections by picture.
        references: Prompt metadata by picture.
        protocol: ``official``.
        options: See `Options`.
        classify: Judge of colours by picture; None: every detection brings its own.

    Raises:
        ConfigError: Unknown protocol, no pictures, or pictures on one side only.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    if missing := sorted(set(references) - set(predictions)):
        raise ConfigError(f"detections: {len(missing)} of {len(references)} pictures missing, first {missing[0]}")
    if unknown := sorted(set(predictions) - set(references)):
        raise ConfigError(f"detections: {len(unknown)} pictures without a prompt, first {unknown[0]}")
    pictures = []
    for name, metadata in references.items():
        judge_color = classify[name] if classify else lambda _, objects: color_of(objects)
        verdict = judge(metadata, predictions[name], classify=judge_color, options=options)
        pictures.append(
            Picture(
                filename=name,
                tag=metadata["tag"],
                prompt=metadata["prompt"],
                correct=verdict.correct,
                reason=verdict.reason,
                metadata=json.dumps(metadata),
                details=json.dumps(verdict.details),
            )
        )
    return summarise(pictures)


def summarise(pictures: Sequence[Picture]) -> GenEvalResult:
    """Scores of judged pictures.

    Raises:
        ConfigError: There are none.
    """
    if not pictures:
        raise ConfigError("no pictures to score")
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for picture in pictures:
        by_tag.setdefault(picture.tag, []).append(picture.correct)
        by_prompt[picture.metadata] = by_prompt.get(picture.metadata, False) or picture.correct
    tasks = tuple(TaskScore(tag=tag, correct=sum(hits), n=len(hits)) for tag, hits in by_tag.items())
    return GenEvalResult(
        overall=sum(task.accuracy for task in tasks) / len(tasks),
        images=len(pictures),
        prompts=len(by_prompt),
        correct_images=sum(p.correct for p in pictures) / len(pictures),
        correct_prompts=sum(by_prompt.values()) / len(by_prompt),
        tasks=tasks,
        pictures=tuple(pictures),
    )


def summary_text(result: GenEvalResult) -> str:
    """The summary as the official tool prints it, without the final newline."""
    lines = [
        "Summary",
        "=======",
        f"Total images: {result.images}",
        f"Total prompts: {result.prompts}",
        f"% correct images: {result.correct_images:.2%}",
        f"% correct prompts: {result.correct_prompts:.2%}",
        "",
        "Task breakdown",
        "==============",
        *(f"{t.tag:<16} = {t.accuracy:.2%} ({t.correct} / {t.n})" for t in result.tasks),
        "",
        f"Overall score (avg. over tasks): {result.overall:.5f}",
    ]
    return "\n".join(lines)


def result_line(picture: Picture) -> str:
    """One line of the official results file."""
    names = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")
    return json.dumps({name: getattr(picture, name) for name in names})
