"""Renaming of keys in both directions, as data: pairs of templates.

``{i}`` stands for a decimal number without leading zeros, ``{rest}`` for the remainder of a key. The first template
that fits decides, in either direction; a key that none fits is unknown, not passed through.
"""

from __future__ import annotations

import re

__all__ = ["KeyMap"]

_FIELDS = {"i": r"0|[1-9][0-9]*", "rest": r".+"}


class KeyMap:
    """A bijection between published keys and those of a module.

    Args:
        rules: (published template, template of the module); both sides hold the same fields.

    >>> m = KeyMap(("model.layers.{i}.{rest}", "layers.{i}.{rest}"))
    >>> m.forward("model.layers.3.mlp.up_proj.weight")
    'layers.3.mlp.up_proj.weight'
    >>> m.backward("layers.3.mlp.up_proj.weight")
    'model.layers.3.mlp.up_proj.weight'
    """

    def __init__(self, *rules: tuple[str, str]) -> None:
        self.rules = rules
        self._forward = [(_pattern(a), b) for a, b in rules]
        self._backward = [(_pattern(b), a) for a, b in rules]

    def forward(self, key: str) -> str | None:
        """The module's key of a published one; None if it is unknown."""
        return _apply(self._forward, key)

    def backward(self, key: str) -> str | None:
        """The published key of one of the module; None if it is unknown."""
        return _apply(self._backward, key)


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{p}>{_FIELDS[p]})" if n % 2 else re.escape(p) for n, p in enumerate(parts)))


def _apply(rules: list[tuple[re.Pattern[str], str]], key: str) -> str | None:
    for pattern, template in rules:
        if found := pattern.fullmatch(key):
            return template.format(**found.groupdict())
    return None
