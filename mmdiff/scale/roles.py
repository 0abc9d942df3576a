"""Which parameter plays which role: from the kind of layer and the dimensions that grow, never from a guess.

What shapes cannot tell is said in `FAMILIES`, a few patterns per family of the house, or by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mmdiff.errors import ConfigError
from mmdiff.scale.rows import ROLES, Role

__all__ = ["FAMILIES", "Parameter", "Pattern", "family_pattern", "role_of"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """What shapes do not tell about a family.

    Attributes:
        roles: Name or pattern with ``*`` -> role. The last one that fits decides.
        branches: Patterns of the modules that end a residual branch.
        carriers: Patterns of norms whose output goes straight into a tied readout: their gain and bias can carry its
            factor where the forward pass takes none.
        fronts: Patterns of modules that make a tied readout start at zero when they do; ``carriers`` are among them.
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    branches: tuple[str, ...] = ()
    carriers: tuple[str, ...] = ()
    fronts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """A parameter where it stands in a network.

    Attributes:
        name: In the state dict.
        owner: The module that holds it.
        attribute: Its name there.
        base: Size of each dimension in the base; None where it does not grow.
    """

    name: str
    owner: nn.Module
    attribute: str
    base: tuple[int | None, ...]

    @property
    def growing(self) -> tuple[int, ...]:
        """The axes that grow with the width."""
        return tuple(axis for axis, size in enumerate(self.base) if size is not None)

    @property
    def fan_in_axis(self) -> int | None:
        """Axis of the fan-in of a weight; an embedding's is its vocabulary's, which is axis 1 for initialisers."""
        if self.attribute != "weight" or len(self.base) < 2:
            return None
        return 0 if isinstance(self.owner, _TRANSPOSED) else 1


def _llada(config: Any, prefix: str = "") -> Pattern:
    head: dict[str, Role] = {f"{prefix}lm_head.weight": "output"}
    tied: dict[str, Role] = {f"{prefix}embed_tokens.weight": "tied"}
    return Pattern(
        roles=tied if config.tied else head,
        branches=(f"{prefix}layers.*.self_attn.o_proj", f"{prefix}layers.*.mlp.down_proj"),
        carriers=(f"{prefix}norm",) if config.tied else (),
    )


def _llada_v(config: Any) -> Pattern:
    return _llada(config.language, "language.")


def _unified(config: Any) -> Pattern:
    language = _llada_v(config)
    head = "codes.head.weight" if config.latents is None else "latents.head.final_layer.linear.weight"
    return replace(language, roles={**language.roles, head: "output"})


def _maskgit(config: Any) -> Pattern:
    roles: dict[str, Role] = {"net.tok_emb.weight": "tied", "*.in_proj_weight": "hidden"}
    if config.variant != "bert":
        # Small widths share one hidden size, so shapes do not tell. The last norm is modulated by the class: it can
        # start at zero, but not carry the readout's factor.
        return Pattern(
            roles={**roles, "*.ff.w?.weight": "hidden"},
            branches=("net.transformer.layers.*.attn.wo", "net.transformer.layers.*.ff.w2"),
            fronts=("net.last_norm.norm_final", "net.last_norm.mlp.1"),
        )
    return Pattern(
        roles=roles,
        branches=("net.transformer.layers.*.0.fn.mha.out_proj", "net.transformer.layers.*.1.fn.net.3"),
        carriers=("net.last_layer.4",),
    )


FAMILIES: dict[str, Callable[[Any], Pattern]] = {
    "llada": _llada,
    "llada_v": _llada_v,
    "unified": _unified,
    "mmada": _llada_v,
    "lumina": _llada_v,
    "emigm": lambda config: Pattern(roles={"diffloss.net.final_layer.linear.weight": "output"}),
    "maskgit": _maskgit,
    "dit": lambda config: Pattern(roles={"final_layer.linear.weight": "output"}),
    "mmdit": lambda config: Pattern(roles={"readout.weight": "output"}),
    "masked_mmdit": lambda config: Pattern(roles={"codes.out.weight": "output", "text_readout.weight": "output"}),
}
"""Family -> its pattern. A family without a row has none to say."""


def family_pattern(config: Any) -> Pattern:
    """The pattern of a configuration's family."""
    return FAMILIES.get(getattr(config, "type", ""), lambda config: Pattern())(config)


def role_of(parameter: Parameter, rules: Mapping[str, Role]) -> Role:
    """The role of a parameter: of the last rule that fits, else of its layer.

    Raises:
        ConfigError: More than two dimensions grow, a rule names no role, or the layer does not tell.
    """
    for pattern, role in reversed(list(rules.items())):
        if fnmatchcase(parameter.name, pattern):
            if role not in ROLES:
                raise ConfigError(f"roles: {pattern!r} is {role!r}; one of {', '.join(ROLES)}")
            return role
    if len(parameter.growing) > 2:
        raise ConfigError(f"{parameter.name}: {len(parameter.growing)} dimensions grow with the width, at most 2 can")
    found = _of_shape(parameter) or _of_layer(parameter)
    if found is None:
        raise ConfigError(_question(parameter))
    return found


def _of_shape(parameter: Parameter) -> Role | None:
    """Roles that the shape alone tells."""
    if not parameter.growing:
        return "scalar"
    # A table with a leading axis of 1 is added to what flows through; it is multiplied with nothing.
    bare = not isinstance(parameter.owner, (nn.Linear, nn.Embedding, *_CONVOLUTIONS, *_TRANSPOSED))
    added = bare and parameter.base[0] is None and len(parameter.growing) == 1 and _leads_with_one(parameter)
    return "vector" if len(parameter.base) == 1 or added else None


def _leads_with_one(parameter: Parameter) -> bool:
    return getattr(parameter.owner, parameter.attribute).shape[0] == 1


def _of_layer(parameter: Parameter) -> Role | None:
    """Roles that the kind of layer tells; a possible readout is none of them."""
    growing = parameter.growing
    if parameter.attribute != "weight":
        return None
    if isinstance(parameter.owner, nn.Embedding):
        return "input" if growing == (1,) else None
    if isinstance(parameter.owner, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
        if growing == (0, 1):
            return "hidden"
        fan_out = 1 if isinstance(parameter.owner, _TRANSPOSED) else 0
        return "input" if growing == (fan_out,) else None
    return None


def _question(parameter: Parameter) -> str:
    kind = type(parameter.owner).__name__
    where = ", ".join("grows" if size is not None else "fixed" for size in parameter.base)
    if isinstance(parameter.owner, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED)):
        why = (
            "a readout, or a projection whose output was held fixed while the width grew (key/value heads, say): "
            f"say roles={{'{parameter.name}': 'output'}} or 'hidden'"
        )
    else:
        why = f"its role cannot be inferred: say roles={{'{parameter.name}': ...}} with one of {', '.join(ROLES)}"
    return f"{parameter.name} of a {kind} ({where}): {why}"
