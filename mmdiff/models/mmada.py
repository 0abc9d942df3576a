"""MMaDA: LLaDA whose vocabulary also holds image codes, so that it reads and draws images as it reads and writes text.

Image code c is id offset + c; a masked code is the text mask. There is no vision tower: an image is read as the codes
of the tokenizer that it is drawn with.

Source: MMaDA (arXiv 2505.15809) and the files that ship with its checkpoints.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.batch import Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule
from mmdiff.models.llada import Config as LanguageConfig
from mmdiff.models.llada import LLaDA
from mmdiff.text.mmada import Scripts, SpecialIds

__all__ = ["CodesInText", "Config", "MMaDA"]


C = TypeVar("C", bound="CodesInText")


@config
class CodesInText:
    """A backbone whose vocabulary also holds image codes."""

    language: LanguageConfig
    """The backbone."""
    code_offset: int = Field(gt=0)
    """Id of image code 0."""
    codebook: int = Field(8192, gt=1)
    """K, number of image codes."""
    grid: int = Field(gt=0)
    """Image tokens per side of the pictures that are drawn."""

    def __post_init__(self) -> None:
        if self.code_offset + self.codebook > self.language.vocab_size:
            raise ConfigError(
                f"codes {self.code_offset} .. {self.code_offset + self.codebook - 1} do not fit into the vocabulary of "
                f"{self.language.vocab_size}"
            )

    def with_width(self: C, width: int) -> C:
        """The same network at another width."""
        return dataclasses.replace(self, language=self.language.with_width(width))

    def with_depth(self: C, depth: int) -> C:
        """The same network with ``depth`` blocks."""
        return dataclasses.replace(self, language=self.language.with_depth(depth))


@config
class Config(CodesInText):
    """Shape and ids; the defaults are those of the published 8B checkpoints."""

    type: Literal["mmada"] = "mmada"
    """Family name."""
    language: LanguageConfig = LanguageConfig(vocab_size=134656)
    """The backbone."""
    code_offset: int = Field(126349, gt=0)
    """Id of image code 0: the length of the text tokenizer, not the rows of the embedding."""
    grid: int = Field(32, gt=0)
    """Image tokens per side."""
    text_length: int = Field(512, gt=1)
    """Most tokens of a prompt for an image."""
    special: SpecialIds = SpecialIds()
    """Ids that frame text and images."""


class MMaDA(PretrainedModule):
    """The backbone, and which of its rows are text and which are image codes.

    Args:
        config: Shape and ids: a `Config`, or one of a family that draws in the same way.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Any

    def __init__(self, config: CodesInText, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.language = LLaDA(config.language, generator=generator)

    def layout(self) -> Layout:
        """What this model expects of a sequence."""
        c = self.config
        return Layout(
            vocab_size=c.code_offset,
            codes=c.grid**2,
            codebook=c.codebook,
            code_mask=c.language.mask_id,
            reads_codes=True,
            script=self._script(),
        )

    def forward(self, ids: Int[Tensor, "B L"] | None = None, **options: Any) -> Float[Tensor, "B _ V"]:
        """Logits over text and codes together; arguments as in `mmdiff.models.llada.LLaDA.forward`."""
        return self.language(ids, **options)

    def hidden(self, ids: Int[Tensor, "B L"] | None = None, **options: Any) -> Float[Tensor, "B _ D"]:
        """Hidden states; arguments as in `mmdiff.models.llada.LLaDA.hidden`."""
        return self.language.hidden(ids, **options)

    def embed_slots(self, ids: Int[Tensor, "B L"], images: None = None) -> Float[Tensor, "B L D"]:
        """Input embeddings of a canvas.

        Raises:
            ConfigError: Images are given as pixels.
        """
        if images is not None:
            raise ConfigError("this model reads pictures as codes: encode them and put their ids into the sequence")
        return self.language.embed_tokens(ids)

    def text_head(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B V"]:
        """Logits over text and codes together, as published training normalises."""
        return self.language.head(hidden)

    def code_head(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Logits over the image codes alone, as drawing does."""
        c = self.config
        table = self.language.embed_tokens if c.language.tied else self.language.lm_head
        rows = table.weight[c.code_offset : c.code_offset + c.codebook]
        return torch.nn.functional.linear(hidden, rows)

    def _script(self) -> Any:
        """How training builds sequences."""
        return Scripts(self.config.special, self.config.text_length)


MMaDA.Config = Config
