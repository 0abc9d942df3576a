"""How much memory a run needs, found by one pass forward and backward that is watched tensor by tensor.

On the meta device nothing is allocated: weights and activations have shapes only, while ids and masks are real, so
that a batch of a real run takes the path it will take. So an 8B model can be looked at on a laptop.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.training import optim
from mmdiff.training.finetune import attach
from mmdiff.training.loop import TrainConfig
from mmdiff.training.microbatch import split
from mmdiff.training.objective import Objective
from mmdiff.training.recompute import recomputing

__all__ = ["Estimate", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Parameters, losses of one batch, and memory in bytes.

    Attributes:
        parameters: Number of weights, those of an adapter included.
        trainable: Those that are trained.
        rows: Rows of the part of a batch that was run.
        length: Slots of each.
        losses: Losses of that part, per task and in all (``loss``); empty on the meta device.
        weights: Weights and buffers.
        gradients: Gradients of trainable weights.
        optimizer: The two moments of AdamW.
        average: The averaged weights, if there are any.
        activations: The most memory that tensors of the pass forward and backward had at any moment, but for the next.
        logits: The same of tensors whose last axis is the vocabulary.
    """

    parameters: int
    trainable: int
    rows: int
    length: int
    losses: dict[str, float]
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Sum of the memory: an upper bound, since not all parts are at their most at the same moment."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.logits


def estimate(
    model: nn.Module,
    objective: Objective,
    batch: Batch,
    config: TrainConfig,
    device: torch.device | str = "cpu",
    *,
    weights: int | None = None,
) -> Estimate:
    """Run one part of a batch forward and backward and add up what a run needs.

    Args:
        model: Its gradients are cleared afterwards; its weights are not touched. On the meta device nothing is
            computed.
        objective: What is learnt.
        batch: A batch of the run; with ``config.accumulate`` only its first part is used.
        config: How the run trains; an adapter is attached if there is to be one.
        device: Where; without meaning for a model on the meta device.
        weights: Bytes of the weights if they will be others than the model's, such as quantised ones.

    Raises:
        ConfigError: The optimizer's or the adapter's configuration does not fit the model.
    """
    meta = all(p.is_meta for p in model.parameters())
    place = torch.device("meta" if meta else device)
    if config.lora is not None:
        attach(model, config.lora, config.seed)
    model.to(place).train()
    optim.build(model, config.optim)
    trained = list(optim.trainable(model).values())
    part = split(batch, config.accumulate)[0].to("cpu" if meta else place)
    watch, numbers = _Watch(model, trained), {}
    # Within the backward pass no mode sees what recomputed blocks call, so they enter it once more.
    attention = _FusedAttention if meta else nullcontext
    with recomputing(model, config.gradient_checkpointing, again=attention), attention(), watch:
        with optim.arithmetic(torch.device("cpu") if meta else place, config.autocast):
            losses = objective(model, part, rng.generator(config.seed, "objective", 0))
        if losses.total.requires_grad:
            losses.total.backward()
        if not meta:
            means = {name: float(total) / count for name, (total, count) in losses.terms.items() if count}
            numbers = {"loss": float(losses.total.detach()), **means}
    watch.close()
    model.zero_grad(set_to_none=True)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    return Estimate(
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in trained),
        rows=len(part),
        length=part.ids.shape[1],
        losses=numbers,
        weights=_nbytes(model.state_dict(keep_vars=True).values()) if weights is None else weights,
        gradients=gradients,
        optimizer=2 * gradients,
        average=4 * sum(p.numel() for p in trained) if config.ema_halflife_samples else 0,
        activations=watch.most_others,
        logits=watch.most_logits,
    )


class _Watch(TorchDispatchMode):
    """Knows how much memory the tensors of a pass have at any moment, gradients of parameters left out.

    Args:
        model: Its own memory is not counted.
        trained: Parameters that get gradients.
    """

    def __init__(self, model: nn.Module, trained: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self._classes = _classes(model)
        tensors = [*model.parameters(), *model.buffers()]
        self._own = {t.untyped_storage()._cdata for t in tensors}
        self._sizes = {t.numel() for t in tensors}
        self._live: dict[int, tuple[int, bool]] = {}
        self._now = {False: 0, True: 0}
        self._most = {False: 0, True: 0}
        self._hooks = [p.register_post_accumulate_grad_hook(self._is_gradient) for p in trained]

    @property
    def most_others(self) -> int:
        """The most bytes of tensors that are no logits."""
        return self._most[False]

    @property
    def most_logits(self) -> int:
        """The most bytes of logits, of their gradients, and of what is computed from them class by class."""
        return self._most[True]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given: tuple[Any, Any] = (args, dict(kwargs or {}))
        if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(given)):
            given = tree_map(_as_meta, (_whole_indices(func, given[0]), given[1]))
        out = func(*given[0], **given[1])
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._own:
            return
        # The gradient of a head may pass as [D, V].
        logits = tensor.ndim >= 2 and tensor.shape[-1] in self._classes and tensor.numel() not in self._sizes
        self._live[key] = (storage.nbytes(), logits)
        self._now[logits] += storage.nbytes()
        self._most[logits] = max(self._most[logits], self._now[logits])
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        nbytes, logits = self._live.pop(key, (0, False))
        self._now[logits] -= nbytes

    def _is_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._drop(parameter.grad.untyped_storage()._cdata)


class _FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch's attention takes its slow path, which holds all scores; real devices fuse it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _AttentionShape.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _AttentionShape(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output, and one number per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _as_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) and not leaf.is_meta else leaf


def _whole_indices(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Masks used as indices become numbers while their values are still known: results have that many rows."""
    if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
        return args
    whole: list[Tensor | None] = []
    for index in args[1]:
        known = isinstance(index, Tensor) and not index.is_meta and index.dtype == torch.bool
        whole += list(index.nonzero(as_tuple=True)) if known else [index]
    return (args[0], whole, *args[2:])


def _classes(model: Any) -> set[int]:
    layout = model.layout() if hasattr(model, "layout") else None
    sizes = {layout.vocab_size, layout.codebook} if layout else {getattr(model.config, "vocab_size", 0)}
    return {n for n in sizes if n > 1}


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
