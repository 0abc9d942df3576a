"""Text from text: continuing, filling gaps, conversation, likelihood."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack, overload

import torch

from mmdiff import rng
from mmdiff.diffusion.likelihood import log_likelihood, stratified_masks
from mmdiff.errors import ConfigError
from mmdiff.pipelines.answers import Answers, place_images, tokenizer_of
from mmdiff.pipelines.base import Checkpoint, Pipeline
from mmdiff.pipelines.words import TextWords, batch_of, zip_batches
from mmdiff.sampling import Constraint, TextBackbone, Whole, layout

__all__ = ["TextGenerator", "converse", "score_answer"]

Message = Mapping[str, Any]


class TextGenerator(Pipeline):
    """Generate text.

    Args:
        checkpoint: The parts.

    Raises:
        CheckpointError: It has no text head or tokenizer.
    """

    needs = "generate_text"

    @overload
    def generate(self, prompt: str, **words: Unpack[TextWords]) -> str: ...
    @overload
    def generate(self, prompt: list[str], **words: Unpack[TextWords]) -> list[str]: ...
    def generate(self, prompt: str | list[str], **words: Unpack[TextWords]) -> str | list[str]:
        """Continue plain text (no chat template; for instruction-tuned checkpoints use `chat`).

        Args:
            prompt: Text, or a list of texts. Special spellings are literal.
            **words: Options; see `mmdiff.sampling.presets.text_parts`.

        Returns:
            The continuation without the prompt, or a list of them.
        """
        prompts, many = batch_of(prompt)
        answers = Answers(self, self.checkpoint, words)
        texts = answers.texts(answers.canvas([answers.tokenizer.encode(_text(p)) for p in prompts]))
        return texts if many else texts[0]

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], stream: Any = False, **words: Unpack[TextWords]
    ) -> str | list[str] | Iterator[str]:
        """Answer a conversation; arguments and result as in `VisionLanguage.chat`, without images."""
        return converse(self, messages, stream, words, pixels=lambda images: None, slots=0)

    @overload
    def infill(self, text: str, mask: str = ..., tokens_per_mask: int = ..., **words: Unpack[TextWords]) -> str: ...
    @overload
    def infill(
        self, text: list[str], mask: str = ..., tokens_per_mask: int = ..., **words: Unpack[TextWords]
    ) -> list[str]: ...
    def infill(
        self, text: str | list[str], mask: str = "[MASK]", tokens_per_mask: int = 1, **words: Unpack[TextWords]
    ) -> str | list[str]:
        """Fill gaps.

        Args:
            text: Text with gaps, or a list of texts.
            mask: What a gap looks like.
            tokens_per_mask: Tokens that fill one gap.
            **words: Options; ``gen_length`` and ``block_length`` have no meaning here.

        Returns:
            The whole text with its gaps filled, or a list of them.

        Raises:
            ConfigError: A text without a gap, or an option without meaning.
        """
        if "gen_length" in words or "block_length" in words:
            raise ConfigError("infill: the gaps say how much is generated; drop gen_length and block_length")
        if not mask or tokens_per_mask < 1:
            raise ConfigError(f"infill: mask {mask!r} must not be empty, tokens_per_mask {tokens_per_mask} at least 1")
        texts, many = batch_of(text)
        answers = Answers(self, self.checkpoint, words)
        rows = [_gaps(_text(t), mask, tokens_per_mask, answers.tokenizer.encode) for t in texts]
        canvas = answers.lay_out([[]] * len(rows), rows)
        gaps = max(sum(slot is None for slot in row) for row in rows)
        parts = dataclasses.replace(
            answers.parts(gaps),
            blocks=Whole(),
            exit=None,
            constraint=Constraint(forbid=tuple(sorted(answers.tokenizer.special_ids))),
        )
        done = answers.run(canvas, parts).canvas
        out = [answers.tokenizer.decode(r[v].tolist()) for r, v in zip(done.tokens, done.valid, strict=True)]
        return out if many else out[0]

    def loglikelihood(
        self, prompt: str | Sequence[str], answer: str | Sequence[str], samples: int = 128, seed: int = 0
    ) -> float | list[float]:
        """Estimate of log p(answer | prompt) in nats, summed over the answer's tokens.

        Args:
            prompt: Plain text, or a list of texts.
            answer: What follows, or a list; nothing is appended to it.
            samples: Masks drawn.
            seed: Of the masks; the same for every item.

        Returns:
            The estimate, or a list of them.
        """
        pairs, many = zip_batches(prompt=prompt, answer=answer)
        encode = tokenizer_of(self.checkpoint).encode
        values = [score_answer(self.checkpoint, encode(_text(p)), encode(_text(a)), samples, seed) for p, a in pairs]
        return values if many else values[0]


def score_answer(
    checkpoint: Checkpoint,
    prompt: Sequence[int],
    answer: Sequence[int],
    samples: int,
    seed: int,
    pixels: torch.Tensor | None = None,
    batch: int = 16,
) -> float:
    """Estimate of log p(answer | prompt, images) in nats.

    Source: LLaDA (arXiv 2502.09992), published likelihood code: stratified numbers of masked tokens.

    Raises:
        ConfigError: An empty answer, or no samples.
    """
    if not answer or samples < 1:
        raise ConfigError(
            f"loglikelihood: the answer has {len(answer)} tokens and samples is {samples}; both at least 1"
        )
    backbone = TextBackbone(checkpoint.model)
    canvas = layout([prompt], [list(answer)], mask_id=backbone.mask_id, device=checkpoint.device)
    canvas = place_images(canvas, checkpoint.model, pixels)
    index = torch.arange(canvas.start, canvas.tokens.shape[1], device=checkpoint.device)

    def logits(masked: torch.Tensor) -> torch.Tensor:
        rows = canvas.select(torch.zeros(len(masked), dtype=torch.long, device=masked.device))
        rows.tokens[:, canvas.start :].masked_fill_(masked, backbone.mask_id)
        return backbone.forward(rows, index.expand(len(masked), -1))

    masks = stratified_masks(len(answer), samples, batch, rng.generator(seed, "likelihood"))
    with torch.no_grad():
        return log_likelihood(logits, torch.tensor(answer, device=checkpoint.device), masks)


def converse(
    owner: Pipeline,
    messages: Any,
    stream: Any,
    words: TextWords,
    *,
    pixels: Any,
    slots: int,
) -> str | list[str] | Iterator[str]:
    """Answer one conversation or a batch of them; ``pixels`` turns all images in order into a tensor."""
    if not messages:
        raise ConfigError("chat: no messages; give at least one from the user")
    many = not isinstance(messages[0], Mapping)
    batch = messages if many else [messages]
    answers = Answers(owner, owner.checkpoint, words)
    prompts = [answers.tokenizer.chat(_plain(m), slots).ids for m in batch]
    images = [p["image"] for m in batch for p in _image_parts(m)]
    canvas = answers.canvas(prompts, pixels(images))
    if stream is False or stream is None:
        texts = answers.texts(canvas)
        return texts if many else texts[0]
    if many:
        raise ConfigError("chat: stream shows one conversation; give a single list of messages")
    return answers.drafts(canvas) if stream is True else answers.feed(canvas, stream)


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages without the pictures themselves."""
    out = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            content = [{"type": "image"} if p.get("type") == "image" else p for p in content]
        out.append({"role": message.get("role"), "content": content})
    return out


def _image_parts(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    parts = [p for m in messages if isinstance(m.get("content"), (list, tuple)) for p in m["content"]]
    found = [p for p in parts if p.get("type") == "image"]
    if any("image" not in p for p in found):
        raise ConfigError('chat: an image part needs its picture: {"type": "image", "image": ...}')
    return found


def _gaps(text: str, mask: str, tokens: int, encode: Any) -> list[int | None]:
    pieces = text.split(mask)
    if len(pieces) == 1:
        raise ConfigError(f"infill: {text[:60]!r} holds no {mask!r}")
    row: list[int | None] = []
    for i, piece in enumerate(pieces):
        row += [None] * tokens * (i > 0)
        row += encode(piece) if piece else []
    return row


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"expected text, got {type(value).__name__}")
    return value
