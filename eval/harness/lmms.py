"""A model for lmms-eval: ``python -m lmms_eval --model mmdiff --model_args pretrained=PATH,style=llada-v ...``.

In lmms-eval 0.7.3 only generation tasks can be scored: likelihood tasks fail inside the harness, whatever the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmms_eval.api.model import lmms
from tqdm import tqdm

from mmdiff.pipelines import VisionLanguage

from ..mmmu import llada_v
from .words import cut, generation_words, tokens_of

__all__ = ["MmdiffLmms"]


class MmdiffLmms(lmms):
    """A checkpoint that answers about pictures.

    Args:
        pretrained: Checkpoint: folder or hub id.
        batch_size: Taken for the harness's sake; every request is asked alone, so that no answer depends on another.
        device: Where it runs.
        dtype: Precision of the weights.
        style: ``plain``, or ``llada-v`` for that model's published way of asking.
        samples: Masks per likelihood.
        seed: Of the masks.
        **words: Generation options for all requests.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        style: str = "plain",
        samples: int = 128,
        seed: int = 0,
        **words: Any,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = 0, 1
        self.style, self.words = style, {**tokens_of(style), **words}
        self.samples, self.seed = int(samples), int(seed)
        self.model = VisionLanguage.from_pretrained(pretrained, device=device, dtype=dtype)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests."""
        return [self._answer(*request.args) for request in tqdm(requests, desc="mmdiff")]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log p of the continuation, False) of each request: whether it is the greedy answer is not found out."""
        found = []
        for request in tqdm(requests, desc="mmdiff"):
            context, continuation, visuals, place, task, split = request.args
            images = _pictures(visuals(self.task_dict[task][split][place]))
            told: Any = self.model.loglikelihood([images], context, continuation, self.samples, self.seed)
            found.append((float(told[0]), False))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not a thing of these models yet.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("mmdiff answers single rounds; choose a task without several of them")

    def _answer(self, context: str, settings: dict[str, Any], visuals: Any, place: int, task: str, split: str) -> str:
        images = _pictures(visuals(self.task_dict[task][split][place]))
        if self.style == "llada-v":
            mode = {"think_mode": "no_think", **settings}
            context = llada_v.user_message(context, len(images), mode)
            context = context.removeprefix(" ".join(["<image>"] * len(images)) + "\n") if images else context
        text = self.model.ask([images], [context], **generation_words(settings, self.words))[0]
        # LLaDA-V's wrapper drops the stop texts and removes one full stop instead.
        return llada_v.final_response(text) if self.style == "llada-v" else cut(text, settings.get("until"))


def _pictures(visuals: Any) -> list[Any]:
    return [picture.convert("RGB") for picture in visuals or ()]
