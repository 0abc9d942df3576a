"""The template of conversations: headers, contents with images between texts, ends of turns.

Source: LLaDA's published chat template; LLaDA-V's conversation template and preparation of its training samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmdiff.batch import IMAGE
from mmdiff.errors import ConfigError

__all__ = [
    "CAPTION_PROMPT",
    "PLACEHOLDER",
    "ROLES",
    "VISION_SYSTEM",
    "Content",
    "Dialogue",
    "Encoded",
    "Script",
    "from_llava",
    "image_first",
    "turns_of",
]

ROLES = ("system", "user", "assistant")
PLACEHOLDER = "<image>"
"""Where LLaVA's texts put the image."""
VISION_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""System message of LLaDA-V's template."""
CAPTION_PROMPT = "Describe this image."
"""What the user asks for a caption, in training and in use."""


@dataclass(frozen=True)
class Encoded:
    """A chat as ids.

    Attributes:
        ids: All ids; `IMAGE` where an image's features go.
        answer_start: Where the answer begins; ``len(ids)`` if none was given.
        user_span: Start and end of the last user message between its header and its end-of-turn token.
    """

    ids: list[int]
    answer_start: int
    user_span: tuple[int, int]


@dataclass(frozen=True)
class Dialogue:
    """A conversation to be learnt.

    Attributes:
        ids: All ids; `IMAGE` where an image's features go.
        labels: The ids to predict, `mmdiff.batch.IGNORE` elsewhere.
        spans: Start and end of every answer, its end of turn included.
    """

    ids: list[int]
    labels: list[int]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Content:
    """What one message says: texts, with an image between each two.

    Attributes:
        texts: One more than there are images; literal, whatever they spell.
    """

    texts: tuple[str, ...]

    @classmethod
    def parse(cls, value: str) -> Content:
        """A text of LLaVA's data, in which `PLACEHOLDER` stands for an image."""
        return cls(tuple(value.split(PLACEHOLDER)))

    @classmethod
    def of(cls, content: Any, number: int) -> Content:
        """What a user gives as the content of message ``number``: text, a list of parts, or `Content` itself.

        A newline goes between an image and the text after it, a blank between two images, as LLaDA-V is asked.

        Raises:
            ConfigError: Another type, an unknown part, or a message without anything in it.
        """
        if isinstance(content, Content):
            return content
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            raise ConfigError(
                f"chat: message {number} has content of type {type(content).__name__}; expected text or parts"
            )
        texts = [""]
        for i, part in enumerate(content):
            if text := _text_of(part, number):
                texts[-1] += f"\n{text}" if len(texts) > 1 and not texts[-1] else text
                continue
            follows_image = i > 0 and len(texts) > 1 and not texts[-1]
            texts[-1] += " " * follows_image
            texts.append("")
        if not content:
            raise ConfigError(f"chat: message {number} is empty")
        return cls(tuple(texts))

    def stripped(self) -> Content:
        """Without surrounding whitespace; whitespace around images is kept."""
        first, *rest = self.texts
        if not rest:
            return Content((first.strip(),))
        return Content((first.lstrip(), *rest[:-1], rest[-1].rstrip()))


def image_first(value: str) -> str:
    """LLaVA's preparation of a human turn: its only placeholder goes to the front, followed by a newline."""
    if value.count(PLACEHOLDER) != 1 or value.startswith(PLACEHOLDER):
        return value
    return f"{PLACEHOLDER}\n{value.replace(PLACEHOLDER, '').strip()}".strip()


def from_llava(turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turns ``{"from": "human" | "gpt", "value": text}`` of LLaVA's data as messages for `mmdiff.text.Tokenizer`.

    Placeholders in human turns become images, a single one in front of its text; a first turn that is not from the
    human is left out.

    Raises:
        ConfigError: A turn of another form.
    """
    messages = []
    for number, turn in enumerate(turns):
        role, value = _SPEAKERS.get(str(turn.get("from"))), turn.get("value")
        if role is None or not isinstance(value, str):
            raise ConfigError(f"turn {number} is {turn!r:.80}; expected from human or gpt, and a value")
        content = Content.parse(image_first(value)) if role == "user" else Content((value,))
        messages.append({"role": role, "content": content})
    return messages[1:] if messages and messages[0]["role"] != "user" else messages


_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def turns_of(messages: Sequence[Mapping[str, Any]], system: str = "") -> list[tuple[str, Content]]:
    """(role, content) of each message, with a system message in front if there is none.

    Raises:
        ConfigError: An unknown role, or a content as in `Content.of`.
    """
    turns = []
    for number, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise ConfigError(f"chat: message {number} has role {role!r}; expected one of {', '.join(ROLES)}")
        turns.append((str(role), Content.of(message.get("content"), number)))
    if system and all(role != "system" for role, _ in turns):
        turns.insert(0, ("system", Content((system,))))
    return turns


class _Encoder(Protocol):
    bos_id: int
    eot_id: int
    start_header_id: int
    end_header_id: int

    def encode(self, text: str) -> list[int]: ...


class Script:
    """Writes a conversation, message by message.

    Args:
        tokenizer: Gives the ids.
        image_slots: As in `mmdiff.text.Tokenizer.chat`.
        lose_after_image: Lose the first id after every image.

    Attributes:
        ids: What has been written.
        slots: Slots of the images to come.
    """

    def __init__(
        self, tokenizer: _Encoder, image_slots: int | Sequence[int], *, lose_after_image: bool = False
    ) -> None:
        self.tokenizer, self.slots, self.lose = tokenizer, Slots(image_slots), lose_after_image
        self.ids: list[int] = [tokenizer.bos_id]
        self._messages = 0

    def header(self, role: str) -> None:
        """The header of a message, without its newlines."""
        t = self.tokenizer
        self.text([t.start_header_id, *t.encode(role), t.end_header_id])

    def message(self, role: str, content: Content) -> tuple[int, int]:
        """A whole message; returns where its content starts and ends."""
        self.header(role)
        first, *rest = content.texts
        # Newlines and text are encoded together, as the published template does with the whole string.
        lead, ids = self.tokenizer.encode("\n\n"), self.tokenizer.encode("\n\n" + first)
        start = len(self.ids) + (len(lead) if ids[: len(lead)] == lead else 0)
        self.text(ids)
        for text in rest:
            self.ids += [IMAGE] * self.slots.take(self._messages)
            self.text(self.tokenizer.encode(text) if text else [])
        end = len(self.ids)
        self.text([self.tokenizer.eot_id])
        self._messages += 1
        return start, end

    def text(self, ids: Sequence[int]) -> None:
        """Ids that are no image."""
        self.ids += ids[1:] if self.lose and self.ids[-1] == IMAGE else ids


class Slots:
    """Hands out the number of slots of each image in turn.

    Args:
        slots: One number for all images, or one per image.
    """

    def __init__(self, slots: int | Sequence[int]) -> None:
        self._slots = slots if isinstance(slots, int) else list(slots)
        self._used = 0

    def take(self, number: int) -> int:
        """Slots of the next image, which message ``number`` holds.

        Raises:
            ConfigError: There is none for it.
        """
        self._used += 1
        if not isinstance(self._slots, int):
            if self._used > len(self._slots):
                raise ConfigError(f"chat: message {number} holds image {self._used}, {len(self._slots)} were given")
            return self._slots[self._used - 1]
        if self._slots < 1:
            raise ConfigError(f"chat: message {number} holds an image, but this model has no slots for images")
        return self._slots

    def check_all_used(self) -> None:
        """Refuse images that no message holds.

        Raises:
            ConfigError: There are some.
        """
        if not isinstance(self._slots, int) and self._used != len(self._slots):
            raise ConfigError(f"chat: {len(self._slots)} images were given, the messages hold {self._used}")


def _text_of(part: Any, number: int) -> str | None:
    """The stripped text of a part; None for an image.

    Raises:
        ConfigError: It is neither, or a text without anything in it.
    """
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ConfigError(f"chat: message {number} holds {part!r:.80}; expected an image or a text part")
    if not part["text"].strip():
        raise ConfigError(f"chat: message {number} has an empty text; ask something")
    return str(part["text"].strip())
