"""The painter of flow-matching networks: noise into latents (or pixels), told texts or classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmdiff import rng
from mmdiff.diffusion.flow import TRAIN_STEPS, guide
from mmdiff.errors import CheckpointError
from mmdiff.pipelines.base import Checkpoint
from mmdiff.pipelines.drawing import Drawing, Frame, Job, words_of
from mmdiff.sampling.flow import integrate
from mmdiff.sampling.flow_presets import FlowParts, flow_parts
from mmdiff.sampling.trace import Pass, Trace

__all__ = ["FlowPainter"]


class FlowPainter:
    """Images of a DiT or MMDiT that was trained with rectified flow.

    Raises:
        CheckpointError: The autoencoder has other latents than the network draws.
    """

    words = words_of(flow_parts)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        model: Any = checkpoint.model
        self.model, self.config = model, model.config
        self.grid: int = self.config.image_size
        self.prompts: bool = self.config.type == "mmdit"
        if checkpoint.image_tokenizer is not None:
            vae = checkpoint.image_tokenizer.config
            have = (getattr(vae, "channels", None), getattr(vae, "grid", None))
            if have != (self.config.channels, self.grid):
                raise CheckpointError(
                    f"the network draws latents of {self.config.channels} channels, {self.grid} x {self.grid}, the "
                    f"autoencoder has {have[0]} channels, {have[1]} x {have[1]}: it is not the one the network was "
                    "trained with"
                )

    @property
    def size(self) -> int:
        """Side of the pictures, pixels."""
        tokenizer = self.checkpoint.image_tokenizer
        return self.grid if tokenizer is None else int(tokenizer.config.image_size)

    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B C h w"]:
        """Latents of images."""
        tokenizer = self.checkpoint.image_tokenizer
        if tokenizer is None:
            return pixels
        return tokenizer.latents(pixels) if hasattr(tokenizer, "latents") else tokenizer.encode(pixels)

    def pixels(self, result: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 S S"]:
        """Images of latents."""
        tokenizer = self.checkpoint.image_tokenizer
        if tokenizer is None:
            return result.float()
        return tokenizer.decode(result.to(next(tokenizer.parameters()).dtype)).float()

    def draw(self, job: Job, words: dict[str, Any], report: Callable[[int, float, Tensor], None] | None) -> Drawing:
        """Integrate from the noise of each row's source.

        Args:
            job: What to draw.
            words: See `mmdiff.sampling.flow_presets.flow_parts`.
            report: Called after each step with its number, the share of noise left and the latents.
        """
        parts = flow_parts(**words)
        device = self.checkpoint.device
        shape = (len(job.subjects), self.config.channels, self.grid, self.grid)
        noise = rng.normal(job.sources, shape).to(device)
        kept = None if job.known is None else _Kept(job.known.to(noise), job.open.view(-1, 1, *shape[2:]).to(device))
        run = _Run(self, parts, self._conditions(job.subjects, device), kept)
        frames: list[Callable[[], Frame]] = []

        def stepped(i: int, x: Tensor) -> None:
            if report is not None:
                report(i, float(parts.sigmas[i + 1]), x)
            if job.keep:
                frames.append(lambda: Frame(x, None))

        result = integrate(run, noise, parts.sigmas, solver=parts.solver, on_step=stepped)
        return Drawing(result, run.trace(), frames)

    def _conditions(self, subjects: Sequence[Any], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """What the network is told, with the condition and without."""
        if not self.prompts:
            labels = torch.tensor(subjects, device=device)
            return [labels], [torch.full_like(labels, self.config.classes)]
        like = next(self.model.parameters())
        given, empty = self.checkpoint.text_encoder(list(subjects)), self.checkpoint.text_encoder([""])
        return (
            [t.to(like) for t in given],
            [t.to(like).expand(len(subjects), *t.shape[1:]) for t in empty],
        )


class _Kept:
    """Parts of images that stay: their path from the noise is the straight line to what they are."""

    def __init__(self, known: Float[Tensor, "B C h w"], open_: Bool[Tensor, "B 1 h w"]) -> None:
        self.known, self.open = known, open_

    def velocity(self, x: Tensor, v: Tensor, sigma: float) -> Tensor:
        """``v`` where the image is open."""
        return torch.where(self.open, v, (x - self.known) / sigma)


class _Run:
    """The guided velocity of one batch, and the account of what it cost."""

    def __init__(
        self,
        painter: FlowPainter,
        parts: FlowParts,
        conditions: tuple[list[Tensor], list[Tensor]],
        kept: _Kept | None,
    ) -> None:
        self.model, self.parts, self.kept = painter.model, parts, kept
        self.tokens = (painter.grid // painter.config.patch_size) ** 2
        self.told, self.untold = conditions
        self.both = [torch.cat(pair) for pair in zip(*conditions, strict=True)]
        self.passes: list[Pass] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = float(sigma[0])
        guidance = self.parts.at(level)
        if guidance == 1:
            v = self._forward(x, sigma, self.told)
        else:
            told, untold = self._forward(torch.cat((x, x)), torch.cat((sigma, sigma)), self.both).chunk(2)
            v = guide(told, untold, guidance)
        return v if self.kept is None else self.kept.velocity(x, v, level)

    def _forward(self, x: Tensor, sigma: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        words = conditions[0].shape[1] if conditions[0].ndim == 3 else 0
        self.passes.append(Pass(rows=len(x), computed=self.tokens + words, slots=self.tokens + words, read=self.tokens))
        dtype = next(self.model.parameters()).dtype
        return self.model(x.to(dtype), TRAIN_STEPS * sigma, *conditions).float()

    def trace(self) -> Trace:
        """The finished record; every pass moves every token, and none decides any."""
        rows, device = len(self.told[0]), self.told[0].device
        return Trace(
            passes=tuple(self.passes),
            row_nfe=(len(self.passes),) * rows,
            committed=torch.zeros(len(self.passes), rows, dtype=torch.long, device=device),
            order=torch.full((rows, self.tokens), len(self.passes) - 1, dtype=torch.int32, device=device),
            drift={},
        )
