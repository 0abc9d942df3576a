"""Texts of the emoji: what emojibase says about each one, and the base concept it is a variant of.

Reads the English ``data.json`` and ``groups.json`` of the npm package emojibase-data. No pictures here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["GROUP_ANSWERS", "GROUP_NAMES", "TONES", "Entry", "base_concept", "normal_hexcode", "plain", "read_entries"]

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GROUP_NAMES = {
    "smileys-emotion": "smileys and emotion",
    "people-body": "people and body",
    "component": "component",
    "animals-nature": "animals and nature",
    "food-drink": "food and drink",
    "travel-places": "travel and places",
    "activities": "activities",
    "objects": "objects",
    "symbols": "symbols",
    "flags": "flags",
}
"""Readable names of emojibase's groups."""
GROUP_ANSWERS = {
    "smileys and emotion": "emotion",
    "people and body": "people",
    "animals and nature": "nature",
    "food and drink": "food",
    "travel and places": "travel",
    "activities": "activity",
    "objects": "object",
    "symbols": "symbol",
    "flags": "flag",
}
"""The same in one word, as answers."""

# Gendered labels whose base concept is not found by replacing "man" or "woman" in the label.
_CONCEPTS = {
    "boy": "child",
    "girl": "child",
    "old man": "older person",
    "old woman": "older person",
    "merman": "merperson",
    "mermaid": "merperson",
    "prince": "person with crown",
    "princess": "person with crown",
    "mrs. claus": "santa claus",
    "mx claus": "santa claus",
    "woman dancing": "dancer",
    "man dancing": "dancer",
    "ballet dancer": "dancer",
    "breast-feeding": "person feeding baby",
    "woman with headscarf": "woman with headscarf",
    "woman and man holding hands": "people holding hands",
}
_GENDERS = {"merman": "man", "mermaid": "woman", "prince": "man", "princess": "woman", "mrs. claus": "woman"}
_STRAIGHT = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})
_FAMILIES = ("family", "kiss", "couple with heart")
_TONE = re.compile(r"(?:light|medium-light|medium|medium-dark|dark) skin tone")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One emoji in words."""

    hexcode: str
    """Code points, lower case, without the variation selector: the key of its picture."""
    caption: str
    """emojibase's label in lower case, with straight quotes."""
    concept: str
    """The label without skin tone and gender: what all variants share."""
    variant: str
    """The label without skin tone: tells the variants of one tone apart."""
    tags: tuple[str, ...]
    """emojibase's tags, most common first."""
    group: str
    subgroup: str
    tone: str | None
    """One of ``TONES``, or None."""
    gender: str | None
    """``man``, ``woman``, ``boy`` or ``girl`` where the label says so, else None."""


def plain(text: str) -> str:
    """Lower case with straight quotes and single spaces."""
    return " ".join(text.translate(_STRAIGHT).lower().split())


def normal_hexcode(name: str) -> str:
    """A file stem or hexcode in the spelling both packages share: lower case, without ``-fe0f``."""
    return name.lower().replace("-fe0f", "")


def base_concept(label: str) -> str:
    """The concept of a label without skin tone: ``"woman astronaut"`` is an ``"astronaut"``.

    Args:
        label: A label of the group "people and body", as ``plain`` writes it.
    """
    for family in _FAMILIES:
        if label == family or label.startswith(f"{family}:"):
            return family
    label = label.removesuffix(": facing right")
    if label in _CONCEPTS:
        return _CONCEPTS[label]
    neutral = re.sub(r"\b(?:men|women)\b", "people", re.sub(r"\b(?:man|woman)\b", "person", label))
    # Roles are written without "person": "man astronaut" belongs to "astronaut", "man frowning" to "person frowning".
    role = neutral.removeprefix("person ")
    is_role = neutral != role and not re.match(r"(?:(?:\w+ )?\w+ing\b|in |with )", role)
    return role if is_role else neutral


def _gender(label: str, people: bool) -> str | None:
    if not people or any(label.startswith(f"{family}:") for family in _FAMILIES):
        return None
    if label in _GENDERS:
        return _GENDERS[label]
    found = set(re.findall(r"\b(?:man|woman|boy|girl)\b", label))
    plural = {"men": "man", "women": "woman"}
    found |= {plural[word] for word in re.findall(r"\b(?:men|women)\b", label)}
    return found.pop() if len(found) == 1 else None


def read_entries(data: Sequence[Mapping[str, Any]], groups: Mapping[str, Any]) -> dict[str, Entry]:
    """Every emoji that has a group, by hexcode.

    Args:
        data: The parsed ``en/data.json``.
        groups: The parsed ``meta/groups.json``.
    """
    common: Counter[str] = Counter(plain(tag) for base in data for tag in base.get("tags", ()))
    return {
        normal_hexcode(item["hexcode"]): _entry(base, item, groups, common)
        for base, item in _variants(data)
        if "group" in base
    }


def _variants(data: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for base in data:
        yield base, base
        for skin in base.get("skins", ()):
            yield base, skin


def _entry(base: Mapping[str, Any], item: Mapping[str, Any], groups: Mapping[str, Any], common: Counter[str]) -> Entry:
    variant, caption = plain(base["label"]), plain(item["label"])
    group = groups["groups"][str(base["group"])]
    people = group == "people-body"
    tone = item.get("tone")
    tags = sorted({plain(tag) for tag in base.get("tags", ())}, key=lambda tag: (-common[tag], tag))
    return Entry(
        hexcode=normal_hexcode(item["hexcode"]),
        caption=caption,
        concept=base_concept(variant) if people else variant,
        variant=variant if isinstance(tone, int) or tone is None else _TONE.sub("*", caption),
        tags=tuple(tags),
        group=GROUP_NAMES[group],
        subgroup=groups["subgroups"][str(base["subgroup"])].replace("-", " "),
        tone=TONES[tone - 1] if isinstance(tone, int) else None,
        gender=_gender(variant, people),
    )
