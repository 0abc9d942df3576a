"""eMIGM and MAR: a masked autoencoder over continuous image tokens, with a diffusion head per token.

The encoder sees the known tokens only, the decoder all of them; what comes out is a condition per token, from which
the head draws the token. The network gets no time input. Rows of a batch may have different numbers of known tokens:
they are padded, and the padding is neither attended nor written.

Source: MAR (arXiv 2406.11838) and eMIGM (arXiv 2503.07197), published code's behaviour; key names as published.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmdiff.batch import Layout
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.models.base import PretrainedModule, check_range
from mmdiff.models.diffusion_head import DiffusionHead
from mmdiff.nn.patches import fold, unfold
from mmdiff.nn.vit import ViTBlock, take

__all__ = ["EMIGM", "SIZES", "Config", "Known", "TransformerConfig"]


@config
class TransformerConfig:
    """Shape of the encoder or of the decoder."""

    width: int = Field(768, gt=0)
    """D, size of the residual stream."""
    depth: int = Field(12, gt=0)
    """Number of blocks."""
    heads: int = Field(12, gt=0)
    """Attention heads."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} must be a multiple of heads {self.heads}")


@config
class Config:
    """Shape of an eMIGM or MAR network; the defaults are eMIGM-B's at 256 pixels."""

    type: Literal["emigm"] = "emigm"
    """Family name."""
    grid: int = Field(16, gt=0)
    """Latent cells per side."""
    channels: int = Field(16, gt=0)
    """Channels of the latent."""
    patch: int = Field(1, gt=0)
    """Latent cells per token and side."""
    classes: int = Field(1000, gt=0)
    """Number of classes; the label of that number means no class."""
    encoder: TransformerConfig = Field(default_factory=TransformerConfig)
    """Sees the known tokens."""
    decoder: TransformerConfig = Field(default_factory=TransformerConfig)
    """Sees all slots."""
    buffer: int = Field(64, gt=0)
    """Slots in front, each with the class embedding."""
    head_width: int = Field(1024, gt=0)
    """Width of the diffusion head."""
    head_depth: int = Field(6, gt=0)
    """Residual blocks of the diffusion head."""
    tied_null: bool = True
    """Whether no class and a masked slot are one vector (eMIGM: guidance with the mask; MAR: two)."""
    embedding_std: float = Field(0.02, gt=0)
    """Standard deviation of learnt positions, mask vector and classes before training. The published one drowns in the
    tokens of a narrow network; with 0.3 a short run finds neighbours about twice as soon."""
    drop_masked: bool = True
    """Whether the encoder sees the known tokens only; False: all slots, masked ones as the mask vector."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of attention probabilities, in training."""
    proj_dropout: float = Field(0.1, ge=0, lt=1)
    """After projections and feed-forward layers, in training."""

    def __post_init__(self) -> None:
        if self.grid % self.patch:
            raise ConfigError(f"grid {self.grid} is not a multiple of patch {self.patch}")
        if (self.tied_null or not self.drop_masked) and self.encoder.width != self.decoder.width:
            raise ConfigError(
                f"encoder width {self.encoder.width} and decoder width {self.decoder.width} must be equal when the "
                "mask vector serves both (tied_null, or drop_masked false)"
            )

    @property
    def tokens(self) -> int:
        """N, tokens of an image."""
        return (self.grid // self.patch) ** 2

    @property
    def token_channels(self) -> int:
        """C, numbers in a token."""
        return self.channels * self.patch**2

    def with_width(self, width: int) -> Config:
        """The same network at another width: head_dim and the head's relative width stay."""

        def scaled(part: TransformerConfig) -> TransformerConfig:
            new = part.width * width // self.encoder.width
            return dataclasses.replace(part, width=new, heads=max(1, part.heads * new // part.width))

        head = max(1, self.head_width * width // self.encoder.width)
        return dataclasses.replace(self, encoder=scaled(self.encoder), decoder=scaled(self.decoder), head_width=head)

    def with_depth(self, depth: int) -> Config:
        """The same network with ``depth`` blocks in encoder and decoder."""
        encoder, decoder = (dataclasses.replace(part, depth=depth) for part in (self.encoder, self.decoder))
        return dataclasses.replace(self, encoder=encoder, decoder=decoder)


def _size(width: int, depth: int, heads: int, head_depth: int, head_width: int, **latent: int) -> Config:
    part = TransformerConfig(width=width, depth=depth, heads=heads)
    return Config(encoder=part, decoder=part, head_depth=head_depth, head_width=head_width, **latent)  # type: ignore[arg-type]


_512 = {"channels": 32}
SIZES: dict[str, Config] = {
    "xsmall-256": _size(448, 10, 8, 3, 1024),
    "small-256": _size(512, 12, 8, 3, 1024),
    "base-256": _size(768, 12, 12, 6, 1024),
    "large-256": _size(1024, 16, 16, 8, 1280),
    "huge-256": _size(1280, 20, 16, 12, 1536),
    "xsmall-512": _size(448, 10, 8, 6, 1280, **_512),
    "small-512": _size(512, 12, 8, 6, 1280, **_512),
    "base-512": _size(768, 12, 12, 8, 1280, **_512),
    "large-512": _size(1024, 16, 16, 8, 1280, **_512),
}
"""Published sizes."""


@dataclasses.dataclass(frozen=True)
class Known:
    """Which tokens of a batch are known, ready for padding.

    Attributes:
        index: Int64 [B, V]; their places in ascending order, padded with masked ones.
        real: Bool [B, V]; False = padding. None: every row has V.
    """

    index: Int[Tensor, "B V"]
    real: Bool[Tensor, "B V"] | None

    @classmethod
    def of(cls, mask: Bool[Tensor, "B N"], counts: tuple[int, int] | None = None) -> Known:
        """Find them.

        Args:
            mask: True = masked.
            counts: Smallest and largest number of known tokens in a row; None asks the device.
        """
        known = (~mask).sum(1)
        low, high = counts or (int(known.min()), int(known.max()))
        index = mask.byte().argsort(dim=1, stable=True)[:, :high]
        real = None if low == high else torch.arange(high, device=mask.device) < known[:, None]
        return cls(index, real)


class EMIGM(PretrainedModule):
    """Condition of every token given the known ones, and the head that draws tokens from it.

    Args:
        config: Shape.
        generator: Draws the initial weights; None leaves PyTorch's allocation.
    """

    config: Config

    def __init__(self, config: Config, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        d, e, slots = config.decoder.width, config.encoder.width, config.buffer + config.tokens
        self.fake_latent = nn.Parameter(torch.empty(1, e))
        self.mask_token = None if config.tied_null else nn.Parameter(torch.empty(1, 1, d))
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, slots, e))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, slots, d))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, config.tokens, d))
        self.class_emb = nn.Embedding(config.classes, e)
        self.z_proj, self.z_proj_ln = nn.Linear(config.token_channels, e), nn.LayerNorm(e, eps=1e-6)
        self.encoder_blocks, self.encoder_norm = _blocks(config, config.encoder)
        self.decoder_embed = nn.Linear(e, d)
        self.decoder_blocks, self.decoder_norm = _blocks(config, config.decoder)
        self.diffloss = nn.ModuleDict(
            {"net": DiffusionHead(config.token_channels, d, config.head_width, config.head_depth)}
        )
        if generator is not None:
            self.init_(generator)

    def layout(self) -> Layout:
        """What tasks build examples for."""
        c = self.config
        return Layout(latents=(c.channels, c.grid, c.grid), classes=c.classes)

    @property
    def head(self) -> DiffusionHead:
        """Draws tokens from conditions; each token on its own."""
        return self.diffloss["net"]  # type: ignore[return-value]

    def condition(
        self,
        latents: Float[Tensor, "B *shape"],
        mask: Bool[Tensor, "B N"],
        labels: Int[Tensor, "B"],
        *,
        index: Int[Tensor, "B q"] | None = None,
        counts: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B q D"]:
        """Condition z of the tokens.

        Args:
            latents: Tokens [B, N, C], or latents [B, c, h, w]; values at masked tokens do not matter.
            mask: True = masked.
            labels: Classes 0 .. K-1; K = no class.
            index: Int64 tokens whose condition is needed; None = all. The last block then runs for those only.
            counts: Smallest and largest number of known tokens in a row, if the caller knows them; else the device
                is asked.

        Returns:
            Float [B, q or N, D].

        Raises:
            ConfigError: Shapes or labels that do not fit.
        """
        # The tokens of a run stay float32, whatever the precision of the weights.
        tokens = self._tokens(latents).to(self.fake_latent.dtype)
        if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
            raise ConfigError(f"mask is {mask.dtype} {tuple(mask.shape)}; expected bool {tuple(tokens.shape[:2])}")
        check_range("labels", labels, self.config.classes)
        known = Known.of(mask, counts)
        return self.decode(self.encode(tokens, mask, labels, known), mask, known, index)

    def encode(
        self, tokens: Float[Tensor, "B N C"], mask: Bool[Tensor, "B N"], labels: Int[Tensor, "B"], known: Known
    ) -> Float[Tensor, "B M D"]:
        """States of the buffer and of the known tokens (of all tokens if the encoder sees all)."""
        c, positions = self.config, self.encoder_pos_embed_learned
        front = self._class_vectors(labels)[:, None] + positions[:, : c.buffer]
        attend = None
        if c.drop_masked:
            rest = self.z_proj(take(tokens, known.index)) + take(positions, known.index + c.buffer)
            attend = _attend(known, c.buffer)
            x = self.z_proj_ln(torch.cat((front, rest), dim=1))
        else:
            x = self.z_proj_ln(torch.cat((front, self.z_proj(tokens) + positions[:, c.buffer :]), dim=1))
            hidden = torch.cat((mask.new_zeros(len(mask), c.buffer), mask), dim=1)
            x = torch.where(hidden[..., None], self._mask_vector(), x)
        for block in self.encoder_blocks:
            x = block(x, attend)
        return self.encoder_norm(x)

    def decode(
        self,
        states: Float[Tensor, "B M E"],
        mask: Bool[Tensor, "B N"],
        known: Known,
        index: Int[Tensor, "B q"] | None = None,
    ) -> Float[Tensor, "B q D"]:
        """Conditions from the encoder's states; arguments as in `condition`."""
        front = self.config.buffer
        x = self.decoder_embed(states)
        if self.config.drop_masked:
            x = self._spread(x, known)
        x = x + self.decoder_pos_embed_learned
        last = len(self.decoder_blocks) - 1
        asked = None if index is None else index + front
        for i, block in enumerate(self.decoder_blocks):
            x = block(x, None, asked if i == last else None)
        x = self.decoder_norm(x)
        if index is None:
            return x[:, front:] + self.diffusion_pos_embed_learned
        return x + take(self.diffusion_pos_embed_learned, index)

    def patchify(self, latents: Float[Tensor, "B c h w"]) -> Float[Tensor, "B N C"]:
        """Tokens of latents: positions row-major; in a token channel first, then row, then column of the patch."""
        return unfold(latents, self.config.patch)

    def unpatchify(self, tokens: Float[Tensor, "B N C"]) -> Float[Tensor, "B c h w"]:
        """Latents of tokens."""
        return fold(tokens, self.config.grid, self.config.patch)

    @torch.no_grad()
    def init_(self, generator: torch.Generator) -> EMIGM:
        """Normal embeddings (`Config.embedding_std`), Xavier-uniform layers without bias; the head has its own rule."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
        own = [p for p in self.parameters(recurse=False)]
        for parameter in [*own, self.class_emb.weight]:
            nn.init.normal_(parameter, std=self.config.embedding_std, generator=generator)
        self.head.init_(generator)
        return self

    def _tokens(self, latents: Tensor) -> Tensor:
        c = self.config
        if latents.shape[1:] == (c.channels, c.grid, c.grid):
            return self.patchify(latents)
        if latents.shape[1:] != (c.tokens, c.token_channels):
            raise ConfigError(
                f"latents are {tuple(latents.shape)}; this network takes [B, {c.channels}, {c.grid}, {c.grid}] or "
                f"tokens [B, {c.tokens}, {c.token_channels}]: is it the image autoencoder the network was trained with?"
            )
        return latents

    def _class_vectors(self, labels: Tensor) -> Tensor:
        """Rows of the class table; ``fake_latent`` for no class."""
        dropped = labels == self.config.classes
        rows = self.class_emb(labels.masked_fill(dropped, 0))
        return torch.where(dropped[:, None], self.fake_latent, rows)

    def _mask_vector(self) -> Tensor:
        return self.fake_latent if self.mask_token is None else self.mask_token[0]

    def _spread(self, x: Tensor, known: Known) -> Tensor:
        """Known tokens back to their places among masked ones."""
        c = self.config
        front, rest = x[:, : c.buffer], x[:, c.buffer :]
        fill = self._mask_vector().to(x.dtype)
        if known.real is not None:
            rest = torch.where(known.real[..., None], rest, fill)
        places = known.index[..., None].expand_as(rest)
        slots = fill.expand(len(x), c.tokens, -1).scatter(1, places, rest)
        return torch.cat((front, slots), dim=1)


EMIGM.Config = Config


def _blocks(config: Config, part: TransformerConfig) -> tuple[nn.ModuleList, nn.LayerNorm]:
    made = [ViTBlock(part.width, part.heads, config.dropout, config.proj_dropout) for _ in range(part.depth)]
    return nn.ModuleList(made), nn.LayerNorm(part.width, eps=1e-6)


def _attend(known: Known, front: int) -> Bool[Tensor, "B 1 1 M"] | None:
    if known.real is None:
        return None
    return torch.cat((known.real.new_ones(len(known.real), front), known.real), dim=1)[:, None, None]
