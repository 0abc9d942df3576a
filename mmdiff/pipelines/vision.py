"""Text about images: captions, answers, conversation, gaps in an answer, likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Unpack

from mmdiff.pipelines.answers import Answers
from mmdiff.pipelines.base import Pipeline
from mmdiff.pipelines.prompts import Message, Prompter, about
from mmdiff.pipelines.scoring import Scoring, score_answer
from mmdiff.pipelines.text import converse, fill
from mmdiff.pipelines.words import PromptedScoreWords, TextWords, literal, with_defaults, zip_batches
from mmdiff.text import CAPTION_PROMPT

__all__ = ["VisionLanguage"]


class VisionLanguage(Pipeline):
    """Answer in text about images.

    Everywhere an ``image`` is a picture (PIL, path, https URL, uint8 array or tensor), a `mmdiff.Video`, or None for
    text alone. A list is a batch; a list inside the list is one item of several pictures.

    Args:
        checkpoint: The parts.

    Raises:
        CheckpointError: It has no vision tower.
    """

    needs = "caption"

    def caption(self, image: Any, prompt: str | Sequence[str] = CAPTION_PROMPT, **words: Unpack[TextWords]) -> Any:
        """Describe images.

        Args:
            image: What is shown, or a list: a batch.
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
            **words: Options; see `mmdiff.sampling.presets.text_parts`. ``stop`` is a text, or several, at which an
                answer ends.

        Returns:
            Text, or a list of texts in the same order.

        Raises:
            ConfigError: An empty question, lists of different lengths, a prompt that is too long, or an unknown or
                contradictory option.
            SampleError: A picture that is too large, empty or damaged.
        """
        pairs, many = zip_batches(image=image, question=question)
        answers = Answers(self, self.checkpoint, words)
        prompts = [answers.prompter.conversation(about(i, literal(q))) for i, q in pairs]
        texts = answers.texts(answers.canvas(prompts))
        return texts if many else texts[0]

    def chat(
        self, messages: Sequence[Message] | Sequence[Sequence[Message]], stream: Any = False, **words: Unpack[TextWords]
    ) -> str | list[str] | Iterator[str]:
        """Answer a conversation.

        Args:
            messages: ``{"role", "content"}``, content text or a list of ``{"type": "image", "image": picture}``,
                ``{"type": "video", "video": frames}`` and ``{"type": "text", "text": ...}``; or a list of such
                conversations: a batch.
            stream: True returns an iterator over the answer after every pass, the last one final. An object with
                ``put_draft``, ``put`` and ``end`` (transformers' ``TextDiffusionStreamer``) is fed instead, and the
                answer is returned.
            **words: Options; see `mmdiff.sampling.presets.text_parts`.

        Returns:
            The answer, a list of answers, or an iterator.
        """
        return converse(self, messages, stream, words)

    def infill(
        self,
        image: Any,
        answer: str | Sequence[str],
        question: str | Sequence[str] = CAPTION_PROMPT,
        mask: str = "[MASK]",
        tokens_per_mask: int = 1,
        **words: Unpack[TextWords],
    ) -> Any:
        """Fill the gaps of an answer about an image.

        Args:
            image: As in `caption`.
            answer: What the assistant says, with gaps; or one per item.
            question: What was asked, one for all or one per item.
            mask: What a gap looks like.
            tokens_per_mask: Tokens that fill one gap.
            **words: Options; ``gen_length``, ``block_length`` and ``stop`` have no meaning here.

        Returns:
            The answer with its gaps filled, or a list of them.

        Raises:
            ConfigError: An answer without a gap, or an option without meaning.
        """
        items, many = zip_batches(image=image, answer=answer, question=question)
        answers = Answers(self, self.checkpoint, words)
        prompts = [answers.prompter.conversation(about(i, literal(q))) for i, _, q in items]
        filled = fill(answers, prompts, [literal(a) for _, a, _ in items], mask, tokens_per_mask, ended=True)
        return filled if many else filled[0]

    def loglikelihood(
        self,
        image: Any,
        question: str | Sequence[str],
        answer: str | Sequence[str],
        samples: int = 128,
        seed: int = 0,
        **words: Unpack[PromptedScoreWords],
    ) -> float | list[float]:
        """Estimate of log p(answer | image, question) in nats, summed over the answer's tokens and its end of turn.

        Args:
            image: As in `caption`.
            question: Text, or one per item.
            answer: Text, or one per item.
            samples: Masks drawn.
            seed: Of the masks; the same for every item.
            **words: ``method``, ``guidance`` and ``batch_size`` of `mmdiff.pipelines.scoring.Scoring`, and ``compat``.

        Returns:
            The estimate, or a list of them.
        """
        items, many = zip_batches(image=image, question=question, answer=answer)
        options = with_defaults(words, {}, PromptedScoreWords)
        prompter = Prompter(self.checkpoint, options.pop("compat", None))
        how = Scoring(samples=samples, seed=seed, **options)
        values = []
        for picture, asked, reply in items:
            prompt = prompter.conversation(about(picture, literal(asked)), literal(reply))
            values.append(score_answer(self.checkpoint, prompt.ids, prompt.tail, how, prompt.images))
        return values if many else values[0]
