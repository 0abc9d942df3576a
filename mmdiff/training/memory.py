"""How much memory a run needs, found by one pass forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.training import optim
from mmdiff.training.loop import TrainConfig
from mmdiff.training.microbatch import split
from mmdiff.training.objective import Objective

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Parameters, losses of one batch, and memory in bytes.

    Attributes:
        parameters: Number of weights.
        trainable: Those that are trained.
        losses: Losses of the first batch, per task and in all (``loss``).
        weights: Weights and buffers.
        gradients: Gradients of trainable weights.
        optimizer: The two moments of AdamW.
        average: The averaged weights, if there are any.
        activations: What the backward pass needs of one part of a batch; on a GPU the peak that was measured.
    """

    parameters: int
    trainable: int
    losses: dict[str, float]
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of the memory; passing buffers of the largest layer come on top on a CPU."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def estimate(
    model: nn.Module, objective: Objective, batch: Batch, config: TrainConfig, device: torch.device | str = "cpu"
) -> Estimate:
    """Run one part of a batch forward and backward and add up what a run needs.

    Args:
        model: Its gradients are cleared afterwards; its weights are not touched.
        objective: What is learnt.
        batch: A batch of the run; with ``config.accumulate`` only its first part is used.
        config: How the run trains.
        device: Where.

    Raises:
        ConfigError: The optimizer's configuration does not fit the model.
    """
    device = torch.device(device)
    model.to(device).train()
    optim.build(model, config.optim)
    trained = optim.trainable(model).values()
    part = split(batch, config.accumulate)[0].to(device)
    weights = _nbytes(model.state_dict(keep_vars=True).values())
    kept = _Kept(model)
    before = _peak_from_here(device)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        losses = objective(model, part, rng.generator(config.seed, "objective", 0))
    if losses.total.requires_grad:
        losses.total.backward()
    gradients = sum(p.numel() * p.element_size() for p in trained)
    peak = _peak(device) - before - gradients
    model.zero_grad(set_to_none=True)
    means = {name: float(total) / count for name, (total, count) in losses.terms.items() if count}
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in trained),
        losses={"loss": float(losses.total.detach()), **means},
        weights=weights,
        gradients=gradients,
        optimizer=2 * gradients,
        average=4 * sum(p.numel() for p in trained) if config.ema_halflife_samples else 0,
        activations=max(kept.nbytes, peak),
    )


class _Kept:
    """Counts the memory that autograd keeps, each storage once and the model's own not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.nbytes = 0
        # Held, because the address of memory that is freed may come again.
        self._held: list[Tensor] = []
        self._seen = {t.untyped_storage().data_ptr() for t in model.state_dict(keep_vars=True).values()}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._held.append(tensor.detach())
            self.nbytes += storage.nbytes()
        return tensor


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _peak_from_here(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
