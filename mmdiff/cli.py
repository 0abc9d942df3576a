"""The ``mmdiff`` command: finds the commands, shows errors as sentences, sets exit codes. Nothing else.

Importing this file, and ``mmdiff --help``, load no large library.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmdiff import __version__
from mmdiff.errors import ConfigError, MmdiffError

__all__ = ["app", "check_rooms", "main"]

_INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""

COMMANDS = {
    "demo": "mmdiff.commands.demo:demo",
    "train": "mmdiff.commands.train:command",
    "caption": "mmdiff.commands.caption:caption",
    "ask": "mmdiff.commands.ask:ask",
    "chat": "mmdiff.commands.chat:chat",
    "generate": "mmdiff.commands.generate:generate",
    "ui": "mmdiff.commands.ui:ui",
    "sample": "mmdiff.commands.sample:sample",
    "data": "mmdiff.commands.data:app",
    "eval": "mmdiff.commands.eval:app",
    "mup": "mmdiff.commands.mup:app",
    "convert": "mmdiff.commands.convert:convert",
    "info": "mmdiff.commands.info:info",
    "doctor": "mmdiff.commands.doctor:doctor",
    "bench": "mmdiff.commands.bench:bench",
}
"""Command name -> ``module:attribute``; the attribute is a function, or a typer app with commands of its own."""

_ROOMS = ("data_pipelines", "eval")


class _Root(TyperGroup):
    """The group of all commands; the one place where an error becomes a sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; without ``--debug`` an expected error is one message on stderr."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(_INTERRUPTED) from None
        except BrokenPipeError:
            raise
        except (MmdiffError, OSError) as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(getattr(error, "exit_code", MmdiffError.exit_code)) from None


app = typer.Typer(
    name="mmdiff",
    cls=_Root,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmdiff {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", envvar="MMDIFF_DEBUG")
    ] = False,
) -> None:
    """Multimodal masked diffusion: train, caption, answer, generate and evaluate.

    Results go to stdout, progress and messages to stderr. Exit codes: 0 done, 2 bad input, 3 data unusable,
    4 checkpoint refused, 75 stopped and saved, 130 interrupted.
    """
    check_rooms()


def check_rooms() -> None:
    """Make sure that the packages ``data_pipelines`` and ``eval`` that Python would import are ours.

    They are looked at, not imported: a stranger's code does not run.

    Raises:
        ConfigError: Another package answers to the name; its path is named.
    """
    for name in _ROOMS:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ConfigError(f"the package {name!r} of mmdiff is not installed; install mmdiff again")
        if spec.origin and "MMDIFF_PACKAGE" in Path(spec.origin).read_text(encoding="utf-8", errors="replace"):
            continue
        found = spec.origin or next(iter(spec.submodule_search_locations or ()), "an unknown place")
        raise ConfigError(
            f"Python finds another package named {name!r} before mmdiff's own: {found}; "
            "run the `mmdiff` command (not `python -m mmdiff`) or start from another folder, "
            f"and see that PYTHONPATH (now {os.environ.get('PYTHONPATH', '')!r}) does not lead there"
        )


def _register() -> None:
    for name, target in COMMANDS.items():
        module, attribute = target.split(":")
        command = getattr(importlib.import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)


_register()


def main() -> None:
    """Entry point of the console script and of ``python -m mmdiff``."""
    app(prog_name="mmdiff")
