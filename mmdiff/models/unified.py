"""One model that understands and draws: LLaDA-V whose sequences may also hold discrete image tokens.

Image codes have their own embedding, learned 2-D positions and their own head (a MaskGIT head) on the shared backbone;
ids V .. V+K-1 stand for codes and V+K for the masked code, so one canvas of ids describes any mixture.

Source: the layout follows LaViDa-O (arXiv 2509.19244: separate embedding, head and mask for image codes) and MMaDA
(arXiv 2505.15809: codes are ids behind the text vocabulary); the head is MaskGIT's (arXiv 2202.04200).
"""

from __future__ import annotations

import dataclasses
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmdiff.batch import Layout
from mmdiff.config import Field, config
from mmdiff.images import Tiling
from mmdiff.models.llada import Config as LanguageConfig
from mmdiff.models.llada_v import LLaDAV
from mmdiff.models.vision import Config as VisionConfig

__all__ = ["CodesConfig", "Config", "Unified"]


_EMBEDDING_STD = 0.7


@config
class CodesConfig:
    """The image tokens that the model draws."""

    codebook: int = Field(gt=1)
    """K, number of codes of the image tokenizer."""
    grid: int = Field(gt=0)
    """Image tokens per side."""


@config
class Config:
    """Sizes of the parts."""

    type: Literal["unified"] = "unified"
    """Family name."""
    language: LanguageConfig
    """The backbone."""
    vision: VisionConfig
    """The tower that reads images."""
    codes: CodesConfig
    """The image tokens that are drawn."""
    tiling: Tiling | None = None
    """How pictures become crops and image tokens; null: every picture is one square."""
    system: str = ""
    """System message of conversations that have none of their own; empty: none."""
    max_tokens: int | None = Field(None, gt=0)
    """Longest sequence after images are expanded; longer ones are cut. Null: never."""

    def __post_init__(self) -> None:
        if self.tiling is not None:
            self.tiling.canvases(self.vision.image_size)

    def with_width(self, width: int) -> Config:
        """The same model with a backbone of another width; the tower is scaled by the same ratio."""
        tower = self.vision.with_width(self.vision.width * width // self.language.width)
        return dataclasses.replace(self, language=self.language.with_width(width), vision=tower)

    def with_depth(self, depth: int) -> Config:
        """The same model with a backbone of ``depth`` blocks."""
        return dataclasses.replace(self, language=self.language.with_depth(depth))


class ImageCodes(nn.Module):
    """Embedding, positions and head of image codes.

    Args:
        codebook: K.
        tokens: N image tokens per image.
        width: D.
    """

    def __init__(self, codebook: int, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook + 1, width)
        self.position = nn.Embedding(tokens, width)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.head = nn.Linear(width, codebook)

    def forward(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Logits over the codes."""
        return self.head(self.transform(hidden))

    def embed(self, codes: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        """Embeddings of whole images of codes, one after the other (n a multiple of N); K is the masked code."""
        images = codes.numel() // self.position.num_embeddings
        return self.embedding(codes) + self.position.weight.repeat(images, 1)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> ImageCodes:
        """Draw initial weights: tables at about unit scale, fan-in matrices, zero biases."""
        std = self.head.in_features**-0.5
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, 0.0, _EMBEDDING_STD, generator=generator)
        for linear in (cast("nn.Linear", self.transform[0]), self.head):
            nn.init.trunc_normal_(linear.weight, 0.0, std, -3 * std, 3 * std, generator=generator)
            nn.init.zeros_(linear.bias)
        return self


class Unified(LLaDAV):
    """LLaDA-V with image codes in its sequences.

    Args:
        config: Sizes.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config  # type: ignore[assignment]

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator=generator)
        self.codes = ImageCodes(config.codes.codebook, config.codes.grid**2, config.language.width)
        if generator is not None:
            self.codes.init_(generator)
            # Vision features enter at unit scale; text at LLaDA's 1/sqrt(D) would be drowned beside them.
            nn.init.normal_(self.language.embed_tokens.weight, 0.0, _EMBEDDING_STD, generator=generator)

    def layout(self) -> Layout:
        """What this model expects of a sequence."""
        codes = self.config.codes
        return dataclasses.replace(super().layout(), codes=codes.grid**2, codebook=codes.codebook)

    def code_head(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Image-code logits of hidden states."""
        return self.codes(hidden)

    def _embed_ids(self, ids: Int[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
        is_code = ids >= self.config.language.vocab_size
        embeds = self.language.embed_tokens(ids.masked_fill(is_code, 0))
        codes = ids[is_code] - self.config.language.vocab_size
        return embeds.masked_scatter(is_code[..., None], self.codes.embed(codes).to(embeds.dtype))


Unified.Config = Config
