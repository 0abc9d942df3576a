"""Tasks of networks that read and draw images as codes of their own vocabulary, in the sequences they were trained on.

What is said about an image is made by the ordinary tasks; here its codes are put where the family's script wants them.
What is drawn has a prompt of its own, which is dropped now and then, so that guidance has an unconditional branch.

Source: MMaDA (arXiv 2505.15809) and Lumina-DiMOO (arXiv 2510.06308), published prompts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmdiff import rng
from mmdiff.batch import IGNORE, Example, Layout
from mmdiff.text import Tokenizer

from .reader import Sample, numbered

__all__ = ["BesideCodes", "DrawnCodes", "EditedCodes", "PicturelessTokenizer"]

Codes = Callable[..., Any]
"""Codes of a sample's first image, or of the one of a number; as `data_pipelines.contents.codes_of`."""


class PicturelessTokenizer:
    """A tokenizer whose conversations are the family's and leave images out: their codes are put in afterwards.

    Args:
        tokenizer: The tokenizer.
        script: The family's, such as `mmdiff.text.mmada.Scripts`.
    """

    def __init__(self, tokenizer: Tokenizer, script: Any) -> None:
        self._tokenizer, self._script = tokenizer, script

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def chat(self, messages: Sequence[Mapping[str, Any]], slots: Any = 0, answer: Any = None, **options: Any) -> Any:
        """As `mmdiff.text.Tokenizer.chat`, without the images."""
        return self._script.told(self._tokenizer, [_without_images(m) for m in messages], answer)


class BesideCodes:
    """A task about an image, with the image's codes in its example.

    Args:
        task: The ordinary task, made with a `PicturelessTokenizer`.
        tokenizer: The tokenizer.
        layout: What the model expects.
        codes: Reads the codes of a sample.
    """

    def __init__(
        self, task: Callable[[Sample, torch.Generator], Example], tokenizer: Tokenizer, layout: Layout, codes: Codes
    ) -> None:
        self.task, self.tokenizer, self.layout, self.codes = task, tokenizer, layout, codes

    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        """One example."""
        said = self.task(sample, generator)
        codes = (self.codes(sample, self.layout) + self.layout.code_offset).tolist()
        shown = torch.tensor(self.layout.script.shown(codes, math.isqrt(len(codes))))
        answer = int((said.labels != IGNORE).nonzero()[0])
        place = self.layout.script.place(self.tokenizer, answer)

        def around(row: Tensor, new: Tensor) -> Tensor:
            return torch.cat([row[:place], new, row[place:]])

        def nothing(row: Tensor, value: float) -> Tensor:
            return around(row, row.new_full((len(shown),), value))

        return replace(
            said,
            ids=around(said.ids, shown),
            labels=nothing(said.labels, IGNORE),
            weights=nothing(said.weights, 0.0),
            droppable=nothing(said.droppable, False),
        )

    def length(self, sample: Sample, generator: torch.Generator) -> int:
        """Slots of the example that the same arguments give."""
        return len(self(sample, generator).ids)

    @property
    def reads_images(self) -> bool:
        """Whether `length` needs the images' bytes: their codes are enough."""
        return False


class DrawnCodes:
    """A prompt, and the codes of its image to be learnt.

    Args:
        options: The task's configuration.
        tokenizer: For the prompt.
        layout: What the model expects.
        codes: Reads the codes of a sample.
        text: The prompt's text of a sample.
    """

    def __init__(
        self,
        options: Any,
        tokenizer: Tokenizer,
        layout: Layout,
        codes: Codes,
        text: Callable[[Sample, torch.Generator], str],
    ) -> None:
        self.options, self.tokenizer, self.layout, self.codes, self.text = options, tokenizer, layout, codes, text

    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        """One example."""
        script, before = self.layout.script, self.before(sample, generator)
        codes = self.shifted(sample)
        side = math.isqrt(len(codes))
        ids = torch.tensor([*before, *script.slots(codes, side)])
        learnt = torch.zeros(len(ids), dtype=torch.bool)
        learnt[len(before) + torch.tensor(script.cells(side))] = True
        return Example(
            key=sample.key,
            task=self.options.type,
            ids=ids,
            labels=torch.where(learnt, ids, IGNORE),
            weights=learnt.float(),
            # Guidance reads the prompt that stands for none, so nothing is masked.
            droppable=torch.zeros(len(ids), dtype=torch.bool),
        )

    def before(self, sample: Sample, generator: torch.Generator) -> list[int]:
        """Ids before the codes that are learnt."""
        return list(self.layout.script.drawing(self.tokenizer, self.said(sample, generator)))

    def said(self, sample: Sample, generator: torch.Generator) -> list[int] | None:
        """Ids of the prompt; None where it is dropped."""
        text = self.tokenizer.encode(self.text(sample, generator))
        return None if rng.uniform(generator, (1,)).item() < self.options.drop_text else text

    def shifted(self, sample: Sample, number: int = 0) -> list[int]:
        """Ids of an image's codes."""
        return list((self.codes(sample, self.layout, number) + self.layout.code_offset).tolist())

    def length(self, sample: Sample, generator: torch.Generator) -> int:
        """Slots of the example that the same arguments give."""
        return len(self(sample, generator).ids)

    @property
    def reads_images(self) -> bool:
        """Whether `length` needs the images' bytes: their codes are enough."""
        return False


class EditedCodes(DrawnCodes):
    """An instruction about one of a sample's further images, shown as its codes, and the codes of the first."""

    def before(self, sample: Sample, generator: torch.Generator) -> list[int]:
        """Ids before the codes that are learnt.

        Raises:
            SampleError: No image to begin from, or none with codes.
        """
        said = self.said(sample, generator)
        others = next(n for n in itertools.count(1) if numbered(n, "codes.npy") not in sample.members) - 1
        codes = self.shifted(sample, 1 + int(rng.uniform(generator, (1,)).item() * others))
        return list(self.layout.script.editing(self.tokenizer, said, codes, math.isqrt(len(codes))))


def _without_images(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    kept = content if isinstance(content, str) else [part for part in content if part.get("type") != "image"]
    return {**message, "content": kept}
