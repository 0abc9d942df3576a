"""MMaDA's sequences: text, image codes and task tokens in one row of ids.

Every task has its own layout, in ids alone: text comes as ids, images as codes with the offset already added. Nothing
here masks or draws.

Source: MMaDA (arXiv 2505.15809), published prompt builder with reserved tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff.batch import IGNORE
from mmdiff.config import Field, config
from mmdiff.text.template import Encoded
from mmdiff.text.tokenizer import Tokenizer

__all__ = ["Row", "Scripts", "SpecialIds"]


@config
class SpecialIds:
    """Ids that frame the parts of a sequence; the defaults are those of the published checkpoints."""

    bos: int = Field(126080, ge=0)
    """Start of text."""
    eos: int = Field(126081, ge=0)
    """End of text, and padding of text."""
    end_header: int = Field(126347, ge=0)
    """End of a message's header in a conversation; what follows the last one is the answer."""
    soi: int = Field(126084, ge=0)
    """Start of an image."""
    eoi: int = Field(126085, ge=0)
    """End of an image."""
    t2i: int = Field(126088, ge=0)
    """Task: text to image."""
    mmu: int = Field(126089, ge=0)
    """Task: understanding of an image."""
    ipad: int = Field(126093, ge=0)
    """Padding in front of a prompt."""
    r2i: int = Field(126094, ge=0)
    """Task: reasoning, then an image."""


@dataclass(frozen=True)
class Row:
    """One sequence.

    Attributes:
        ids: The sequence.
        labels: The id to learn at each position, `IGNORE` where nothing is.
        valid: False = padding, which is not attended.
        prompt: True = given, never masked.
    """

    ids: list[int]
    labels: list[int]
    valid: list[bool]
    prompt: list[bool]


@dataclass(frozen=True)
class Scripts:
    """The layouts.

    Attributes:
        ids: Special ids.
        text_length: M, most tokens of a prompt or an answer.
    """

    ids: SpecialIds
    text_length: int

    def text_to_image(
        self, text: Sequence[int], codes: Sequence[int], labels: Sequence[int] | None = None, *, drop: bool = False
    ) -> Row:
        """Prompt, padded in front to M + 1 places, then the image.

        Args:
            text: Ids of the prompt.
            codes: Ids of the image, masks included.
            labels: What is learnt of the image; default nothing, as when drawing.
            drop: Leave the prompt's text out, so that guidance has an unconditional branch.
        """
        s = self.ids
        prompt = self.prompt([] if drop else text)
        pad = self.text_length + 1 - len(prompt)
        image = [s.soi, *codes, s.eoi]
        learnt = [s.soi, *([IGNORE] * len(codes) if labels is None else labels), s.eoi]
        return Row(
            ids=[s.ipad] * pad + prompt + image,
            labels=[IGNORE] * pad + prompt + learnt,
            valid=[False] * pad + [True] * (len(prompt) + len(image)),
            prompt=[True] * (pad + len(prompt) + 1) + [False] * len(codes) + [True],
        )

    def prompt(self, text: Sequence[int]) -> list[int]:
        """What stands before an image that is to be drawn, without padding: at most M + 1 ids."""
        s = self.ids
        whole = [s.t2i, *self._opened(text), s.eos]
        return whole if len(whole) <= self.text_length + 1 else [*whole[: self.text_length], s.eos]

    def plain(self, text: Sequence[int], length: int) -> Row:
        """Text alone, filled with ends of text or cut to ``length``; all of it may be masked."""
        ids = self._filled([*self._opened(text), self.ids.eos], length)
        return Row(ids, list(ids), [True] * length, [False] * length)

    def chat(self, text: Sequence[int], length: int) -> Row:
        """As `plain`; what comes before the last answer is given."""
        row = self.plain(text, length)
        given = self._given(row.ids)
        return Row(row.ids, row.labels, row.valid, [i < given for i in range(length)])

    def understanding(self, codes: Sequence[int], text: Sequence[int]) -> Row:
        """An image, then a conversation about it."""
        front = self.picture([codes])
        ids = [*front, *self._body(text)]
        given = max(len(front), self._given(ids))
        labels = [IGNORE] * len(front) + ids[len(front) :]
        return Row(ids, labels, [True] * len(ids), [i < given for i in range(len(ids))])

    def picture(self, images: Sequence[Sequence[int]]) -> list[int]:
        """What stands before a conversation about images; published sequences hold one."""
        s = self.ids
        return [s.mmu, *(i for codes in images for i in (s.soi, *codes, s.eoi))]

    def told(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], answer: str | None) -> Encoded:
        """A conversation and its answer, without the pictures."""
        return tokenizer.chat(messages, (), answer)

    def place(self, tokenizer: Tokenizer, start: int) -> int:
        """Where pictures go into ``told``: in front."""
        return 0

    def shown(self, codes: Sequence[int], side: int) -> list[int]:
        """A picture that a conversation is about."""
        return self.picture([codes])

    def drawing(self, tokenizer: Tokenizer, text: Sequence[int] | None) -> list[int]:
        """What stands before the codes of a picture that is drawn; None: without a condition, which is no text."""
        return [*self.prompt([] if text is None else text), self.ids.soi]

    def slots(self, codes: Sequence[int | None], side: int) -> list[int | None]:
        """What follows: the codes and the end of the image."""
        return [*codes, self.ids.eoi]

    def cells(self, side: int) -> list[int]:
        """Which of the slots are codes: the first."""
        return list(range(side**2))

    def reasoning_to_image(self, text: Sequence[int], codes: Sequence[int]) -> Row:
        """A conversation whose answer reasons, then the image; without an answer all of the text is given."""
        s, body = self.ids, self._body(text)
        given = self._given(body) or len(body)
        ids = [s.r2i, *body, s.soi, *codes, s.eoi]
        prompt = [True] * (1 + given) + [False] * (len(body) - given) + [True] + [False] * len(codes) + [True]
        return Row(ids, list(ids), [True] * len(ids), prompt)

    def _opened(self, text: Sequence[int]) -> list[int]:
        """The text with a start of text."""
        return list(text) if text and text[0] == self.ids.bos else [self.ids.bos, *text]

    def _body(self, text: Sequence[int]) -> list[int]:
        """A conversation of exactly M ids; one that is too long still ends with the end of text."""
        whole, m = [*self._opened(text), self.ids.eos], self.text_length
        return self._filled(whole, m) if len(whole) <= m else [*whole[: m - 1], self.ids.eos]

    def _filled(self, ids: Sequence[int], length: int) -> list[int]:
        return [*ids[:length], *[self.ids.eos] * (length - len(ids))]

    def _given(self, ids: Sequence[int]) -> int:
        """Places up to and including the last end of a header; 0 if there is none."""
        return max((i + 1 for i, token in enumerate(ids) if token == self.ids.end_header), default=0)
