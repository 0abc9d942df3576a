"""Networks whose image codes are ids of the text vocabulary: how they are shown pictures, and how they draw.

Source: MMaDA (arXiv 2505.15809), published inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmdiff.errors import CheckpointError
from mmdiff.images import to_pixels
from mmdiff.pipelines.base import Checkpoint
from mmdiff.pipelines.painters import slots_of, words_of
from mmdiff.pipelines.prompts import tokenizer_of
from mmdiff.sampling import Canvas, CodeBackbone, Decoded, layout
from mmdiff.sampling.vocabulary_presets import vocabulary_parts
from mmdiff.text import Tokenizer
from mmdiff.text.mmada import Scripts

__all__ = ["MMaDAPainter", "PictureCodes"]


class PictureCodes:
    """Pictures as ids of the vocabulary.

    Args:
        checkpoint: Network, tokenizer and image tokenizer.

    Raises:
        CheckpointError: A tokenizer that is not the network's.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.shape = checkpoint, checkpoint.layout
        config: Any = checkpoint.model.config
        self.config, self.scripts = config, Scripts(config.special, config.text_length)
        self.tokenizer: Tokenizer = _fitting(tokenizer_of(checkpoint), self.shape.code_offset)
        images, codebook = checkpoint.image_tokenizer, self.shape.codebook
        if images is not None and images.codebook != codebook:
            raise CheckpointError(
                f"the network knows {codebook:,} image codes, the image tokenizer makes {images.codebook:,}: it is not "
                "the one the network was trained with"
            )

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return int(self.config.grid)

    @property
    def size(self) -> int:
        """Pixels per side."""
        return self.grid * int(self._images.config.factor)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Int[Tensor, "B N"]:
        """Codes of images, without the offset."""
        return self._images.encode(pixels).flatten(1)

    def decode(self, codes: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 S S"]:
        """Images of codes."""
        return self._images.decode(codes)

    def front(self, pictures: Sequence[Any]) -> list[int]:
        """What stands before a conversation about pictures; of each the largest centred square is read."""
        pixels = torch.stack([to_pixels(p, self.size, "crop") for p in pictures])
        weight = next(self._images.parameters())
        codes = self.encode(pixels.to(weight)) + self.shape.code_offset
        return self.scripts.picture(codes.tolist())

    @property
    def _images(self) -> Any:
        if self.checkpoint.image_tokenizer is None:
            raise CheckpointError(
                "this network reads and draws pictures as codes, and the checkpoint has no image tokenizer: give "
                "image_tokenizer=, a folder or hub id"
            )
        return self.checkpoint.image_tokenizer


class MMaDAPainter:
    """Codes of a network whose vocabulary holds them, drawn from a text.

    Args:
        checkpoint: Network, tokenizer and image tokenizer.

    Raises:
        CheckpointError: A tokenizer that is not the network's.
    """

    prompts = True
    words = words_of(vocabulary_parts)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.codes = checkpoint, PictureCodes(checkpoint)
        self.grid, self.size = self.codes.grid, self.codes.size
        self.cells = slice(0, self.grid**2)
        self.backbone = CodeBackbone(checkpoint.model)
        self.offset: int = checkpoint.layout.code_offset

    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Int[Tensor, "B N"]:
        """Codes of images."""
        return self.codes.encode(pixels)

    def canvas(self, subjects: Sequence[str], known: Tensor | None, open_: Bool[Tensor, "B N"]) -> Canvas:
        """The prompt, the image between its marks, and the empty prompt of the unguided branch."""
        scripts, special = self.codes.scripts, self.codes.scripts.ids
        ids = torch.zeros_like(open_, dtype=torch.long) if known is None else known.cpu() + self.offset
        rows = [
            [*(None if is_open else code for code, is_open in zip(row, flags, strict=True)), special.eoi]
            for row, flags in zip(ids.tolist(), open_.tolist(), strict=True)
        ]
        return layout(
            [[*scripts.prompt(self.codes.tokenizer.encode(text)), special.soi] for text in subjects],
            rows,
            mask_id=self.backbone.mask_id,
            pad_id=special.ipad,
            nulls=[[*scripts.prompt([]), special.soi]] * len(rows),
            device=self.checkpoint.device,
        )

    def parts(self, canvas: Canvas, drawn: Any, words: dict[str, Any]) -> dict[str, Any]:
        """See `mmdiff.sampling.vocabulary_presets`."""
        return vocabulary_parts(slots=slots_of(canvas), tokens=self.grid**2, **words).arguments()

    def result(self, decoded: Decoded) -> Int[Tensor, "B h w"]:
        """Codes."""
        return (decoded.tokens[:, self.cells] - self.offset).view(-1, self.grid, self.grid)

    def pixels(self, result: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 S S"]:
        """Images of codes."""
        return self.codes.decode(result)


def _fitting(tokenizer: Tokenizer, offset: int) -> Tokenizer:
    if tokenizer.vocab_size != offset:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size:,} ids, and image codes begin at id {offset:,}: it is not the "
            "one the network was trained with"
        )
    return tokenizer
