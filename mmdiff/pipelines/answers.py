"""From prompts as ids to answers as text: the one path of all pipelines that generate text."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmdiff.batch import IMAGE
from mmdiff.errors import ConfigError
from mmdiff.pipelines.base import Checkpoint
from mmdiff.pipelines.prompts import Prompt, Prompter
from mmdiff.pipelines.words import TextWords, report_steps, sources, with_defaults
from mmdiff.sampling import Canvas, Decoded, Linear, Step, Stop, TextBackbone, layout, steps
from mmdiff.sampling.presets import Parts, text_parts

__all__ = ["MASK_SIGN", "Answers", "check_length", "place_images"]

MASK_SIGN = "░"
"""Shown for a token that is not decided yet, in drafts."""
_GEN_LENGTH = 128


def place_images(canvas: Canvas, model: Any, images: Sequence[Any] | None) -> Canvas:
    """The canvas with image tokens in the slots of `IMAGE` ids (row by row, in order)."""
    given = canvas.tokens == IMAGE
    if not images or not bool(given.any()):
        return canvas
    values = {} if canvas.values is None else {"values": canvas.values}
    with torch.no_grad():
        canvas.embeds = model.embed_slots(canvas.tokens, images, **values)
    canvas.given = given
    canvas.tokens = canvas.tokens.masked_fill(given, 0)
    return canvas


def check_length(checkpoint: Checkpoint, canvas: Canvas) -> None:
    """Refuse a row with more slots than the network has positions.

    Raises:
        ConfigError: There is one; its prompt and the room it leaves are named.
    """
    config: Any = getattr(checkpoint.model, "config", None)
    most = getattr(getattr(config, "language", config), "max_length", None)
    longest = int(canvas.valid.sum(1).max())
    if most is not None and longest > most:
        prompt = int(canvas.valid[:, : canvas.start].sum(1).max())
        raise ConfigError(
            f"the longest prompt has {prompt:,} tokens, images included, and {canvas.tokens.shape[1] - canvas.start:,} "
            f"are to follow; the model has {most:,} positions: shorten the text, show fewer or smaller images, or "
            "lower gen_length"
        )


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
        if self.words.get("block_length") is None and "block_length" in options:
            # What the checkpoint recommends is for its own length, not for a shorter one that the user asks for.
            options["block_length"] = min(options["block_length"], self.gen_length)
        self.stops = _stop_texts(options.pop("stop", ()))
        self.seeds, self.generator = options.pop("seeds", None), options.pop("generator", None)
        self.callback = report_steps(self.owner, options.pop("callback_on_step_end", None))
        self.options = options
        self.prompter = Prompter(self.checkpoint, options.get("compat"))
        self.tokenizer = self.prompter.tokenizer
        self.end_ids = self.prompter.end_ids
        self.backbone = TextBackbone(self.checkpoint.model)

    def parts(self, gen_length: int) -> Parts:
        """Parts of the engine for answers of at most ``gen_length`` tokens."""
        parts = text_parts(gen_length=gen_length, end_ids=self.end_ids, forbid=self._forbidden(), **self.options)
        stops = tuple(tuple(self.tokenizer.encode(stop)) for stop in self.stops)
        if self._is_llada_v and self.options.get("compat") == "reference":
            # Its published loop leaves a block with its last mask, and looks for the end of turn in every pass.
            if isinstance(parts.schedule, Linear):
                parts = dataclasses.replace(parts, schedule=dataclasses.replace(parts.schedule, idle=False))
            return dataclasses.replace(parts, exit=Stop((*stops, self.end_ids[1:]), self.end_ids[0], published=True))
        if stops:
            ends = tuple((i,) for i in self.end_ids)
            parts = dataclasses.replace(parts, exit=Stop((*stops, *ends), self.end_ids[0]))
        return parts

    def canvas(self, prompts: Sequence[Prompt]) -> Canvas:
        """Prompts followed by masks.

        Raises:
            ConfigError: A prompt is too long for the model.
        """
        rows = [[*p.tail, *[None] * self.gen_length] for p in prompts]
        return self.lay_out([p.ids for p in prompts], rows, [i for p in prompts for i in p.images])

    def lay_out(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[Sequence[int | None]], images: Sequence[Any] = ()
    ) -> Canvas:
        """Prompts followed by given and open slots; errors as in `canvas`."""
        blank = layout(
            prompts, rows, mask_id=self.backbone.mask_id, pad_id=self.tokenizer.pad_id, device=self.checkpoint.device
        )
        if self.options.get("compat") != "reference":
            check_length(self.checkpoint, blank)
        return place_images(blank, self.checkpoint.model, images)

    def run(self, canvas: Canvas, parts: Parts | None = None) -> Decoded:
        """Decode."""
        run = self._steps(canvas, parts or self.parts(self.gen_length))
        while True:
            try:
                next(run)
            except StopIteration as end:
                return end.value

    def texts(self, canvas: Canvas) -> list[str]:
        """Decode and read the answers."""
        return [self.read(row) for row in self.run(canvas).tokens.tolist()]

    def drafts(self, canvas: Canvas) -> Iterator[str]:
        """The single answer after every pass; the last one is final."""
        for step in self._steps(canvas, self.parts(self.gen_length)):
            yield self.draft(step)

    def feed(self, canvas: Canvas, streamer: Any) -> str:
        """Decode the single answer, showing it to an object like transformers' ``TextDiffusionStreamer``.

        ``put_draft`` gets the canvas after every pass (if the streamer has it), ``put`` the answer, then comes ``end``.
        A streamer that skips the prompt is given the prompt's text first, as it expects.
        """
        final: list[int] = []
        if getattr(streamer, "skip_prompt", False):
            prompt = canvas.tokens[0, : canvas.start]
            streamer.put(prompt[canvas.valid[0, : canvas.start]].cpu())
        for step in self._steps(canvas, self.parts(self.gen_length)):
            final = step.canvas.tokens[0, canvas.start :].tolist()
            if hasattr(streamer, "put_draft"):
                streamer.put_draft(torch.tensor(final))
        streamer.put(torch.tensor(self.cut(final)))
        streamer.end()
        return self.read(final)

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Ids before the first end of text or turn."""
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        return list(ids[:end])

    def read(self, ids: Sequence[int]) -> str:
        """Text of an answer, up to the first of the user's stops."""
        text = self.tokenizer.decode(self.cut(ids))
        # A stop may be spelled by other ids than its own, so the text has the last word.
        ends = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))].strip()

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

    @property
    def _is_llada_v(self) -> bool:
        return getattr(getattr(self.checkpoint.model, "config", None), "type", None) == "llada_v"

    def _forbidden(self) -> tuple[int, ...]:
        t = self.tokenizer
        frame = tuple(i for i in (t.bos_id, t.start_header_id, t.end_header_id) if i is not None)
        if self._is_llada_v:
            return (t.eos_id, *frame)  # as published; its answers end with the end of turn
        # LLaDA's published sampler forbids nothing.
        published = self.options.get("preset") == "exact" or self.options.get("compat") == "reference"
        return () if published else frame

    def _steps(self, canvas: Canvas, parts: Parts) -> Generator[Step, None, Decoded]:
        """The passes; each is reported to the user's callback, and the cost of all is kept."""
        draws = sources(len(canvas), "text", self.seeds, self.generator)
        run = steps(self.backbone, canvas=canvas, generators=draws, **parts.arguments())
        while True:
            try:
                step = next(run)
            except StopIteration as end:
                self.owner.trace = end.value.trace
                return end.value
            if self.callback is not None:
                self.callback(step)
            yield step


def _stop_texts(stop: Any) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(t, str) and t for t in texts):
        raise ConfigError(f"stop {stop!r:.80}: give a text or a list of texts, none of them empty")
    return texts
