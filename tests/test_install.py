"""The wheel holds everything, and works from a folder where other people's eval/ and tests/ lie around."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mmdiff

PARTS = ("mmdiff", "data_pipelines", "eval", "configs")
FILES = ("pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY.md")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the tree, built without network in a copy, so that nothing is left behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        shutil.copytree(repository / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(repository / file, source / file)
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder with packages of the names that projects of this kind like to use."""
    for name in ("eval", "tests", "configs", "data_pipelines"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a decoy was imported')", encoding="utf-8")
    return tmp_path


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [installed / "bin" / "mmdiff", *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_wheel_holds_every_module_recipe_and_embedded_file(wheel: Path, repository: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {p.relative_to(repository).as_posix() for part in PARTS[:3] for p in (repository / part).rglob("*.py")}
    wanted |= {f"mmdiff/{p.relative_to(repository).as_posix()}" for p in (repository / "configs").rglob("*.yaml")}
    embedded = repository / "data_pipelines" / "embedded"
    for folder in (embedded, repository / "mmdiff" / "embedded"):
        wanted |= {p.relative_to(repository).as_posix() for p in folder.rglob("*") if p.is_file()}
    wanted |= {"mmdiff/py.typed"}
    assert not wanted - held, "add the package to [tool.setuptools] packages, or the file type to package-data"
    assert any(name.startswith("mmdiff/configs/") for name in held)
    assert any(name.startswith("data_pipelines/embedded/") and name.endswith(".tar") for name in held)


def test_wheel_brings_no_other_top_level_name_and_its_licences(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"mmdiff-{mmdiff.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"mmdiff", "data_pipelines", "eval", info}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/THIRD_PARTY.md"} <= set(names)


def test_version_is_the_same_everywhere(installed: Path, elsewhere: Path) -> None:
    out = run(installed, elsewhere, "--version")
    assert (out.returncode, out.stdout) == (0, f"mmdiff {mmdiff.__version__}\n"), out.stderr


@pytest.mark.parametrize("words", [["--help"], ["eval", "fid", "--help"], ["data", "pack", "--help"]])
def test_installed_command_works_beside_decoys(installed: Path, elsewhere: Path, words: list[str]) -> None:
    out = run(installed, elsewhere, *words)
    assert out.returncode == 0, out.stderr
    assert "Usage: mmdiff" in out.stdout


def test_installed_command_uses_the_installed_files_and_finds_recipes(installed: Path, elsewhere: Path) -> None:
    out = run(installed, elsewhere, "doctor", "--json")
    assert out.returncode == 0, out.stderr
    assert Path(json.loads(out.stdout)["mmdiff"]["path"]) == installed / "mmdiff"
    code = "from mmdiff.config import recipes, find_recipe; print(find_recipe(recipes()[0]))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    found = subprocess.check_output([sys.executable, "-P", "-c", code], cwd=elsewhere, env=environment, text=True)
    assert Path(found.strip()).is_relative_to(installed / "mmdiff" / "configs")


def test_dependencies_have_lower_bounds_with_reasons_and_no_upper_bounds(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert not [r for r in wanted if any(mark in r for mark in ("<", "==", "~=", "!="))]
    bare = {r for r in project["dependencies"] if ">=" not in r}
    assert bare == {"torchvision"}
