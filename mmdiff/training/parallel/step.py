"""One forward pass of a network and its objective, alone, in DDP or under FSDP2.

Networks are called by many methods (to embed, to read, to score), so what is wrapped is not the network but the whole
pass. Losses are sums divided by numbers of summands over the global batch, and gradients of processes are added up, so
that a step is the same for any number of processes and of parts.

Source: DDP as in Li et al. (arXiv 2006.15704), FSDP2 as in PyTorch's ``fully_shard``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mmdiff import rng
from mmdiff.batch import Batch
from mmdiff.config import Field, config
from mmdiff.errors import ConfigError
from mmdiff.training.losses import Losses
from mmdiff.training.parallel.group import Group
from mmdiff.training.recompute import blocks

__all__ = ["DdpConfig", "FsdpConfig", "ParallelConfig", "Pass", "Step", "spread"]

_TINY = 1e-9
"""Below any number of summands: a sum without summands is 0."""


@config
class DdpConfig:
    """Every process holds all weights; gradients are added up."""

    type: Literal["ddp"] = "ddp"
    """Name of the strategy."""
    bucket_mib: int = Field(25, gt=0)
    """Gradients are sent in pieces of about this size, while others are still computed."""


@config
class FsdpConfig:
    """Weights, gradients and optimizer are spread over the processes, block by block (FSDP2)."""

    type: Literal["fsdp"] = "fsdp"
    """Name of the strategy."""
    dtype: Literal["bfloat16"] | None = None
    """Dtype in which weights travel and blocks compute; gradients are added up in float32. Null: the weights' own."""
    free: bool = True
    """Give up the others' weights of a block after its forward pass; they travel again for the backward pass."""
    replicas: int = Field(1, ge=1)
    """Groups of processes that hold the same; within a group weights are spread (HSDP)."""


ParallelConfig = Annotated[DdpConfig | FsdpConfig, Field(discriminator="type")]


@dataclass(frozen=True)
class Pass:
    """How the pass of a part is run.

    Attributes:
        run: Arguments and result of `Step.forward`.
        apart: Within it gradients stay with their process; for all parts of a batch but the last.
        settle: Called after the last part: parameters that no process's batch reached have no gradient, as with one.
    """

    run: Callable[..., tuple[Tensor, dict[str, tuple[Tensor, int]]]]
    apart: Callable[[], AbstractContextManager[Any]] = nullcontext
    settle: Callable[[], None] = lambda: None


class Step(nn.Module):
    """The pass of one part of a batch.

    Args:
        model: The network.
        objective: What is learnt.
    """

    def __init__(self, model: nn.Module, objective: Callable[[nn.Module, Batch, rng.Source], Losses]) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.touched: list[tuple[nn.Module, str]] = []
        self.reached: set[int] = set()
        self.looks = False

    def forward(
        self, part: Batch, source: rng.Source, totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, tuple[Tensor, int]]]:
        """This part's share of the loss of the global batch, and its terms for the log.

        Args:
            part: Rows.
            source: A generator per row.
            totals: Number of summands of each sum in the global batch.
        """
        losses = self.objective(self.model, part, source)
        sums = losses.sums if hasattr(self.objective, "counts") else {"rows": losses.total * len(part)}
        total = losses.total.new_zeros(())
        for name, value in sums.items():
            total = total + value / max(totals[name], _TINY)
        if self.looks:
            leaves = _leaves(total)
            self.reached |= {n for n, (m, name) in enumerate(self.touched) if id(getattr(m, name)) in leaves}
        for module, name in self.touched:
            # What processes share must have a gradient on each of them, if only of zeros.
            total = total + getattr(module, name).reshape(-1)[0] * 0
        return total, losses.terms


def spread(step: Step, spec: DdpConfig | FsdpConfig, group: Group, device: torch.device) -> Pass:
    """The pass for all processes of a group.

    Gradients are averaged over processes, as both strategies do: losses have to be multiplied by their number.

    Raises:
        ConfigError: The strategy does not fit the network or the number of processes.
    """
    if group.world == 1:
        return Pass(step)
    return _fsdp(step, spec, group, device) if isinstance(spec, FsdpConfig) else _ddp(step, spec)


def _ddp(step: Step, spec: DdpConfig) -> Pass:
    from torch.nn.parallel import DistributedDataParallel

    # One is enough for a backward pass to take place on every process; DDP itself fills in the rest.
    step.touched = _owned(step, lambda p: p.requires_grad)[:1]
    with warnings.catch_warnings():
        # Its new name came with a later torch than the oldest supported one.
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        outer = DistributedDataParallel(
            step, broadcast_buffers=False, find_unused_parameters=True, bucket_cap_mb=spec.bucket_mib
        )
    return Pass(outer, outer.no_sync)


def _fsdp(step: Step, spec: FsdpConfig, group: Group, device: torch.device) -> Pass:
    """The network's blocks one by one, everything else as one unit around the pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    world = group.world
    _check(step.model, spec, world)
    shape = (world,) if spec.replicas == 1 else (spec.replicas, world // spec.replicas)
    names = ("shard",) if spec.replicas == 1 else ("replicate", "shard")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    dtype = torch.bfloat16 if spec.dtype else None
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    units = _backbone(step.model)
    inside = {id(p) for unit in units for p in unit.parameters()}
    # What no unit holds may be left out by a batch (an image head, a tower), but never by one process alone.
    step.touched, step.looks = _owned(step, lambda p: p.requires_grad and id(p) not in inside), True
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=spec.free)
    outer: Any = fully_shard(step, mesh=mesh, mp_policy=policy, reshard_after_forward=False)

    @contextmanager
    def apart() -> Iterator[None]:
        outer.set_requires_gradient_sync(False)
        yield
        outer.set_requires_gradient_sync(True)

    def settle() -> None:
        anywhere = group.sum([float(n in step.reached) for n in range(len(step.touched))])
        for (module, name), count in zip(step.touched, anywhere, strict=True):
            if not count:
                getattr(module, name).grad = None
        step.reached.clear()

    return Pass(outer, apart, settle)


def _leaves(total: Tensor) -> set[int]:
    """Identities of the parameters that a result depends on."""
    todo: list[Any] = [total.grad_fn]
    seen, found = set[Any](), set[int]()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo += [after for after, _ in node.next_functions]
    return found


def _owned(step: nn.Module, wanted: Callable[[nn.Parameter], bool]) -> list[tuple[nn.Module, str]]:
    """Modules and names of parameters, tied ones once."""
    found: dict[int, tuple[nn.Module, str]] = {}
    for module in step.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if wanted(parameter):
                found.setdefault(id(parameter), (module, name))
    return list(found.values())


def _check(model: nn.Module, spec: FsdpConfig, world: int) -> None:
    if world % spec.replicas:
        raise ConfigError(f"train.parallel.replicas is {spec.replicas}, which does not divide {world} processes")
    packed = [name for name, p in model.named_parameters() if not p.is_floating_point()]
    if packed:
        raise ConfigError(
            f"train.parallel: quantised weights ({packed[0]} and others) cannot be spread; set train.parallel.type=ddp"
        )


def _backbone(model: nn.Module) -> list[nn.Module]:
    """Blocks of the class that holds most of the weights: those are run by every batch."""
    sizes: dict[type, int] = {}
    for block in blocks(model):
        sizes[type(block)] = sizes.get(type(block), 0) + sum(p.numel() for p in block.parameters())
    largest = max(sizes, key=lambda kind: sizes[kind], default=None)
    return [block for block in blocks(model) if type(block) is largest]
