"""Captions and answers by a model, kept as they come and scored: what ``mmdiff eval caption|vqa model:PATH`` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError
from mmdiff.text import CAPTION_PROMPT

from . import caption, vqa
from .asking import Asked, ask_all
from .files import write_json
from .processes import barrier, rank_and_world
from .records import Pictured
from .run_folder import RunFolder

__all__ = ["Described", "describe"]


@dataclass(frozen=True, kw_only=True)
class Described:
    """A finished run.

    Attributes:
        result: `eval.caption.CaptionResult` or `eval.vqa.VqaResult`.
        items: The pictures.
        said: What the model said, by id.
    """

    result: Any
    items: Sequence[Pictured]
    said: Mapping[str, str]


def describe(
    model: Any,
    items: Sequence[Pictured],
    out: str | Path,
    *,
    task: str,
    protocol: str | None = None,
    prompt: str = "",
    limit: int | None = None,
    batch: int = 1,
    words: Mapping[str, Any] | None = None,
    checkpoint: str = "",
    meteor: bool = False,
) -> Described:
    """Ask, score, and write ``predictions.json`` in the official form; an interrupted run goes on.

    Args:
        model: A `mmdiff.VisionLanguage`, or anything with its ``ask``.
        items: Pictures with the truth, see `eval.records`.
        out: Folder of the answers and results.
        task: ``caption`` or ``vqa``.
        protocol: Of the measure; None: its own default.
        prompt: For captions what is asked (None asks what the model was trained with); for questions what is added.
        limit: Only the first so many items.
        batch: Items per pass.
        words: Generation options.
        checkpoint: Hash of the model, for the record.
        meteor: Also METEOR of captions, which needs Java.

    Raises:
        ConfigError: No items, or a folder with answers of other settings.
    """
    items = list(items[:limit])
    if not items:
        raise ConfigError("no pictures to ask about")
    settings = {"task": task, "prompt": prompt, "words": dict(words or {}), "checkpoint": checkpoint, "limit": limit}
    ends = {"first": items[0].id, "last": items[-1].id, "number": len(items)}
    asked = [Asked(id=i.id, prompt=_prompt(task, i, prompt), pictures=_Late(i)) for i in items]
    said = ask_all(
        lambda pictures, prompts: list(model.ask(pictures, prompts, **dict(words or {}))),
        asked,
        RunFolder(out, settings | ends),
        batch=batch,
    )
    answers = [said[i.id] for i in items]
    if task == "caption":
        result: Any = caption.score(
            answers, [i.truth["captions"] for i in items], protocol=protocol or "coco", meteor=meteor
        )
    else:
        result = vqa.score(answers, [i.truth for i in items], protocol=protocol or "exact")
    if rank_and_world()[0] == 0:
        key, name = ("image_id", "caption") if task == "caption" else ("question_id", "answer")
        rows = [{key: i.truth[key], name: said[i.id]} for i in items]
        write_json(Path(out) / "predictions.json", rows)
    barrier()
    return Described(result=result, items=items, said=said)


def _prompt(task: str, item: Pictured, prompt: str) -> str:
    if task == "caption":
        return prompt or CAPTION_PROMPT
    return f"{item.prompt}\n{prompt}" if prompt else item.prompt


class _Late(Sequence[bytes]):
    """The one picture of an item, read when it is asked about."""

    def __init__(self, item: Pictured) -> None:
        self.item = item

    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: Any) -> Any:
        return [self.item.image()][place]
