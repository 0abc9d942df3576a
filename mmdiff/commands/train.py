"""``mmdiff train CONFIG``: build what a recipe names, train it, export the averaged weights."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdiff.commands.export import export_result
from mmdiff.commands.run_parts import (
    build,
    checked_layout,
    device_of,
    image_tokenizer_of,
    loader_of,
    model_of,
    objective_of,
    quantized,
    scales_of,
    tokenizer_of,
)
from mmdiff.commands.workers import rank_and_world
from mmdiff.errors import EXIT_STOPPED, ConfigError

if TYPE_CHECKING:
    from mmdiff.commands.recipe import RunConfig
    from mmdiff.training.loop import FitReport
    from mmdiff.training.memory import Estimate
    from mmdiff.training.parallel.group import Group
    from mmdiff.training.probes import Probe

__all__ = ["TrainResult", "command", "load_config", "run", "train"]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What came of `run`.

    Attributes:
        run_dir: Folder of the run.
        model_dir: The exported model, or adapter if one was trained; None after a stop or a dry run.
        fit: Report of the training; None after a dry run.
        estimate: Memory and parameters; only after a dry run.
        resume_command: Goes on with the run.
    """

    run_dir: Path
    model_dir: Path | None = None
    fit: FitReport | None = None
    estimate: Estimate | None = None
    resume_command: str = ""


def train(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    resume: bool = False,
    dry_run: bool = False,
    probes: Iterable[Probe] = (),
    progress: bool = True,
    **changes: Any,
) -> TrainResult:
    """Train from Python: `run`, with overrides as keyword arguments too.

    >>> train("demo/unified.yaml", out="runs/mine", train={"samples": 1000})  # doctest: +SKIP
    """
    texts = [*_texts(overrides), *_texts(changes)]
    return run(config, texts, resume=resume, dry_run=dry_run, probes=probes, progress=progress)


def run(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
    *,
    resume: bool = False,
    dry_run: bool = False,
    probes: Iterable[Probe] = (),
    progress: bool = True,
) -> TrainResult:
    """Train a model as a recipe says; in several processes, if torchrun or accelerate started them.

    Args:
        config: Name of a recipe, path of a YAML file, or its content.
        overrides: ``dotted.key=value`` strings, or a mapping from dotted keys to values.
        resume: Go on with the run in the folder ``out``.
        dry_run: Build everything, run one batch, write nothing.
        probes: See `mmdiff.training.probes.Probe`.
        progress: Show a bar or lines on stderr.

    Raises:
        ConfigError: The recipe cannot be carried out.
        ShardError: The data cannot be used.
        CheckpointError: A checkpoint or model cannot be read or written.
    """
    spec = load_config(config, overrides)
    if dry_run:
        return TrainResult(run_dir=Path(spec.out), estimate=_estimate(spec, device_of(spec)))
    from mmdiff.training.parallel.group import joined

    with joined(spec.train.first_step_timeout_s) as group:
        return _carried_out(spec, group, resume, probes, progress)


def _carried_out(spec: RunConfig, group: Group, resume: bool, probes: Iterable[Probe], progress: bool) -> TrainResult:
    from mmdiff.training import state
    from mmdiff.training.loop import fit

    run_dir, device = Path(spec.out), device_of(spec)
    # Before minutes are spent on building.
    group.first(lambda: state.check(run_dir, spec, resume=resume))
    skipped = run_dir / ("skipped.jsonl" if group.leads else f"skipped.rank{group.rank}.jsonl")
    made = build(spec, device, _skip_log(skipped), group.rank, group.world)

    report = fit(
        made.model,
        made.objective,
        made.loader,
        spec.train,
        run_dir,
        resume=resume,
        probes=probes,
        run_config=spec,
        description=run_dir.name,
        device=device,
        progress=progress,
        scales=scales_of(spec),
    )
    again = f"mmdiff train {shlex.quote(str(run_dir / 'config.yaml'))} --resume"
    model_dir = None
    if not report.stopped:
        model_dir = export_result(spec, made.model, run_dir, group)
    if report.skipped and group.leads:
        print(made.loader.skip_report(), file=sys.stderr)
    if not report.stopped:
        made.loader.finish()
    return TrainResult(run_dir=run_dir, model_dir=model_dir, fit=report, resume_command=again)


def load_config(config: str | Path | Mapping[str, Any], overrides: Sequence[str] | Mapping[str, Any] = ()) -> RunConfig:
    """The recipe with its overrides, checked.

    Raises:
        ConfigError: No such recipe, unknown key, wrong value.
    """
    from mmdiff import config as configs
    from mmdiff.commands.recipe import RunConfig

    source = config if isinstance(config, Mapping) else configs.find_recipe(config)
    return configs.load(RunConfig, source, _texts(overrides))


def command(
    config: Annotated[str, typer.Argument(help="Path of a YAML file, or name of a recipe such as demo/unified.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes: dotted.key=value ...")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the folder `out`.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build everything, run one batch, say what memory it takes, write nothing."),
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the full configuration and exit.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a model; Ctrl-C saves and stops, --resume goes on."""
    texts = overrides or []
    if print_config:
        from mmdiff import config as configs

        spec = load_config(config, texts)
        typer.echo(json.dumps(configs.to_dict(spec)) if as_json else configs.dump(spec), nl=as_json)
        return
    result = run(config, texts, resume=resume, dry_run=dry_run)
    stopped = result.fit is not None and result.fit.stopped
    if rank_and_world()[0]:
        # The first process speaks for all.
        raise typer.Exit(EXIT_STOPPED if stopped else 0)
    if result.estimate is not None:
        table = {**asdict(result.estimate), "total": result.estimate.total}
        typer.echo(json.dumps(table) if as_json else _table(table))
        return
    if as_json:
        typer.echo(json.dumps(asdict(result), default=str))
    if result.fit is not None and stopped:
        typer.echo(f"stopped and saved at {result.fit.samples:,} samples; go on with:", err=True)
        typer.echo(f"  {result.resume_command}", err=True)
        raise typer.Exit(EXIT_STOPPED)
    if not as_json:
        typer.echo(result.model_dir)


def _texts(overrides: Sequence[str] | Mapping[str, Any], prefix: str = "") -> list[str]:
    """Overrides as ``dotted.key=value``; JSON is YAML. Mappings are merged into what is there, key by key."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    out: list[str] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping) and value:
            out += _texts(value, f"{prefix}{key}.")
        else:
            plain = str(value) if isinstance(value, os.PathLike) else value
            try:
                out.append(f"{prefix}{key}={json.dumps(plain)}")
            except TypeError:
                raise ConfigError(f"override {prefix}{key}: {value!r} is not plain data") from None
    return out


def _estimate(spec: RunConfig, device: str) -> Estimate:
    """Memory of the whole run from its shapes; if it fits twice into what is free, one batch is really run."""
    from mmdiff.commands.dry_run import estimate

    tokenizer = tokenizer_of(spec, weights=False)
    part = -(-spec.data.batch_size // spec.train.accumulate)

    def loader(model: Any) -> Any:
        layout = checked_layout(spec, model, tokenizer, image_tokenizer_of(spec))
        return loader_of(replace(spec, data=replace(spec.data, batch_size=part)), tokenizer, layout, None)

    return estimate(spec, device, loader, objective_of(spec, "cpu"), lambda: quantized(spec, model_of(spec), device))


def _skip_log(path: Path) -> Callable[[Any], None]:
    """A callback that appends skipped samples to a file, each once, though a resumed run passes some again."""
    began = False

    def write(skip: Any) -> None:
        nonlocal began
        if not began and path.exists():
            lines = [t for t in path.read_text("utf-8").splitlines() if _position(t) < skip.position]
            path.write_text("".join(f"{t}\n" for t in lines), "utf-8")
        began = True
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(skip)) + "\n")

    return write


def _position(line: str) -> float:
    try:
        return json.loads(line)["position"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the half line of a killed run


def _table(values: Mapping[str, Any]) -> str:
    def lines() -> Iterator[str]:
        yield f"parameters  {values['parameters']:,} ({values['trainable']:,} trained)"
        yield f"batch       {values['rows']:,} x {values['length']:,} slots at a time"
        if values["losses"]:
            yield "losses      " + "  ".join(f"{k} {v:.4f}" for k, v in values["losses"].items())
        else:
            yield "losses      not computed: from shapes only, the run is too large for this machine's free memory"
        for name in ("weights", "gradients", "optimizer", "average", "activations", "logits", "total"):
            yield f"{name:<11} {values[name] / 2**20:12,.1f} MiB"

    return "\n".join(lines())
