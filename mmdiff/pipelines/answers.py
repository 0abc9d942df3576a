"""From prompts as ids to answers as text: the one path of all pipelines that generate text."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmdiff.batch import IMAGE
from mmdiff.errors import CheckpointError
from mmdiff.pipelines.base import Checkpoint
from mmdiff.pipelines.words import TextWords, report_steps, sources, with_defaults
from mmdiff.sampling import Canvas, Decoded, Step, TextBackbone, decode, layout, steps
from mmdiff.sampling.presets import Parts, text_parts
from mmdiff.text import Tokenizer

__all__ = ["MASK_SIGN", "Answers", "place_images", "tokenizer_of"]

MASK_SIGN = "░"
"""Shown for a token that is not decided yet, in drafts."""
_GEN_LENGTH = 128


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: There is none.
    """
    if checkpoint.tokenizer is None:
        raise CheckpointError("the checkpoint's folder holds no tokenizer.json")
    return checkpoint.tokenizer


def place_images(canvas: Canvas, model: Any, pixels: Tensor | None) -> Canvas:
    """The canvas with image features in the slots of `IMAGE` ids (row by row, in order)."""
    given = canvas.tokens == IMAGE
    if pixels is None or not bool(given.any()):
        return canvas
    first = next(model.parameters())
    with torch.no_grad():
        canvas.embeds = model.embed_slots(canvas.tokens, pixels.to(first))
    canvas.given = given
    canvas.tokens = canvas.tokens.masked_fill(given, 0)
    return canvas


@dataclass
class Answers:
    """Decoding of a batch of prompts, ready to run.

    Args:
        owner: The pipeline, for callbacks.
        checkpoint: Network and tokenizer.
        words: Options.
    """

    owner: Any
    checkpoint: Checkpoint
    words: TextWords

    def __post_init__(self) -> None:
        options: dict[str, Any] = with_defaults(self.words, self.checkpoint.defaults.get("text", {}), TextWords)
        self.gen_length: int = options.pop("gen_length", _GEN_LENGTH)
        self.seeds, self.generator = options.pop("seeds", None), options.pop("generator", None)
        self.callback = report_steps(self.owner, options.pop("callback_on_step_end", None))
        self.options = options
        self.tokenizer = tokenizer_of(self.checkpoint)
        self.end_ids = (self.tokenizer.eos_id, self.tokenizer.eot_id)
        self.backbone = TextBackbone(self.checkpoint.model)

    def parts(self, gen_length: int) -> Parts:
        """Parts of the engine for answers of at most ``gen_length`` tokens."""
        return text_parts(gen_length=gen_length, end_ids=self.end_ids, forbid=self._forbidden(), **self.options)

    def canvas(self, prompts: Sequence[Sequence[int]], pixels: Tensor | None = None) -> Canvas:
        """Prompts followed by masks."""
        rows = [[None] * self.gen_length] * len(prompts)
        blank = self.lay_out(prompts, rows)
        return place_images(blank, self.checkpoint.model, pixels)

    def lay_out(self, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int | None]]) -> Canvas:
        """Prompts followed by given and open slots."""
        return layout(
            prompts,
            rows,
            mask_id=self.backbone.mask_id,
            pad_id=self.tokenizer.pad_id,
            device=self.checkpoint.device,
        )

    def run(self, canvas: Canvas, parts: Parts | None = None) -> Decoded:
        """Decode."""
        parts = parts or self.parts(self.gen_length)
        done = decode(self.backbone, canvas=canvas, **self._drawn(canvas), **parts.arguments(), callback=self.callback)
        self.owner.trace = done.trace
        return done

    def texts(self, canvas: Canvas) -> list[str]:
        """Decode and read the answers."""
        return [self.read(row) for row in self.run(canvas).tokens.tolist()]

    def drafts(self, canvas: Canvas) -> Iterator[str]:
        """The single answer after every pass; the last one is final."""
        for step in self._steps(canvas):
            yield self.draft(step)

    def feed(self, canvas: Canvas, streamer: Any) -> str:
        """Decode the single answer, showing every pass to a ``put_draft`` / ``put`` / ``end`` streamer."""
        final: list[int] = []
        for step in self._steps(canvas):
            final = step.canvas.tokens[0, canvas.start :].tolist()
            streamer.put_draft(torch.tensor(final))
        streamer.put(torch.tensor(self.cut(final)))
        streamer.end()
        return self.read(final)

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Ids before the first end of text or turn."""
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        return list(ids[:end])

    def read(self, ids: Sequence[int]) -> str:
        """Text of an answer."""
        return self.tokenizer.decode(self.cut(ids)).strip()

    def draft(self, step: Step) -> str:
        """Text of an unfinished answer, open slots shown as signs."""
        ids = self.cut(step.canvas.tokens[0, step.canvas.start :].tolist())
        runs: list[str] = []
        known: list[int] = []
        for token in [*ids, self.backbone.mask_id]:
            if token != self.backbone.mask_id:
                known.append(token)
                continue
            runs.append(self.tokenizer.decode(known))
            known = []
        return MASK_SIGN.join(runs).strip()

    def _forbidden(self) -> tuple[int, ...]:
        t, family = self.tokenizer, getattr(self.checkpoint.model, "config", None)
        frame = (t.bos_id, t.start_header_id, t.end_header_id)
        if getattr(family, "type", None) == "llada_v":
            return (t.eos_id, *frame)  # as published; its answers end with the end of turn
        # LLaDA's published sampler forbids nothing.
        published = self.options.get("preset") == "exact" or self.options.get("compat") == "reference"
        return () if published else frame

    def _drawn(self, canvas: Canvas) -> dict[str, Any]:
        return {"generators": sources(len(canvas), "text", self.seeds, self.generator)}

    def _steps(self, canvas: Canvas) -> Generator[Step, None, Decoded]:
        return steps(self.backbone, canvas=canvas, **self._drawn(canvas), **self.parts(self.gen_length).arguments())
