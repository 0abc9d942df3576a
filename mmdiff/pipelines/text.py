"""Text from text: continuing, filling gaps, conversation, likelihood."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Unpack, overload

from mmdiff.errors import ConfigError
from mmdiff.pipelines.answers import Answers
from mmdiff.pipelines.base import Pipeline
from mmdiff.pipelines.prompts import Message, Prompt, tokenizer_of
from mmdiff.pipelines.scoring import Scoring, score_answer
from mmdiff.pipelines.words import ScoreWords, TextWords, batch_of, literal, with_defaults, zip_batches
from mmdiff.sampling import Constraint, Whole

__all__ = ["TextGenerator", "converse", "fill"]


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
        texts = answers.texts(answers.canvas([Prompt(answers.tokenizer.encode(literal(p)), [], []) for p in prompts]))
        return texts if many else texts[0]

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], stream: Any = False, **words: Unpack[TextWords]
    ) -> str | list[str] | Iterator[str]:
        """Answer a conversation; arguments and result as in `VisionLanguage.chat`, without images."""
        return converse(self, messages, stream, words)

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
            **words: Options; ``gen_length``, ``block_length`` and ``stop`` have no meaning here.

        Returns:
            The whole text with its gaps filled, or a list of them.

        Raises:
            ConfigError: A text without a gap, or an option without meaning.
        """
        texts, many = batch_of(text)
        answers = Answers(self, self.checkpoint, words)
        nothing = [Prompt([], [], [])] * len(texts)
        out = fill(answers, nothing, [literal(t) for t in texts], mask, tokens_per_mask)
        return out if many else out[0]

    def loglikelihood(
        self,
        prompt: str | Sequence[str],
        answer: str | Sequence[str],
        samples: int = 128,
        seed: int = 0,
        **words: Unpack[ScoreWords],
    ) -> float | list[float]:
        """Estimate of log p(answer | prompt) in nats, summed over the answer's tokens.

        Args:
            prompt: Plain text, or a list of texts.
            answer: What follows, or a list; nothing is appended to it.
            samples: Masks drawn.
            seed: Of the masks; the same for every item.
            **words: ``method``, ``guidance`` and ``batch_size`` of `mmdiff.pipelines.scoring.Scoring`.

        Returns:
            The estimate, or a list of them.
        """
        pairs, many = zip_batches(prompt=prompt, answer=answer)
        encode = tokenizer_of(self.checkpoint).encode
        how = Scoring(samples=samples, seed=seed, **with_defaults(words, {}, ScoreWords))
        values = [score_answer(self.checkpoint, encode(literal(p)), encode(literal(a)), how) for p, a in pairs]
        return values if many else values[0]


def converse(owner: Pipeline, messages: Any, stream: Any, words: TextWords) -> str | list[str] | Iterator[str]:
    """Answer one conversation or a batch of them."""
    if not messages:
        raise ConfigError("chat: no messages; give at least one from the user")
    many = not isinstance(messages[0], Mapping)
    if many and stream:
        raise ConfigError("chat: stream shows one conversation; give a single list of messages")
    answers = Answers(owner, owner.checkpoint, words)
    canvas = answers.canvas([answers.prompter.conversation(m) for m in (messages if many else [messages])])
    if not stream:
        texts = answers.texts(canvas)
        return texts if many else texts[0]
    return answers.drafts(canvas) if stream is True else answers.feed(canvas, stream)


def fill(
    answers: Answers, prompts: Sequence[Prompt], texts: Sequence[str], mask: str, tokens: int, *, ended: bool = False
) -> list[str]:
    """Texts after prompts with their gaps filled.

    Args:
        answers: Options and checkpoint.
        prompts: One per text; may be empty.
        texts: Texts with gaps.
        mask: What a gap looks like.
        tokens: Tokens per gap.
        ended: Whether the end of a turn follows each text.

    Raises:
        ConfigError: A text without a gap, or an option without meaning.
    """
    if useless := sorted({"gen_length", "block_length", "stop"} & set(answers.words)):
        raise ConfigError(f"infill: the gaps say how much is generated; drop {' and '.join(useless)}")
    if not mask or tokens < 1:
        raise ConfigError(f"infill: mask {mask!r} must not be empty, tokens_per_mask {tokens} at least 1")
    end: list[int | None] = [answers.tokenizer.eot_id] if ended else []
    rows = [_gaps(t, mask, tokens, answers.tokenizer.encode) + end for t in texts]
    canvas = answers.lay_out([p.ids for p in prompts], rows, [i for p in prompts for i in p.images])
    parts = dataclasses.replace(
        answers.parts(max(sum(slot is None for slot in row) for row in rows)),
        blocks=Whole(),
        exit=None,
        constraint=Constraint(forbid=tuple(sorted(answers.tokenizer.special_ids))),
    )
    done = answers.run(canvas, parts).canvas
    ids, real = done.tokens[:, done.start :], done.valid[:, done.start :]
    return [answers.tokenizer.decode(row[valid].tolist()) for row, valid in zip(ids, real, strict=True)]


def _gaps(text: str, mask: str, tokens: int, encode: Any) -> list[int | None]:
    pieces = text.split(mask)
    if len(pieces) == 1:
        raise ConfigError(f"infill: {text[:60]!r} holds no {mask!r}")
    row: list[int | None] = []
    for i, piece in enumerate(pieces):
        row += [None] * tokens * (i > 0)
        row += encode(piece) if piece else []
    return row
