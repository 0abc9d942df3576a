"""Base, probe and target of a family of the house: built on the meta device, checked to be scalings of each other."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmdiff import config as configs
from mmdiff.errors import ConfigError
from mmdiff.models import registry
from mmdiff.scale.roles import Pattern, family_pattern

__all__ = ["Scaling", "scaling", "size_of", "with_size"]

_FORWARD = ("readout_scale", "residual_scale", "attention_scale")
"""Fields that a plan sets; they are no part of the shape."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Three networks of one family.

    Attributes:
        target: The network to be trained.
        base: The one at which values were tuned, with as many blocks as the target.
        probe: The base with every width different.
        pattern: What shapes do not tell.
        base_config: Configuration of ``base``; None for foreign modules.
        fields: Which forward scales the configuration has.
        width_ratio: Width of the target over that of the base.
        depth_ratio: The same for depth.
        attention_scale: Factor of the attention logits, where the head dimension grew and the network takes one.
    """

    target: nn.Module
    base: nn.Module
    probe: nn.Module
    pattern: Pattern = dataclasses.field(default_factory=Pattern)
    base_config: Any = None
    fields: set[str] = dataclasses.field(default_factory=set)
    width_ratio: float = 1.0
    depth_ratio: float = 1.0
    attention_scale: float | None = None

    @property
    def modules(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """Target, base, probe."""
        return self.target, self.base, self.probe


def scaling(target: Any, base: Any, probe: Any = None) -> Scaling:
    """The three networks of a configuration and its base.

    Args:
        target: Configuration.
        base: Configuration.
        probe: Configuration; default the base at a width beyond its own and the target's.

    Raises:
        ConfigError: The target is no scaling of the base; the field is named.
    """
    if type(target) is not type(base):
        raise ConfigError(f"the target is a {target.type}, its base a {base.type}")
    depth = size_of(target, "depth")
    same_depth = with_size(base, depth=depth)
    _check(target, same_depth)
    _warn_rounded(target, same_depth)
    probe = _probe(target, same_depth) if probe is None else with_size(probe, depth=depth)
    built = (registry.build(config, device="meta") for config in (target, same_depth, probe))
    fields = {name for name in _FORWARD if hasattr(target, name)}
    names = ("target", "base", "probe")
    return Scaling(
        **dict(zip(names, built, strict=True)),
        pattern=family_pattern(target),
        base_config=same_depth,
        fields=fields,
        width_ratio=size_of(target, "width") / size_of(base, "width"),
        depth_ratio=depth / size_of(base, "depth"),
        attention_scale=_attention(target, same_depth, "attention_scale" in fields),
    )


def size_of(config: Any, what: str) -> int:
    """Width or depth of a configuration: its own, or that of its backbone or encoder.

    Raises:
        ConfigError: It has none.
    """
    places = (config, getattr(config, "language", None), getattr(config, "encoder", None))
    owner = next((place for place in places if hasattr(place, what)), None)
    if owner is None or not hasattr(config, f"with_{what}"):
        raise ConfigError(f"a {getattr(config, 'type', type(config).__name__)} has no {what} to scale")
    return getattr(owner, what)


def with_size(config: Any, *, width: int | None = None, depth: int | None = None) -> Any:
    """The configuration at another width or depth; at its own it is left as it is."""
    if width is not None and width != size_of(config, "width"):
        config = config.with_width(width)
    if depth is not None and depth != size_of(config, "depth"):
        config = config.with_depth(depth)
    return config


def _probe(target: Any, base: Any) -> Any:
    """The base at twice its width, or at such a multiple that what is rounded has grown wherever the target's has."""
    then, now = size_of(base, "width"), size_of(target, "width")
    return with_size(base, width=then * 2 ** (1 + max(0, math.ceil(math.log2(now / then)))))


def _warn_rounded(target: Any, base: Any) -> None:
    """Say when a rounded hidden size leaves the ratio of the widths by more than a twentieth."""
    if not hasattr(target, "ffn_hidden"):
        return
    grown, wider = target.ffn_hidden / base.ffn_hidden, target.width / base.width
    if not math.isclose(grown, wider, rel_tol=0.05):
        warnings.warn(
            f"the feed-forward layers' hidden size is rounded: it goes from {base.ffn_hidden} to {target.ffn_hidden} "
            f"(x{grown:.3g}) where the width goes from {base.width} to {target.width} (x{wider:.3g}), so this is no "
            "scaling of the width alone; every layer is scaled by its own fan-in, but values carry over less surely: "
            "choose ffn_width so that two thirds of it are a multiple of 256 at both widths",
            stacklevel=4,
        )


def _check(target: Any, base: Any) -> None:
    """Compare every field with what the base gives at the target's width."""
    wanted = _flat(configs.to_dict(with_size(base, width=size_of(target, "width"))))
    have, before = _flat(configs.to_dict(target)), _flat(configs.to_dict(base))
    grown = _flat(configs.to_dict(with_size(base, width=2 * size_of(base, "width"))))
    for name, value in have.items():
        part, _, field = name.rpartition(".")
        if field in _FORWARD or value == wanted.get(name):
            continue
        grows = grown.get(name) != before.get(name)
        if grows and (field == "heads" or _grouped_alike(have, before, part, field)):
            continue  # another head dimension; `_attention` looks at it
        if grows and part and value == before.get(name):
            continue  # a part that is not scaled along, such as a fixed vision tower
        raise ConfigError(
            f"the target is not a scaling of its base: {name} is {value!r}, expected {wanted.get(name)!r} "
            f"(the base has {before.get(name)!r})"
        )


def _grouped_alike(have: Mapping[str, Any], base: Mapping[str, Any], part: str, field: str) -> bool:
    """Whether the key/value heads are to the heads as in the base."""
    heads = f"{part}.heads" if part else "heads"
    keys = f"{part}.kv_heads" if part else "kv_heads"
    return field == "kv_heads" and have[keys] * base[heads] == base[keys] * have[heads]


def _attention(target: Any, base: Any, takes_scale: bool) -> float | None:
    """The attention scale for a grown head dimension; a warning where the network would use another."""
    owner, small = (_with_heads(c) for c in (target, base))
    if not hasattr(owner, "heads"):
        return None
    now, then = owner.width // owner.heads, small.width // small.heads
    given = getattr(target, "attention_scale", None)
    before = getattr(base, "attention_scale", None) or 1 / math.sqrt(then)
    wanted = before * then / now
    if now == then or (given is not None and math.isclose(given, wanted, rel_tol=1e-3)):
        return None
    if takes_scale and given is None:
        return wanted
    warnings.warn(
        f"head_dim grows from {then} to {now}: attention logits then need the scale {wanted:.4g}, this network uses "
        f"{given or now**-0.5:.4g}; keep head_dim by scaling heads to {owner.width // then} (with_width does)"
        + (", or set attention_scale" if takes_scale else ""),
        stacklevel=4,
    )
    return None


def _with_heads(config: Any) -> Any:
    places = (config, getattr(config, "language", None), getattr(config, "encoder", None))
    return next((place for place in places if hasattr(place, "heads")), config)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return out
