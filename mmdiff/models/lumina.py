"""Lumina-DiMOO: LLaDA whose vocabulary also holds image codes, drawn row by row with breaks between the rows.

Source: Lumina-DiMOO (arXiv 2510.06308) and the files that ship with its checkpoint.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.llada import Config as LanguageConfig
from mmdiff.models.mmada import MMaDA
from mmdiff.text.lumina import SpecialIds

__all__ = ["Config", "Lumina"]


@config
class Config:
    """Shape and ids; the defaults are those of the published 8B checkpoint."""

    type: Literal["lumina"] = "lumina"
    """Family name."""
    language: LanguageConfig = LanguageConfig(vocab_size=134548)
    """The backbone."""
    code_offset: int = Field(126356, gt=0)
    """Id of image code 0."""
    codebook: int = Field(8192, gt=1)
    """K, number of image codes."""
    grid: int = Field(64, gt=0)
    """Image tokens per side of the pictures that are drawn."""
    special: SpecialIds = SpecialIds()
    """Ids that frame text and images."""

    def __post_init__(self) -> None:
        if self.code_offset + self.codebook > self.language.vocab_size:
            raise ConfigError(
                f"codes {self.code_offset} .. {self.code_offset + self.codebook - 1} do not fit into the vocabulary of "
                f"{self.language.vocab_size}"
            )

    def with_width(self, width: int) -> Config:
        """The same network at another width."""
        return dataclasses.replace(self, language=self.language.with_width(width))

    def with_depth(self, depth: int) -> Config:
        """The same network with ``depth`` blocks."""
        return dataclasses.replace(self, language=self.language.with_depth(depth))


class Lumina(MMaDA):
    """The same network as MMaDA's, with other ids and other sequences.

    Args:
        config: Shape and ids.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config  # type: ignore[assignment]

    def _script(self) -> None:
        """No task builds its sequences."""


Lumina.Config = Config
