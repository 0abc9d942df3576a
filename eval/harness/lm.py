"""A model for lm-evaluation-harness: ``python -m eval.harness.lm run --model mmdiff --model_args pretrained=PATH ...``.

Likelihoods are Monte-Carlo estimates of the bound that masked-diffusion models have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from mmdiff.pipelines import load
from mmdiff.pipelines.prompts import tokenizer_of

from .words import cut, generation_words

__all__ = ["MmdiffLM"]


@register_model("mmdiff")
class MmdiffLM(LM):
    """Text, and pictures where the checkpoint sees.

    Args:
        pretrained: Checkpoint: folder or hub id.
        batch_size: Prompts per pass when generating.
        device: Where it runs.
        dtype: Precision of the weights.
        samples: Masks per likelihood.
        seed: Of the masks.
        greedy: Also find out whether a continuation is what the model would write; a decoding per request.
        **words: Generation options for all requests.
    """

    MULTIMODAL = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        samples: int = 128,
        seed: int = 0,
        greedy: bool = False,
        **words: Any,
    ) -> None:
        super().__init__()
        self.model = load(pretrained, device=device, dtype=dtype)
        self.batch_size = 1 if batch_size == "auto" else int(batch_size)
        self.samples, self.seed, self.greedy, self.words = int(samples), int(seed), greedy, words

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether the model would write it) of each ``(context, continuation)``."""
        found = []
        for request in _bar(requests, disable_tqdm):
            context, continuation, *more = request.args
            found.append((self._likelihood(context, continuation, more), self._writes(context, continuation)))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text."""
        return [self._likelihood("", request.args[0], ()) for request in _bar(requests, disable_tqdm)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, cut at the stop texts, in the order of the requests."""
        return [self._generated(*request.args) for request in _bar(requests, disable_tqdm)]

    def _likelihood(self, context: str, continuation: str, more: Sequence[Any]) -> float:
        images = _images(more)
        if images:
            told: Any = self.model.vision.loglikelihood([images], context, continuation, self.samples, self.seed)
            return float(told[0])
        own: Any = self.model.text.loglikelihood(context, continuation, self.samples, self.seed)
        return float(own)

    def _writes(self, context: str, continuation: str) -> bool:
        if not self.greedy:
            return False
        length = len(tokenizer_of(self.model.checkpoint).encode(continuation))
        words = generation_words(self.words, {}) | {"gen_length": length}
        return self.model.text.generate(context, **words) == continuation

    def _generated(self, context: str, settings: dict[str, Any], *more: Any) -> str:
        words = generation_words(settings, self.words)
        images = _images(more)
        text = (
            self.model.vision.ask([images], [context.replace("<image>", "").strip()], **words)[0]
            if images
            else self.model.text.generate(context, **words)
        )
        return cut(text, settings.get("until"))


def _images(more: Sequence[Any]) -> list[Any]:
    return list(more[0].get("visual", ())) if more and isinstance(more[0], dict) else []


def _bar(requests: Sequence[Any], hidden: bool) -> Any:
    from tqdm import tqdm

    return tqdm(requests, desc="mmdiff", disable=hidden or None)


if __name__ == "__main__":
    cli_evaluate()
