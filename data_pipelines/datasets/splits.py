"""Which split a sample belongs to: decided by hashes of words, so that it never changes with the order of files."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable

__all__ = ["COMBINATIONS", "CONCEPTS", "HELD_OUT", "SALT", "TRAIN", "assign", "unit_hash"]

SALT = "mmdiff-emoji-1"
HELD_OUT = 0.12
"""Share of the base concepts, and share of the variants of the other concepts, that training never sees."""
TRAIN, CONCEPTS, COMBINATIONS = "train", "novel_concepts", "novel_combinations"


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that depends on the texts alone."""
    text = "\x1f".join((SALT, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def assign(items: Iterable[tuple[Hashable, str, tuple[str, ...]]], share: float = HELD_OUT) -> dict[Hashable, str]:
    """The split of every item.

    A concept is held out as a whole when its hash is below ``share``. Of every other concept with at least two
    variants those with a hash below ``share`` are held out, the one with the greatest hash never.

    Args:
        items: Triples of key, base concept, and what tells the variants of a concept apart (skin tone, gender, style).
        share: Share held out, in [0, 1).

    Returns:
        ``"train"``, ``"novel_concepts"`` or ``"novel_combinations"`` by key.
    """
    concepts: dict[str, dict[Hashable, float]] = {}
    for key, concept, variant in items:
        concepts.setdefault(concept, {})[key] = unit_hash("variant", concept, *variant)
    splits: dict[Hashable, str] = {}
    for concept, variants in concepts.items():
        whole = unit_hash("concept", concept) < share
        kept = max(variants, key=lambda key: variants[key])
        for key, position in variants.items():
            novel = position < share and key != kept
            splits[key] = CONCEPTS if whole else COMBINATIONS if novel else TRAIN
    return splits
