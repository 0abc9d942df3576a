"""Lumina-DiMOO's sequences: a system sentence and a user's part between tags, then an answer that is text or an image.

An image is its rows of codes, each closed by a newline id, between a begin and an end. Ids alone; nothing here masks or
draws.

Source: Lumina-DiMOO (arXiv 2510.06308), published prompts; the sentences say what the published ones say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.text.template import Encoded
from mmdiff.text.tokenizer import Tokenizer

__all__ = ["DRAW", "EDIT", "READ", "Scripts", "SpecialIds"]

DRAW = "Generate an image according to the text prompt."
"""System sentence of text to image."""
EDIT = "Generate an image applying the following editing instruction based on the original image."
"""System sentence of image to image."""
READ = (
    "You are a multimodal model that can process both text and images. Answer the following question based on the "
    "provided images."
)
"""System sentence of understanding."""


@config
class SpecialIds:
    """Ids that frame the parts of a sequence; the defaults are those of the published checkpoint."""

    newline: int = Field(126084, ge=0)
    """End of a row of codes."""
    boi: int = Field(126349, ge=0)
    """Begin of an image."""
    eoi: int = Field(126350, ge=0)
    """End of an image."""
    uncondition: int = Field(126351, ge=0)
    """What stands in the place of a prompt that is dropped."""
    boa: int = Field(126354, ge=0)
    """Begin of the answer."""
    eoa: int = Field(126355, ge=0)
    """End of the answer."""


@dataclass(frozen=True)
class Scripts:
    """The layouts.

    Attributes:
        ids: Special ids.
    """

    ids: SpecialIds

    def picture(self, codes: Sequence[int], rows: int, columns: int) -> list[int]:
        """An image of rows x columns codes, row-major."""
        lines = [[*codes[i * columns : (i + 1) * columns], self.ids.newline] for i in range(rows)]
        return [self.ids.boi, *(i for line in lines for i in line), self.ids.eoi]

    def prompt(
        self, tokenizer: Tokenizer, sentence: str, user: Sequence[int], pictures: Sequence[Sequence[int]] = ()
    ) -> list[int]:
        """What stands before the answer, its begin included.

        Args:
            tokenizer: The tags are its special tokens where it has them, else their letters.
            sentence: What is asked for.
            user: Ids of the user's text.
            pictures: Images that are shown, as `picture` gives them.
        """
        shown = [i for ids in pictures for i in ids]
        system = [*_tag(tokenizer, "<system>"), *tokenizer.encode(sentence), *_tag(tokenizer, "</system>")]
        return [*system, *_tag(tokenizer, "<user>"), *user, *shown, *self._closing(tokenizer)]

    def told(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], answer: str | None) -> Encoded:
        """A question and its answer, without the pictures.

        Raises:
            ConfigError: Several turns, which the published sequences do not have, or nothing asked.
        """
        if len(messages) != 1 or messages[0].get("role") != "user":
            raise ConfigError("this network answers single questions: give one message of the user")
        content = messages[0].get("content")
        parts = [p.get("text", "") for p in content] if isinstance(content, list) else [content]
        question = "".join(str(p) for p in parts).strip()
        if not question:
            raise ConfigError("chat: a message is empty")
        prompt = self.prompt(tokenizer, READ, tokenizer.encode(question))
        tail = [] if answer is None else [*tokenizer.encode(answer), self.ids.eoa]
        return Encoded([*prompt, *tail], len(prompt), (0, 0))

    def place(self, tokenizer: Tokenizer, start: int) -> int:
        """Where pictures go into ``told``, whose answer begins at ``start``: behind the question."""
        return start - len(self._closing(tokenizer))

    def shown(self, codes: Sequence[int], side: int) -> list[int]:
        """A square picture that a question is about."""
        return self.picture(codes, side, side)

    def drawing(self, tokenizer: Tokenizer, text: Sequence[int] | None) -> list[int]:
        """What stands before the codes of a picture that is drawn; None: without a condition, which has an id."""
        user = [self.ids.uncondition] if text is None else text
        return [*self.prompt(tokenizer, DRAW, user), self.ids.boi]

    def editing(self, tokenizer: Tokenizer, text: Sequence[int] | None, codes: Sequence[int], side: int) -> list[int]:
        """The same for a picture made from another one, which stays in sight when the instruction is dropped."""
        user = [self.ids.uncondition] if text is None else text
        return [*self.prompt(tokenizer, EDIT, user, [self.shown(codes, side)]), self.ids.boi]

    def slots(self, codes: Sequence[int | None], side: int) -> list[int | None]:
        """What follows: rows, each closed by a break; the end of the image and of the answer."""
        rows = [[*codes[i * side : (i + 1) * side], self.ids.newline] for i in range(side)]
        return [*(slot for row in rows for slot in row), self.ids.eoi, self.ids.eoa]

    def cells(self, side: int) -> list[int]:
        """Which of the slots are codes: all but the breaks."""
        return [row * (side + 1) + column for row in range(side) for column in range(side)]

    def _closing(self, tokenizer: Tokenizer) -> list[int]:
        return [*_tag(tokenizer, "</user>"), self.ids.boa]


def _tag(tokenizer: Tokenizer, spelling: str) -> list[int]:
    known = tokenizer.special_id(spelling)
    return tokenizer.encode(spelling) if known is None else [known]
