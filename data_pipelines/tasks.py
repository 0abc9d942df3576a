"""Tasks: what a sample is asked to teach. One configuration and one class each; a sample goes in, an `Example` out.

This is the second of the two places where a sample may be refused, always with a `SampleError` and a reason.
A new task is a configuration in ``task_config`` and a class in `_TASKS`; nothing else changes.

What a sample's JSON may hold is told in ``contents``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mmdiff import rng
from mmdiff.batch import IGNORE, IMAGE, Example, Layout
from mmdiff.errors import ConfigError, SampleError
from mmdiff.text import Tokenizer, from_llava

from .code_tasks import BesideCodes, DrawnCodes, EditedCodes, PicturelessTokenizer
from .contents import caption_of, codes_of, instructions, questions, texts
from .conversations import read_conversation
from .latents import LatentTask, PromptedTask, read_latents
from .pictures import NO_PICTURE, Picture, Pictures
from .reader import Sample
from .transforms import PixelCache

__all__ = ["Task", "build_task"]

Task = Callable[[Sample, torch.Generator], Example]


def build_task(options: Any, tokenizer: Tokenizer | None, layout: Layout, cache: PixelCache | None = None) -> Task:
    """The function that makes a task's examples.

    Args:
        options: One of the configurations of ``task_config.TaskConfig``.
        tokenizer: Needed by all tasks but ``image``, ``latent`` and ``prompted``.
        layout: What the model expects.
        cache: Where decoded images are kept.

    Raises:
        ConfigError: The task needs a tokenizer, image slots or image codes that are not there.
    """
    kind = options.type
    if kind == "latent":
        return LatentTask(options, layout)
    if kind == "prompted":
        return PromptedTask(options, layout, caption_of, Pictures(options, layout, cache).square)
    if tokenizer is None and kind != "image":
        raise ConfigError(f"task {kind!r}: needs a tokenizer; set tokenizer: in the configuration")
    if tokenizer is not None and kind not in ("image", "pair") and tokenizer.vocab_size > layout.vocab_size:
        raise ConfigError(
            f"task {kind!r}: the tokenizer has {tokenizer.vocab_size:,} ids, the model {layout.vocab_size:,}; "
            "raise the model's vocab_size"
        )
    if layout.reads_codes and kind != "text":
        return _as_codes(options, tokenizer, layout)
    if kind in ("caption", "vqa", "edit") and not layout.features:
        raise ConfigError(f"task {kind!r}: this model does not see images; use a model with a vision tower")
    if kind in ("text_to_image", "class_to_image", "edit") and not layout.codes:
        raise ConfigError(f"task {kind!r}: this model draws no image codes; use a model of family unified")
    return _TASKS[kind](options, tokenizer, layout, cache)


def _as_codes(options: Any, tokenizer: Any, layout: Layout) -> Task:
    """A task of a network that reads and draws images as codes of its vocabulary."""
    kind = options.type
    edits = kind == "edit" and hasattr(layout.script, "editing")
    if not edits and kind not in ("caption", "vqa", "text_to_image", "class_to_image"):
        raise ConfigError(f"task {kind!r}: not known for this family")
    if kind in ("caption", "vqa"):
        task = _TASKS[kind](options, PicturelessTokenizer(tokenizer, layout.script), layout, None)
        task.picture = _no_picture
        return BesideCodes(task, tokenizer, layout, codes_of)
    made = _TASKS[kind](options, tokenizer, layout, None)
    return (EditedCodes if edits else DrawnCodes)(options, tokenizer, layout, codes_of, made.said)


def _no_picture(sample: Sample, generator: torch.Generator) -> Picture:
    return NO_PICTURE  # its codes take no slots in the conversation


class _Task:
    """What the tasks share."""

    def __init__(self, options: Any, tokenizer: Any, layout: Layout, cache: PixelCache | None) -> None:
        self.options, self.tokenizer, self.layout = options, tokenizer, layout
        if hasattr(options, "fit"):
            self.picture: Any = Pictures(options, layout, cache)

    def example(
        self,
        sample: Sample,
        ids: Sequence[int],
        learnt: Mapping[tuple[int, int], float],
        *,
        droppable: tuple[int, int] = (0, 0),
        **given: Any,
    ) -> Example:
        """Put an example together; ``learnt`` holds spans of ids and their weight, ``given`` the images."""
        limit = getattr(self.options, "max_length", len(ids))
        if len(ids) > limit:
            raise SampleError("too_long", f"{sample}: {len(ids):,} ids, max_length is {limit:,}")
        row = torch.tensor(ids, dtype=torch.int64)
        labels, weights = torch.full_like(row, IGNORE), torch.zeros(len(row))
        for (start, end), weight in learnt.items():
            labels[start:end] = row[start:end]
            weights[start:end] = weight
        drop = torch.zeros(len(row), dtype=torch.bool)
        drop[slice(*droppable)] = True
        drop &= row != IMAGE  # guidance drops what is said, a picture stays in sight
        return Example(
            key=sample.key,
            task=self.options.type,
            ids=row,
            labels=labels,
            weights=weights,
            droppable=drop,
            **given,
        )

    def length(self, sample: Sample, generator: torch.Generator) -> int:
        """Slots of the example that the same arguments give, without decoding images.

        Raises:
            SampleError: What tells without pixels that the sample cannot be used.
        """
        twin = copy.copy(self)
        if hasattr(self, "picture"):
            twin.picture = self.picture.sizes()
        return len(twin(sample, generator).ids)

    @property
    def reads_images(self) -> bool:
        """Whether `length` needs the images' bytes."""
        return hasattr(self, "picture") and self.picture.sizes().reads_headers

    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        """One example."""
        raise NotImplementedError

    def conversation(
        self, sample: Sample, messages: Sequence[Mapping[str, Any]], slots: Sequence[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a whole conversation and the span of every answer in it."""
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # What is learnt of each answer is what follows a prompt, so that training meets the ids of inference.
            answer = message["content"][0]["text"]
            asked = messages[:number]
            used = slots[: sum(part["type"] == "image" for m in asked for part in m["content"])]
            chat = self.tokenizer.chat(asked, used, answer, system=self.layout.system)
            if chat.ids[: len(ids)] != ids:
                raise SampleError("bad_conversation", f"{sample}: the template does not extend turn by turn")
            ids = chat.ids
            spans.append((chat.answer_start, len(ids)))
        return ids, spans

    def answered(self, sample: Sample, ids: list[int], spans: Sequence[tuple[int, int]], **given: Any) -> Example:
        """A chat whose answers lie at ``spans``; the last one ends the ids and is filled up."""
        start, end = spans[-1]
        filled = start + -(-(end - start) // self.options.answer_multiple) * self.options.answer_multiple
        ids = ids + self.filling(filled - end)
        learnt = {span: 1.0 for span in spans} | {(end, filled): self.options.pad_weight}
        return self.example(sample, ids, learnt, **given)

    def filling(self, count: int) -> list[int]:
        """Ids behind the end of a turn: end of text, or one of it and then the colours of the rainbow in turn."""
        cycle = self.options.rainbow or (self.tokenizer.pad_id,)
        return [self.tokenizer.pad_id, *(cycle[i % len(cycle)] for i in range(count - 1))][:count]


class _Image(_Task):
    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        return self.example(sample, [], {}, pixels=self.picture.square(sample, generator))


class _Pair(_Task):
    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        text = caption_of(sample, self.options, generator)
        ids = self.tokenizer.encode(text)[: self.options.max_length]
        return self.example(sample, ids, {}, pixels=self.picture.square(sample, generator))


class _Caption(_Task):
    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        answer = caption_of(sample, self.options, generator)
        picture = self.picture(sample, generator)
        if self.options.template == "plain":
            plain = self.tokenizer.plain(answer, sum(picture.slots))
            return self.example(sample, plain.ids, dict.fromkeys(plain.spans, 1.0), **picture.given)
        messages = _about_image(self.options.prompt)
        chat = self.tokenizer.chat(messages, picture.slots, answer, system=self.layout.system)
        span = (chat.answer_start, len(chat.ids))
        return self.answered(sample, chat.ids, [span], **picture.given)


class _Vqa(_Task):
    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        messages: list[dict[str, Any]] = []
        for question, answer in self._draw(sample, generator):
            messages += [_said("user", question), _said("assistant", answer)]
        messages[0]["content"].insert(0, {"type": "image"})
        picture = self.picture(sample, generator)
        ids, spans = self.conversation(sample, messages, picture.slots)
        return self.answered(sample, ids, spans, **picture.given)

    def _draw(self, sample: Sample, generator: torch.Generator) -> list[tuple[str, str]]:
        """Between one and ``turns`` different questions with their answers, in random order."""
        entries = questions(sample, self.options.kinds)
        turns = 1 if self.options.turns == 1 else _pick(range(1, self.options.turns + 1), generator)
        drawn: list[tuple[str, str]] = []
        while entries and len(drawn) < turns:
            pool = entries
            if self.options.balance == "answer":
                kind = _pick(list(dict.fromkeys(kind for *_, kind in entries)), generator)
                pool = [e for e in entries if e[2] == kind]
            entry = _pick(pool, generator)
            entries = [e for e in entries if e is not entry]
            drawn.append(entry[:2])
        return drawn


class _Chat(_Task):
    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        messages = read_conversation(sample)
        images = sum(part["type"] == "image" for m in messages for part in m["content"])
        if images and not self.layout.features:
            raise ConfigError("task 'chat': the data holds images, but this model does not see any")
        picture = self.picture(sample, generator, range(images)) if images else NO_PICTURE
        if self.options.labels == "published":
            return self.published(sample, picture)
        if self.options.system:
            told = [{"type": "text", "text": self.options.system}]
            messages.insert(0, {"role": "system", "content": told})
        ids, spans = self.conversation(sample, messages, picture.slots)
        return self.answered(sample, ids, spans, **picture.given)

    def published(self, sample: Sample, picture: Picture) -> Example:
        """The example that LLaDA-V's training code makes: no filling, and all labels of weight 1."""
        turns, system = sample.info()["conversations"], self.options.system or self.layout.system
        try:
            told = self.tokenizer.dialogue(from_llava(turns), picture.slots, system=system, compat="reference")
        except ConfigError as error:
            raise SampleError("bad_conversation", f"{sample}: {error}") from None
        spans = {(i, i + 1): 1.0 for i, label in enumerate(told.labels) if label != IGNORE}
        return self.example(sample, told.ids, spans, **picture.given)


class _TextToImage(_Task):
    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        return self.draw(sample, [_said("user", self.said(sample, generator))], generator)

    def said(self, sample: Sample, generator: torch.Generator) -> str:
        """What is to be drawn."""
        return caption_of(sample, self.options, generator)

    def draw(
        self,
        sample: Sample,
        messages: Sequence[Mapping[str, Any]],
        generator: torch.Generator,
        shown: Picture = NO_PICTURE,
    ) -> Example:
        """A prompt, about a picture or not, and the tokens of the image to be drawn."""
        given, prompt = dict(shown.given), self.tokenizer.chat(messages, shown.slots)
        if self.layout.latents:
            given["latents"] = read_latents(sample, self.layout.latents, False, generator)
            drawn = [self.layout.code_offset] * self.layout.codes
        else:
            drawn = (codes_of(sample, self.layout) + self.layout.code_offset).tolist()
        ids = prompt.ids + drawn
        return self.example(sample, ids, {(len(prompt.ids), len(ids)): 1.0}, droppable=prompt.user_span, **given)


class _ClassToImage(_TextToImage):
    def said(self, sample: Sample, generator: torch.Generator) -> str:
        """The name of the class."""
        number = sample.text("cls")
        if number is not None and self.options.classes:
            if number.isdecimal() and int(number[:9]) < len(self.options.classes):
                return self.options.classes[int(number[:9])]
            raise SampleError("bad_class", f"{sample}: class {number[:20]!r} is not below {len(self.options.classes)}")
        info = sample.info()
        names = texts(info.get(self.options.field)) or texts(info.get("caption")) or texts(sample.text())
        if not names:
            raise SampleError("missing_class", f"{sample}: no field {self.options.field!r}, caption or text")
        return names[0]


class _Edit(_TextToImage):
    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        instruction = self.said(sample, generator)
        sources = range(1, len(sample.images()))
        if not sources:
            raise SampleError("missing_image", f"{sample}: no image2 that the picture could be made from")
        picture = self.picture(sample, generator, (_pick(sources, generator),))
        return self.draw(sample, _about_image(instruction), generator, picture)

    def said(self, sample: Sample, generator: torch.Generator) -> str:
        """What is to be changed."""
        said: str = _pick(instructions(sample, self.options.field), generator)
        return said


class _Text(_Task):
    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        info = sample.info()
        found = [t for f in self.options.fields for t in texts(info.get(f))] or texts(sample.text())
        if not found:
            raise SampleError("missing_text", f"{sample}: no text in {', '.join(self.options.fields)} or .txt")
        ids = [*self.tokenizer.encode(found[0]), self.tokenizer.eos_id]
        spare = len(ids) - self.options.max_length
        if spare > 0:
            start = int(rng.uniform(generator, (1,)).item() * (spare + 1))
            ids = ids[start : start + self.options.max_length]
        return self.example(sample, ids, {(0, len(ids)): 1.0})


_TASKS: dict[str, type[Any]] = {
    "image": _Image,
    "pair": _Pair,
    "caption": _Caption,
    "vqa": _Vqa,
    "chat": _Chat,
    "text_to_image": _TextToImage,
    "class_to_image": _ClassToImage,
    "edit": _Edit,
    "text": _Text,
}


def _said(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _about_image(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def _pick(items: Sequence[Any], generator: torch.Generator) -> Any:
    return items[int(rng.uniform(generator, (1,)).item() * len(items))]
