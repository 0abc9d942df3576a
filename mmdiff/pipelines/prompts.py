"""Prompts: a user's messages, with pictures and videos in them, as ids and crops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.images import Crops, ImageInput, cut, film, sample_frames
from mmdiff.pipelines.base import Checkpoint
from mmdiff.text import Tokenizer

__all__ = ["Message", "Prompt", "Prompter", "Video", "about", "tokenizer_of"]

Message = Mapping[str, Any]

_FILM_FRAMES = 32
"""Frames that LLaDA-V's published evaluation reads of a video."""
_SQUARE_FRAMES = 8


@dataclass(frozen=True)
class Video:
    """Frames that belong together.

    Attributes:
        frames: Pictures in order.
        limit: At most this many are read, spread evenly. None: 32, or 8 for a model that reads every frame as a picture
            of its own.
    """

    frames: Sequence[ImageInput]
    limit: int | None = None

    @property
    def pictures(self) -> list[ImageInput]:
        """The frames that are read."""
        return self.read(_FILM_FRAMES)

    def read(self, default: int) -> list[ImageInput]:
        """The frames that are read where ``default`` is the limit unless there is one.

        Raises:
            ConfigError: There are no frames, or the limit is below 1.
        """
        limit = default if self.limit is None else self.limit
        if not len(self.frames) or limit < 1:
            raise ConfigError(f"a video of {len(self.frames)} frames, of which {limit} are read; both at least 1")
        return [self.frames[i] for i in sample_frames(len(self.frames), limit)]


@dataclass(frozen=True)
class Prompt:
    """What the network reads before it answers.

    Attributes:
        ids: With `mmdiff.batch.IMAGE` at the slots of image tokens.
        images: Their crops, in order.
        tail: Ids of a given answer.
        user_span: Start and end of the last user message; empty for networks that do not drop it slot by slot.
    """

    ids: list[int]
    images: list[Crops]
    tail: list[int]
    user_span: tuple[int, int] = (0, 0)


class Prompter:
    """Makes the prompts of one checkpoint.

    Args:
        checkpoint: Network and tokenizer.
        compat: ``"reference"``: with the quirks of LLaDA-V's published inference.
    """

    def __init__(self, checkpoint: Checkpoint, compat: str | None = None) -> None:
        self.tokenizer, self.compat = tokenizer_of(checkpoint), compat
        config: Any = getattr(checkpoint.model, "config", None)
        self._tiling, self._system = getattr(config, "tiling", None), getattr(config, "system", "")
        self._size, self._features = checkpoint.layout.image_size, checkpoint.layout.features
        self._script: Any = None
        self.end_ids: tuple[int, ...] = (self.tokenizer.eos_id, self.tokenizer.eot_id)  # the filler first
        if checkpoint.layout.reads_codes:
            from mmdiff.pipelines.scripts import script_of

            self._script = script_of(checkpoint)
            self.end_ids = self._script.end_ids

    def conversation(self, messages: Sequence[Message], answer: str | None = None) -> Prompt:
        """The prompt of a conversation.

        Args:
            messages: ``{"role", "content"}``; content is text, or a list of ``{"type": "text", "text": ...}``,
                ``{"type": "image", "image": picture}`` and ``{"type": "video", "video": frames or Video}``.
            answer: What the assistant says.

        Raises:
            ConfigError: As `mmdiff.text.Tokenizer.chat`, or an image for a model that sees none.
            SampleError: A picture that cannot be used.
        """
        shown: list[ImageInput | Video] = []
        plain = [{"role": m.get("role"), "content": self._without_pictures(m.get("content"), shown)} for m in messages]
        if self._script is not None:
            texts = [{**m, "content": _texts(m["content"])} for m in plain]
            ids, tail = self._script.conversation(texts, shown, answer)
            return Prompt(ids, [], tail)
        images = self._crops(shown)
        side = math.isqrt(self._features)
        slots = [c.view.tokens(side) for c in images]
        chat = self.tokenizer.chat(plain, slots, answer, system=self._system, compat=self.compat)
        return Prompt(chat.ids[: chat.answer_start], images, chat.ids[chat.answer_start :], chat.user_span)

    def _without_pictures(self, content: Any, shown: list[ImageInput | Video]) -> Any:
        """The content with bare image parts; the pictures are added to ``shown``."""
        if not isinstance(content, list | tuple):
            return content
        parts: list[Any] = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in ("image", "video"):
                parts.append(part)
                continue
            if part.get(kind) is None:
                wanted = {"type": kind, kind: "the picture" if kind == "image" else "its frames"}
                raise ConfigError(f"chat: a part of type {kind} must be like {wanted}")
            found = self._pictures(part[kind] if kind == "image" else _video(part[kind]))
            shown += found
            parts += [{"type": "image"}] * len(found)
        return parts

    def _pictures(self, item: Any) -> list[ImageInput | Video]:
        """What stands behind one placeholder each: a film is one, frames that are read as pictures are several."""
        if isinstance(item, Video) and self._tiling is None:
            return [*item.read(_SQUARE_FRAMES)]
        return [item]

    def _crops(self, shown: Sequence[Any]) -> list[Crops]:
        if shown and not self._features:
            raise ConfigError("the conversation holds an image, but this model does not see any")
        stills = [s for s in shown if not isinstance(s, Video)]
        cuts = iter(cut(stills, self._size, self._tiling, compat=self.compat))
        return [self._film(s) if isinstance(s, Video) else next(cuts) for s in shown]

    def _film(self, video: Video) -> Crops:
        assert self._tiling is not None  # else `_pictures` has made pictures of it
        return film(video.pictures, self._size, self._tiling)


def about(item: Any, question: Any) -> list[dict[str, Any]]:
    """One user message about an item: a picture, a `Video`, a list of them, or None for text alone."""
    shown = list(item) if isinstance(item, list | tuple) else [] if item is None else [item]
    parts = [{"type": "video", "video": s} if isinstance(s, Video) else {"type": "image", "image": s} for s in shown]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: There is none.
    """
    if checkpoint.tokenizer is None:
        raise CheckpointError("the checkpoint's folder holds no tokenizer.json")
    return checkpoint.tokenizer


def _texts(content: Any) -> Any:
    """The content without its image parts."""
    if not isinstance(content, list):
        return content
    return [part for part in content if not (isinstance(part, Mapping) and part.get("type") == "image")]


def _video(value: Any) -> Video:
    if isinstance(value, Video):
        return value
    if isinstance(value, list | tuple):
        return Video(value)
    raise ConfigError(f"a video of type {type(value).__name__}; give mmdiff.Video(frames) or a list of pictures")
