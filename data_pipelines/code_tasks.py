"""Tasks of networks that read and draw images as codes of their own vocabulary, in the sequences they were trained on.

What is said about an image is made by the ordinary tasks; here its codes are put in front of the conversation. What is
drawn has a prompt of its own, which is left empty now and then, so that guidance has an unconditional branch.

Source: MMaDA (arXiv 2505.15809), published prompt builder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmdiff import rng
from mmdiff.batch import IGNORE, Example, Layout
from mmdiff.text import Tokenizer

from .reader import Sample

__all__ = ["BehindCodes", "DrawnCodes", "PicturelessTokenizer"]

Codes = Callable[[Sample, Layout], Any]


class PicturelessTokenizer:
    """A tokenizer whose conversations leave images out: their codes stand in front.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def chat(self, messages: Sequence[Mapping[str, Any]], slots: Any = 0, answer: Any = None, **options: Any) -> Any:
        """As `mmdiff.text.Tokenizer.chat`, without the images."""
        return self._tokenizer.chat([_without_images(m) for m in messages], 0, answer, **options)


class BehindCodes:
    """A task about an image, its example behind the image's codes.

    Args:
        task: The ordinary task, made with a `PicturelessTokenizer`.
        layout: What the model expects.
        codes: Reads the codes of a sample.
    """

    def __init__(self, task: Callable[[Sample, torch.Generator], Example], layout: Layout, codes: Codes) -> None:
        self.task, self.layout, self.codes = task, layout, codes

    def __call__(self, sample: Sample, generator: torch.Generator) -> Example:
        """One example."""
        said = self.task(sample, generator)
        codes = (self.codes(sample, self.layout) + self.layout.code_offset).tolist()
        front = torch.tensor(self.layout.script.picture([codes]))

        def behind(row: Tensor, value: float) -> Tensor:
            return torch.cat([row.new_full((len(front),), value), row])

        return replace(
            said,
            ids=torch.cat([front, said.ids]),
            labels=behind(said.labels, IGNORE),
            weights=behind(said.weights, 0.0),
            droppable=behind(said.droppable, False),
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
        text, script = self.text(sample, generator), self.layout.script
        empty = rng.uniform(generator, (1,)).item() < self.options.drop_text
        before = [*script.prompt([] if empty else self.tokenizer.encode(text)), script.ids.soi]
        codes = torch.from_numpy(self.codes(sample, self.layout)) + self.layout.code_offset
        ids = torch.cat([torch.tensor(before), codes, torch.tensor([script.ids.eoi])])
        learnt = torch.zeros(len(ids), dtype=torch.bool)
        learnt[len(before) : len(before) + len(codes)] = True
        return Example(
            key=sample.key,
            task=self.options.type,
            ids=ids,
            labels=torch.where(learnt, ids, IGNORE),
            weights=learnt.float(),
            # Guidance reads the empty prompt, so none is masked.
            droppable=torch.zeros(len(ids), dtype=torch.bool),
        )

    def length(self, sample: Sample, generator: torch.Generator) -> int:
        """Slots of the example that the same arguments give."""
        return len(self(sample, generator).ids)

    @property
    def reads_images(self) -> bool:
        """Whether `length` needs the images' bytes: their codes are enough."""
        return False


def _without_images(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message["content"]
    kept = content if isinstance(content, str) else [part for part in content if part.get("type") != "image"]
    return {**message, "content": kept}
