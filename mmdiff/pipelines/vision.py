"""Text about images: captions, answers, conversation, likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from mmdiff.errors import ConfigError
from mmdiff.images import ImageInput, to_pixels
from mmdiff.pipelines.answers import Answers, tokenizer_of
from mmdiff.pipelines.base import Pipeline
from mmdiff.pipelines.text import Message, converse, score_answer
from mmdiff.pipelines.words import TextWords, zip_batches
from mmdiff.text import CAPTION_PROMPT

__all__ = ["Video", "VisionLanguage"]


@dataclass(frozen=True)
class Video:
    """Frames that belong together; they are read as several images.

    Attributes:
        frames: Pictures in order.
        limit: At most this many are read, spread evenly.
    """

    frames: Sequence[ImageInput]
    limit: int = 8

    @property
    def pictures(self) -> list[ImageInput]:
        """The frames that are read.

        Source: LLaVA's published choice, linspace over the frame numbers truncated to integers.
        """
        if not self.frames or self.limit < 1:
            raise ConfigError(f"a video of {len(self.frames)} frames, of which {self.limit} are read; both at least 1")
        if len(self.frames) <= self.limit:
            return list(self.frames)
        places = torch.linspace(0, len(self.frames) - 1, self.limit).long().tolist()
        return [self.frames[i] for i in places]


class VisionLanguage(Pipeline):
    """Answer in text about images.

    Args:
        checkpoint: The parts.

    Raises:
        CheckpointError: It has no vision tower.
    """

    needs = "caption"

    def caption(self, image: Any, prompt: str | Sequence[str] = CAPTION_PROMPT, **words: Unpack[TextWords]) -> Any:
        """Describe images.

        Args:
            image: Picture (PIL, path, https URL, uint8 array or tensor, `Video`), or a list of them: a batch. A list
                inside the list is one item of several pictures.
            prompt: What is asked, one for all or one per item.
            **words: Options; see `mmdiff.sampling.presets.text_parts`.

        Returns:
            Text, or a list of texts in the same order.
        """
        return self.ask(image, prompt, **words)

    def ask(self, image: Any, question: str | Sequence[str], **words: Unpack[TextWords]) -> Any:
        """Answer questions about images.

        Args:
            image: As in `caption`.
            question: Text, or one per item; a single one is asked about every item.
            **words: Options; see `mmdiff.sampling.presets.text_parts`.

        Returns:
            Text, or a list of texts in the same order.
        """
        pairs, many = zip_batches(image=image, question=question)
        answers = Answers(self, self.checkpoint, words)
        pictures = [_pictures(i) for i, _ in pairs]
        slots = self.checkpoint.layout.features
        prompts = [
            answers.tokenizer.chat(_about(len(p), q), slots).ids for p, (_, q) in zip(pictures, pairs, strict=True)
        ]
        texts = answers.texts(answers.canvas(prompts, self._pixels([p for item in pictures for p in item])))
        return texts if many else texts[0]

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], stream: Any = False, **words: Unpack[TextWords]
    ) -> str | list[str] | Iterator[str]:
        """Answer a conversation.

        Args:
            messages: ``{"role", "content"}``, content text or a list of ``{"type": "image", "image": picture}`` and
                ``{"type": "text", "text": ...}``; or a list of such conversations: a batch.
            stream: True returns an iterator over the answer after every pass, the last one final. An object with
                ``put_draft``, ``put`` and ``end`` (transformers' ``TextDiffusionStreamer``) is fed instead, and the
                answer is returned.
            **words: Options; see `mmdiff.sampling.presets.text_parts`.

        Returns:
            The answer, a list of answers, or an iterator.
        """
        return converse(self, messages, stream, words, pixels=self._pixels, slots=self.checkpoint.layout.features)

    def loglikelihood(
        self, image: Any, question: str | Sequence[str], answer: str | Sequence[str], samples: int = 128, seed: int = 0
    ) -> float | list[float]:
        """Estimate of log p(answer | image, question) in nats, summed over the answer's tokens and its end of turn.

        Args:
            image: As in `caption`.
            question: Text, or one per item.
            answer: Text, or one per item.
            samples: Masks drawn.
            seed: Of the masks; the same for every item.

        Returns:
            The estimate, or a list of them.
        """
        items, many = zip_batches(image=image, question=question, answer=answer)
        values = []
        for picture, text, reply in items:
            pictures = _pictures(picture)
            chat = tokenizer_of(self.checkpoint).chat(
                _about(len(pictures), text), self.checkpoint.layout.features, reply
            )
            prompt, tail = chat.ids[: chat.answer_start], chat.ids[chat.answer_start :]
            values.append(score_answer(self.checkpoint, prompt, tail, samples, seed, self._pixels(pictures)))
        return values if many else values[0]

    def _pixels(self, pictures: Sequence[Any]) -> Tensor | None:
        if not pictures:
            return None
        size = self.checkpoint.layout.image_size
        return torch.stack([to_pixels(p, size) for p in pictures])


def _pictures(item: Any) -> list[Any]:
    if isinstance(item, Video):
        return item.pictures
    return [f for p in item for f in _pictures(p)] if isinstance(item, (list, tuple)) else [item]


def _about(images: int, question: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}]
