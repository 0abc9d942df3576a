"""The texts that are asked, and which pictures go with them, in the published tools' words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdiff.errors import ConfigError

__all__ = ["PROMPTS", "Prompt", "interleaved", "vision_prompt"]

_CHOOSE = "Answer with the option's letter from the given choices directly."
_SHORT = "Answer the question using a single word or phrase."
_CHOOSE_PRO = "Answer with the option letter from the given choices directly."
_LAST_LINE = (
    "The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of options."
)
_STEPS = "Think step by step before answering."


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        text: The whole prompt.
        images: Columns of the pictures, in the order in which they are given.
    """

    text: str
    images: tuple[str, ...]


def _official(document: Mapping[str, Any]) -> Prompt:
    """The official configuration for LLaVA-1.5; its example gives ``image_1`` alone, which nobody reports."""
    options = "".join(f"({letter}) {text}\n" for letter, text in _lettered(document))
    text = f"{document['question']}\n{options}\n{_CHOOSE}" if options else f"{document['question']}\n{_SHORT}"
    return Prompt(text, _each_once(text))


def _lmms(document: Mapping[str, Any]) -> Prompt:
    """lmms-eval's default, with which LLaDA-V, LaViDa and LLaVA-OneVision are measured."""
    return _blocks(document, _CHOOSE, "\n\n")


def _lmms_pro(document: Mapping[str, Any]) -> Prompt:
    return _blocks(document, _CHOOSE_PRO, "\n\n")


def _blocks(document: Mapping[str, Any], instruction: str, gap: str) -> Prompt:
    options = "\n".join(f"{letter}. {text}" for letter, text in _lettered(document))
    text = f"{document['question']}\n{options}{gap}{instruction}" if options else f"{document['question']}\n\n{_SHORT}"
    return Prompt(text, _each_once(text))


def _pro_direct(document: Mapping[str, Any]) -> Prompt:
    return _in_order(_blocks(document, _CHOOSE_PRO, "\n"))


def _pro_steps(document: Mapping[str, Any]) -> Prompt:
    instruction = f"Answer the preceding multiple choice question. {_LAST_LINE} {_STEPS}"
    return _in_order(_blocks(document, instruction, "\n"))


PROMPTS: dict[str, Callable[[Mapping[str, Any]], Prompt]] = {
    "official": _official,
    "lmms-eval": _lmms,
    "lmms-eval-pro": _lmms_pro,
    "pro-direct": _pro_direct,
    "pro-cot": _pro_steps,
}
"""Name -> document with ``question`` and ``options`` (texts; none for an open question) -> prompt."""


def vision_prompt(style: str) -> str:
    """The text beside a screenshot of MMMU-Pro vision: ``direct`` or ``cot``.

    Raises:
        ConfigError: Another style.
    """
    texts = {
        "direct": f"{_CHOOSE_PRO} {_LAST_LINE}",
        "cot": f"Write out the multiple-choice question in the image and then solve it. {_LAST_LINE} {_STEPS}",
    }
    if style not in texts:
        raise ConfigError(f"style {style!r}; known: {', '.join(texts)}")
    return texts[style]


def interleaved(text: str) -> str:
    """The markers ``<image 1>`` ... ``<image 7>`` as ``<image>``: lmms-eval's interleaved form."""
    return re.sub(r"<image [1-7]>", "<image>", text)


def _lettered(document: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    return [(chr(ord("A") + i), text) for i, text in enumerate(document["options"])]


def _each_once(text: str) -> tuple[str, ...]:
    # Sorted as text, as lmms-eval sorts them.
    return tuple(m.strip("<>").replace(" ", "_") for m in sorted(set(re.findall(r"<image \d+>", text))))


def _in_order(prompt: Prompt) -> Prompt:
    """MMMU-Pro's own form: a placeholder per marker, pictures in the order of mention, repeats included."""
    order = re.findall(r"<image\s+(\d+)>", prompt.text)
    return Prompt(re.sub(r"<image\s+\d+>", "[image]", prompt.text), tuple(f"image_{n}" for n in order))
