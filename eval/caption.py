"""Captions against references: BLEU-1..4, ROUGE-L, CIDEr-D, METEOR where Java is, and named attributes.

Protocol ``coco`` gives the COCO tool's numbers: its tokeniser is a Java program, and `eval.ptb` is its equal on
captions in plain Python. ``coco-java`` asks the program itself, ``tokenised`` takes text that was tokenised elsewhere,
and ``simple`` splits at everything but letters and digits.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdiff.errors import ConfigError

from . import coco_java
from .cli import finish
from .files import by_id, read_records
from .ptb import tokenise as ptb_tokenise
from .records import captioned

__all__ = ["PROTOCOLS", "AttributeResult", "CaptionResult", "attributes", "main", "score", "score_files", "tokenise"]

_Grams = Counter[tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class AttributeResult:
    """Whether captions name an attribute that the references name.

    Attributes:
        name: ``tone`` or ``gender``.
        n: Images whose reference names it.
        accuracy: Share of them whose caption names the same value.
        macro_accuracy: Mean over the values of that share.
        commonest: The commonest value.
        commonest_accuracy: Share of the commonest value: what always saying it would score.
        false_positives: Images whose reference does not name it and whose caption does.
        n_without: Images whose reference does not name it.
    """

    name: str
    n: int
    accuracy: float
    macro_accuracy: float
    commonest: str
    commonest_accuracy: float
    false_positives: int
    n_without: int


@dataclass(frozen=True, kw_only=True)
class CaptionResult:
    """Scores of a set of captions, one per image.

    Attributes:
        protocol: One of `PROTOCOLS`.
        n: Number of images.
        exact: Share of captions equal to a reference after tokenising.
        bleu: Corpus BLEU-1 to BLEU-4, 0...1.
        rouge_l: Mean ROUGE-L, 0...1.
        cider: Mean CIDEr-D (1.2 is reported elsewhere as 120); depends on the set, which gives the word frequencies.
        attributes: One entry per attribute that a reference names.
        exact_per_image: 0 or 1 per image, for `eval.bootstrap`.
        cider_per_image: CIDEr-D per image, for `eval.bootstrap`.
        rouge_l_per_image: ROUGE-L per image.
        bleu_per_image: BLEU-1 to BLEU-4 per image.
        meteor: METEOR, where it was asked for; from the Java program, see `eval.coco_java`.
        meteor_per_image: The same per image.
    """

    protocol: str
    n: int
    exact: float
    bleu: tuple[float, ...]
    rouge_l: float
    cider: float
    attributes: tuple[AttributeResult, ...]
    exact_per_image: tuple[float, ...]
    cider_per_image: tuple[float, ...]
    rouge_l_per_image: tuple[float, ...]
    bleu_per_image: tuple[tuple[float, ...], ...]
    meteor: float | None = None
    meteor_per_image: tuple[float, ...] | None = None


def score(
    predictions: Mapping[Any, str] | Sequence[str],
    references: Mapping[Any, Sequence[str]] | Sequence[Sequence[str]],
    *,
    protocol: str = "coco",
    meteor: bool = False,
) -> CaptionResult:
    """Score captions.

    Args:
        predictions: One caption per image, by id or in the order of the references.
        references: One or more true captions per image.
        protocol: One of `PROTOCOLS`.
        meteor: Also ask the Java program for METEOR.

    Raises:
        ConfigError: Unknown protocol, no images, an image without reference, or ids that do not agree.
        MissingExtraError: Java, or the package with its programs, is needed and not there.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    captions, truths = _aligned(predictions, references)
    said, true = _tokenised(PROTOCOLS[protocol], captions, truths)
    candidates, targets = [c.split() for c in said], [[r.split() for r in rs] for rs in true]
    exact = tuple(float(any(c == r for r in rs)) for c, rs in zip(candidates, targets, strict=True))
    bleu, bleu_each = _bleu(candidates, targets)
    # Here the tool splits at single spaces: an empty caption is one empty word, and "1 1/2" stays together.
    pairs = zip(said, true, strict=True)
    rouge = tuple(_rouge_l(c.split(" "), [r.split(" ") for r in rs]) for c, rs in pairs)
    cider = _cider(candidates, targets)
    total, each = coco_java.meteor(said, true) if meteor else (None, None)
    return CaptionResult(
        protocol=protocol,
        n=len(captions),
        exact=_mean(exact),
        bleu=bleu,
        rouge_l=_mean(rouge),
        cider=_mean(cider),
        attributes=_attribute_results(captions, [rs[0] for rs in truths]),
        exact_per_image=exact,
        cider_per_image=cider,
        rouge_l_per_image=rouge,
        bleu_per_image=bleu_each,
        meteor=total,
        meteor_per_image=each,
    )


def tokenise(text: str) -> list[str]:
    """Lower-case words and numbers; hyphens and apostrophes inside a word stay, other marks go."""
    return re.findall(r"\w+(?:[-'\u2019.,/:]\w+)*|[&%$#]", text.lower())


PROTOCOLS: dict[str, Callable[[Sequence[str]], list[str]]] = {
    "coco": lambda texts: [" ".join(ptb_tokenise(t)) for t in texts],
    "coco-java": coco_java.tokenise,
    "simple": lambda texts: [" ".join(tokenise(t)) for t in texts],
    "tokenised": list,
}
"""Name -> how captions become tokens with single spaces between them; ``tokenised``: they are already."""

_TONES = ("medium-light", "medium-dark", "light", "medium", "dark")
_GENDERS = {
    "female": "woman women girl girls lady female mother queen princess bride she her",
    "male": "man men boy boys gentleman male father king prince groom he his",
    "neutral": "person people child children adult baby they",
}
_GENDER_OF = {word: gender for gender, words in _GENDERS.items() for word in words.split()}


def attributes(caption: str) -> dict[str, str]:
    """Attributes that a caption names: ``tone`` (skin tone) and ``gender``.

    A caption with words of both genders ("woman and man holding hands") names ``both``.

    >>> attributes("woman running: medium-dark skin tone")
    {'tone': 'medium-dark', 'gender': 'female'}
    """
    text = caption.lower()
    out = {}
    if tone := re.search(rf"\b({'|'.join(_TONES)}) skin", text):
        out["tone"] = tone[1]
    named = {_GENDER_OF[w] for w in re.findall(r"[a-z]+", text) if w in _GENDER_OF}
    if named:
        sexes = named - {"neutral"}
        out["gender"] = "neutral" if not sexes else "both" if len(sexes) > 1 else sexes.pop()
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m eval.caption PRED REF``: the result as JSON on stdout; returns the exit code."""
    parser = argparse.ArgumentParser(prog="eval.caption", description="Score captions.")
    parser.add_argument("predictions", help="JSON or JSONL: image_id, caption")
    parser.add_argument("references", help="JSON or JSONL: image_id, caption or captions; or COCO annotations")
    parser.add_argument("--protocol", choices=list(PROTOCOLS), default="coco")
    parser.add_argument("--meteor", action="store_true", help="also METEOR, which needs Java")
    options = vars(parser.parse_args(argv))
    predictions, references = options.pop("predictions"), options.pop("references")
    return finish(lambda: score_files(predictions, references, **options))


def score_files(
    predictions: str | Path, references: str | Path, *, protocol: str = "coco", meteor: bool = False
) -> CaptionResult:
    """`score` of two files: records of ``image_id`` with ``caption`` (one per line or several) or ``captions``.

    The references may also be shards, whose samples bring their captions.
    """
    truths = {item.id: item.truth["captions"] for item in captioned(references)}
    wanted = [{"image_id": i} for i in truths]
    given = by_id(read_records(predictions), wanted, "image_id")
    captions = [str(g["caption"]) for g in given]
    return score(captions, list(truths.values()), protocol=protocol, meteor=meteor)


def _tokenised(
    tokens: Callable[[Sequence[str]], list[str]], captions: list[str], truths: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Captions and references as tokens, in one call: a Java program that starts twice takes twice as long."""
    flat = iter(tokens([*captions, *(r for rs in truths for r in rs)]))
    said = [next(flat) for _ in captions]
    return said, [[next(flat) for _ in rs] for rs in truths]


def _aligned(predictions: Any, references: Any) -> tuple[list[str], list[list[str]]]:
    if isinstance(references, Mapping):
        if not isinstance(predictions, Mapping):
            raise ConfigError("references are by id, so predictions must be, too")
        records = [{"image_id": k, "caption": v} for k, v in predictions.items()]
        ordered = by_id(records, [{"image_id": k} for k in references], "image_id")
        predictions, references = [r["caption"] for r in ordered], list(references.values())
    if len(predictions) != len(references) or not references:
        raise ConfigError(f"{len(predictions)} captions for {len(references)} images")
    truths = [[r] if isinstance(r, str) else list(r) for r in references]
    if empty := [i for i, r in enumerate(truths) if not r]:
        raise ConfigError(f"{len(empty)} images have no reference, first image {empty[0]}")
    return list(predictions), truths


def _grams(words: Sequence[str], n: int) -> _Grams:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _bleu(
    candidates: list[list[str]], references: list[list[list[str]]]
) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Corpus BLEU and per-image BLEU. Source: behaviour of pycocoevalcap 1.2, its small constants included."""
    total_correct, total_guess, total_length, total_target = [0] * 4, [0] * 4, 0, 0
    each = []
    for words, targets in zip(candidates, references, strict=True):
        target = min((abs(len(r) - len(words)), len(r)) for r in targets)[1]
        guess = [max(0, len(words) - n) for n in range(4)]
        correct = []
        for n in range(1, 5):
            ceiling: _Grams = Counter()
            for r in targets:
                ceiling |= _grams(r, n)
            correct.append((_grams(words, n) & ceiling).total())
        each.append(_bleu_of(correct, guess, len(words), target))
        total_correct = [a + b for a, b in zip(total_correct, correct, strict=True)]
        total_guess = [a + b for a, b in zip(total_guess, guess, strict=True)]
        total_length, total_target = total_length + len(words), total_target + target
    return _bleu_of(total_correct, total_guess, total_length, total_target), tuple(each)


def _bleu_of(correct: list[int], guess: list[int], length: int, target: int) -> tuple[float, ...]:
    ratio = (length + 1e-15) / (target + 1e-9)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    out, product = [], 1.0
    for n in range(4):
        product *= (correct[n] + 1e-15) / (guess[n] + 1e-9)
        out.append(product ** (1 / (n + 1)) * brevity)
    return tuple(out)


def _rouge_l(own: list[str], references: list[list[str]], beta: float = 1.2) -> float:
    common = [(_longest_common(r, own), len(r)) for r in references]
    precision = max(c / len(own) for c, _ in common)
    recall = max(c / length for c, length in common)
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        before = 0
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def _cider(candidates: list[list[str]], references: list[list[list[str]]], sigma: float = 6.0) -> tuple[float, ...]:
    """CIDEr-D of each image. Source: Vedantam et al. 2015; behaviour of pycocoevalcap 1.2."""
    frequency: _Grams = Counter()
    for targets in references:
        frequency.update({g for r in targets for n in range(1, 5) for g in _grams(r, n)})
    log_images = math.log(len(references))

    def vector(words: list[str], n: int) -> dict[tuple[str, ...], float]:
        return {g: c * (log_images - math.log(max(1, frequency[g]))) for g, c in _grams(words, n).items()}

    def similarity(words: list[str], target: list[str], n: int) -> float:
        ours, theirs = vector(words, n), vector(target, n)
        shared = sum(min(w, theirs[g]) * theirs[g] for g, w in ours.items() if g in theirs)
        norms = math.sqrt(sum(w * w for w in ours.values())) * math.sqrt(sum(w * w for w in theirs.values()))
        gap = max(0, len(words) - 1) - max(0, len(target) - 1)  # the tool counts length in bigrams
        return shared / (norms or 1.0) * math.exp(-(gap**2) / (2 * sigma**2))

    return tuple(
        10 * sum(similarity(c, r, n) for r in targets for n in range(1, 5)) / 4 / len(targets)
        for c, targets in zip(candidates, references, strict=True)
    )


def _attribute_results(captions: list[str], truths: list[str]) -> tuple[AttributeResult, ...]:
    named = [(attributes(c), attributes(t)) for c, t in zip(captions, truths, strict=True)]
    out = []
    for name in ("tone", "gender"):
        having = [(given.get(name), true[name]) for given, true in named if name in true]
        without = [given for given, true in named if name not in true]
        if having:
            out.append(_attribute(name, having, sum(name in given for given in without), len(without)))
    return tuple(out)


def _attribute(name: str, pairs: list[tuple[str | None, str]], false_positives: int, without: int) -> AttributeResult:
    by_value: dict[str, list[float]] = {}
    for given, true in pairs:
        by_value.setdefault(true, []).append(float(given == true))
    commonest = min(by_value, key=lambda v: (-len(by_value[v]), v))
    return AttributeResult(
        name=name,
        n=len(pairs),
        accuracy=_mean([hit for hits in by_value.values() for hit in hits]),
        macro_accuracy=_mean([_mean(hits) for hits in by_value.values()]),
        commonest=commonest,
        commonest_accuracy=len(by_value[commonest]) / len(pairs),
        false_positives=false_positives,
        n_without=without,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
