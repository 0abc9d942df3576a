"""What the network proposes in a pass: a token for every slot, and how sure it is of it.

Statistics are computed when a selector asks, in the dtype of the logits, a few slots at a time: the whole vocabulary
is gone through while it is in the processor's cache, and no copy of all logits is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Proposal"]

_CHUNK = 2**21
"""Logits that are worked on at a time."""


@dataclass(frozen=True)
class Proposal:
    """What the network proposes for the q slots of a pass.

    Attributes:
        tokens: Int64 [B, q]; the chosen ids.
        classes: Int64 [B, q]; the same as columns of ``logits``.
        logits: Float [B, q, V]; untempered, excluded classes at -inf, the mask class included.
        index: Int64 [B, q]; the slots of the canvas.
    """

    tokens: Int[Tensor, "B q"]
    classes: Int[Tensor, "B q"]
    logits: Float[Tensor, "B q V"]
    index: Int[Tensor, "B q"]

    @cached_property
    def score(self) -> Float[Tensor, "B q"]:
        """Log-odds of the chosen class: the order of its probability, without float32's ties near probability 1."""
        parts = []
        for logits, chosen in self._chunks():
            largest, weights = _weights(logits)
            own = logits.gather(-1, chosen) - largest
            parts.append(own[:, 0] - weights.scatter_(-1, chosen, 0).sum(-1).log())
        return self._join(parts).nan_to_num(nan=-torch.inf, posinf=torch.inf)

    @cached_property
    def confidence(self) -> Float[Tensor, "B q"]:
        """Probability of the chosen class."""
        return self.score.sigmoid()

    @cached_property
    def log_prob(self) -> Float[Tensor, "B q"]:
        """Log-probability of the chosen class."""
        return F.logsigmoid(self.score)

    @cached_property
    def margin(self) -> Float[Tensor, "B q"]:
        """Largest minus second largest probability; 1 if only one class is allowed."""
        parts = []
        for logits, _ in self._chunks():
            weights = _weights(logits)[1]
            total = weights.sum(-1)
            # The largest weight is 1.
            second = weights.scatter_(-1, weights.argmax(-1, keepdim=True), 0).amax(-1)
            parts.append((1 - second) / total)
        return self._join(parts)

    @cached_property
    def entropy(self) -> Float[Tensor, "B q"]:
        """Entropy of the distribution, nats."""
        parts = []
        for logits, _ in self._chunks():
            weights = _weights(logits)[1]
            total = weights.sum(-1)
            parts.append(total.log() + torch.special.entr(weights).sum(-1) / total)
        return self._join(parts)

    def _chunks(self) -> Iterator[tuple[Float[Tensor, "n V"], Int[Tensor, "n 1"]]]:
        rows = max(1, _CHUNK // self.logits.shape[-1])
        yield from zip(self.logits.flatten(0, 1).split(rows), self.classes.view(-1, 1).split(rows), strict=True)

    def _join(self, parts: list[Tensor]) -> Float[Tensor, "B q"]:
        return torch.cat(parts).view(self.tokens.shape)


def _weights(logits: Float[Tensor, "n V"]) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n V"]]:
    """The largest logit, and exp(logit - largest)."""
    largest = logits.amax(-1, keepdim=True)
    return largest, (logits - largest).exp_()
