"""The same prompts, drawn again and again while the model learns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["PROMPTS", "Progress"]

PROMPTS = (
    "grinning face with big eyes",
    "woman astronaut: medium-dark skin tone",
    "red heart",
    "thumbs up: light skin tone",
    "flag: italy",
    "tiger face",
    "pizza",
    "automobile",
)
"""Drawn with seed = place in the list."""


class Progress:
    """A probe that writes one strip of pictures per visit.

    Args:
        folder: The demo run.
        samples: Length of the training.
        shares: Shares of the training at which it is called.
        defaults: Defaults of generation, as the recipe gives them.
    """

    name = "progress"

    def __init__(self, folder: Path, samples: int, shares: Sequence[float], defaults: dict[str, Any]) -> None:
        self.every_samples: Sequence[int] = [round(samples * share) for share in shares]
        self._folder, self._defaults = folder, defaults
        self._parts: tuple[Any, Any] | None = None

    def __call__(self, model: Any, samples_seen: int) -> None:
        """Draw `PROMPTS` with the model as it is."""
        from mmdiff import images
        from mmdiff.pipelines import ImageGenerator
        from mmdiff.pipelines.base import Checkpoint

        tokenizer, image_tokenizer = self._loaded()
        checkpoint = Checkpoint(
            model=model, tokenizer=tokenizer, image_tokenizer=image_tokenizer, defaults=self._defaults
        )
        pictures = ImageGenerator(checkpoint)(prompts=list(PROMPTS), seeds=list(range(len(PROMPTS)))).images
        out = self._folder / "progress"
        out.mkdir(parents=True, exist_ok=True)
        strip = images.grid(pictures, columns=len(pictures))
        (out / f"{samples_seen:010d}.png").write_bytes(images.encode_png(strip))

    def _loaded(self) -> tuple[Any, Any]:
        from mmdiff.models.registry import load_model
        from mmdiff.text import Tokenizer

        if self._parts is None:
            image_tokenizer = load_model(self._folder / "image_tokenizer" / "model").eval()
            self._parts = Tokenizer.from_pretrained(self._folder / "tokenizer"), image_tokenizer
        return self._parts
