"""What families of image models differ in: the canvas, the parts of the engine, and the way to pixels and back.

A painter is one object per checkpoint; `mmdiff.pipelines.image` does the rest for all of them alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmdiff.batch import IMAGE
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.pipelines.base import Checkpoint
from mmdiff.pipelines.drawing import Drawing, Frame, Job, words_of
from mmdiff.pipelines.flow import FlowPainter
from mmdiff.pipelines.words import generated, share_left
from mmdiff.sampling import (
    Canvas,
    CodeBackbone,
    Decoded,
    LatentBackbone,
    PromptedLatents,
    Step,
    decode,
    latent_canvas,
    layout,
)
from mmdiff.sampling.image_presets import code_parts, latent_parts
from mmdiff.sampling.maskgit import ClassCodeBackbone, class_canvas
from mmdiff.sampling.presets import image_parts

__all__ = [
    "ClassPainter",
    "EnginePainter",
    "LatentPainter",
    "Painter",
    "PromptLatentPainter",
    "PromptPainter",
    "painter_of",
    "slots_of",
]


class Painter(Protocol):
    """Draws with one kind of network.

    Attributes:
        grid: Cells per side.
        size: Pixels per side.
        prompts: Whether it takes texts (else class numbers).
        words: Generation words that mean something to it.
    """

    grid: int
    prompts: bool
    words: frozenset[str]

    @property
    def size(self) -> int:
        """Side of the pictures, pixels."""
        ...

    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Tensor:
        """Tokens or latents of images."""
        ...

    def draw(self, job: Job, words: dict[str, Any], report: Callable[[int, float, Tensor], None] | None) -> Drawing:
        """Draw; ``report`` is called after each step with its number, the share still to do, and the tokens."""
        ...

    def pixels(self, result: Tensor) -> Float[Tensor, "B 3 S S"]:
        """Images of what `draw` gives."""
        ...


class EnginePainter:
    """Painters whose images are slots of a canvas that the one decoding engine fills."""

    size: int
    cells: Any
    """Slots of the image's tokens among those behind the prompt, in row-major order; a slice or their numbers."""
    backbone: Any
    offset = 0
    """Id that stands for a code where none is decided yet."""

    def canvas(self, job: Job) -> Canvas:
        """Rows for texts or class numbers."""
        raise NotImplementedError

    def parts(self, canvas: Canvas, drawn: Any, words: dict[str, Any]) -> dict[str, Any]:
        """Parts of the engine for what the user said."""
        raise NotImplementedError

    def result(self, decoded: Decoded) -> Tensor:
        """Codes [B, h, w] or latents [B, C, h, w]."""
        raise NotImplementedError

    def draw(self, job: Job, words: dict[str, Any], report: Callable[[int, float, Tensor], None] | None) -> Drawing:
        """Decode a canvas."""
        canvas, kept = self.canvas(job), list[Canvas]()

        def stepped(step: Step) -> None:
            if report is not None:
                report(step.number, share_left(step.canvas), generated(step.canvas))
            if job.keep:
                kept.append(step.canvas.copy())

        parts = self.parts(canvas, job.sources, words)
        watched = stepped if report is not None or job.keep else None
        done = decode(self.backbone, canvas=canvas, generators=job.sources, callback=watched, **parts)
        frames = [lambda c=c: self._frame(c, done) for c in kept]
        return Drawing(self.result(done), done.trace, frames)

    def _frame(self, canvas: Canvas, done: Decoded) -> Frame:
        open_ = canvas.undecided[:, canvas.start :]
        tokens = canvas.tokens[:, canvas.start :].masked_fill(open_, self.offset)
        values = None if canvas.values is None else canvas.values[:, canvas.start :]
        return Frame(self.result(Decoded(tokens, canvas, done.trace, values)), open_[:, self.cells])


def _any(value: Any) -> Any:
    return value


def painter_of(checkpoint: Checkpoint) -> Painter:
    """The painter of a checkpoint.

    Raises:
        CheckpointError: Network and image tokenizer do not belong together.
    """
    family = getattr(checkpoint.model.config, "type", "")
    if checkpoint.layout.reads_codes:
        from mmdiff.pipelines.scripts import ScriptPainter

        return ScriptPainter(checkpoint)
    kinds: dict[str, Any] = {"emigm": LatentPainter, "maskgit": ClassPainter, "dit": FlowPainter, "mmdit": FlowPainter}
    prompted = PromptLatentPainter if checkpoint.layout.latents else PromptPainter
    return kinds.get(family, prompted)(checkpoint)


class PromptPainter(EnginePainter):
    """Codes of a network that reads texts; a class is drawn by its name."""

    prompts = True
    words = words_of(image_parts)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.grid: int = checkpoint.image_tokenizer.grid
        self.size, self.cells = _size(checkpoint), _ALL
        self.backbone = CodeBackbone(checkpoint.model)
        self.offset: int = checkpoint.layout.code_offset

    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Int[Tensor, "B N"]:
        """Codes of images."""
        return self.checkpoint.image_tokenizer.encode(pixels).flatten(1)

    def canvas(self, job: Job) -> Canvas:
        """The chat that asks for the picture, perhaps about another one, and the slots of the picture."""
        from mmdiff.pipelines.answers import place_images
        from mmdiff.pipelines.prompts import Prompter, about

        prompter, shape = Prompter(self.checkpoint), self.checkpoint.layout
        shown = job.about or [None] * len(job.subjects)
        chats = [prompter.conversation(about(i, text)) for i, text in zip(shown, job.subjects, strict=True)]
        # As in training, guidance drops what the user said and keeps the frame around it, and pictures.
        drop = [[i in range(*c.user_span) and slot != IMAGE for i, slot in enumerate(c.ids)] for c in chats]
        rows = [
            [None if is_open else code for code, is_open in zip(row, flags, strict=True)]
            for row, flags in zip(self.ids(job).tolist(), job.open.tolist(), strict=True)
        ]
        canvas = layout(
            [c.ids for c in chats],
            rows,
            mask_id=shape.code_mask_id,
            pad_id=prompter.tokenizer.pad_id,
            droppable=drop,
            device=self.checkpoint.device,
        )
        self.put_values(canvas, job)
        return place_images(canvas, self.checkpoint.model, [image for c in chats for image in c.images])

    def ids(self, job: Job) -> Int[Tensor, "B N"]:
        """Ids of the picture's slots; open ones may hold anything."""
        known = torch.zeros_like(job.open, dtype=torch.long) if job.known is None else job.known.cpu()
        return known + self.offset

    def put_values(self, canvas: Canvas, job: Job) -> None:
        """Fill in what ids do not tell: of codes nothing."""

    def parts(self, canvas: Canvas, drawn: Any, words: dict[str, Any]) -> dict[str, Any]:
        """See `mmdiff.sampling.presets.image_parts`."""
        return image_parts(slots=slots_of(canvas), **words).arguments()

    def result(self, decoded: Decoded) -> Int[Tensor, "B h w"]:
        """Codes."""
        return (decoded.tokens - self.checkpoint.layout.code_offset).view(-1, self.grid, self.grid)

    def pixels(self, result: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 S S"]:
        """Images of codes."""
        return self.checkpoint.image_tokenizer.decode(result)


class PromptLatentPainter(PromptPainter):
    """Continuous tokens of a network that reads texts.

    Raises:
        CheckpointError: The autoencoder has other latents than the network draws.
    """

    words = words_of(latent_parts)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.model = checkpoint, _any(checkpoint.model)
        shape = self.model.config.latents
        _check_latents(checkpoint, shape.channels, shape.grid)
        self.grid = shape.side
        self.size, self.cells, self.offset = _size(checkpoint), _ALL, checkpoint.layout.code_offset
        self.backbone = PromptedLatents(checkpoint.model)

    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N C"]:
        """Tokens of images."""
        return self.model.latents.patchify(self.checkpoint.image_tokenizer.encode(pixels))

    def ids(self, job: Job) -> Int[Tensor, "B N"]:
        """They only say that a slot is known."""
        return torch.full_like(job.open, self.offset, dtype=torch.long)

    def put_values(self, canvas: Canvas, job: Job) -> None:
        """The known tokens."""
        values = torch.zeros(*canvas.tokens.shape, self.model.config.latents.token_channels)
        if job.known is not None:
            values[:, canvas.start :] = job.known.masked_fill(job.open.to(job.known.device)[..., None], 0).cpu()
        canvas.values = values.to(self.checkpoint.device)

    def parts(self, canvas: Canvas, drawn: Any, words: dict[str, Any]) -> dict[str, Any]:
        """See `mmdiff.sampling.image_presets.latent_parts`; all passes are guided unless an interval is given."""
        told: dict[str, Any] = {"guidance_interval": (0.0, 1.0), **words}
        tokens = self.backbone.tokens
        return latent_parts(
            slots=slots_of(canvas), rows=len(canvas), tokens=tokens, source=drawn, start=canvas.start, **told
        )

    def result(self, decoded: Decoded) -> Float[Tensor, "B C h w"]:
        """Latents in the network's scale."""
        return self.model.latents.unpatchify(_values(decoded))

    def pixels(self, result: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 S S"]:
        """Images of latents."""
        return _of_latents(self.checkpoint, result)


class ClassPainter(EnginePainter):
    """Codes of a class-conditional network.

    Raises:
        CheckpointError: The image tokenizer makes other codes than the network draws.
    """

    prompts = False
    words = words_of(code_parts)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.config = checkpoint, _any(checkpoint.model.config)
        self.grid: int = self.config.grid
        self.size, self.cells = _size(checkpoint), _ALL
        self.backbone = ClassCodeBackbone(checkpoint.model)
        tokenizer = checkpoint.image_tokenizer
        have = (getattr(tokenizer, "grid", None), getattr(tokenizer, "codebook", None))
        if have != (self.config.grid, self.config.codebook):
            makes = f"{have[0]} x {have[0]} of {have[1]:,}" if have[1] else f"none: it is a {tokenizer.config.type}"
            raise CheckpointError(
                f"the network draws {self.config.grid} x {self.config.grid} codes of {self.config.codebook:,}, the "
                f"image tokenizer makes {makes}; give the one the network was trained with"
            )

    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Int[Tensor, "B N"]:
        """Codes of images."""
        return self.checkpoint.image_tokenizer.encode(pixels).flatten(1)

    def canvas(self, job: Job) -> Canvas:
        """The class, and the slots of the picture."""
        device = self.checkpoint.device
        open_ = job.open.to(device)
        codes = torch.zeros_like(open_, dtype=torch.long) if job.known is None else job.known.to(device)
        return class_canvas(self.backbone, torch.tensor(job.subjects, device=device), codes, open_)

    def parts(self, canvas: Canvas, drawn: Any, words: dict[str, Any]) -> dict[str, Any]:
        """See `mmdiff.sampling.image_presets.code_parts`."""
        halton = self.config.variant == "halton"
        return code_parts(slots=slots_of(canvas), grid=self.grid, halton=halton, **words)

    def result(self, decoded: Decoded) -> Int[Tensor, "B h w"]:
        """Codes."""
        return decoded.tokens.clamp_max(self.config.codebook - 1).view(-1, self.grid, self.grid)

    def pixels(self, result: Int[Tensor, "B h w"]) -> Float[Tensor, "B 3 S S"]:
        """Images of codes."""
        return self.checkpoint.image_tokenizer.decode(result)


class LatentPainter(EnginePainter):
    """Continuous tokens of a class-conditional network.

    Raises:
        CheckpointError: The autoencoder has other latents than the network draws.
    """

    prompts = False
    words = words_of(latent_parts)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.model, self.config = checkpoint, _any(checkpoint.model), _any(checkpoint.model.config)
        self.grid: int = self.config.grid // self.config.patch
        self.size, self.cells = _size(checkpoint), _ALL
        self.backbone = LatentBackbone(checkpoint.model)
        _check_latents(checkpoint, self.config.channels, self.config.grid)

    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N C"]:
        """Tokens of images."""
        return self.model.patchify(self.checkpoint.image_tokenizer.encode(pixels))

    def canvas(self, job: Job) -> Canvas:
        """The class, and the slots of the picture."""
        device, known = self.checkpoint.device, job.known
        values = torch.zeros(*job.open.shape, self.config.token_channels) if known is None else known
        return latent_canvas(torch.tensor(job.subjects, device=device), values.to(device), job.open.to(device))

    def parts(self, canvas: Canvas, drawn: Any, words: dict[str, Any]) -> dict[str, Any]:
        """See `mmdiff.sampling.image_presets.latent_parts`."""
        mar = not self.config.tied_null
        count = self.config.tokens
        return latent_parts(slots=slots_of(canvas), rows=len(canvas), tokens=count, source=drawn, mar=mar, **words)

    def result(self, decoded: Decoded) -> Float[Tensor, "B C h w"]:
        """Latents in the network's scale."""
        return self.model.unpatchify(_values(decoded))

    def pixels(self, result: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 S S"]:
        """Images of latents."""
        return _of_latents(self.checkpoint, result)


_ALL = slice(None)


def _check_latents(checkpoint: Checkpoint, channels: int, grid: int) -> None:
    vae = checkpoint.image_tokenizer.config
    have = (getattr(vae, "channels", None), getattr(vae, "grid", None))
    if have != (channels, grid):
        makes = f"has {have[0]} channels, {have[1]} x {have[1]}" if have[0] else f"has none: it is a {vae.type}"
        raise CheckpointError(
            f"the network draws latents of {channels} channels, {grid} x {grid}, the autoencoder {makes}; give the one "
            "the network was trained with"
        )


def _values(decoded: Decoded) -> Float[Tensor, "B N C"]:
    if decoded.values is None:
        raise ConfigError("the canvas holds no values")
    return decoded.values.float()


def _of_latents(checkpoint: Checkpoint, latents: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 S S"]:
    vae = checkpoint.image_tokenizer
    return vae.decode(latents.to(next(vae.parameters()).dtype)).float()


def _size(checkpoint: Checkpoint) -> int:
    return int(checkpoint.image_tokenizer.config.image_size)


def slots_of(canvas: Canvas) -> int:
    """Most slots that are drawn in a row.

    Raises:
        ConfigError: None is.
    """
    slots = int(canvas.undecided.sum(1).max())
    if not slots:
        raise ConfigError("nothing to draw: the mask marks no part of the image")
    return slots
