"""Images from class labels or text, and redrawing a part of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.images import to_pixels, to_uint8
from mmdiff.pipelines.base import Checkpoint, Pipeline
from mmdiff.pipelines.drawing import Drawing, Frame, Job
from mmdiff.pipelines.painters import painter_of
from mmdiff.pipelines.words import Generators, ImageWords, sources, with_defaults, zip_batches
from mmdiff.sampling.trace import Trace

__all__ = ["ImageGenerator", "ImageOutput"]


@dataclass(frozen=True)
class ImageOutput:
    """Generated images.

    Attributes:
        images: List of PIL images; ``"np"``: uint8 [B, S, S, 3]; ``"pt"``: float [B, 3, S, S] in [-1, 1];
            ``"latent"``: int64 codes [B, h, w], or float latents [B, C, h, w] of a network with continuous tokens.
        trace: What decoding cost.
    """

    images: Any
    trace: Trace


class ImageGenerator(Pipeline):
    """Draw images.

    Args:
        checkpoint: The parts.

    Raises:
        CheckpointError: It does not draw, or its image tokenizer is that of another network.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        by_class = "class_image" in self.capabilities or hasattr(checkpoint.model.config, "classes")
        self.require("class_image" if by_class else "text_image")
        self.painter = painter_of(checkpoint)

    @property
    def classes(self) -> int:
        """Number of classes it can draw; 0 if it draws from texts only."""
        own = getattr(self.checkpoint.model.config, "classes", None)
        return own if isinstance(own, int) else len(self.checkpoint.classes)

    @torch.no_grad()
    def __call__(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        prompts: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] | None = None,
        generator: Generators | None = None,
        output_type: str = "pil",
        **words: Unpack[ImageWords],
    ) -> ImageOutput:
        """Draw one image per label or prompt.

        An image is a function of its label or prompt, its seed and the options, whatever else is in the batch.

        Args:
            labels: Class numbers (or names), one or a list.
            prompts: Instead of labels: texts, one or a list.
            seeds: One per image; a single label or prompt is drawn once per seed. Default 0, 1, 2, ...
            generator: Instead of seeds: one generator per image.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            **words: Options; see `mmdiff.sampling.presets.image_parts`, and for class-conditional networks
                `mmdiff.sampling.image_presets`.

        Raises:
            ConfigError: Neither or both of labels and prompts, or options that contradict each other.
            CheckpointError: Labels for a checkpoint without classes, or prompts for one without texts.
        """
        subjects = self._subjects(labels, prompts)
        rows, drawn = self._rows(subjects, seeds, generator, words.get("compat"))
        drawing = self._draw(rows, drawn, words)
        return ImageOutput(self._output(drawing.result, output_type), drawing.trace)

    @torch.no_grad()
    def edit(
        self, image: Any, mask: Any, prompt_or_label: Any, seed: int | Sequence[int] = 0, **words: Unpack[ImageWords]
    ) -> Image.Image | list[Image.Image]:
        """Redraw a part of an image (inpainting); pixels outside the part are kept as they are.

        Without a mask the text is an instruction about the image, for networks that follow such (capability ``edit``):
        all of it is drawn anew, with the image in sight.

        Args:
            image: Picture, or a list of them; squeezed to the model's square size.
            mask: PIL image, array or tensor [H, W], True or bright = redraw; one, or one per image. None: see above.
            prompt_or_label: Text or class number; one, or one per image.
            seed: One, or one per image.
            **words: Options, as when calling.

        Returns:
            The image, or a list of images.

        Raises:
            ConfigError: A mask that marks nothing, none for a network that needs one, or options that contradict each
                other.
        """
        if mask is None:
            return self._follow(image, prompt_or_label, seed, words)
        items, many = zip_batches(image=image, mask=mask, prompt=prompt_or_label, seed=seed)
        size, grid = self.painter.size, self.painter.grid
        pixels = torch.stack([to_pixels(i, size) for i, *_ in items])
        redraw = torch.stack([_mask(m, size) for _, m, *_ in items])
        cells = redraw.view(-1, grid, size // grid, grid, size // grid).any(dim=4).any(dim=2).flatten(1)
        known = self.painter.encode(pixels.to(self.checkpoint.device))
        subjects = [self._subject(t) for _, _, t, _ in items]
        drawn = sources(len(items), "image", [s for *_, s in items], None)
        new = self.painter.pixels(self._draw(subjects, drawn, words, known=known, cells=cells).result).cpu()
        blended = torch.where(redraw[:, None], new.float(), pixels)
        out = [Image.fromarray(a) for a in to_uint8(blended).numpy()]
        return out if many else out[0]

    def _follow(self, image: Any, text: Any, seed: Any, words: ImageWords) -> Image.Image | list[Image.Image]:
        """New pictures by instructions about others."""
        if "edit" not in self.capabilities:
            raise ConfigError("give a mask of the part to draw again: this network follows no instructions")
        items, many = zip_batches(image=image, prompt=text, seed=seed)
        drawn = sources(len(items), "image", [s for *_, s in items], None)
        drawing = self._draw([t for _, t, _ in items], drawn, words, about=[i for i, *_ in items])
        out: list[Image.Image] = self._output(drawing.result, "pil")
        return out if many else out[0]

    @torch.no_grad()
    def denoising(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        prompts: str | Sequence[str] | None = None,
        seeds: int | Sequence[int] | None = None,
        columns: int = 8,
        **words: Unpack[ImageWords],
    ) -> Image.Image:
        """A picture of how images come to be: one row per image, evenly chosen passes from left to right.

        Cells that are still masked are grey.

        Args:
            labels: As when calling.
            prompts: As when calling.
            seeds: As when calling.
            columns: Passes shown, at most; the last one is always.
            **words: As when calling.

        Raises:
            ConfigError: As when calling.
        """
        rows, drawn = self._rows(self._subjects(labels, prompts), seeds, None, words.get("compat"))
        steps = self._draw(rows, drawn, words, keep=True).frames
        chosen = torch.linspace(0, len(steps) - 1, min(columns, len(steps))).round().int().tolist()
        frames = [self._frame(steps[i]()) for i in chosen]
        across = torch.stack(frames, dim=1).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        return Image.fromarray(to_uint8(across.permute(2, 0, 1)[None])[0].numpy())

    def _frame(self, frame: Frame) -> Tensor:
        """Float [B, 3, S, S]; what is decided, on grey."""
        pixels = self.painter.pixels(frame.result).float().cpu()
        if frame.masked is None:
            return pixels
        cell = pixels.shape[-1] // self.painter.grid
        grey = frame.masked.view(-1, 1, self.painter.grid, self.painter.grid).cpu()
        grey = grey.repeat_interleave(cell, 2).repeat_interleave(cell, 3)
        return torch.where(grey, torch.zeros_like(pixels), pixels)

    def _subjects(self, labels: Any, prompts: Any) -> Any:
        """Texts or class numbers, one or a list."""
        if (labels is None) == (prompts is None):
            raise ConfigError("give labels (class numbers) or prompts (texts), one of them")
        if prompts is not None:
            self.require("text_image")
            return prompts
        self.require("class_image")
        return [self._class(v) for v in labels] if isinstance(labels, (list, tuple)) else self._class(labels)

    def _subject(self, prompt_or_label: Any) -> Any:
        if isinstance(prompt_or_label, str) and self.painter.prompts:
            return prompt_or_label
        self.require("class_image")
        return self._class(prompt_or_label)

    def _rows(self, subjects: Any, seeds: Any, generator: Any, compat: Any) -> tuple[list[Any], Any]:
        if generator is None:
            if compat == "reference":
                raise ConfigError("compat='reference' draws for the whole batch: give generator=, one generator")
            if seeds is None and isinstance(subjects, (list, tuple)):
                seeds = list(range(len(subjects)))
            items, _ = zip_batches(subjects=subjects, seeds=0 if seeds is None else seeds)
            return [p for p, _ in items], sources(len(items), "image", [s for _, s in items], None)
        if isinstance(generator, torch.Generator) and compat == "reference":
            return [p for (p,) in zip_batches(subjects=subjects)[0]], generator
        given = [generator] if isinstance(generator, torch.Generator) else list(generator)
        items, _ = zip_batches(subjects=subjects, generator=given)
        return [p for p, _ in items], sources(len(items), "image", seeds, given)

    def _draw(
        self,
        subjects: list[Any],
        drawn: Any,
        words: ImageWords,
        *,
        known: Tensor | None = None,
        cells: Tensor | None = None,
        about: list[Any] | None = None,
        keep: bool = False,
    ) -> Drawing:
        usual = self.checkpoint.defaults.get("image" if about is None else "edit", {})
        options: dict[str, Any] = with_defaults(words, usual, ImageWords)
        callback = options.pop("callback_on_step_end", None)
        if strange := sorted(set(options) - self.painter.words):
            raise ConfigError(f"{', '.join(strange)} means nothing to a network of this family; leave it out")
        if cells is None:
            cells = torch.ones(len(subjects), self.painter.grid**2, dtype=torch.bool)

        def report(number: int, share: float, state: Tensor) -> None:
            callback(self, number, share, {"tokens": state})

        job = Job(subjects=subjects, known=known, open=cells, sources=drawn, about=about, keep=keep)
        drawing = self.painter.draw(job, options, None if callback is None else report)
        self.trace = drawing.trace
        return drawing

    def _output(self, result: Tensor, kind: str) -> Any:
        if kind not in ("pil", "np", "pt", "latent"):
            raise ConfigError(f"output_type {kind!r}; known: pil, np, pt, latent")
        if kind == "latent":
            return result
        pixels = self.painter.pixels(result)
        if kind == "pt":
            return pixels.clamp(-1, 1)
        arrays = to_uint8(pixels).cpu().numpy()
        return arrays if kind == "np" else [Image.fromarray(a) for a in arrays]

    def _class(self, label: Any) -> Any:
        """The name of a class for a network that reads texts, else its number."""
        names = self.checkpoint.classes
        if isinstance(label, str):
            if label not in names:
                raise ConfigError(f"class {label!r} is not one of the checkpoint's {len(names)}; use prompts for text")
            return label if self.painter.prompts else names.index(label)
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < self.classes:
            raise ConfigError(f"label {label!r} must be a number from 0 to {self.classes - 1}")
        return names[int(label)] if self.painter.prompts else int(label)


def _mask(mask: Any, size: int) -> Tensor:
    """Bool [S, S]; a cell is marked if any part of it is (largest value, not the mean)."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L")) > 127
    marked = torch.as_tensor(np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask))
    if marked.ndim != 2:
        raise ConfigError(f"a mask must be [H, W], got {tuple(marked.shape)}; True = redraw")
    marked = marked if marked.dtype == torch.bool else marked > (127 if not marked.is_floating_point() else 0.5)
    return torch.nn.functional.adaptive_max_pool2d(marked[None].float(), size)[0].bool()
