"""Reading the fields of a published config.json.

A field that would change the network and that our network has no switch for is refused by name; a needed one that is
absent is asked for, not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdiff import config as configs
from mmdiff.errors import CheckpointError

__all__ = ["Tree", "build", "need", "refuse"]

Tree = Mapping[str, Any]
"""The content of a config.json."""


def build(cls: Any, **values: Any) -> Any:
    """A configuration of values that a config.json gave.

    Raises:
        ConfigError: A value is of the wrong type or range.
    """
    return configs.parse(cls, values, "config.json")


def need(tree: Tree, key: str) -> Any:
    """The value of a field that has no default.

    Raises:
        CheckpointError: It is absent or null.
    """
    if tree.get(key) is None:
        raise CheckpointError(f"config.json lacks {key}")
    return tree[key]


def refuse(tree: Tree, supported: Mapping[str, Any]) -> None:
    """Refuse switches that our network does not have; null counts as absent.

    Raises:
        CheckpointError: A field holds another value than the one given.
    """
    for key, value in supported.items():
        if tree.get(key) not in (None, value):
            raise CheckpointError(f"config.json has {key} = {tree[key]!r}; only {value!r} is supported")
