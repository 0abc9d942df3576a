"""Questions and short answers about emoji, each supported by metadata or by pixels; and balanced held-out sets of them.

A question that two careful people might answer differently is not asked: hence the lists of what is left out. The
wording per kind is fixed. Yes/no questions are asked of as many "no" concepts as there are "yes" concepts.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdiff.rng import derive

from .emojibase import GROUP_ANSWERS, Entry
from .splits import unit_hash

__all__ = ["KINDS", "QUESTIONS", "Look", "balanced_questions", "questions_of", "shape_of"]

QUESTIONS: dict[str, tuple[str, ...]] = {
    "group": ("What category is this?", "Which category does it belong to?"),
    "subgroup": ("What type is it?",),
    "what": ("What is shown?",),
    "tone": ("What is the skin tone?",),
    "gender": ("Is this a man or a woman?",),
    "color": ("What is the main color?", "What color is it mostly?"),
    "shape": ("Is it wide or tall?",),
    "is_color": ("Is it mostly {color}?",),
    "is_person": ("Is there a person?",),
    "is_animal": ("Is this an animal?",),
    "is_food": ("Is it food?",),
    "is_vehicle": ("Is it a vehicle?",),
    "is_flag": ("Is this a flag?",),
    "is_face": ("Is it a face?",),
}
"""Every wording by kind; two at most, chosen by a hash of the sample."""
KINDS = tuple(QUESTIONS)

WIDE, TALL = 1.4, 1 / 1.4
"""A picture is wide or tall when the box around what is not nearly white has at least this ratio of sides."""
# Subgroups whose emojibase name does not say what a person would call the thing.
_NO_TYPE = {
    "emotion", "place other", "other object", "other symbol", "alphanum", "time", "event", "tool", "household",
    "person", "person role", "person symbol", "av symbol", "gender", "punctuation", "hotel", "flag", "light video",
    "hand prop", "hands", "place map", "costume", "transport sign", "sound",
}  # fmt: skip
_TYPE_WORDS = {
    "hand fingers open": "hand", "hand fingers partial": "hand", "hand single finger": "pointing hand",
    "hand fingers closed": "fist", "body parts": "body part", "person gesture": "gesture",
    "person fantasy": "fantasy person", "person activity": "activity", "person sport": "sport",
    "person resting": "resting", "animal mammal": "mammal", "animal bird": "bird", "animal amphibian": "amphibian",
    "animal reptile": "reptile", "animal marine": "sea animal", "animal bug": "bug", "plant flower": "flower",
    "plant other": "plant", "food fruit": "fruit", "food vegetable": "vegetable", "food prepared": "prepared food",
    "food asian": "asian food", "food sweet": "sweet food", "place geographic": "landscape",
    "place building": "building", "place religious": "religious building", "transport ground": "ground transport",
    "transport water": "water transport", "transport air": "air transport", "sky weather": "sky and weather",
    "award medal": "medal", "arts crafts": "arts and crafts", "book paper": "book or paper",
    "country flag": "country flag", "subdivision flag": "country flag", "face smiling": "smiling face",
    "face affection": "affectionate face", "face tongue": "face with tongue", "face hand": "face with hand",
    "face neutral skeptical": "neutral face", "face sleepy": "sleepy face", "face unwell": "unwell face",
    "face concerned": "concerned face", "face negative": "negative face", "face hat": "face with hat",
    "face glasses": "face with glasses", "face costume": "costume face", "geometric": "geometric shape",
    "religion": "religious symbol", "math": "math symbol", "currency": "currency symbol", "zodiac": "zodiac sign",
    "warning": "warning sign", "musical instrument": "musical instrument", "science": "science tool",
    "medical": "medical thing", "office": "office thing", "writing": "writing tool", "lock": "lock or key",
    "drink": "drink", "dishware": "dishware",
}  # fmt: skip
_ANIMALS = {f"animal {kind}" for kind in ("mammal", "bird", "amphibian", "reptile", "marine", "bug")}
_PEOPLE = {
    "person", "person gesture", "person role", "person activity", "person sport", "person resting", "family",
}  # fmt: skip
_FOOD = {"food fruit", "food vegetable", "food prepared", "food asian", "food sweet"}
_VEHICLES = {"transport ground", "transport water", "transport air"}
# Concepts of those subgroups that are parts, traces, places or mythical: neither yes nor no.
_UNSURE_ANIMAL = {
    "paw prints", "pig nose", "feather", "wing", "spiral shell", "coral", "spider web", "microbe", "unicorn", "phoenix",
    "dragon", "dragon face",
}  # fmt: skip
_UNSURE_FOOD = {"cooking", "pot of food", "takeout box", "honey pot", "fondue", "salt", "canned food", "bento box"}
_NOT_VEHICLES = {
    "station", "bus stop", "motorway", "railway track", "oil drum", "fuel pump", "wheel", "police car light",
    "horizontal traffic light", "vertical traffic light", "stop sign", "construction", "anchor", "ring buoy", "seat",
    "parachute", "satellite", "roller skate", "skateboard", "manual wheelchair", "motorized wheelchair",
    "flying saucer",
    "suspension railway", "airplane departure", "airplane arrival", "kick scooter", "mountain railway",
}  # fmt: skip
# Concepts that show so little skin that the tones cannot be told apart at 64 pixels.
_LITTLE_SKIN = {"snowboarder", "person in suit levitating", "horse racing"}
_HARD_WORDS = re.compile(
    r"\b(?:flag|face|person|people|man|woman|men|women|boy|girl|baby|child|children|animal|horse|dog|cat|fish|bear|"
    r"bird|mouse|carp|spider|dragon|cow|food|cake|egg|fruit|tree|car|dolls?|snowman|statue|moai|joker|cards|mahjong|"
    r"robot|alien|carousel|mermaid|zodiac|santa|skull|masks?|performing|puppet|pedestrians|bicycles|scooter|sled|"
    r"moon|sun|jack-o-lantern|angel|fishing|trap|bait|restroom|room|elevator|wheelchair|id|identification|placard)\b"
)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What the pixels say."""

    color: str | None
    shape: str | None


def shape_of(rgb: np.ndarray, near_white: int = 235) -> str | None:
    """``"wide"`` or ``"tall"`` when the drawn part clearly is, else None.

    Args:
        rgb: uint8 [H, W, 3] over white.
        near_white: A pixel is background when all channels are at least this.
    """
    drawn = rgb.min(axis=-1) < near_white
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    if not len(rows):
        return None
    ratio = float(columns[-1] - columns[0] + 1) / float(rows[-1] - rows[0] + 1)
    return "wide" if ratio >= WIDE else "tall" if ratio <= TALL else None


# --- yes/no rules: True, False, or None where the question is not asked ---------------------------------------------


def _is_person(entry: Entry) -> bool | None:
    if entry.group == "people and body":
        return True if entry.subgroup in _PEOPLE else None
    faces = entry.subgroup.startswith("face") or entry.group in ("smileys and emotion", "symbols")
    return None if faces or _HARD_WORDS.search(entry.concept) else False


def _is_animal(entry: Entry) -> bool | None:
    if entry.subgroup in _ANIMALS:
        return None if entry.concept in _UNSURE_ANIMAL else True
    unsure = entry.group in ("people and body", "smileys and emotion") or entry.subgroup in ("zodiac", "food prepared")
    return None if unsure or _HARD_WORDS.search(entry.concept) else False


def _is_food(entry: Entry) -> bool | None:
    if entry.subgroup in _FOOD:
        return None if entry.concept in _UNSURE_FOOD else True
    unsure = entry.group in ("food and drink", "animals and nature")
    return None if unsure or _HARD_WORDS.search(entry.concept) else False


def _is_vehicle(entry: Entry) -> bool | None:
    if entry.subgroup in _VEHICLES:
        return None if entry.concept in _NOT_VEHICLES else True
    unsure = entry.subgroup in ("person sport", "person activity", "transport sign", "warning")
    return None if unsure or _HARD_WORDS.search(entry.concept) else False


def _is_flag(entry: Entry) -> bool | None:
    if entry.group == "flags":
        return None if entry.concept == "crossed flags" else True
    return None if re.search(r"\bflag|streamer|banner", entry.concept) else False


def _is_face(entry: Entry) -> bool | None:
    if entry.group == "smileys and emotion" and re.search(r"\bface$|^face\b|\bface\b", entry.concept):
        return True
    unsure = entry.group in ("smileys and emotion", "people and body", "animals and nature")
    return None if unsure or _HARD_WORDS.search(entry.concept) else False


_YES_NO: dict[str, Callable[[Entry], bool | None]] = {
    "is_person": _is_person,
    "is_animal": _is_animal,
    "is_food": _is_food,
    "is_vehicle": _is_vehicle,
    "is_flag": _is_flag,
    "is_face": _is_face,
}


# --- questions of a split ---------------------------------------------------------------------------------------------


def questions_of(
    entries: Sequence[tuple[str, Entry]], looks: Mapping[str, Look], *, known: bool = True
) -> dict[str, list[list[str]]]:
    """The questions of every sample of one split.

    Args:
        entries: Pairs of key and entry: one split, since yes and no are balanced within it.
        looks: What the pixels say, by key.
        known: Training has seen these concepts. If not, "What is shown?" is left out: no one could know the name.

    Returns:
        Lists ``[question, answer, kind]`` by key.
    """
    variants = Counter(entry.concept for _, entry in entries)
    asked = _balanced_concepts([entry for _, entry in entries])
    color_claims = _color_claims(entries, looks)
    result = {}
    for key, entry in entries:
        look = looks[key]
        answers = _open_answers(entry, look, name=known and variants[entry.concept] > 1)
        for kind, chosen in asked.items():
            if entry.concept in chosen and (truth := _YES_NO[kind](entry)) is not None:
                answers.append((kind, "yes" if truth else "no"))
        lines = [[_wording(kind, key), answer, kind] for kind, answer in answers]
        if key in color_claims:
            claimed = color_claims[key]
            lines.append([_wording("is_color", key).format(color=claimed), _yes(claimed == look.color), "is_color"])
        result[key] = lines
    return result


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _wording(kind: str, key: str) -> str:
    choices = QUESTIONS[kind]
    return choices[int(unit_hash("wording", kind, key) * len(choices))]


def _open_answers(entry: Entry, look: Look, *, name: bool) -> list[tuple[str, str]]:
    answers = []
    if entry.group in GROUP_ANSWERS:
        answers.append(("group", GROUP_ANSWERS[entry.group]))
    if entry.subgroup not in _NO_TYPE and entry.group != "component":
        answers.append(("subgroup", _TYPE_WORDS.get(entry.subgroup, entry.subgroup)))
    if name and len(entry.concept.split()) <= 3:
        answers.append(("what", entry.concept))
    if entry.tone is not None and entry.concept not in _LITTLE_SKIN:
        answers.append(("tone", entry.tone))
    if (
        entry.gender in ("man", "woman")
        and entry.subgroup in _PEOPLE | {"person fantasy"}
        and "people" not in entry.concept
    ):
        answers.append(("gender", entry.gender))
    if look.color is not None:
        answers.append(("color", look.color))
    if look.shape is not None:
        answers.append(("shape", look.shape))
    return answers


def _balanced_concepts(entries: Sequence[Entry]) -> dict[str, set[str]]:
    """Per yes/no kind the concepts that are asked: as many for "no" as for "yes", chosen by hash."""
    chosen = {}
    for kind, rule in _YES_NO.items():
        truths: dict[bool, set[str]] = {True: set(), False: set()}
        for entry in entries:
            if (truth := rule(entry)) is not None:
                truths[truth].add(entry.concept)
        truths[False] -= truths[True]
        size = min(len(truths[True]), len(truths[False]))
        chosen[kind] = {
            concept for pool in truths.values() for concept in sorted(pool, key=lambda c: unit_hash(kind, c))[:size]
        }
    return chosen


def _color_claims(entries: Sequence[tuple[str, Entry]], looks: Mapping[str, Look]) -> dict[str, str]:
    """The colour each picture is asked about: per colour half of its own (yes), and as many others (no).

    Asking "no" pictures of colour A about the colours in proportion to how often those are true leaves the question's
    wording without a hint.
    """
    by_color: dict[str, list[str]] = defaultdict(list)
    for key, _ in entries:
        if (color := looks[key].color) is not None:
            by_color[color].append(key)
    claims: dict[str, str] = {}
    spare: list[str] = []
    wanted: list[str] = []
    for color in sorted(by_color):
        keys = sorted(by_color[color], key=lambda key: unit_hash("claim", key))
        half = (len(keys) + 1) // 2
        claims |= dict.fromkeys(keys[:half], color)
        wanted += [color] * half
        spare += keys[half:]
    spare.sort(key=lambda key: unit_hash("spare", key))
    for _, color in sorted(enumerate(wanted), key=lambda item: unit_hash("wanted", str(item[0]), item[1])):
        match = next((key for key in spare if looks[key].color != color), None)
        if match is None:
            continue
        spare.remove(match)
        claims[match] = color
    return claims


def balanced_questions(
    samples: Iterable[tuple[str, Mapping[str, Any]]], seed: int, per_kind: int
) -> list[tuple[str, str, str, str]]:
    """A question set in which guessing the commonest answer of a kind scores as low as possible.

    Within each kind every answer occurs equally often; answers too rare for that are left out, as is a kind with a
    single answer. Yes/no kinds are balanced per wording, so that "Is it mostly red?" gives nothing away. The draw is a
    pure function of its arguments.

    Args:
        samples: Pairs of key and the sample's parsed JSON with ``"qa": [[question, answer, kind], ...]``.
        seed: Another seed gives other questions.
        per_kind: Most questions of a kind.

    Returns:
        ``(key, question, answer, kind)``, ordered by kind.
    """
    pools: dict[str, dict[str, dict[str, list[tuple[int, str, str]]]]] = {}
    for key, sample in samples:
        for question, answer, kind in sample.get("qa", ()):
            wording = question if kind.startswith("is_") else ""
            answers = pools.setdefault(kind, {}).setdefault(wording, {})
            answers.setdefault(answer, []).append((derive(seed, "question", key, question), key, question))
    chosen: list[tuple[str, str, str, str]] = []
    for kind, wordings in sorted(pools.items()):
        usable = {wording: answers for wording, answers in wordings.items() if len(answers) > 1}
        for _, answers in sorted(usable.items()):
            drawn = _equally_many(answers, max(2, per_kind // len(usable)))
            chosen += [(key, question, answer, kind) for answer, (_, key, question) in drawn]
    return chosen


def _equally_many(
    answers: Mapping[str, Sequence[tuple[int, str, str]]], most: int
) -> list[tuple[str, tuple[int, str, str]]]:
    """``c`` questions of each of ``n`` answers, with the ``c`` that makes ``sqrt(c) * (n - 1)`` greatest.

    That prefers many different answers, among which a guess is worth little, to many questions about two of them.
    """
    sizes = sorted((len(pool) for pool in answers.values()), reverse=True)[:most]
    n, c = max(
        ((n, min(sizes[n - 1], most // n)) for n in range(2, len(sizes) + 1)),
        key=lambda pair: pair[1] ** 0.5 * (pair[0] - 1),
    )
    by_hash = sorted(answers, key=lambda answer: (min(answers[answer]), answer))
    kept = [answer for answer in by_hash if len(answers[answer]) >= c][:n]
    return [(answer, question) for answer in sorted(kept) for question in sorted(answers[answer])[:c]]
