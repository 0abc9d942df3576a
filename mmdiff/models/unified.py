"""One model that understands and draws: LLaDA-V whose sequences may also hold image tokens.

Image codes have their own embedding, learned 2-D positions and their own head (a MaskGIT head) on the shared backbone;
ids V .. V+K-1 stand for codes and V+K for the masked code, so one canvas of ids describes any mixture. Instead of codes
a model may draw continuous tokens with a diffusion head (`mmdiff.models.latent_tokens`): then id V stands for a known
token, whose numbers come beside the ids, and V+1 for a masked one.

Source: the layout follows LaViDa-O (arXiv 2509.19244: separate embedding, head and mask for image codes) and MMaDA
(arXiv 2505.15809: codes are ids behind the text vocabulary); the head is MaskGIT's (arXiv 2202.04200).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmdiff.batch import Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.images import Tiling
from mmdiff.models.diffusion_head import DiffusionHead
from mmdiff.models.latent_tokens import LatentTokens, LatentTokensConfig
from mmdiff.models.llada import Config as LanguageConfig
from mmdiff.models.llada_v import EMBEDDING_STD, Images, LLaDAV
from mmdiff.models.vision import Config as VisionConfig

__all__ = ["CodesConfig", "Config", "Unified"]


@config
class CodesConfig:
    """The image tokens that the model draws."""

    codebook: int = Field(gt=1)
    """K, number of codes of the image tokenizer."""
    grid: int = Field(gt=0)
    """Image tokens per side."""
    rotary: Literal["sequence", "grid"] = "sequence"
    """Rotary positions of image tokens. sequence: as those of text; grid: row and column take the frequencies in turn,
    both counted from where the image begins. Text has the same positions either way."""
    levels: tuple[int, ...] = ()
    """Steps of each channel of a scalar-quantised codebook (FSQ), first channel fastest. Codes that agree in a channel
    then share a part of their embedding and of their row in the head, so that rare codes are learnt from their
    neighbours; empty: every code stands alone."""

    def __post_init__(self) -> None:
        if self.levels and math.prod(self.levels) != self.codebook:
            raise ConfigError(f"codes.levels {self.levels} make {math.prod(self.levels)} codes, not {self.codebook}")

    @property
    def side(self) -> int:
        """Tokens per side."""
        return self.grid


@config
class Config:
    """Sizes of the parts."""

    type: Literal["unified"] = "unified"
    """Family name."""
    language: LanguageConfig
    """The backbone."""
    vision: VisionConfig
    """The tower that reads images."""
    codes: CodesConfig | None = None
    """The discrete image tokens that are drawn; give these or ``latents``."""
    latents: LatentTokensConfig | None = None
    """The continuous image tokens that are drawn instead."""
    pool: int = Field(1, gt=0)
    """Side of the squares of image features that are averaged into one token before the connector, as LLaDA-V does with
    video frames; 1 keeps all. A fine patch with pooling sees small things and stays cheap for the backbone."""
    tiling: Tiling | None = None
    """How pictures become crops and image tokens; null: every picture is one square."""
    system: str = ""
    """System message of conversations that have none of their own; empty: none."""
    max_tokens: int | None = Field(None, gt=0)
    """Longest sequence after images are expanded; longer ones are cut. Null: never."""

    def __post_init__(self) -> None:
        if (self.codes is None) == (self.latents is None):
            raise ConfigError("give codes (discrete image tokens) or latents (continuous ones), and not both")
        if self.vision.grid % self.pool:
            raise ConfigError(f"pool {self.pool} does not divide the vision tower's grid of {self.vision.grid}")
        if self.tiling is not None:
            if self.pool > 1:
                raise ConfigError(f"pool {self.pool} and tiling exclude each other; set pool to 1 or tiling to null")
            self.tiling.canvases(self.vision.image_size)

    @property
    def image_tokens(self) -> CodesConfig | LatentTokensConfig:
        """Those that are drawn."""
        drawn = self.latents if self.codes is None else self.codes
        assert drawn is not None  # one of them is given
        return drawn

    def with_width(self, width: int) -> Config:
        """The same model with a backbone of another width; tower and diffusion head are scaled by the same ratio."""
        tower = self.vision.with_width(self.vision.width * width // self.language.width)
        latents = self.latents
        if latents is not None:
            head = max(1, latents.head_width * width // self.language.width)
            latents = dataclasses.replace(latents, head_width=head)
        return dataclasses.replace(self, language=self.language.with_width(width), vision=tower, latents=latents)

    def with_depth(self, depth: int) -> Config:
        """The same model with a backbone of ``depth`` blocks."""
        return dataclasses.replace(self, language=self.language.with_depth(depth))


class ImageCodes(nn.Module):
    """Embedding, positions and head of image codes.

    Args:
        codes: The codebook.
        width: D.

    Source: sharing between codes of a factorised codebook follows Open-MAGVIT2 (arXiv 2409.04410), section 3.2; a free
        part per code is kept beside it, so that channels need not be independent.
    """

    digits: Tensor

    def __init__(self, codes: CodesConfig, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes.codebook + 1, width)
        self.position = nn.Embedding(codes.grid**2, width)
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.head = nn.Linear(width, codes.codebook)
        self.shared = nn.ModuleDict()
        if codes.levels:
            self.shared["embedding"] = nn.Linear(sum(codes.levels), width, bias=False)
            self.shared["head"] = nn.Linear(width, sum(codes.levels), bias=False)
        self.register_buffer("digits", _digits(codes.levels, codes.codebook), persistent=False)

    def forward(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Logits over the codes."""
        state = self.transform(hidden)
        logits = self.head(state)
        return logits + self.shared["head"](state) @ self.digits.T.to(state) if self.shared else logits

    def embed(self, codes: Int[Tensor, "n"]) -> Float[Tensor, "n D"]:
        """Embeddings of whole images of codes, one after the other (n a multiple of N); K is the masked code."""
        images = codes.numel() // self.position.num_embeddings
        embeds = self.embedding(codes) + self.position.weight.repeat(images, 1)
        if not self.shared:
            return embeds
        known = codes < self.head.out_features
        shared = self.shared["embedding"](self.digits.to(embeds))[codes.masked_fill(~known, 0)]
        return embeds + shared * known[:, None]

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> ImageCodes:
        """Draw initial weights: tables at about unit scale, fan-in matrices, zero biases."""
        std = self.head.in_features**-0.5
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, 0.0, EMBEDDING_STD, generator=generator)
        for linear in (cast("nn.Linear", self.transform[0]), self.head):
            nn.init.trunc_normal_(linear.weight, 0.0, std, -3 * std, 3 * std, generator=generator)
            nn.init.zeros_(linear.bias)
        if self.shared:
            # What is shared speaks first; what is one code's own is learnt on top of it.
            own = self.embedding.weight[:-1]
            nn.init.normal_(own, 0.0, 0.1 * EMBEDDING_STD, generator=generator)
            nn.init.zeros_(self.head.weight)
            embedding, head = (cast("nn.Linear", self.shared[name]) for name in ("embedding", "head"))
            nn.init.normal_(embedding.weight, 0.0, EMBEDDING_STD / 2, generator=generator)
            nn.init.normal_(head.weight, 0.0, std / 2, generator=generator)
        return self


def _digits(levels: tuple[int, ...], codebook: int) -> Float[Tensor, "K _"]:
    """One-hot digits of every code, channel after channel."""
    codes, parts = torch.arange(codebook), []
    for steps in levels:
        parts.append(nn.functional.one_hot(codes % steps, steps))
        codes = codes // steps
    return torch.cat(parts, 1).float() if parts else torch.zeros(codebook, 0)


class Unified(LLaDAV):
    """LLaDA-V with image tokens in its sequences.

    Args:
        config: Sizes.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config  # type: ignore[assignment]

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__(config, generator=generator)
        width = config.language.width
        self.codes = None if config.codes is None else ImageCodes(config.codes, width)
        self.latents = None if config.latents is None else LatentTokens(config.latents, width)
        if generator is not None:
            if self.codes is not None:
                self.codes.init_(generator)
            if self.latents is not None:
                self.latents.init_(generator, EMBEDDING_STD)
            # Vision features enter at unit scale; text at LLaDA's 1/sqrt(D) would be drowned beside them.
            nn.init.normal_(self.language.embed_tokens.weight, 0.0, EMBEDDING_STD, generator=generator)

    def layout(self) -> Layout:
        """What this model expects of a sequence."""
        c = self.config
        told: dict[str, Any] = {"features": c.vision.tokens // c.pool**2, "codes": c.image_tokens.side**2}
        if c.latents is not None:
            told |= {"codebook": 1, "latents": (c.latents.channels, c.latents.grid, c.latents.grid)}
        elif c.codes is not None:
            told["codebook"] = c.codes.codebook
        return dataclasses.replace(super().layout(), **told)

    def features(self, pixels: Float[Tensor, "M 3 S S"]) -> Float[Tensor, "M N D"]:
        """Connected features of M images in [-1, 1], N per image after pooling, in the backbone's width."""
        grid, pool = self.config.vision.grid, self.config.pool
        squares = self.vision(pixels).unflatten(1, (grid // pool, pool, grid // pool, pool))
        return self.connector(squares.mean((2, 4)).flatten(1, 2))

    def places(self, ids: Int[Tensor, "B L"], positions: Int[Tensor, "B L"] | None = None) -> Int[Tensor, "B L *A"]:
        """Rotary positions of a canvas.

        Args:
            ids: Int64 [B, L]; images are whole.
            positions: Int64 [B, L], running numbers of the slots; default 0 .. L-1.

        Returns:
            Int64 [B, L], or [B, L, 2] where image tokens have a row and a column.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        drawn = self.config.image_tokens
        if drawn.rotary == "sequence":
            return positions
        is_drawn, number = self._is_drawn(ids), self.number(ids)
        start = positions - number
        axes = torch.stack((start + number // drawn.side, start + number % drawn.side), -1)
        return torch.where(is_drawn[..., None], axes, positions[..., None])

    def number(self, ids: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """Place of each image token within its image, row-major; images are whole. Elsewhere it means nothing."""
        return (self._is_drawn(ids).long().cumsum(1) - 1) % self.config.image_tokens.side**2

    def code_head(self, hidden: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Image-code logits of hidden states."""
        assert self.codes is not None  # a model with continuous tokens has `head` instead
        return self.codes(hidden)

    @property
    def head(self) -> DiffusionHead:
        """Draws continuous tokens from conditions; each token on its own."""
        assert self.latents is not None  # a model with codes has `code_head` instead
        return self.latents.head

    def embed_slots(
        self, ids: Int[Tensor, "B L"], images: Images | None = None, values: Float[Tensor, "B L C"] | None = None
    ) -> Float[Tensor, "B L D"]:
        """As `mmdiff.models.llada_v.LLaDAV.embed_slots`, with continuous tokens.

        Args:
            ids: Int64 [B, L]; images that are drawn are whole.
            images: The images that are read.
            values: Continuous tokens at the slots of ids from V on; those of masked ones do not matter.

        Raises:
            ConfigError: There are such slots, and no values.
        """
        embeds, drawn = super().embed_slots(ids, images), self._is_drawn(ids)
        if self.latents is None or not bool(drawn.any()):
            return embeds
        if values is None:
            raise ConfigError(f"{int(drawn.sum())} slots of continuous image tokens, and no values for them")
        known = ids[drawn] == self.config.language.vocab_size
        tokens = self.latents.embed(values[drawn], known, self.number(ids)[drawn])
        return embeds.masked_scatter(drawn[..., None], tokens.to(embeds.dtype))

    def _is_drawn(self, ids: Int[Tensor, "*B"]) -> Bool[Tensor, "*B"]:
        return ids >= self.config.language.vocab_size

    def _embed_ids(self, ids: Int[Tensor, "*B"]) -> Float[Tensor, "*B D"]:
        is_code = self._is_drawn(ids)
        embeds = self.language.embed_tokens(ids.masked_fill(is_code, 0))
        if self.codes is None:
            return embeds
        codes = ids[is_code] - self.config.language.vocab_size
        return embeds.masked_scatter(is_code[..., None], self.codes.embed(codes).to(embeds.dtype))


Unified.Config = Config
