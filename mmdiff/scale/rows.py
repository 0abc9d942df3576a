"""One parameter under a parametrisation: its role, which of its dimensions grow, and the factors that follow.

Pure data and arithmetic; nothing here knows a network.

Source: Tensor Programs V (arXiv 2203.03466), tables 3 and 8; CompleteP (arXiv 2505.01618); weight decay as in
arXiv 2405.13698, which keeps the product of rate and decay; the rule for Muon is that of its published code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from mmdiff.errors import ConfigError

__all__ = ["OPTIMIZERS", "ROLES", "Decay", "Factors", "Optimizer", "Role", "Row", "Rule"]

Role = Literal["input", "hidden", "output", "tied", "vector", "scalar"]
"""What a parameter is.

``input``: from a finite dimension into the width, embeddings included; ``hidden``: from width to width; ``output``: a
readout, from the width to a finite dimension; ``tied``: an embedding that is also the readout; ``vector``: one growing
dimension and no fan-in (biases, gains, position tables); ``scalar``: nothing grows.
"""

Rule = Literal["sp", "mup", "depth"]
"""``sp``: everything as in the base; ``mup``: by width; ``depth``: by width and depth (CompleteP)."""

Optimizer = Literal["adamw", "adam", "sgd", "muon"]
Decay = Literal["independent", "coupled"]
"""``independent``: rate times decay stays as in the base; ``coupled``: the decay coefficient does."""

ROLES: tuple[Role, ...] = get_args(Role)
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)


@dataclass(frozen=True)
class Factors:
    """Of one parameter under one optimizer, relative to the base.

    Attributes:
        lr: Of the learning rate.
        decay: Of the weight decay.
        eps: Of Adam's epsilon, if epsilon is scaled.
    """

    lr: float
    decay: float
    eps: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """A parameter.

    Attributes:
        name: In the state dict.
        role: See `Role`.
        shape: Of the target.
        base: Size of each dimension in the base; None where it does not grow.
        aliases: Further names of a shared parameter.
        trainable: Whether it is trained.
        fan_in_axis: Axis of the fan-in; None where there is none (vectors and scalars).
        rule: The parametrisation.
        forward: Factor of the input of a readout, in the network's forward pass or folded into the weight.
        folded: The factors of the forward pass are folded into initialisation and rate.
        branch: Factor of the residual branch that ends here, folded likewise; 1 where it is in the forward pass.
        front: Whether it belongs to the norm in front of a tied readout, which starts at zero with it.
        block: Whether it lies in a block that depth repeats.
        depth_lr: Factor of the rate by depth.
        model_ratio: Width of the target over that of the base, of the whole network.
        depth_ratio: The same for depth.
    """

    name: str
    role: Role
    shape: tuple[int, ...]
    base: tuple[int | None, ...]
    aliases: tuple[str, ...] = ()
    trainable: bool = True
    fan_in_axis: int | None = None
    rule: Rule = "mup"
    forward: float = 1.0
    folded: bool = False
    branch: float = 1.0
    front: bool = False
    block: bool = False
    depth_lr: float = 1.0
    model_ratio: float = 1.0
    depth_ratio: float = 1.0

    @property
    def growing(self) -> tuple[int, ...]:
        """The axes that grow with the width."""
        return tuple(axis for axis, size in enumerate(self.base) if size is not None)

    def ratio(self, axis: int) -> float:
        """Size over base size of an axis; 1 where it does not grow."""
        size = self.base[axis]
        return 1.0 if size is None else self.shape[axis] / size

    @property
    def width_ratio(self) -> float:
        """Ratio of the last growing axis; 1 without one."""
        return self.ratio(self.growing[-1]) if self.growing else 1.0

    @property
    def fan_in_ratio(self) -> float:
        """Ratio of the fan-in; 1 where there is none."""
        return 1.0 if self.fan_in_axis is None else self.ratio(self.fan_in_axis)

    @property
    def fan_out_ratio(self) -> float:
        """Ratio of the other of the first two axes."""
        return 1.0 if self.fan_in_axis is None else self.ratio(1 - self.fan_in_axis)

    @property
    def fold(self) -> float:
        """The factor that stands in the weight instead of in the forward pass."""
        return self.branch * (self.forward if self.folded else 1.0)

    @property
    def init(self) -> float:
        """Standard deviation over that of the base, for a rule that gives the base's value at every width."""
        if self.rule == "sp":
            return 1.0
        by_width = self.fan_in_ratio**-0.5 if self.role == "hidden" else 1.0
        return by_width * self.fold

    def factors(self, optimizer: Optimizer, decay: Decay = "independent") -> Factors:
        """Rate and decay under an optimizer.

        Raises:
            ConfigError: Muon with a parameter that is no hidden matrix.
        """
        if self.rule == "sp":
            return Factors(1.0, 1.0)
        if optimizer == "muon":
            lr = self._muon()
        elif optimizer == "sgd":
            lr = self._sgd() * self.fold**2
        else:
            lr = (1 / self.fan_in_ratio if self.role == "hidden" else 1.0) * self.fold
        lr *= self.depth_lr
        # Entries of a gradient shrink as the readout's factor; what is folded into a weight grows back in it.
        eps = 1 / self.model_ratio / (self.depth_ratio if self.block and self.rule == "depth" else 1.0) / self.fold
        return Factors(lr, 1 / lr if decay == "independent" else 1.0, eps)

    def _sgd(self) -> float:
        if self.role == "hidden":
            return self.fan_out_ratio / self.fan_in_ratio
        return self.width_ratio

    def _muon(self) -> float:
        if self.role != "hidden" or len(self.shape) != 2:
            raise ConfigError(
                f"{self.name} ({self.role}, {list(self.shape)}) is no hidden matrix; Muon is defined for those alone: "
                "give the others to AdamW with roles=('input', 'output', 'tied', 'vector', 'scalar')"
            )
        return math.sqrt(self.fan_out_ratio / self.fan_in_ratio) * self.fold
