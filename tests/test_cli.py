"""The command line: instant help, errors as sentences, exit codes, and our own rooms or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import mmdiff
from mmdiff import cli, errors
from mmdiff.commands import doctor

HEAVY = ("torch", "numpy", "transformers", "diffusers", "timm", "open_clip", "webdataset", "torchvision", "peft")


def python(*words: str, cwd: Path, root: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(root), **env}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)


def loaded_by(statement: str, root: Path) -> set[str]:
    code = f"import sys\ntry:\n    {statement}\nexcept SystemExit: pass\nsys.stderr.write(repr(sorted(sys.modules)))"
    out = python("-c", code, cwd=root, root=root)
    assert out.returncode == 0, out.stderr
    return set(out.stderr.split("'"))


@pytest.mark.parametrize(
    "statement",
    [
        "import mmdiff",
        "import mmdiff.cli",
        "import mmdiff.cli; mmdiff.cli.app(['--help'])",
        "import mmdiff.cli; mmdiff.cli.app(['train', '--help'])",
        "import mmdiff.cli; mmdiff.cli.app(['eval', 'fid', '--help'])",
    ],
)
def test_help_and_import_load_no_large_library(statement: str, repository: Path) -> None:
    loaded = loaded_by(statement, repository)
    assert "mmdiff" in loaded
    assert not loaded & set(HEAVY)


def test_help_takes_less_than_two_seconds_of_processor_time(repository: Path) -> None:
    began = os.times()
    out = python("-m", "mmdiff", "--help", cwd=repository, root=repository)
    ended = os.times()
    assert out.returncode == 0
    assert (ended.children_user + ended.children_system) - (began.children_user + began.children_system) < 2
    assert all(name in out.stdout for name in cli.COMMANDS)


def test_version_is_printed_to_stdout_alone() -> None:
    out = CliRunner().invoke(cli.app, ["--version"])
    assert (out.exit_code, out.stdout, out.stderr) == (0, f"mmdiff {mmdiff.__version__}\n", "")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (errors.ConfigError("no such key"), 2, "error: no such key\n"),
        (errors.ShardError("a.tar: gone"), 3, "error: a.tar: gone\n"),
        (errors.UnsafeFileError("a.pt: runs code"), 4, "error: a.pt: runs code\n"),
        (PermissionError(13, "Permission denied", "out"), 2, "error: [Errno 13] Permission denied: 'out'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_expected_error_is_one_message_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    monkeypatch.setattr(doctor, "examine", raising(error))
    out = CliRunner().invoke(cli.app, ["doctor"])
    assert (out.exit_code, out.stdout, out.stderr) == (code, "", message)


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", raising(errors.ConfigError("no such key")))
    assert isinstance(CliRunner().invoke(cli.app, ["--debug", "doctor"]).exception, errors.ConfigError)
    assert isinstance(CliRunner().invoke(cli.app, ["doctor"], env={"MMDIFF_DEBUG": "1"}).exception, errors.ConfigError)


def test_defect_of_the_program_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", raising(ZeroDivisionError()))
    assert isinstance(CliRunner().invoke(cli.app, ["doctor"]).exception, ZeroDivisionError)


def raising(error: BaseException):
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize("words", [["nonsense"], ["--nonsense"], ["doctor", "extra"]])
def test_wrong_usage_ends_with_two(words: list[str]) -> None:
    assert CliRunner().invoke(cli.app, words).exit_code == 2


def test_strangers_package_named_eval_is_named_and_not_run(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "__init__.py").write_text("open('ran', 'w')", encoding="utf-8")
    out = python("-m", "mmdiff", "doctor", cwd=tmp_path, root=repository)
    assert out.returncode == 2
    assert f"another package named 'eval' before mmdiff's own: {tmp_path / 'eval' / '__init__.py'}" in out.stderr
    assert "run the `mmdiff` command" in out.stderr
    assert not (tmp_path / "ran").exists()


def test_folder_of_that_name_that_is_no_package_does_no_harm(tmp_path: Path, repository: Path) -> None:
    (tmp_path / "eval").mkdir()
    out = python("-m", "mmdiff", "data", "--help", cwd=tmp_path, root=repository)
    assert out.returncode == 0, out.stderr


def test_public_names_are_listed_and_unknown_ones_are_refused() -> None:
    assert set(mmdiff.__all__) <= set(dir(mmdiff))
    with pytest.raises(AttributeError, match="module 'mmdiff' has no attribute 'lod'"):
        _ = mmdiff.lod


@pytest.mark.parametrize("name", [n for n in mmdiff.__all__ if n != "__version__"])
def test_public_name_resolves(name: str) -> None:
    assert callable(getattr(mmdiff, name))


def test_doctor_reports_as_json_what_it_prints() -> None:
    out = CliRunner().invoke(cli.app, ["doctor", "--json"])
    report = json.loads(out.stdout)
    assert report["mmdiff"]["version"] == mmdiff.__version__
    assert report["packages"]["torch"]
    assert report["compute"]["threads"] >= 1
    text = CliRunner().invoke(cli.app, ["doctor"]).stdout
    for name, version in report["packages"].items():
        assert f"{name} {version}" in text


def test_doctor_names_the_extra_that_a_feature_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor._EXTRAS, "inception", (("no_such_module",), "`mmdiff eval fid`"))
    out = CliRunner().invoke(cli.app, ["doctor"]).stdout
    assert "inception (`mmdiff eval fid`): missing no_such_module; pip install 'mmdiff[inception]'" in out


def test_doctor_knows_only_extras_that_exist(repository: Path) -> None:
    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    for name in doctor._EXTRAS:
        assert f"\n{name} = [" in text


def test_doctor_warns_when_pytorchs_guard_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    assert "warning" not in CliRunner().invoke(cli.app, ["doctor"]).stdout
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert "warning: TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set" in CliRunner().invoke(cli.app, ["doctor"]).stdout
