"""Networks whose image codes are ids of the text vocabulary: how they are shown pictures, and how they draw.

A script is what one family's sequences look like; the painter and the prompts are the same for all.

Source: MMaDA (arXiv 2505.15809) and Lumina-DiMOO (arXiv 2510.06308), published inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.images import crop_sizes, to_pixels, to_shape
from mmdiff.pipelines.base import Checkpoint
from mmdiff.pipelines.drawing import Job, words_of
from mmdiff.pipelines.painters import EnginePainter, slots_of
from mmdiff.sampling import Canvas, CodeBackbone, Decoded, layout
from mmdiff.sampling.vocabulary_presets import lumina_parts, mmada_parts
from mmdiff.text import Tokenizer

__all__ = ["LuminaScript", "MMaDAScript", "Script", "ScriptPainter", "script_of"]

_PATCH = 2
"""Image tokens per side of the patches that Lumina's sizes are counted in."""


class Script:
    """Sequences of one checkpoint. Pictures are ids of the vocabulary.

    Attributes:
        scripts: The family's layouts in ids, such as `mmdiff.text.mmada.Scripts`.

    Args:
        checkpoint: Network, tokenizer and image tokenizer.

    Raises:
        CheckpointError: A tokenizer that is not the network's.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        from mmdiff.pipelines.prompts import tokenizer_of

        config: Any = checkpoint.model.config
        self.checkpoint, self.config = checkpoint, config
        self.offset: int = checkpoint.layout.code_offset
        self.grid: int = config.grid
        self.scripts: Any = checkpoint.layout.script
        self.tokenizer: Tokenizer = tokenizer_of(checkpoint)
        if self.tokenizer.vocab_size != self.offset:
            raise CheckpointError(
                f"the tokenizer has {self.tokenizer.vocab_size:,} ids, and image codes begin at id {self.offset:,}: it "
                "is not the one the network was trained with"
            )
        images, codebook = checkpoint.image_tokenizer, config.codebook
        if images is not None and images.codebook != codebook:
            raise CheckpointError(
                f"the network knows {codebook:,} image codes, the image tokenizer makes {images.codebook:,}: it is not "
                "the one the network was trained with"
            )

    @property
    def images(self) -> Any:
        """The image tokenizer.

        Raises:
            CheckpointError: There is none.
        """
        if self.checkpoint.image_tokenizer is None:
            raise CheckpointError(
                "this network reads and draws pictures as codes, and the checkpoint has no image tokenizer: give "
                "image_tokenizer=, a folder or hub id"
            )
        return self.checkpoint.image_tokenizer

    @property
    def size(self) -> int:
        """Side in pixels of the pictures that are drawn."""
        return self.grid * int(self.images.config.factor)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end an answer, the filler first."""
        return (self.tokenizer.eos_id, self.tokenizer.eot_id)

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> Int[Tensor, "B h w"]:
        """Codes of images, without the offset."""
        weight = next(self.images.parameters())
        return self.images.encode(pixels.to(weight))

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], shown: Sequence[Any], answer: str | None
    ) -> tuple[list[int], list[int]]:
        """Ids of a conversation about pictures up to the answer, and those of a given answer."""
        raise NotImplementedError

    def drawing(self, text: str | None) -> list[int]:
        """Ids before the codes of a picture that is to be drawn; None: the prompt that guidance puts in its place."""
        raise NotImplementedError

    def editing(self, text: str | None, codes: Sequence[int]) -> list[int]:
        """The same for a picture that follows an instruction about another one.

        Raises:
            ConfigError: The network has not learnt that.
        """
        raise ConfigError(
            "this network draws from texts alone: give a mask of the part to draw again, or take a model that edits"
        )

    def slots(self, codes: Sequence[int | None]) -> list[int | None]:
        """What follows: the codes, None where one is drawn, and what stands between and behind them."""
        return list(self.scripts.slots(codes, self.grid))

    @property
    def cells(self) -> list[int]:
        """Which of the slots are codes."""
        return list(self.scripts.cells(self.grid))

    @property
    def pad_id(self) -> int:
        """Id at slots that nobody attends."""
        return self.tokenizer.pad_id


class MMaDAScript(Script):
    """MMaDA: pictures in front of the conversation, prompts of a task token and a text."""

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], shown: Sequence[Any], answer: str | None
    ) -> tuple[list[int], list[int]]:
        """Of each picture the largest centred square is read."""
        chat = self.scripts.told(self.tokenizer, messages, answer)
        front: list[int] = []
        if shown:
            pixels = torch.stack([to_pixels(p, self.size, "crop") for p in shown])
            front = self.scripts.picture((self.encode(pixels).flatten(1) + self.offset).tolist())
        return [*front, *chat.ids[: chat.answer_start]], chat.ids[chat.answer_start :]

    def drawing(self, text: str | None) -> list[int]:
        """Task, text, start of the image; without a condition the text is empty."""
        return self.scripts.drawing(self.tokenizer, None if text is None else self.tokenizer.encode(text))

    @property
    def pad_id(self) -> int:
        """MMaDA's own."""
        return int(self.config.special.ipad)


class LuminaScript(Script):
    """Lumina-DiMOO: a system sentence, the user's part with its pictures, rows of codes with breaks."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Also the end of the answer."""
        return (*super().end_ids, self.config.special.eoa)

    def conversation(
        self, messages: Sequence[Mapping[str, Any]], shown: Sequence[Any], answer: str | None
    ) -> tuple[list[int], list[int]]:
        """One question; pictures keep their shape as far as the trained sizes allow.

        Raises:
            ConfigError: Several turns, which the published sequences do not have.
        """
        told = self.scripts.told(self.tokenizer, messages, answer)
        place = self.scripts.place(self.tokenizer, told.answer_start)
        pictures = [i for p in shown for i in self._picture(p)]
        prompt = [*told.ids[:place], *pictures, *told.ids[place : told.answer_start]]
        return prompt, told.ids[told.answer_start :]

    def drawing(self, text: str | None) -> list[int]:
        """Without a condition a token of its own stands for the text."""
        return self.scripts.drawing(self.tokenizer, None if text is None else self.tokenizer.encode(text))

    def editing(self, text: str | None, codes: Sequence[int]) -> list[int]:
        """The picture stays in sight when the instruction is dropped."""
        said = None if text is None else self.tokenizer.encode(text)
        return list(self.scripts.editing(self.tokenizer, said, [c + self.offset for c in codes], self.grid))

    def _picture(self, picture: Any) -> list[int]:
        factor = int(self.images.config.factor)
        pixels = to_shape(picture, crop_sizes((self.grid // _PATCH) ** 2 or 1, factor * _PATCH))
        codes = self.encode(pixels[None])[0] + self.offset
        return self.scripts.picture(codes.flatten().tolist(), *codes.shape)


_SCRIPTS: dict[str, Any] = {"mmada": (MMaDAScript, mmada_parts), "lumina": (LuminaScript, lumina_parts)}
"""Family -> its script, and what its generation words mean."""


def script_of(checkpoint: Checkpoint) -> Script:
    """The script of a checkpoint's family; errors as in `Script`."""
    made: Script = _SCRIPTS[_family(checkpoint)][0](checkpoint)
    return made


class ScriptPainter(EnginePainter):
    """Codes of a network whose vocabulary holds them, drawn from a text, or from a picture and a text.

    Args:
        checkpoint: Network, tokenizer and image tokenizer.

    Raises:
        CheckpointError: A tokenizer that is not the network's.
    """

    prompts = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.script = checkpoint, script_of(checkpoint)
        self._parts = _SCRIPTS[_family(checkpoint)][1]
        self.words = words_of(self._parts)
        self.grid, self.size, self.cells = self.script.grid, self.script.size, self.script.cells
        self.backbone = CodeBackbone(checkpoint.model)
        self.offset: int = self.script.offset

    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Int[Tensor, "B N"]:
        """Codes of images."""
        return self.script.encode(pixels).flatten(1)

    def canvas(self, job: Job) -> Canvas:
        """The prompt, the picture's slots, and the prompt of the unguided branch."""
        ids = torch.zeros_like(job.open, dtype=torch.long) if job.known is None else job.known.cpu()
        rows: list[list[int | None]] = []
        for codes, flags in zip(ids.tolist(), job.open.tolist(), strict=True):
            shown = [None if free else c + self.offset for c, free in zip(codes, flags, strict=True)]
            rows.append(self.script.slots(shown))
        fronts, nulls = self._prompts(job, job.subjects), self._prompts(job, [None] * len(rows))
        return layout(
            fronts,
            rows,
            mask_id=self.backbone.mask_id,
            pad_id=self.script.pad_id,
            nulls=nulls,
            device=self.checkpoint.device,
        )

    def _prompts(self, job: Job, texts: Sequence[str | None]) -> list[list[int]]:
        """What stands before the pictures that are drawn; None: without a condition."""
        if job.about is None:
            return [self.script.drawing(text) for text in texts]
        pixels = torch.stack([to_pixels(image, self.size) for image in job.about])
        codes = self.encode(pixels.to(self.checkpoint.device)).tolist()
        return [self.script.editing(text, row) for text, row in zip(texts, codes, strict=True)]

    def parts(self, canvas: Canvas, drawn: Any, words: dict[str, Any]) -> dict[str, Any]:
        """See `mmdiff.sampling.vocabulary_presets`."""
        parts: dict[str, Any] = self._parts(slots=slots_of(canvas), tokens=self.grid**2, **words).arguments()
        return parts

    def result(self, decoded: Decoded) -> Int[Tensor, "B h w"]:
        """Codes."""
        return (decoded.tokens[:, self.cells] - self.offset).view(-1, self.grid, self.grid)

    def pixels(self, result: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 S S"]:
        """Images of codes."""
        return self.script.images.decode(result)


def _family(checkpoint: Checkpoint) -> str:
    config: Any = checkpoint.model.config
    return str(config.type)
