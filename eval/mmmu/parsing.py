"""Reading an answer out of a response: the rules of the published tools, kept with their oddities.

Nothing that a model wrote is ever run: options and answers are parsed as literals elsewhere, and here are only
substring tests and three regular expressions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmdiff.errors import ConfigError

__all__ = ["VARIANTS", "Choice", "extract_numbers", "normalise", "open_is_correct", "parse_choice", "parse_open"]

VARIANTS = ("official", "lmms-eval", "mmmu-pro")
"""Whose parser of multiple choice: MMMU's own, lmms-eval's (LLaDA-V, LaViDa), MMMU-Pro's own."""

Answer = str | float

_MARKS = ",.!?;:'"
_LONG = 5
_PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = {":", ",", ".", "!", "?", ";", "'"}
_NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


@dataclass(frozen=True)
class Choice:
    """A parsed multiple choice.

    Attributes:
        letter: The chosen option.
        fallback: Whether it was drawn at random because no rule matched.
    """

    letter: str
    fallback: bool


def parse_choice(
    response: str, options: Sequence[str], *, variant: str = "official", draw: Callable[[Sequence[str]], str]
) -> Choice:
    """The option that a response chooses.

    Args:
        response: What the model wrote.
        options: Text of option A, B, ...
        variant: One of `VARIANTS`.
        draw: Picks one of the letters where no rule matches, such as ``random.Random(42).choice``.

    Raises:
        ConfigError: Unknown variant, or no options.

    Source: behaviour of the MMMU and MMMU-Pro evaluators and of lmms-eval.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"parser {variant!r}; known: {', '.join(VARIANTS)}")
    if not 0 < len(options) <= 26:
        raise ConfigError(f"{len(options)} options; a multiple choice needs 1 to 26")
    letters = [chr(ord("A") + i) for i in range(len(options))]
    if variant == "mmmu-pro" and (said := _after_answer(response, letters)):
        return Choice(said, False)
    for mark in _MARKS:  # one pass: 'A.' keeps its full stop, because the quote is stripped after it
        response = response.strip(mark)
    padded = f" {response} "
    found = _candidates(padded, letters, options, variant)
    if not found:
        return Choice(draw(letters), True)
    # The last mention counts; on a tie the first letter.
    return Choice(max(found, key=lambda pair: pair[1])[0], False)


def _after_answer(response: str, letters: Sequence[str]) -> str | None:
    _, mark, tail = response.rpartition("Answer:")
    said = [letter for letter in letters if letter in tail.strip()] if mark else []
    return said[0] if len(said) == 1 else None


def _candidates(padded: str, letters: Sequence[str], options: Sequence[str], variant: str) -> list[tuple[str, int]]:
    """(letter, place of its last mention) of every option that the first rule with a hit finds."""
    if found := [(x, padded.rfind(f"({x})")) for x in letters if f"({x})" in padded]:
        return found
    # lmms-eval and MMMU-Pro need no space before the letter, yet look for one when they compare places.
    for mention in (" {} ",) if variant == "official" else ("{} ", "{}."):
        if found := [(x, padded.rfind(f" {x} ")) for x in letters if mention.format(x) in padded]:
            return found
    if len(padded.split()) <= _LONG:
        return []
    lower = padded.lower()
    texts = zip(letters, (option.lower() for option in options), strict=True)
    return [(x, lower.rfind(text)) for x, text in texts if text in lower]


def parse_open(response: str) -> list[Answer]:
    """Everything in a response that may be the answer to an open question: normalised texts and numbers, each once.

    Source: behaviour of the MMMU evaluator (lmms-eval has the same rules).
    """
    text = response.strip().strip(".").lower()
    lines = text.split("\n")
    tails = [_tail(line, last=number == len(lines) - 1) for number, line in enumerate(lines)]
    keys = [tail for tail in tails if tail] or [text]
    found = [*keys, *(number for key in keys for number in extract_numbers(key))]
    return list(dict.fromkeys(answer for part in found for answer in normalise(part)))


def _tail(line: str, *, last: bool) -> str:
    """The shortest text after a key phrase; empty where there is none, or nothing but a mark."""
    best = ""
    for phrase in (*_PHRASES, "=") if last else _PHRASES:
        if phrase in line:
            tail = line.rpartition(phrase)[2].strip()
            if not best or len(tail) < len(best):
                best = tail
    return "" if best in _TRIVIAL else best


def extract_numbers(text: str) -> list[str]:
    """Numbers with thousands commas, then in scientific notation, then plain ones, as they are written."""
    return [number for pattern in _NUMBERS for number in re.findall(pattern, text)]


def normalise(text: str) -> list[Answer]:
    """A text as it is compared: a number with two decimals, else lower case; one character needs a space beside it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
    return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def open_is_correct(parsed: Sequence[Answer], truth: str | Sequence[str]) -> bool:
    """Whether a parsed response holds the truth: a text by substring, a number by equality, never one by the other.

    Args:
        parsed: From `parse_open`.
        truth: The true answer, or alternatives.
    """
    wanted = [answer for one in ([truth] if isinstance(truth, str) else truth) for answer in normalise(one)]
    texts = [answer for answer in wanted if isinstance(answer, str)]
    return any(any(t in said for t in texts) if isinstance(said, str) else said in wanted for said in parsed)
