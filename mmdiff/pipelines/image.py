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
from mmdiff.pipelines.base import Pipeline
from mmdiff.pipelines.prompts import tokenizer_of
from mmdiff.pipelines.words import Generators, ImageWords, report_steps, sources, with_defaults, zip_batches
from mmdiff.sampling import Canvas, CodeBackbone, Decoded, decode, layout
from mmdiff.sampling.presets import image_parts
from mmdiff.sampling.trace import Trace

__all__ = ["ImageGenerator", "ImageOutput"]


@dataclass(frozen=True)
class ImageOutput:
    """Generated images.

    Attributes:
        images: List of PIL images; ``"np"``: uint8 [B, S, S, 3]; ``"pt"``: float [B, 3, S, S] in [-1, 1];
            ``"latent"``: int64 codes [B, h, w].
        trace: What decoding cost.
    """

    images: Any
    trace: Trace


class ImageGenerator(Pipeline):
    """Draw images.

    Args:
        checkpoint: The parts.

    Raises:
        CheckpointError: It does not draw.
    """

    needs = "text_image"

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
            **words: Options; see `mmdiff.sampling.presets.image_parts`.

        Raises:
            ConfigError: Neither or both of labels and prompts, or options that contradict each other.
            CheckpointError: Labels for a checkpoint without classes.
        """
        if (labels is None) == (prompts is None):
            raise ConfigError("give labels (class numbers) or prompts (texts), one of them")
        if labels is not None:
            self.require("class_image")
            prompts = [self._name(v) for v in labels] if isinstance(labels, (list, tuple)) else self._name(labels)
        texts, drawn = self._rows(prompts, seeds, generator)
        shape = self.checkpoint.layout
        rows = [[None] * shape.codes for _ in texts]
        decoded = self._decode(self._canvas(texts, rows), drawn, words)
        return ImageOutput(self._output(self._codes(decoded), output_type), decoded.trace)

    @torch.no_grad()
    def edit(
        self, image: Any, mask: Any, prompt_or_label: Any, seed: int | Sequence[int] = 0, **words: Unpack[ImageWords]
    ) -> Image.Image | list[Image.Image]:
        """Redraw a part of an image (inpainting); pixels outside the part are kept as they are.

        Args:
            image: Picture, or a list of them; squeezed to the model's square size.
            mask: PIL image, array or tensor [H, W], True or bright = redraw; one, or one per image.
            prompt_or_label: Text or class number; one, or one per image.
            seed: One, or one per image.
            **words: Options; see `mmdiff.sampling.presets.image_parts`.

        Returns:
            The image, or a list of images.

        Raises:
            ConfigError: A mask that marks nothing, or options that contradict each other.
        """
        items, many = zip_batches(image=image, mask=mask, prompt=prompt_or_label, seed=seed)
        size, device = self.checkpoint.image_tokenizer.config.image_size, self.checkpoint.device
        pixels = torch.stack([to_pixels(i, size) for i, *_ in items])
        redraw = torch.stack([_mask(m, size) for _, m, *_ in items])
        grid, offset = self.checkpoint.image_tokenizer.grid, self.checkpoint.layout.code_offset
        cells = redraw.view(-1, grid, size // grid, grid, size // grid).any(dim=4).any(dim=2).flatten(1)
        codes = self.checkpoint.image_tokenizer.encode(pixels.to(device)).flatten(1).cpu()
        rows = [
            [None if open_ else c + offset for c, open_ in zip(r.tolist(), o.tolist(), strict=True)]
            for r, o in zip(codes, cells, strict=True)
        ]
        texts = [t if isinstance(t, str) else self._label_text(t) for _, _, t, _ in items]
        drawn = sources(len(items), "image", [s for *_, s in items], None)
        decoded = self._decode(self._canvas(texts, rows), drawn, words)
        new = self.checkpoint.image_tokenizer.decode(self._codes(decoded)).cpu()
        blended = torch.where(redraw[:, None], new.float(), pixels)
        out = [Image.fromarray(a) for a in to_uint8(blended).numpy()]
        return out if many else out[0]

    def _rows(self, prompts: Any, seeds: Any, generator: Any) -> tuple[list[str], list[torch.Generator]]:
        if generator is None:
            if seeds is None and isinstance(prompts, (list, tuple)):
                seeds = list(range(len(prompts)))
            items, _ = zip_batches(prompts=prompts, seeds=0 if seeds is None else seeds)
            return [p for p, _ in items], sources(len(items), "image", [s for _, s in items], None)
        given = [generator] if isinstance(generator, torch.Generator) else list(generator)
        items, _ = zip_batches(prompts=prompts, generator=given)
        return [p for p, _ in items], sources(len(items), "image", seeds, given)

    def _canvas(self, texts: Sequence[str], rows: Sequence[Sequence[int | None]]) -> Canvas:
        tokenizer = tokenizer_of(self.checkpoint)
        chats = [tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
        # As in training, guidance drops what the user said and keeps the frame around it.
        drop = [[c.user_span[0] <= i < c.user_span[1] for i in range(len(c.ids))] for c in chats]
        shape = self.checkpoint.layout
        return layout(
            [c.ids for c in chats],
            rows,
            mask_id=shape.code_mask_id,
            pad_id=tokenizer.pad_id,
            droppable=drop,
            device=self.checkpoint.device,
        )

    def _decode(self, canvas: Canvas, drawn: list[torch.Generator], words: ImageWords) -> Decoded:
        options: dict[str, Any] = with_defaults(words, self.checkpoint.defaults.get("image", {}), ImageWords)
        callback = report_steps(self, options.pop("callback_on_step_end", None))
        slots = int(canvas.undecided.sum(1).max())
        if not slots:
            raise ConfigError("nothing to draw: the mask marks no part of the image")
        parts = image_parts(slots=slots, **options)
        backbone = CodeBackbone(self.checkpoint.model)
        done = decode(backbone, canvas=canvas, generators=drawn, callback=callback, **parts.arguments())
        self.trace = done.trace
        return done

    def _codes(self, decoded: Decoded) -> Tensor:
        grid = self.checkpoint.image_tokenizer.grid
        return (decoded.tokens - self.checkpoint.layout.code_offset).view(-1, grid, grid)

    def _output(self, codes: Tensor, kind: str) -> Any:
        if kind not in ("pil", "np", "pt", "latent"):
            raise ConfigError(f"output_type {kind!r}; known: pil, np, pt, latent")
        if kind == "latent":
            return codes
        pixels = self.checkpoint.image_tokenizer.decode(codes)
        if kind == "pt":
            return pixels
        arrays = to_uint8(pixels).cpu().numpy()
        return arrays if kind == "np" else [Image.fromarray(a) for a in arrays]

    def _label_text(self, label: Any) -> str:
        self.require("class_image")
        return self._name(label)

    def _name(self, label: Any) -> str:
        classes = self.checkpoint.classes
        if isinstance(label, str):
            if label not in classes:
                raise ConfigError(
                    f"class {label!r} is not one of the checkpoint's {len(classes)}; use prompts for text"
                )
            return label
        if not isinstance(label, (int, np.integer)) or not 0 <= label < len(classes):
            raise ConfigError(f"label {label!r} must be a number from 0 to {len(classes) - 1}")
        return classes[int(label)]


def _mask(mask: Any, size: int) -> Tensor:
    """Bool [S, S]; a cell is marked if any part of it is (largest value, not the mean)."""
    if isinstance(mask, Image.Image):
        mask = np.asarray(mask.convert("L")) > 127
    marked = torch.as_tensor(np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask))
    if marked.ndim != 2:
        raise ConfigError(f"a mask must be [H, W], got {tuple(marked.shape)}; True = redraw")
    marked = marked if marked.dtype == torch.bool else marked > (127 if not marked.is_floating_point() else 0.5)
    return torch.nn.functional.adaptive_max_pool2d(marked[None].float(), size)[0].bool()
