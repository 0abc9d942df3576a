"""Asking a model many questions about pictures: each once, kept as it comes, shared between processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff.errors import ConfigError, SampleError

from .processes import barrier, rank_and_world
from .run_folder import RunFolder

__all__ = ["Asked", "ask_all", "picture_of"]

Answer = Callable[[list[list[Any]], list[str]], list[str]]
"""(pictures of each item, prompts) -> responses."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question.

    Attributes:
        id: Its id.
        prompt: What is asked.
        pictures: Encoded pictures, in order; may be empty.
    """

    id: str
    prompt: str
    pictures: Sequence[bytes]


def ask_all(answer: Answer, items: Sequence[Asked], run: RunFolder, *, batch: int = 1) -> dict[str, str]:
    """Responses of all items, by id, in the order of the items.

    Items that the folder has an answer for are not asked again. Under torchrun every process asks its share, and all
    of them get all responses.

    Args:
        answer: The model.
        items: The questions.
        run: Where answers are kept.
        batch: Items per call.

    Raises:
        ConfigError: A picture cannot be decoded (the question is named), or the model gave another number of answers.
    """
    from tqdm import tqdm

    rank, world = rank_and_world()
    done = run.done()
    mine = items[rank::world]
    with tqdm(total=sum(i.id not in done for i in mine), unit="question", desc="asking", disable=None) as bar:
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            todo = [item for item in part if item.id not in done]
            if not todo:
                continue
            # A batch is asked whole even if one answer is missing: the same batch gives the same answers.
            pictures = [[picture_of(data, item.id) for data in item.pictures] for item in part]
            responses = answer(pictures, [item.prompt for item in part])
            if len(responses) != len(part):
                raise ConfigError(f"the model gave {len(responses)} answers to {len(part)} questions")
            for item, response in zip(part, responses, strict=True):
                if item in todo:
                    run.append(item.id, prompt=item.prompt, response=response)
            bar.update(len(todo))
    barrier()
    done = run.done()
    return {item.id: str(done[item.id]["response"]) for item in items}


def picture_of(data: bytes, identity: str) -> Any:
    """A decoded picture.

    Raises:
        ConfigError: It cannot be decoded.
    """
    from mmdiff.images import decode

    try:
        return decode(data)
    except SampleError as error:
        raise ConfigError(f"{identity}: a picture cannot be decoded ({error})") from None
