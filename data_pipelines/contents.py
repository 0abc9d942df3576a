"""What a sample says: captions, questions with their answers, instructions, image codes; all of it checked.

A sample's JSON may hold ``caption`` (text), ``captions`` (list of texts), ``concept`` (text), ``qa`` (list of
[question, answer, kind]) and ``instruction`` (text or list of texts); a plain ``.txt`` member serves as the caption
where there is no JSON. What is made of it is the tasks' business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmdiff import rng
from mmdiff.batch import Layout
from mmdiff.errors import SampleError

from .latents import read_array
from .reader import Sample, numbered

__all__ = ["answers_of", "caption_of", "codes_of", "instructions", "questions", "texts"]

_MAX_CODES_BYTES = 1 << 20


def caption_of(sample: Sample, options: Any, generator: torch.Generator) -> str:
    """The main text with probability ``options.main``, else one of the others."""
    info = sample.info()
    main, *others = options.fields or ("caption",)
    first = texts(info.get(main)) or texts(sample.text())
    rest = [t for field in others for t in texts(info.get(field))]
    u, v = rng.uniform(generator, (2,)).tolist()
    chosen = first if first and (u < options.main or not rest) else rest
    if not chosen:
        raise SampleError("missing_caption", f"{sample}: no text in {', '.join(options.fields)} or .txt")
    return chosen[int(v * len(chosen))]


def questions(sample: Sample, kinds: Sequence[str]) -> list[tuple[str, str, str]]:
    """The (question, answer, kind) entries of a sample's JSON, of some kinds only unless ``kinds`` is empty.

    Raises:
        SampleError: Reason ``"bad_qa"`` or ``"missing_qa"``.
    """
    found = sample.info().get("qa")
    entries = []
    for entry in found if isinstance(found, list) else []:
        if not (isinstance(entry, list) and len(entry) >= 2 and all(isinstance(e, str) and e.strip() for e in entry)):
            raise SampleError("bad_qa", f"{sample}: qa holds {entry!r:.80}, expected [question, answer, kind]")
        kind = entry[2] if len(entry) > 2 else ""
        if not kinds or kind in kinds:
            entries.append((entry[0], entry[1], kind))
    if not entries:
        wanted = f" of the kinds {', '.join(kinds)}" if kinds else ""
        raise SampleError("missing_qa", f"{sample}: no questions{wanted} in its JSON")
    return entries


def answers_of(sample: Sample, options: Any) -> set[str]:
    """What a sample can teach of a task ``vqa`` or ``edit``: the kinds with their answers, or the instructions.

    Raises:
        SampleError: Nothing.
    """
    if options.type == "edit":
        return set(instructions(sample, options.field))
    return {f"{kind}: {answer}" for _, answer, kind in questions(sample, options.kinds)}


def instructions(sample: Sample, field: str) -> list[str]:
    """The instructions in a field of a sample's JSON.

    Raises:
        SampleError: Reason ``"missing_instruction"``.
    """
    if said := texts(sample.info().get(field)):
        return said
    raise SampleError("missing_instruction", f"{sample}: no field {field!r} in its JSON")


def texts(value: Any) -> list[str]:
    """The texts with anything in them, of one text or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [v.strip() for v in values if isinstance(v, str) and v.strip()]


def codes_of(sample: Sample, layout: Layout, number: int = 0) -> np.ndarray:
    """Codes of an image in row-major order, checked; ``number`` counts the sample's images from 0."""
    name = numbered(number, "codes.npy")
    data = sample.members.get(name)
    if data is None:
        how = "mmdiff data cache --others" if number else "mmdiff data cache"
        raise SampleError("missing_codes", f"{sample}: no member {name}; run {how} on these shards")
    codes = read_array(data, _MAX_CODES_BYTES)
    if codes is None or codes.dtype.kind not in "iu":
        raise SampleError("bad_codes", f"{sample}: {name} is not an array of integers")
    if codes.size != layout.codes:
        raise SampleError(
            "bad_codes",
            f"{sample}: {name} holds {codes.size:,} codes, the model draws {layout.codes:,} per image; run "
            "mmdiff data cache with this model's image tokenizer, and --size if it draws pictures of another size",
        )
    if codes.min() < 0 or codes.max() >= layout.codebook:
        raise SampleError("bad_codes", f"{sample}: codes {codes.min()} to {codes.max()}, codebook {layout.codebook:,}")
    return codes.astype(np.int64).reshape(-1)
