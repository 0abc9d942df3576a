"""GenEval's verdict on one picture, from its detections. Thresholds and boxes are float32, as in the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmdiff.errors import ConfigError

from .prompts import COLORS, RELATIONS

__all__ = ["Detection", "Options", "Verdict", "judge", "kept_objects", "relations"]

Classify = Callable[[str, Sequence["Detection"]], Sequence[str]]
"""(class, objects) -> colour of each."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the official script can be told, with its defaults.

    Attributes:
        threshold: Score that an object must exceed.
        counting_threshold: The same for prompts that count.
        max_objects: Most objects of a class, best first.
        max_overlap: Intersection over union from which the weaker object of a class is dropped; 1: never.
        position_threshold: Share of the two sizes by which objects must be apart.
        bgcolor: What lies around an object when its colour is judged; ``original`` keeps the picture.
        crop: Whether the object's box is cut out for that.
    """

    threshold: float = 0.3
    counting_threshold: float = 0.9
    max_objects: int = 16
    max_overlap: float = 1.0
    position_threshold: float = 0.1
    bgcolor: str = "#999"
    crop: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Detection:
    """One detected object.

    Attributes:
        name: Class.
        box: x1, y1, x2, y2 in pixels, float32 [4].
        score: Confidence, 0...1.
        mask: Bool [H, W], where colours are to be judged by the picture; None otherwise.
        color: The colour, where somebody else has judged it.
    """

    name: str
    box: np.ndarray
    score: float
    mask: np.ndarray | None = None
    color: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a picture shows its prompt.

    Attributes:
        correct: Whether everything is there.
        reason: What is not, one line each.
        details: Kept objects by class, each ``[x1, y1, x2, y2, score]``.
    """

    correct: bool
    reason: str
    details: Mapping[str, list[list[float]]]


def judge(
    metadata: Mapping[str, Any], detections: Sequence[Detection], *, classify: Classify, options: Options | None = None
) -> Verdict:
    """The verdict on one picture.

    Args:
        metadata: Of its prompt.
        detections: Everything the detector found, in any order.
        classify: Tells colours; asked only where a colour is wanted and enough objects were found.
        options: See `Options`.

    Source: behaviour of the official evaluation script.
    """
    options = options or Options()
    threshold = options.counting_threshold if metadata.get("tag") == "counting" else options.threshold
    objects = kept_objects(detections, threshold, options)
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wanted in metadata.get("include", ()):
        found = objects.get(wanted["class"], [])[: wanted["count"]]
        complaint = _complaint(wanted, found, matched, classify, options)
        reasons += [complaint] if complaint else []
        matched.append(None if complaint else found)
    for unwanted in metadata.get("exclude", ()):
        number = len(objects.get(unwanted["class"], ()))
        if number >= unwanted["count"]:
            reasons.append(f"expected {unwanted['class']}<{unwanted['count']}, found {number}")
    details = {name: [[*map(float, d.box), float(d.score)] for d in kept] for name, kept in objects.items()}
    return Verdict(correct=not reasons, reason="\n".join(reasons), details=details)


def kept_objects(detections: Sequence[Detection], threshold: float, options: Options) -> dict[str, list[Detection]]:
    """Objects by class, best first, after threshold, limit and suppression."""
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        if np.float32(detection.score) > np.float32(threshold):
            by_class.setdefault(detection.name, []).append(detection)
    return {name: _suppressed(found, options) for name, found in by_class.items()}


def relations(a: np.ndarray, b: np.ndarray, slack: float) -> tuple[str, ...]:
    """Relations of box ``a`` to box ``b``: none, one, or one per axis.

    Args:
        a: x1, y1, x2, y2, float32 [4].
        b: The same.
        slack: Share of the two sizes by which centres may differ without meaning anything.
    """
    boxes = np.asarray([a, b], dtype=np.float32).reshape(2, 2, 2)
    centres = boxes.mean(axis=1)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0])
    offset = centres[0] - centres[1]
    reduced = np.maximum(np.abs(offset) - np.float32(slack) * (sizes[0] + sizes[1]), 0) * np.sign(offset)
    if np.all(np.abs(reduced) < 1e-3):
        return ()
    # By the length of the offset before it was reduced: near objects need a clear direction.
    x, y = reduced / np.linalg.norm(offset)
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return tuple(name for name, true in zip(RELATIONS, holds, strict=True) if true)


def _complaint(
    wanted: Mapping[str, Any],
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    classify: Classify,
    options: Options,
) -> str:
    """Why a wanted object is not there; empty if it is."""
    name, count = wanted["class"], wanted["count"]
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    if "color" in wanted:
        colors = list(classify(name, found))
        if colors.count(wanted["color"]) < count:
            present = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
            color = wanted["color"]
            return f"expected {color} {name}>={count}, found {colors.count(color)} {color}; and {present}"
    if "position" in wanted:
        return _misplaced(wanted, found, matched, options.position_threshold)
    return ""


def _misplaced(
    wanted: Mapping[str, Any],
    found: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    slack: float,
) -> str:
    relation, target = wanted["position"]
    if not -len(matched) <= target < len(matched):
        raise ConfigError(f"{wanted['class']} is placed by object {target}, which is not before it")
    others = matched[target]
    if others is None:
        return f"no target for {wanted['class']} to be {relation}"
    for one in found:
        for other in others:
            holds = relations(one.box, other.box, slack)
            if relation not in holds:
                # The reference joins an unordered set; by name, ours is the same every time.
                return f"expected {wanted['class']} {relation} target, found {' and '.join(sorted(holds))} target"
    return ""


def _suppressed(found: Sequence[Detection], options: Options) -> list[Detection]:
    rest = sorted(found, key=lambda d: -float(np.float32(d.score)))[: options.max_objects]
    if options.max_overlap == 1:
        return rest
    kept = []
    while rest:
        best, *rest = rest
        kept.append(best)
        rest = [d for d in rest if _overlap(best.box, d.box) < options.max_overlap]
    return kept


def _area(box: np.ndarray) -> float:
    # Both end pixels count, as in the first detection benchmarks.
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    both = _area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
    either = _area(a) + _area(b) - both
    return both / either if either else 0.0
