"""The rooms of the house: which may import which. Every import counts, those inside functions too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LEAVES = {"errors", "rng", "config"}
MIDDLE = LEAVES | {"images", "text", "batch"}

MAY_IMPORT = {
    "errors": set(),
    "rng": {"errors"},
    "config": {"errors"},
    "images": LEAVES,
    "text": LEAVES | {"batch"},
    "batch": LEAVES,
    "nn": MIDDLE,
    "models": MIDDLE | {"nn"},
    "diffusion": MIDDLE,
    "scale": MIDDLE | {"nn", "models"},
    "io": MIDDLE | {"nn", "models"},
    "sampling": MIDDLE | {"nn", "models", "diffusion", "io"},
    "training": LEAVES | {"batch", "nn", "diffusion", "io"},
    "data_pipelines": MIDDLE,
    "pipelines": MIDDLE | {"models", "diffusion", "io", "sampling"},
    "eval": MIDDLE | {"models", "diffusion", "io", "sampling", "pipelines", "data_pipelines"},
    "commands": MIDDLE
    | {"nn", "models", "diffusion", "scale", "io", "sampling", "training", "pipelines", "data_pipelines", "eval"},
    "cli": {"errors", "commands"},
    "__main__": {"cli"},
    "mmdiff": {"pipelines", "commands"},
}
"""Room -> rooms it may import. Itself, and the package ``mmdiff`` for its version, always."""

WHY = {
    "errors": "it is a leaf",
    "rng": "it is a leaf",
    "config": "it is a leaf",
    "models": "a network file reads no files, runs no loop and knows no task",
    "diffusion": "it gets a callable and never sees a model class",
    "training": "it receives the built model, the loader and the probes",
    "data_pipelines": "it never knows networks, training or sampling; an encoder comes in as a callable",
    "eval": "it uses mmdiff's public interface",
    "cli": "it is thin; the composition is in commands",
}

DOORS = {
    ("mmdiff/models/base.py", "io"): "from_pretrained and save_pretrained are methods of every network",
    ("mmdiff/models/registry.py", "io"): "loading by name is where a network meets its files",
}
"""Files that may look through one more arrow, inside functions (or for type checkers) only."""

TOP_LEVEL = ("mmdiff", "data_pipelines", "eval")


def room_of(module: str) -> str | None:
    """Room of a dotted module name; None for foreign modules."""
    head, *rest = module.split(".")
    if head == "mmdiff":
        return rest[0] if rest and rest[0] in MAY_IMPORT else "mmdiff"
    return head if head in ("data_pipelines", "eval", "tests", "benchmarks", "configs") else None


def module_of(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str, bool]]:
    """(line, module, late) of every import; ``from a import b`` gives ``a.b``, which may be a module or a name."""
    package = module_of(path) if path.endswith("__init__.py") else module_of(path).rpartition(".")[0]
    inside: dict[ast.AST, bool] = {}
    for node in ast.walk(tree):
        late = inside.get(node, False) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        late |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        inside |= dict.fromkeys(ast.iter_child_nodes(node), late)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
            source = ".".join(filter(None, [base if node.level else "", node.module]))
            yield from ((node.lineno, f"{source}.{alias.name}", late) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value), late


def wrong_arrows(path: str, source: str) -> list[str]:
    """A sentence for each import of ``path`` that points the wrong way."""
    room = room_of(module_of(path))
    assert room is not None, f"{path} belongs to no room"
    found = []
    for line, module, late in imports(ast.parse(source), path):
        target = room_of(module)
        if target in (None, room, "mmdiff") or target in MAY_IMPORT[room]:
            continue
        if late and (path, target) in DOORS:
            continue
        allowed = ", ".join(sorted(MAY_IMPORT[room])) or "nothing of mmdiff"
        why = f" ({WHY[room]})" if room in WHY else ""
        found.append(f"{path}:{line} imports {module}, but {room} may import only: {allowed}{why}")
    return found


def product_files() -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for top in TOP_LEVEL for p in (ROOT / top).rglob("*.py"))


def test_all_arrows_between_rooms_point_one_way() -> None:
    found = [s for path in product_files() for s in wrong_arrows(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not found, "\n" + "\n".join(found)


def test_every_file_lies_in_a_known_room() -> None:
    strangers = {
        path
        for path in product_files()
        if path.startswith("mmdiff/") and room_of(module_of(path)) == "mmdiff" and path != "mmdiff/__init__.py"
    }
    assert not strangers, f"rooms are fixed; add a new one to MAY_IMPORT on purpose: {sorted(strangers)}"


def test_rooms_that_know_each_other_are_few_and_named() -> None:
    closed = {room: reachable(room) for room in MAY_IMPORT}
    assert not [room for room, seen in closed.items() if room in seen]


def reachable(room: str) -> set[str]:
    seen: set[str] = set()
    todo = list(MAY_IMPORT[room])
    while todo:
        if (other := todo.pop()) not in seen:
            seen.add(other)
            todo += MAY_IMPORT[other]
    return seen


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("mmdiff/diffusion/masking.py", "from mmdiff.models.llada import LLaDA", "never sees a model class"),
        ("mmdiff/diffusion/masking.py", "from ..models import llada", "never sees a model class"),
        ("mmdiff/diffusion/masking.py", "def f():\n    import mmdiff.models.llada", "masking.py:2 imports"),
        ("mmdiff/diffusion/masking.py", "def f():\n    from mmdiff import models", "never sees a model class"),
        ("data_pipelines/tasks.py", "from mmdiff.nn.rope import Rope", "comes in as a callable"),
        ("data_pipelines/tasks.py", "import eval", "may import only"),
        ("mmdiff/training/loop.py", "from data_pipelines.loader import Loader", "receives the built model"),
        ("mmdiff/models/llada.py", "def f():\n    from mmdiff.io.checkpoint import read", "reads no files"),
        ("mmdiff/models/registry.py", "from mmdiff.io.checkpoint import read", "reads no files"),
        ("mmdiff/commands/train.py", "from tests.helpers import toy", "may import only"),
        (
            "mmdiff/commands/train.py",
            "import importlib\nimportlib.import_module('benchmarks.speed')",
            "may import only",
        ),
        ("mmdiff/errors.py", "from mmdiff import rng", "it is a leaf"),
        ("eval/fid.py", "from mmdiff.training.loop import fit", "public interface"),
    ],
)
def test_arrow_the_wrong_way_is_found(path: str, source: str, complaint: str) -> None:
    assert [s for s in wrong_arrows(path, source) if complaint in s]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("mmdiff/commands/eval.py", "def f():\n    from eval.fid import score"),
        ("mmdiff/models/registry.py", "def f():\n    from mmdiff.io.checkpoint import read"),
        ("eval/fid.py", "from .inception import load\nimport torch"),
        ("mmdiff/sampling/loop.py", "from mmdiff import __version__, rng"),
    ],
)
def test_arrow_the_right_way_passes(path: str, source: str) -> None:
    assert not wrong_arrows(path, source)


def test_rooms_beside_the_package_are_never_imported_by_their_bare_name() -> None:
    found = []
    for path in product_files():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and any(a.name == "eval" for a in node.names):
                found.append(f"{path}:{node.lineno} hides the builtin eval; say `from eval.fid import ...`")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("room", ["data_pipelines", "eval"])
def test_siblings_beside_the_package_are_imported_relatively(room: str) -> None:
    found = []
    for path in product_files():
        if not path.startswith(f"{room}/"):
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == room:
                found.append(f"{path}:{node.lineno} says {node.module}; inside {room} import siblings relatively")
    assert not found, "\n".join(found)
