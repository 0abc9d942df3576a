"""LLaVA-style conversations: the JSON ``{"conversations": [{"from", "value"}, ...]}`` as chat messages.

Source: LLaVA's data format; LLaDA-V's published preparation of it (the only placeholder of a turn moves to its front,
several stay where they are; a first turn that is not from the human is dropped).
"""

from __future__ import annotations

from typing import Any

from mmdiff.errors import SampleError
from mmdiff.text import PLACEHOLDER

from .reader import Sample

__all__ = ["placeholders", "read_conversation"]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


def read_conversation(sample: Sample) -> list[dict[str, Any]]:
    """Messages, alternating from user to assistant, each with a list of content parts.

    Raises:
        SampleError: Reason ``"bad_conversation"``.
    """
    turns = sample.info().get("conversations")
    if not isinstance(turns, list):
        raise SampleError("bad_conversation", f"{sample}: no list 'conversations' in its JSON")
    messages = [_message(sample, turn) for turn in turns]
    if messages and messages[0]["role"] != "user":
        messages = messages[1:]
    messages = messages[: len(messages) // 2 * 2]
    if not messages or any(m["role"] != ("user", "assistant")[i % 2] for i, m in enumerate(messages)):
        raise SampleError("bad_conversation", f"{sample}: turns must alternate between human and gpt")
    return messages


def placeholders(sample: Sample) -> int:
    """Placeholders of images in a sample's conversation; 0 if it has none."""
    turns = sample.info().get("conversations")
    texts = [t.get("value") for t in turns if isinstance(t, dict)] if isinstance(turns, list) else []
    return sum(text.count(PLACEHOLDER) for text in texts if isinstance(text, str))


def _message(sample: Sample, turn: Any) -> dict[str, Any]:
    if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
        raise SampleError("bad_conversation", f"{sample}: turn {turn!r:.80}, expected from human or gpt, and a value")
    role, text = _ROLES[turn["from"]], turn["value"]
    if not text.replace(PLACEHOLDER, "").strip():
        raise SampleError("bad_conversation", f"{sample}: a turn without text")
    if role != "user":
        return {"role": role, "content": [{"type": "text", "text": text.strip()}]}
    first, *rest = text.split(PLACEHOLDER)
    if len(rest) == 1:
        return {"role": role, "content": [{"type": "image"}, {"type": "text", "text": (first + rest[0]).strip()}]}
    content: list[dict[str, Any]] = [{"type": "text", "text": first.strip()}]
    for piece in rest:
        content += [{"type": "image"}, {"type": "text", "text": piece.strip()}]
    return {"role": role, "content": [part for part in content if part.get("text") != ""]}
