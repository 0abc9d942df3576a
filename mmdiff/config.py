"""Configuration: YAML 1.2 into frozen dataclasses, strictly, with ``key=value`` overrides.

A configuration class is declared with `config`; variants are tagged unions (a field ``type: Literal[...]`` and
``Annotated[A | B, Field(discriminator="type")]``). There are no class paths, no interpolation and no environment
variables in a file, so nothing in it can run code.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.json_schema import PydanticJsonSchemaWarning

from mmdiff.errors import ConfigError

__all__ = [
    "Field",
    "config",
    "dump",
    "find_recipe",
    "fingerprint",
    "load",
    "nearest",
    "parse",
    "read_yaml",
    "recipes",
    "to_dict",
    "value_of",
]

T = TypeVar("T")

_MAX_BYTES = 1 << 20
_MAX_NODES = 100_000


@dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[T]) -> type[T]:
    """Class decorator: a frozen keyword-only dataclass whose values are checked on construction."""
    strict = ConfigDict(extra="forbid", allow_inf_nan=False)
    return pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=strict)  # type: ignore[return-value]


def load(cls: type[T], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> T:
    """Read a configuration.

    Args:
        cls: A class made by `config`.
        source: Path of a YAML file, or a mapping that was read already.
        overrides: Strings ``dotted.key=value``; the value is YAML.

    Raises:
        ConfigError: Unreadable file, unknown key (with the nearest valid one), wrong type or value.
    """
    tree = dict(source) if isinstance(source, Mapping) else read_yaml(source)
    where = "the given mapping" if isinstance(source, Mapping) else str(source)
    for text in overrides:
        try:
            tree = _override(tree, text)
        except ValueError as error:
            raise ConfigError(f"{where}: override {text!r}: {error}") from None
    return parse(cls, tree, where)


def parse(cls: type[T], tree: Mapping[str, Any], where: str) -> T:
    """Build ``cls`` from plain data; ``where`` names its origin in errors.

    Raises:
        ConfigError: As `load`.
    """
    _check_plain(tree, where, "")
    try:
        return TypeAdapter(cls).validate_json(json.dumps(tree), strict=True)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except pydantic.ValidationError as error:
        schema = _schema(cls)
        raise ConfigError("\n".join(dict.fromkeys(_sentence(schema, where, e) for e in error.errors()))) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one YAML 1.2 mapping without tags or duplicate keys, at most 1 MiB.

    Raises:
        ConfigError: The file is missing, too large, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{path}: {len(data):,} bytes, limit {_MAX_BYTES:,}; a configuration is a short text")
    try:
        tree = _yaml(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, expected a mapping of keys to values")
    return tree


def value_of(text: str) -> Any:
    """One YAML 1.2 value, as in an override.

    Raises:
        ConfigError: It is none.
    """
    try:
        return _yaml(text)
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}") from None


def to_dict(value: Any) -> Any:
    """Plain data (dicts, lists, numbers, strings) of a configuration."""
    return TypeAdapter(type(value)).dump_python(value, mode="json")


def dump(value: Any) -> str:
    """YAML text that `load` reads back to an equal configuration."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        def represent_str(self, data: str) -> Any:
            # Line separators such as U+0085 survive only between double quotes, where they are escaped.
            return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')

    Representer.add_representer(str, Representer.represent_str)
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    out = io.StringIO()
    yaml.dump(to_dict(value), out)
    return out.getvalue()


def fingerprint(value: Any) -> str:
    """Sixteen hex digits that change when any value of the configuration changes."""
    tree = to_dict(value) if dataclasses.is_dataclass(value) else value
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def recipes() -> list[str]:
    """Names of the recipes that ship with mmdiff, such as ``demo/unified.yaml``."""
    root = _recipe_root()
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file that ``name`` means: an existing path, or a recipe that ships with mmdiff.

    Raises:
        ConfigError: Neither; the nearest recipe names are listed.
    """
    path = Path(name)
    if path.exists():
        return path
    plain = str(name).removeprefix("configs/")
    for candidate in (plain, f"{plain}.yaml"):
        if (_recipe_root() / candidate).is_file():
            return _recipe_root() / candidate
    known = recipes()
    near = difflib.get_close_matches(plain, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the recipes are: {', '.join(known)}"
    raise ConfigError(f"{name}: no such file, and no recipe of that name ships with mmdiff; {hint}")


def _recipe_root() -> Path:
    # In the wheel the recipes are package data; a clone or an editable install has them beside the package.
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def _yaml(text: str) -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        tree = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ValueError(_yaml_problem(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _count_nodes(tree)
    return tree


def _yaml_problem(error: Exception) -> str:
    """Line, column and reason, without the parser's advice on its own options."""
    mark = getattr(error, "problem_mark", None)
    reason = str(getattr(error, "problem", None) or error).split("\n")[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason}" if mark else reason


def _count_nodes(tree: Any) -> None:
    """Refuse alias bombs: count nodes as if every alias were written out."""
    seen, stack = 0, [tree]
    while stack:
        node = stack.pop()
        seen += 1
        if seen > _MAX_NODES:
            raise ValueError(f"more than {_MAX_NODES:,} values once aliases are expanded")
        if isinstance(node, dict):
            stack.extend(node.values())
        elif isinstance(node, (list, tuple, set)):
            stack.extend(node)


def _override(tree: Mapping[str, Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or any(not part for part in key.split(".")):
        raise ValueError("expected dotted.key=value")
    return _set(tree, key.split("."), _yaml(value))


def _set(tree: Any, keys: list[str], value: Any) -> Any:
    if not keys:
        return value
    head, *rest = keys
    if isinstance(tree, list):
        if not head.isdecimal() or int(head) >= len(tree):
            raise ValueError(f"{head!r} is not an index of a list of {len(tree)}")
        out: Any = list(tree)
        out[int(head)] = _set(out[int(head)], rest, value)
        return out
    if tree is not None and not isinstance(tree, Mapping):
        raise ValueError(f"{head!r} lies below the plain value {tree!r}")
    return {**(tree or {}), head: _set((tree or {}).get(head), rest, value)}


def _check_plain(tree: Any, where: str, path: str) -> None:
    """Refuse what JSON would refuse or, worse, rename: dates, sets, bytes, keys that are not text."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where}: {path or 'the top level'}: key {key!r} is not text; put it in quotes")
            _check_plain(value, where, f"{path}.{key}" if path else key)
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            _check_plain(value, where, f"{path}.{i}")
    elif not isinstance(tree, (str, int, float, NoneType)):
        name = type(tree).__name__
        raise ConfigError(
            f"{where}: {path}: {name} values are not allowed, only plain text, numbers, lists and mappings"
        )


def _sentence(schema: Any, where: str, error: Any) -> str:
    """One pydantic error as: file, dotted path, what is wrong, what was probably meant."""
    keys, node, siblings = _locate(schema, error["loc"])
    path = ".".join(keys)
    kind = error["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: unknown key {path!r}; {_meant(keys[-1], siblings, 'known keys')}"
    if kind in ("missing", "missing_argument", "union_tag_not_found"):
        tag = node.get("discriminator")
        if kind == "union_tag_not_found" and tag:
            return f"{where}: key {path + '.' + tag['propertyName']!r} is required; one of {_listed(tag['mapping'])}"
        return f"{where}: key {path!r} is required"
    if kind == "union_tag_invalid":
        tag, got = node["discriminator"], str(error["ctx"]["tag"])
        return f"{where}: {path}.{tag['propertyName']}: unknown value {got!r}; {_meant(got, tag['mapping'], 'one of')}"
    choices = [c for c in node.get("enum", [node.get("const")]) if isinstance(c, str)]
    if kind == "literal_error" and choices and isinstance(error["input"], str):
        return f"{where}: {path}: unknown value {error['input']!r}; {_meant(error['input'], choices, 'one of')}"
    value = repr(error.get("input"))
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {path or 'the top level'}: {message} (got {shown})"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(repr(word) for word in words)


def _meant(word: str, known: Iterable[str], otherwise: str) -> str:
    near = nearest(word, known)
    return f"did you mean {near!r}?" if near else f"{otherwise}: {_listed(sorted(known)) or 'none'}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, if there is one.

    That is the word with the fewest edits (insert, drop or replace a letter, swap two neighbours; case does not
    count) if they are at most a third of the letters, else one that shares most of its letters.
    """
    words = list(known)
    fewest, best = min(((_edits(word.lower(), w.lower()), w) for w in words), default=(len(word), ""))
    if fewest <= max(1, len(word) // 3):
        return best
    return next(iter(difflib.get_close_matches(word, words, n=1)), None)


def _edits(a: str, b: str) -> int:
    """Optimal string alignment distance."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def _schema(cls: Any) -> Any:
    """JSON schema of a configuration; only its keys are read, so defaults that JSON cannot hold do not matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PydanticJsonSchemaWarning)
        return TypeAdapter(cls).json_schema()


def _locate(schema: Any, loc: Sequence[str | int]) -> tuple[list[str], Any, list[str]]:
    """Follow a pydantic location through the JSON schema.

    Returns:
        The keys of the file (the location without the names of union members), the schema at that place, and the
        keys that are known beside the last one.
    """
    node, keys, siblings = _resolve(schema, schema), [], []
    for step in loc:
        member = _member(schema, node, step)
        if member is not None:
            node = member
            continue
        if step == "[key]":
            continue
        keys.append(str(step))
        siblings = list(node.get("properties", {}))
        node = _resolve(schema, _child(node, step))
    return keys, node, siblings


def _resolve(schema: Any, node: Any) -> Any:
    """Follow references, and look through ``... | None``."""
    while True:
        options = [o for o in node.get("anyOf", []) if o.get("type") != "null"]
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        elif len(options) == 1:
            node = options[0]
        else:
            return node


def _member(schema: Any, node: Any, step: str | int) -> Any | None:
    """The member of a union that ``step`` names, or None if this place is not a union."""
    if "discriminator" in node:
        return _resolve(schema, {"$ref": node["discriminator"]["mapping"].get(str(step), "")})
    if "anyOf" in node:
        options = [_resolve(schema, option) for option in node["anyOf"]]
        return next((option for option in options if option.get("title") == step), {})
    return None


def _child(node: Any, step: str | int) -> Any:
    if isinstance(step, int):
        fixed = node.get("prefixItems", [])
        return fixed[step] if step < len(fixed) else node.get("items") or {}
    extra = node.get("additionalProperties")
    return node.get("properties", {}).get(step) or (extra if isinstance(extra, dict) else {})
