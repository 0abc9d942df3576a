"""muP: parametrisations under which values tuned on a small network carry over to a large one.

A `Plan` is pure data, computed from configurations (or modules) on the meta device. Initialisation, the plain floats of
the forward pass and the optimizer's groups read the one table; the modules know nothing of it, so it works unchanged
under torch.compile, FSDP2, averaging, copying and saving.

>>> plan = mup.plan(target, base)                                     # doctest: +SKIP
>>> model = mup.fresh(plan, target, base, generator)                  # doctest: +SKIP
>>> torch.optim.AdamW(plan.groups(model, lr=1e-3, weight_decay=0.1))  # doctest: +SKIP

Source: Tensor Programs V (arXiv 2203.03466); CompleteP (arXiv 2505.01618) for depth; muP for diffusion transformers
(arXiv 2505.15270).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from mmdiff.errors import ConfigError
from mmdiff.models import registry
from mmdiff.scale.coordinates import CoordReport, coord_check
from mmdiff.scale.family import Scaling, scaling
from mmdiff.scale.initialisers import Recipe, chosen, draw_
from mmdiff.scale.roles import Parameter, Pattern, role_of
from mmdiff.scale.rows import Decay, Optimizer, Role, Row, Rule

__all__ = ["CoordReport", "Plan", "coord_check", "fold", "fresh", "plain_name", "plan", "unfold", "with_scales"]

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
"""What compilers and parallel wrappers put into names."""

_BLOCK = re.compile(r"(^|\.)(layers|blocks|singles|transformer_blocks|single_transformer_blocks)\.\d+\.")
"""Parts that depth repeats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How every parameter of a network is initialised and trained.

    Attributes:
        rows: One per parameter.
        rule: The parametrisation.
        scales: Fields of the network's configuration -> plain floats of its forward pass.
    """

    rows: tuple[Row, ...]
    rule: Rule
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The row of a parameter, by any of its names, wrappers included.

        Raises:
            ConfigError: The plan has none.
        """
        plain = plain_name(name)
        found = next((r for r in self.rows if plain == r.name or plain in r.aliases), None)
        if found is None:
            raise ConfigError(f"the plan has no parameter {plain}; it was made for another network")
        return found

    def groups(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float = 0.0,
        optimizer: Optimizer = "adamw",
        decay: Decay = "independent",
        eps: float | None = None,
        no_decay: Sequence[str] = (),
        roles: Sequence[Role] | None = None,
        names: Iterable[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Ordinary parameter groups for an optimizer of PyTorch; one per distinct setting.

        A group carries ``name`` for logs and ``factor``, its rate over ``lr``: a schedule that sets rates must
        multiply by it.

        Args:
            model: The network, wrapped or not; frozen parameters are left out.
            lr: Learning rate tuned on the base.
            weight_decay: Tuned on the base.
            optimizer: Whose rules; ``muon`` takes hidden matrices alone.
            decay: See `mmdiff.scale.rows.Decay`.
            eps: Adam's epsilon, scaled with the gradients' size; None leaves the optimizer's own.
            no_decay: Roles and patterns of names without decay.
            roles: Only parameters of these; default all (for ``muon`` those it is defined for).
            names: Only these; default all.

        Raises:
            ConfigError: A parameter is not in the plan, has another shape, or the optimizer has no rule for it.
        """
        wanted = None if names is None else {plain_name(n) for n in names}
        chosen = ("hidden",) if roles is None and optimizer == "muon" else roles
        found: dict[tuple[float, ...], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            row = self.row(name)
            if tuple(parameter.shape) != row.shape:
                raise ConfigError(f"{row.name} is {list(parameter.shape)}, the plan was made for {list(row.shape)}")
            skipped = wanted is not None and not wanted & {row.name, *row.aliases}
            if not parameter.requires_grad or skipped or (chosen is not None and row.role not in chosen):
                continue
            by = row.factors(optimizer, decay)
            free = any(row.role == p or fnmatchcase(row.name, p) for p in no_decay)
            group = {"lr": lr * by.lr, "weight_decay": 0.0 if free else weight_decay * by.decay, "factor": by.lr}
            if eps is not None:
                group["eps"] = eps * by.eps
            label = f"{row.role} lr x{by.lr:.4g}"
            found.setdefault(tuple(group.values()), {"params": [], **group, "name": label})["params"].append(parameter)
        return list(found.values())

    @torch.no_grad()
    def init_(
        self,
        model: nn.Module,
        generator: torch.Generator | None = None,
        *,
        recipe: Recipe | None = None,
        like: nn.Module | None = None,
        zero_readout: bool = False,
    ) -> nn.Module:
        """Give a fresh network the scales of the plan.

        Args:
            model: The network; changed in place.
            generator: Draws, with ``recipe``.
            recipe: Initialisers; a parameter that none fits keeps its values.
            like: Or: the base with fresh weights of its own; every parameter of ``model`` is rescaled to the base's
                spread times its factor. Parameters without spread (zeros, gains) stay.
            zero_readout: Set the readouts (of a tied one, the norm in front of it) to zero, their value at infinite
                width.

        Returns:
            ``model``.

        Raises:
            ConfigError: Not exactly one of ``recipe`` (with a generator) and ``like``.
        """
        if (recipe is None) == (like is None) or (recipe is not None and generator is None):
            raise ConfigError("give a recipe with a generator, or a base network to be like")
        small = {} if like is None else dict(like.named_parameters())
        for name, parameter in model.named_parameters():
            row = self.row(name)
            if zero_readout and (row.role == "output" or row.front):
                parameter.zero_()
            elif recipe is not None and generator is not None and (initialiser := chosen(recipe, row)) is not None:
                draw_(parameter, initialiser, row, generator)
            elif row.role == "vector" and row.fold != 1:
                parameter.mul_(row.fold)
            elif like is not None and (spread := _spread(parameter)) and (before := _spread(small[name])):
                parameter.mul_(before * row.init / spread)
        return model

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`, JSON's lists included."""
        rows: list[dict[str, Any]] = [
            {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()} for row in tree["rows"]
        ]
        return cls(rows=tuple(Row(**row) for row in rows), rule=tree["rule"], scales=dict(tree["scales"]))

    def table(self, optimizer: Optimizer = "adamw", decay: Decay = "independent") -> list[dict[str, Any]]:
        """One record per parameter: ``parameter shape role fan_in init lr decay forward``, relative to the base."""
        out = []
        for row in self.rows:
            by = row.factors("adamw" if optimizer == "muon" and row.role != "hidden" else optimizer, decay)
            grown = 1.0 if row.role in ("input", "tied") else row.fan_in_ratio
            kinds = {"shape": list(row.shape), "role": row.role, "fan_in": grown, "init": row.init}
            out.append({"parameter": row.name, **kinds, "lr": by.lr, "decay": by.decay, "forward": row.forward})
        return out

    def __str__(self) -> str:
        rows = self.table()
        width = max(len(r["parameter"]) for r in rows)
        head = f"{'parameter':<{width}} {'role':<7} {'shape':<18}" + "".join(f"{c:>9}" for c in _COLUMNS)
        lines = [
            f"{r['parameter']:<{width}} {r['role']:<7} {'x'.join(map(str, r['shape'])):<18}"
            + "".join(f"{r[c]:>9.4g}" for c in _COLUMNS)
            for r in rows
        ]
        scales = ", ".join(f"{k} {v:.4g}" for k, v in self.scales.items()) or "none"
        return "\n".join([f"rule {self.rule}; forward scales: {scales}", head, *lines])


_COLUMNS = ("fan_in", "init", "lr", "decay", "forward")


def plan(
    target: Any,
    base: Any,
    *,
    probe: Any = None,
    rule: Rule = "mup",
    roles: Mapping[str, Role] | None = None,
    branches: Sequence[str] = (),
    carriers: Sequence[str] = (),
    multiplier: bool | None = None,
    output_mult: float = 1.0,
    alpha: float = 1.0,
) -> Plan:
    """The plan for a network that is a wider, or deeper, form of a base.

    Args:
        target: A configuration of the house, or a foreign module (on the meta device, to save memory).
        base: The same at the size at which values are tuned.
        probe: The same with every width different from the base's. Configurations of the house bring their own;
            a foreign module needs it, for otherwise nobody knows what would grow.
        rule: See `mmdiff.scale.rows.Rule`.
        roles: Name or pattern -> role, where shapes do not tell; they win over all else.
        branches: Patterns of modules that end a residual branch, for ``depth`` in a foreign module.
        carriers: Patterns of norms in front of a tied readout, whose gain and bias then carry its factor.
        multiplier: Whether the network multiplies the input of its readouts by ``scales["readout_scale"]``. Default:
            configurations that have this field do, everything else gets the form without multipliers, where the
            factor is folded into initialisation and rate.
        output_mult: Tunable factor of the readouts.
        alpha: Exponent of the depth rule: 1 as CompleteP, 1/2 as depth-muP.

    Raises:
        ConfigError: The target is no scaling of the base, a role is unknown, or a tied readout has no multiplier.
    """
    nets = _foreign(target, base, probe) if isinstance(target, nn.Module) else scaling(target, base, probe)
    pattern = Pattern(
        roles={**nets.pattern.roles, **(roles or {})},
        branches=(*nets.pattern.branches, *branches),
        carriers=(*nets.pattern.carriers, *carriers),
        fronts=nets.pattern.fronts,
    )
    multiplies = "readout_scale" in nets.fields if multiplier is None else multiplier
    shrink = nets.depth_ratio**-alpha if rule == "depth" else 1.0
    folds = "residual_scale" not in nets.fields
    if shrink != 1 and folds and not pattern.branches:
        raise ConfigError("the depth rule scales residual branches: say which modules end one, branches=('*.out',)")
    rows = []
    for places, shape, trainable in _parameters(nets):
        row = _row(places, shape, trainable, pattern, nets, rule)
        branch = shrink if folds and _ends_branch(row.name, pattern.branches) else 1.0
        rows.append(_with_factors(dataclasses.replace(row, folded=not multiplies, branch=branch), output_mult, alpha))
    scales = _scales(rows, nets, multiplies, shrink)
    if not multiplies:
        rows = _carried(rows, pattern.carriers)
    rows = _fronted(rows, (*pattern.carriers, *pattern.fronts))
    return Plan(rows=tuple(rows), rule=rule, scales=scales)


def fresh(
    the_plan: Plan, target: Any, base: Any, generator: torch.Generator, *, zero_readout: bool = True
) -> nn.Module:
    """A network of the house with fresh weights under a plan: its own initialisation, with the base's scales.

    Args:
        the_plan: Of ``target`` and ``base``.
        target: Its configuration.
        base: That of the base.
        generator: Draws the weights, of the base (which is built for comparison) the same ones.
        zero_readout: See `Plan.init_`. A base that is to be compared must be built likewise.
    """
    state = generator.get_state()
    model = registry.build(with_scales(target, the_plan), generator=generator)
    if the_plan.rule == "sp" and not zero_readout:
        return model
    after = generator.get_state()
    generator.set_state(state)
    # Under the standard rule the network is like itself.
    small = target if the_plan.rule == "sp" else scaling(target, base, None).base_config
    like = registry.build(small, generator=generator)
    generator.set_state(after)
    return the_plan.init_(model, like=like, zero_readout=zero_readout)


def with_scales(config: Any, the_plan: Plan) -> Any:
    """A configuration of the house with the plan's floats of the forward pass."""
    return dataclasses.replace(config, **the_plan.scales)


def fold(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Write forward multipliers into weights, for programs that know of none.

    Args:
        state: State dict of a network with multipliers.
        scales: Name of a readout's weight -> factor of its input. The bias is outside and stays.
    """
    return {name: t * scales[name] if name in scales else t for name, t in state.items()}


def unfold(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The inverse of `fold`; arguments as there."""
    return fold(state, {name: 1 / scale for name, scale in scales.items()})


def plain_name(name: str) -> str:
    """A parameter's name without what compilers and parallel wrappers put into it.

    >>> plain_name("_orig_mod.module.blocks.0.mlp.fc1.weight")
    'blocks.0.mlp.fc1.weight'
    """
    return _WRAPPERS.sub("", name)


def _foreign(target: nn.Module, base: Any, probe: Any) -> Scaling:
    if not isinstance(base, nn.Module) or not isinstance(probe, nn.Module):
        raise ConfigError(
            "a foreign module needs the base and a probe as modules too: the probe is the base with every width "
            "different, and tells which dimensions grow"
        )
    return Scaling(target=target, base=base, probe=probe)


def _parameters(nets: Scaling) -> Iterable[tuple[list[Parameter], tuple[int, ...], bool]]:
    """Every parameter once: all its places, its shape, whether it is trained."""
    target, base, probe = (dict(m.named_parameters(remove_duplicate=False)) for m in nets.modules)
    for first, second, what in ((target, base, "base"), (base, probe, "probe")):
        if odd := set(first) ^ set(second):
            raise ConfigError(f"the {what} has other parameters than the network it goes with: {sorted(odd)[:5]}")
    places: dict[int, list[Parameter]] = {}
    for name, parameter in target.items():
        owner, _, attribute = name.rpartition(".")
        grows = _growing(name, base[name].shape, probe[name].shape, parameter.shape)
        place = Parameter(name, nets.target.get_submodule(owner), attribute, grows)
        places.setdefault(id(parameter), []).append(place)
    for found in places.values():
        parameter = target[found[0].name]
        yield found, tuple(parameter.shape), parameter.requires_grad


def _growing(name: str, base: Sequence[int], probe: Sequence[int], target: Sequence[int]) -> tuple[int | None, ...]:
    if not len(base) == len(probe) == len(target):
        raise ConfigError(f"{name} has {len(base)} dimensions in the base and {len(target)} in the target")
    out: list[int | None] = []
    for axis, (b, p, t) in enumerate(zip(base, probe, target, strict=True)):
        if b == p and t != b:
            raise ConfigError(
                f"{name}: dimension {axis} is {t} in the target and {b} in the base, but does not grow with the width: "
                "the target is not a scaling of its base"
            )
        out.append(None if b == p else b)
    return tuple(out)


def _row(
    places: list[Parameter], shape: tuple[int, ...], trainable: bool, pattern: Pattern, nets: Scaling, rule: Rule
) -> Row:
    first = places[0]
    kinds = {type(p.owner) for p in places}
    tied = nn.Embedding in kinds and nn.Linear in kinds
    role = "tied" if tied else role_of(first, pattern.roles)
    matrix = role in ("hidden", "output") and len(shape) > 1
    return Row(
        name=first.name,
        role=role,
        shape=shape,
        base=first.base,
        aliases=tuple(p.name for p in places[1:]),
        trainable=trainable,
        # A bare matrix that is said to be one is stored (out, in), as those of PyTorch's attention are.
        fan_in_axis=1 if matrix and first.fan_in_axis is None else first.fan_in_axis,
        rule=rule,
        block=bool(_BLOCK.search(first.name)),
        model_ratio=nets.width_ratio,
        depth_ratio=nets.depth_ratio,
    )


def _ends_branch(name: str, branches: Sequence[str]) -> bool:
    module = name.rpartition(".")[0]
    return any(fnmatchcase(module, pattern) for pattern in branches)


def _carried(rows: list[Row], carriers: Sequence[str]) -> list[Row]:
    """The factor of a tied readout, given to the norm in front of it."""
    tied = next((row for row in rows if row.role == "tied"), None)
    norms = {row.name for row in rows if row.role == "vector" and _ends_branch(row.name, carriers)}
    if tied is None or (not norms and tied.forward == 1):
        return rows
    if not norms:
        raise ConfigError(_tied_question(tied))
    factor, shared = tied.forward, tied.name

    def moved(row: Row) -> Row:
        if row.name in norms:
            return dataclasses.replace(row, forward=factor)
        return dataclasses.replace(row, forward=1.0) if row.name == shared else row

    return [moved(row) for row in rows]


def _fronted(rows: list[Row], fronts: Sequence[str]) -> list[Row]:
    """The rows, those in front of a tied readout marked."""
    if not any(row.role == "tied" for row in rows):
        return rows
    return [dataclasses.replace(row, front=_ends_branch(row.name, fronts)) for row in rows]


def _tied_question(tied: Row) -> str:
    return (
        f"{tied.name} is both embedding and readout; the readout needs the factor {tied.forward:.4g}, which cannot be "
        "folded into a weight that is also an embedding: untie them, name the norm whose output it reads "
        "(carriers=('norm',)), or multiply the readout's input by plan.scales['readout_scale'] in the forward pass and "
        "say multiplier=True"
    )


def _with_factors(row: Row, output_mult: float, alpha: float) -> Row:
    """The row with its forward factor and its rate by depth."""
    depth_lr = row.depth_ratio ** (alpha - 1) if row.rule == "depth" and row.block else 1.0
    reads_out = row.rule != "sp" and row.role in ("output", "tied")
    return dataclasses.replace(row, forward=output_mult / row.width_ratio if reads_out else 1.0, depth_lr=depth_lr)


def _scales(rows: Sequence[Row], nets: Scaling, multiplies: bool, shrink: float) -> dict[str, float]:
    found = {row.forward for row in rows if row.role in ("output", "tied")}
    if multiplies and len(found) > 1:
        raise ConfigError(f"the readouts need different factors {sorted(found)}, the network takes one readout_scale")
    scales = {"readout_scale": found.pop()} if multiplies and found else {}
    if "residual_scale" in nets.fields:
        scales["residual_scale"] = shrink
    return scales if nets.attention_scale is None else {**scales, "attention_scale": nets.attention_scale}


def _spread(parameter: Tensor) -> float:
    """Standard deviation; 0 for what has none."""
    return float(parameter.float().std()) if parameter.numel() > 1 else 0.0
