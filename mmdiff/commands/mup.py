"""``mmdiff mup``: what a parametrisation does to a network, whether it holds, and what it carries over."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdiff.errors import ConfigError

if TYPE_CHECKING:
    from mmdiff.scale.coordinates import CoordReport

__all__ = ["app", "check", "coordinates", "network_of", "plot", "sweep"]

app = typer.Typer(no_args_is_help=True, help="Parametrisations that carry tuned values over to larger networks.")

Config = Annotated[str, typer.Argument(help="Recipe, YAML file with a network's configuration, or checkpoint.")]
Changes = Annotated[list[str] | None, typer.Argument(help="Changes: dotted.key=value ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def check(
    config: Config,
    overrides: Changes = None,
    base_width: Annotated[int | None, typer.Option(help="Width of the base; default the recipe's.")] = None,
    base_depth: Annotated[int | None, typer.Option(help="The same for depth, with --rule depth.")] = None,
    rule: Annotated[str, typer.Option(help="sp, mup or depth.")] = "mup",
    optimizer: Annotated[str, typer.Option(help="adamw, adam, sgd or muon.")] = "adamw",
    decay: Annotated[str, typer.Option(help="independent or coupled.")] = "independent",
    run: Annotated[bool, typer.Option("--coordinates", help="Step small networks and fit the slopes.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the slopes (.html, .svg, .png).")] = None,
    widths: Annotated[str, typer.Option(help="Widths of the coordinate check.")] = "64,128,256,512",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the coordinate check.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of the coordinate check.")] = 3,
    lr: Annotated[float, typer.Option(help="Learning rate of the coordinate check.")] = 1e-2,
    as_json: Json = False,
) -> None:
    """Print each parameter's role and factors relative to the base; with --plot also check the activations."""
    from mmdiff.scale import mup
    from mmdiff.scale.family import size_of, with_size

    target = network_of(config, overrides or [])
    width = base_width or _recipe_width(config, overrides or []) or size_of(target, "width")
    base = with_size(target, width=width, depth=base_depth)
    if base == target:
        typer.echo("the base is the network itself, so every factor is 1: name a base with --base-width", err=True)
    with _warnings_said():
        plan = mup.plan(target, base, rule=_one_of(rule, "rule", "sp", "mup", "depth"))
    kinds = _one_of(optimizer, "optimizer", "adamw", "adam", "sgd", "muon")
    rows = plan.table(kinds, _one_of(decay, "decay", "independent", "coupled"))
    reports = {}
    if run or plot is not None:
        sizes = _numbers(widths)
        reports = coordinates(with_size(base, width=sizes[0]), sizes, steps=steps, seeds=seeds, lr=lr)
    if plot is not None:
        from mmdiff.commands.mup_page import draw_check

        draw_check(plot, reports, f"{target.type}: coordinate check")
    if as_json:
        slopes = {name: {"max_slope": r.max_slope, "verdict": r.verdict()} for name, r in reports.items()}
        typer.echo(json.dumps({"rule": plan.rule, "scales": dict(plan.scales), "rows": rows, "coordinates": slopes}))
        return
    typer.echo(str(plan))
    for name, report in reports.items():
        typer.echo(f"{name}: {report.verdict()}")


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(help="Training recipe; its model is the target.")],
    overrides: Changes = None,
    widths: Annotated[str, typer.Option(help="Widths; the first is the base.")] = "64,128,256",
    lrs: Annotated[
        str, typer.Option(help="Learning rates; 2^-9 is read as a power of two.")
    ] = "2^-5,2^-6,2^-7,2^-8,2^-9",
    rules: Annotated[str, typer.Option(help="Parametrisations to compare.")] = "sp,mup",
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions of every point.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of the sweep.")] = Path("runs/sweep"),
    jobs: Annotated[int, typer.Option(min=1, help="Points at the same time.")] = 1,
    as_json: Json = False,
) -> None:
    """Train a recipe at several widths and rates, and write the best rate of the base as a recipe of the target.

    Every finished point is kept: the same command goes on where it was stopped.
    """
    from mmdiff.commands.mup_sweep import Grid, run_sweep

    names = tuple(_one_of(r, "rule", "sp", "mup", "depth") for r in rules.split(","))
    grid = Grid(widths=tuple(_numbers(widths)), lrs=tuple(map(_power, lrs.split(","))), rules=names, seeds=seeds)
    result = run_sweep(config, overrides or [], grid, out, jobs=jobs)
    typer.echo(json.dumps(result.to_dict()) if as_json else result.table())
    typer.echo(f"{out / 'curves.html'}\n{out / 'transferred.yaml'}", err=True)


@app.command()
def plot(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    to: Annotated[Path | None, typer.Option(help="File: .html, .svg or .png; default curves.html there.")] = None,
) -> None:
    """Draw the curves of a sweep again."""
    from mmdiff.commands.mup_page import draw_sweep
    from mmdiff.commands.mup_sweep import Sweep

    target = to or folder / "curves.html"
    draw_sweep(target, Sweep.load(folder))
    typer.echo(target)


def network_of(source: str, overrides: list[str]) -> Any:
    """The network's configuration in a recipe, a file of its own, or a checkpoint.

    Raises:
        ConfigError: There is none.
    """
    from mmdiff import config as configs
    from mmdiff.commands.recipe import NetworkConfig
    from mmdiff.models.registry import identify

    if (Path(source) / "config.json").is_file():
        return identify(source).config
    tree = configs.read_yaml(configs.find_recipe(source))
    if "model" not in tree and "type" not in tree:
        raise ConfigError(f"{source}: holds no model; name a recipe with one, or a checkpoint")

    alone = {"model": tree.get("model", tree)}
    return configs.load(NetworkConfig, alone, [o for o in overrides if o.startswith("model.")]).model


def coordinates(
    base: Any, widths: list[int], *, steps: int = 4, seeds: int = 3, lr: float = 1e-2
) -> dict[str, CoordReport]:
    """Coordinate checks of a family in three forms: muP, the standard one, and muP with one rate for all.

    Args:
        base: Configuration at the smallest width.
        widths: Widths to try.
        steps: Training steps.
        seeds: Repetitions.
        lr: AdamW's rate.
    """
    from mmdiff.scale.coordinates import coord_check
    from mmdiff.scale.trials import trials

    names: dict[str, Any] = {"muP": "mup", "standard": "sp", "muP, one rate": "plain"}
    return {
        name: coord_check(trials(base, variant, lr=lr), widths, steps=steps, seeds=seeds)
        for name, variant in names.items()
    }


@contextmanager
def _warnings_said() -> Iterator[None]:
    """Warnings within the block as sentences on stderr, without the line of code."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(w.message) for w in caught):
        typer.echo(f"warning: {message}", err=True)


def _recipe_width(source: str, overrides: list[str]) -> int | None:
    """Base width that a recipe names under ``mup``."""
    from mmdiff import config as configs

    if (Path(source) / "config.json").is_file():
        return None
    given = dict(o.split("=", 1) for o in overrides if "=" in o)
    named = (configs.read_yaml(configs.find_recipe(source)).get("mup") or {}).get("base_width")
    return int(given["mup.base_width"]) if "mup.base_width" in given else named


def _one_of(word: str, what: str, *known: str) -> Any:
    if word not in known:
        raise ConfigError(f"{what} {word!r} is not known; one of {', '.join(known)}")
    return word


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r}: expected whole numbers with commas between, such as 64,128") from None


def _power(text: str) -> float:
    base, caret, exponent = text.strip().partition("^")
    try:
        return float(base) ** float(exponent) if caret else float(base)
    except ValueError:
        raise ConfigError(f"{text!r}: expected a number such as 0.001 or 2^-10") from None
