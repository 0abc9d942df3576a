"""Lumina-DiMOO: LLaDA whose vocabulary also holds image codes, drawn row by row with breaks between the rows.

Source: Lumina-DiMOO (arXiv 2510.06308) and the files that ship with its checkpoint.
"""

from __future__ import annotations

from typing import Literal

from mmdiff.config import Field, config
from mmdiff.models.llada import Config as LanguageConfig
from mmdiff.models.mmada import CodesInText, MMaDA
from mmdiff.text.lumina import Scripts, SpecialIds

__all__ = ["Config", "Lumina"]


@config
class Config(CodesInText):
    """Shape and ids; the defaults are those of the published 8B checkpoint."""

    type: Literal["lumina"] = "lumina"
    """Family name."""
    language: LanguageConfig = LanguageConfig(vocab_size=134548)
    """The backbone."""
    code_offset: int = Field(126356, gt=0)
    """Id of image code 0."""
    grid: int = Field(64, gt=0)
    """Image tokens per side of the pictures that are drawn."""
    special: SpecialIds = SpecialIds()
    """Ids that frame text and images."""


class Lumina(MMaDA):
    """The same network as MMaDA's, with other ids and other sequences.

    Args:
        config: Shape and ids.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def _script(self) -> Scripts:
        return Scripts(self.config.special)


Lumina.Config = Config
