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

from mmdiff.commands.workers import rank_and_world
from mmdiff.errors import EXIT_STOPPED, ConfigError

if TYPE_CHECKING:
    from mmdiff.batch import Layout
    from mmdiff.commands.recipe import RunConfig
    from mmdiff.text import Tokenizer
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
        return TrainResult(run_dir=Path(spec.out), estimate=_estimate(spec, _device(spec)))
    from mmdiff.training.parallel.group import joined

    with joined(spec.train.first_step_timeout_s) as group:
        return _carried_out(spec, group, resume, probes, progress)


def _carried_out(spec: RunConfig, group: Group, resume: bool, probes: Iterable[Probe], progress: bool) -> TrainResult:
    from mmdiff.training import state
    from mmdiff.training.loop import fit

    run_dir, device = Path(spec.out), _device(spec)
    # Before minutes are spent on building.
    group.first(lambda: state.check(run_dir, spec, resume=resume))
    tokenizer, image_tokenizer, classes = _tokenizer(spec), _image_tokenizer(spec), _classes(spec)
    objective = _objective(spec, device)
    model = _quantized(spec, _model(spec), device)
    layout = _checked_layout(spec, model, tokenizer, image_tokenizer)
    skipped = run_dir / ("skipped.jsonl" if group.leads else f"skipped.rank{group.rank}.jsonl")
    loader = _loader(spec, tokenizer, layout, _skip_log(skipped), group.rank, group.world)

    report = fit(
        model,
        objective,
        loader,
        spec.train,
        run_dir,
        resume=resume,
        probes=probes,
        run_config=spec,
        description=run_dir.name,
        device=device,
        progress=progress,
        scales=_scales(spec),
    )
    again = f"mmdiff train {shlex.quote(str(run_dir / 'config.yaml'))} --resume"
    model_dir = None
    if not report.stopped:
        parts = {"tokenizer": tokenizer, "image_tokenizer": image_tokenizer, "classes": classes}
        parts["text_encoder"] = spec.text_encoder
        model_dir = Path(
            group.first(lambda: str(_export(spec, _averaged(spec, model, run_dir, group), run_dir, parts)))
        )
    if report.skipped and group.leads:
        print(loader.skip_report(), file=sys.stderr)
    if not report.stopped:
        loader.finish()
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


def _device(spec: RunConfig) -> str:
    """Where this process trains: under a launcher, the GPU of its number on this machine."""
    from mmdiff.commands.workers import local_device

    return (local_device() if spec.device in (None, "cuda") else spec.device) or spec.device or _best_device()


def _best_device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _tokenizer(spec: RunConfig, *, weights: bool = True) -> Tokenizer | None:
    from mmdiff.io.hub import resolve
    from mmdiff.text import Tokenizer

    if spec.tokenizer is None and spec.init_from is not None:
        folder = resolve(spec.init_from, weights=weights)
        return Tokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
    return Tokenizer.from_pretrained(resolve(spec.tokenizer, weights=False)) if spec.tokenizer else None


def _image_tokenizer(spec: RunConfig) -> Any:
    from mmdiff.models.registry import load_model

    if spec.image_tokenizer is None:
        return None
    model = load_model(spec.image_tokenizer)
    if not hasattr(model, "encode"):
        raise ConfigError(f"{spec.image_tokenizer}: a {type(model).__name__} is no image tokenizer")
    return model


def _model(spec: RunConfig) -> Any:
    import torch

    from mmdiff import rng
    from mmdiff.models import registry

    if spec.init_from is not None:
        model: Any = registry.load_model(spec.init_from)
    elif spec.mup is not None:
        from mmdiff.scale import mup

        model = mup.fresh(_plan(spec), spec.model, _base(spec), rng.generator(spec.train.seed, "init"))
    else:
        model = registry.build(spec.model, generator=rng.generator(spec.train.seed, "init"))
    if spec.dtype is not None:
        model = model.to(getattr(torch, spec.dtype))
    for name, source in spec.init_parts.items():
        _init_part(model, name, source, registry.load_model(source))
    return model


def _quantized(spec: RunConfig, model: Any, device: str) -> Any:
    from mmdiff.io.quantize import quantize_

    return model if spec.quantize is None else quantize_(model, spec.quantize, device)


def _estimate(spec: RunConfig, device: str) -> Estimate:
    """Memory of the whole run from its shapes; if it fits twice into what is free, one batch is really run."""
    from mmdiff.commands.dry_run import estimate

    tokenizer = _tokenizer(spec, weights=False)
    part = -(-spec.data.batch_size // spec.train.accumulate)

    def loader(model: Any) -> Any:
        layout = _checked_layout(spec, model, tokenizer, _image_tokenizer(spec))
        return _loader(replace(spec, data=replace(spec.data, batch_size=part)), tokenizer, layout, None)

    return estimate(spec, device, loader, _objective(spec, "cpu"), lambda: _quantized(spec, _model(spec), device))


def _averaged(spec: RunConfig, model: Any, run_dir: Path, group: Group) -> Any:
    """The network with the averaged weights of the newest checkpoint; a new one where the trained one is spread."""
    from mmdiff.training import finetune, state

    if group.world > 1 and spec.train.parallel.type == "fsdp":
        model = _model(spec)
        if spec.train.lora is not None:
            finetune.attach(model, spec.train.lora, spec.train.seed)
    state.load_average(run_dir, model)
    return model


def _export(spec: RunConfig, model: Any, run_dir: Path, parts: Mapping[str, Any]) -> Path:
    from mmdiff.io.adapter import write_adapter

    if spec.train.lora is not None:
        return write_adapter(model, run_dir / "adapter", base=spec.init_from)
    model.to("cpu").save_pretrained(run_dir / "model", **parts, generation=_generation(spec))
    return run_dir / "model"


def _generation(spec: RunConfig) -> dict[str, Any] | None:
    """Defaults of generation; that there are some for edits says that the network has learnt to follow instructions."""
    given = spec.generation
    edits = any(task.type == "edit" for source in spec.data.sources for task in source.tasks)
    return {"edit": (given or {}).get("image", {}), **(given or {})} if edits else given


def _base(spec: RunConfig) -> Any:
    """The configuration at which the recipe's values were tuned."""
    from mmdiff.scale.family import with_size

    return with_size(spec.model, width=spec.mup.base_width, depth=spec.mup.base_depth) if spec.mup else spec.model


def _plan(spec: RunConfig) -> Any:
    from mmdiff.scale import mup

    return mup.plan(spec.model, _base(spec), rule=spec.mup.rule if spec.mup else "sp")


def _scales(spec: RunConfig) -> dict[str, tuple[float, float]] | None:
    """Factors of every parameter's rate and decay; None without muP."""
    if spec.mup is None:
        return None
    factors = {row.name: row.factors("adamw", spec.mup.decay) for row in _plan(spec).rows}
    return {name: (f.lr, f.decay) for name, f in factors.items()}


def _init_part(model: Any, name: str, source: str, other: Any) -> None:
    """Copy a part of another network, or all of it, into the part ``name`` of ``model``."""
    parts = dict(model.named_children())
    if name not in parts:
        raise ConfigError(f"init_parts: {type(model).__name__} has no part {name!r}; it has {', '.join(parts)}")
    given = dict(other.named_children()).get(name, other)
    try:
        parts[name].load_state_dict(given.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"init_parts: {source} does not fit part {name!r}: {error}") from None


def _checked_layout(spec: RunConfig, model: Any, tokenizer: Tokenizer | None, image_tokenizer: Any) -> Layout:
    """What the model expects of a sequence, after a look at whether the tokenizers fit it."""
    layout = _layout(model)
    _check_text(spec, model, tokenizer, layout)
    _check_images(spec, image_tokenizer, layout)
    return layout


def _layout(model: Any) -> Layout:
    from mmdiff.batch import Layout

    return model.layout() if hasattr(model, "layout") else Layout(image_size=model.config.image_size)


def _check_text(spec: RunConfig, model: Any, tokenizer: Tokenizer | None, layout: Layout) -> None:
    """Find a tokenizer that does not fit before hours are spent on it."""
    if tokenizer is None:
        return
    if tokenizer.vocab_size > layout.vocab_size > 0:
        raise ConfigError(
            f"tokenizer {spec.tokenizer} has {tokenizer.vocab_size:,} ids, the model room for {layout.vocab_size:,}; "
            "raise the model's vocab_size or train a smaller tokenizer"
        )
    language = getattr(model.config, "language", model.config)
    for name in ("mask_id", "eos_id", "bos_id", "eot_id"):
        want, have = getattr(language, name, None), getattr(tokenizer, name)
        if want is not None and want != have:
            raise ConfigError(
                f"the model's {name} is {want}, but {have} in tokenizer {spec.tokenizer}; set it to {have}"
            )


def _check_images(spec: RunConfig, image_tokenizer: Any, layout: Layout) -> None:
    """Find an image tokenizer that does not fit."""
    if image_tokenizer is None:
        return
    _check_cache(spec)
    if layout.latents:
        c = image_tokenizer.config
        if (getattr(c, "channels", None), getattr(c, "grid", None)) != layout.latents[:2]:
            raise ConfigError(
                f"image_tokenizer {spec.image_tokenizer} has other latents than the model, which draws "
                f"{layout.latents[0]} channels of {layout.latents[1]} x {layout.latents[2]}"
            )
        return
    if not hasattr(image_tokenizer, "codebook"):
        raise ConfigError(f"{spec.image_tokenizer}: a {type(image_tokenizer).__name__} makes no codes")
    have = (image_tokenizer.grid**2, image_tokenizer.codebook)
    if have != (layout.codes, layout.codebook):
        raise ConfigError(
            f"image tokenizer {spec.image_tokenizer} makes {have[0]} tokens of {have[1]:,} codes, the model draws "
            f"{layout.codes} of {layout.codebook:,}; set the model's codes.grid and codes.codebook"
        )


def _check_cache(spec: RunConfig) -> None:
    """Refuse shards whose codes or latents another encoder made."""
    from data_pipelines.cache import CACHE_FILE
    from mmdiff.commands.data import identity_of
    from mmdiff.io.atomic import load_json

    mine = identity_of(Path(str(spec.image_tokenizer)))
    for source in spec.data.sources:
        for url in source.shards:
            folder = Path(url) if Path(url).is_dir() else Path(url).parent
            note = load_json(folder / CACHE_FILE) if (folder / CACHE_FILE).is_file() else {}
            if note.get("encoder") not in (None, mine):
                raise ConfigError(
                    f"{folder}: was encoded by {note['encoder']}, but image_tokenizer {spec.image_tokenizer} is "
                    f"{mine}; run mmdiff data cache again with this one, or name the other"
                )


def _objective(spec: RunConfig, device: str) -> Any:
    """The objective, with the text encoder if there is one, after a look at whether it fits the network."""
    from mmdiff.training.objective import build

    objective: Any = build(spec.objective)
    if spec.text_encoder is None:
        return objective
    if not hasattr(objective, "reading"):
        raise ConfigError(f"text_encoder: objective {objective.type} reads no texts beside the network; leave it out")
    from mmdiff.io.text_encoders import load_text_encoder

    encoder = load_text_encoder(spec.text_encoder, device)
    _check_features(spec, encoder)
    return objective.reading(encoder)


def _check_features(spec: RunConfig, encoder: Any) -> None:
    if spec.model is None:
        return  # the network's own files say it; loading one with another encoder fails at its first layer
    for ours, have in (("context_channels", encoder.channels), ("pooled_channels", encoder.pooled_channels)):
        want = getattr(spec.model, ours, None)
        if want != have:
            raise ConfigError(f"text_encoder {spec.text_encoder} gives {have}, but the model's {ours} is {want}")


def _loader(
    spec: RunConfig, tokenizer: Tokenizer | None, layout: Layout, on_skip: Any, rank: int = 0, world: int = 1
) -> Any:
    from data_pipelines.loader import open_loader

    return open_loader(spec.data, tokenizer, layout, seed=spec.train.seed, on_skip=on_skip, rank=rank, world=world)


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


def _classes(spec: RunConfig) -> list[str] | None:
    from mmdiff.io.atomic import load_json

    if spec.classes is None:
        return None
    names = load_json(spec.classes)
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise ConfigError(f"{spec.classes}: expected a JSON list of class names")
    return names


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
