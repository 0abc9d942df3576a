"""What other people type and import, frozen: commands with their options, public names, keys of a training recipe.

A difference here is a change for users: it belongs into CHANGELOG.md. To accept it, run
``MMDIFF_UPDATE_SURFACE=1 pytest tests/test_surface.py`` and look at the difference in tests/surface.json.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pydantic
import typer

from mmdiff.cli import app

SNAPSHOT = Path(__file__).parent / "surface.json"

MODULES = (
    "mmdiff",
    "mmdiff.batch",
    "mmdiff.config",
    "mmdiff.diffusion",
    "mmdiff.errors",
    "mmdiff.images",
    "mmdiff.io",
    "mmdiff.models",
    "mmdiff.pipelines",
    "mmdiff.rng",
    "mmdiff.sampling",
    "mmdiff.text",
    "mmdiff.training",
    "data_pipelines",
    "eval",
)


def commands(command: Any, name: str = "mmdiff") -> dict[str, list[str]]:
    """Words of every command: its options, and its arguments in capitals."""
    words = sorted(max(p.opts, key=len) if p.param_type_name == "option" else p.name.upper() for p in command.params)
    found = {name: words}
    for child, sub in getattr(command, "commands", {}).items():
        found |= commands(sub, f"{name} {child}")
    return found


def names() -> dict[str, list[str]]:
    return {m: sorted(getattr(importlib.import_module(m), "__all__", [])) for m in MODULES}


def recipe_keys() -> dict[str, list[str]]:
    """Keys of every part of a training recipe."""
    from mmdiff.commands.recipe import RunConfig

    schema = pydantic.TypeAdapter(RunConfig).json_schema()
    parts = {"RunConfig": schema, **schema["$defs"]}
    return {name: sorted(part["properties"]) for name, part in sorted(parts.items()) if "properties" in part}


def surface() -> dict[str, Any]:
    return {"commands": commands(typer.main.get_command(app)), "names": names(), "recipe": recipe_keys()}


def test_surface_is_the_promised_one() -> None:
    now = surface()
    if os.environ.get("MMDIFF_UPDATE_SURFACE"):
        SNAPSHOT.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    promised = json.loads(SNAPSHOT.read_text(encoding="utf-8"))
    for part in now:
        assert now[part] == promised[part], f"the public surface changed in {part}; see the top of this file"


def test_every_listed_name_exists() -> None:
    for module, listed in names().items():
        for name in listed:
            assert hasattr(importlib.import_module(module), name), f"{module}.__all__ lists {name}, which is not there"
