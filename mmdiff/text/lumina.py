"""Lumina-DiMOO's sequences: a system sentence and a user's part between tags, then an answer that is text or an image.

An image is its rows of codes, each closed by a newline id, between a begin and an end. Ids alone; nothing here masks or
draws.

Source: Lumina-DiMOO (arXiv 2510.06308), published prompts; the sentences say what the published ones say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmdiff.config import Field, config
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

        def tag(spelling: str) -> list[int]:
            known = tokenizer.special_id(spelling)
            return tokenizer.encode(spelling) if known is None else [known]

        shown = [i for ids in pictures for i in ids]
        system = [*tag("<system>"), *tokenizer.encode(sentence), *tag("</system>")]
        return [*system, *tag("<user>"), *user, *shown, *tag("</user>"), self.ids.boa]
