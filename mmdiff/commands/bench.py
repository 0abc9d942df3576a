"""``mmdiff bench``: how fast this machine is at what mmdiff does, as rates, ratios and shares of what it could do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer

from mmdiff.commands.options import TINY, Device, Json
from mmdiff.errors import ConfigError

__all__ = ["PARTS", "bench", "measure"]

PARTS = ("device", "loader", "training", "presets")
RECIPES: dict[str, tuple[str, ...]] = {
    "demo/image_tokenizer.yaml": (),
    "demo/reader.yaml": ("tokenizer=tiny", "init_parts={}"),
}
"""What is trained if no recipe is named -> what makes it need nothing but the package."""


def bench(
    config: Annotated[
        str | None, typer.Argument(help="Recipe whose training step is measured; default two of the demo's.")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes: dotted.key=value ...")] = None,
    shards: Annotated[
        list[str] | None, typer.Option(help="Shards to read; may be repeated; default those in the package.")
    ] = None,
    model: Annotated[str, typer.Option(help="Checkpoint whose presets are compared.")] = TINY,
    only: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; may be repeated; default all.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time of each measurement.")] = 2.0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure this machine: matrix products, reading, training steps, presets; takes under a minute on two cores."""
    found = measure(
        config, overrides or (), shards=shards, model=model, only=only, seconds=seconds, device=device, progress=True
    )
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def measure(
    config: str | None = None,
    overrides: Sequence[str] = (),
    *,
    shards: Sequence[str] | None = None,
    model: str = TINY,
    only: Sequence[str] | None = None,
    seconds: float = 2.0,
    device: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Everything `bench` prints, as plain data.

    Args:
        config: Recipe to train; None for two of the demo's.
        overrides: ``dotted.key=value`` changes of the recipe.
        shards: What is read; None for the pictures in the package.
        model: Checkpoint whose presets are compared.
        only: Some of `PARTS`; None or empty for all.
        seconds: Time of each measurement.
        device: Where; None = a GPU if there is one.
        progress: Say on stderr what is being measured.

    Returns:
        Part -> rates, see `mmdiff.commands.bench_measures`; of ``training`` by the recipe's name.

    Raises:
        ConfigError: No such part, or the recipe cannot be carried out.
        ShardError: The data cannot be read.
        CheckpointError: The model cannot be loaded.
    """
    parts = _checked(only, config, overrides)
    from mmdiff.commands import bench_measures as measures

    read, place = shards or ("embedded:emoji/train",), device or _best_device()
    found: dict[str, Any] = {}
    for part in parts:
        if part == "training":
            found[part] = _training(config, overrides, place, seconds, found.get("device", {}), progress)
            continue
        _say(progress, {"loader": f"reading {' '.join(read)}", "presets": f"presets of {model}"}.get(part, part))
        if part == "device":
            found[part] = measures.device_rates(place)
        elif part == "loader":
            found[part] = measures.loader_rates(read, seconds)
        else:
            found[part] = {"model": model, "seconds_per_item": measures.preset_rates(model, place, read, seconds)}
    return found


def _checked(only: Sequence[str] | None, config: str | None, overrides: Sequence[str]) -> list[str]:
    unknown = [part for part in only or () if part not in PARTS]
    if unknown:
        raise ConfigError(f"--only {unknown[0]}: not a part; there are {', '.join(PARTS)}")
    if overrides and config is None:
        raise ConfigError(f"{overrides[0]}: changes need a recipe before them")
    if config is not None and "=" in config:
        raise ConfigError(f"{config}: expected a recipe before changes, such as demo/vision.yaml")
    parts = [part for part in PARTS if part in (only or PARTS)]
    if config is not None and "training" not in parts:
        raise ConfigError(f"{config}: a recipe is for the part training, which --only leaves out")
    return parts


def _training(
    config: str | None, overrides: Sequence[str], device: str, seconds: float, known: dict[str, Any], progress: bool
) -> dict[str, Any]:
    import torch

    from mmdiff.commands import bench_measures as measures
    from mmdiff.commands.train import load_config
    from mmdiff.training.throughput import peak_flops

    def peak(dtype: torch.dtype) -> float:
        name = f"{str(dtype).removeprefix('torch.')}_flops"
        return known[name] if name in known else peak_flops(torch.device(device), dtype)

    rows: dict[str, Any] = {}
    for name, changes in ({config: tuple(overrides)} if config is not None else RECIPES).items():
        _say(progress, f"training {name}")
        rows[name] = measures.training_rates(load_config(name, changes), device, seconds, peak)
    return rows


def _best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _say(on: bool, text: str) -> None:
    if on:
        print(f"measuring: {text}", file=sys.stderr, flush=True)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    for part, rates in found.items():
        yield from _SHOW[part](rates)


def _device(rates: dict[str, Any]) -> Iterator[str]:
    yield f"device    {rates['device']}, {rates['threads']} threads"
    yield (
        f"          matrix products {_giga(rates['float32_flops'])}FLOP/s in float32, "
        f"{_giga(rates['bfloat16_flops'])}FLOP/s in bfloat16; copying {_giga(rates['copy_bytes'])}B/s"
    )


def _loader(rates: dict[str, Any]) -> Iterator[str]:
    share = f", {rates['share']:.0%} of raw reads ({rates['raw']:,.0f})" if rates["share"] is not None else ""
    yield f"loader    {rates['samples']:,} samples of {rates['bytes'] / max(rates['samples'], 1) / 1e3:,.1f} kB"
    yield f"          {rates['read']:,.0f} samples/s from memory in shuffled order, checked{share}"
    disk = "unknown" if rates["disk_bytes"] is None else f"{_giga(rates['disk_bytes'])}B/s"
    decoded = "none" if rates["decoded"] is None else f"{rates['decoded']:,.0f} pictures/s on one thread"
    yield f"          disk {disk}; decoding {decoded}"


def _trained(rows: dict[str, Any]) -> Iterator[str]:
    for name, rates in rows.items():
        share = "an unknown share" if rates["share"] is None else f"{rates['share']:.1%}"
        speeds = ", ".join(f"{rates[n]:,.1f} {n}/s" for n in ("samples", "tokens", "images") if rates[n])
        yield f"training  {name}, {rates['parameters'] / 1e6:,.2f} M parameters, batches of {rates['batch_size']}"
        yield f"          {speeds}; {1e3 * rates['step_seconds']:,.0f} ms per step, {rates['data_wait']:.0%} of it data"
        memory = f"{rates['peak_bytes'] / 1e6:,.0f} MB at most"
        yield f"          {_giga(rates['flops'])}FLOP/s, {share} of the peak; {memory}"


def _presets(rates: dict[str, Any]) -> Iterator[str]:
    yield f"presets   {rates['model']}, milliseconds per item"
    for name, by_preset in rates["seconds_per_item"].items():
        slow = by_preset["exact"]
        told = []
        for preset, value in by_preset.items():
            if isinstance(value, str):
                told.append(f"{preset}: {value}")
                continue
            ratio = f" ({slow / value:.1f}x)" if isinstance(slow, float) and preset != "exact" else ""
            told.append(f"{preset} {1e3 * value:,.0f}{ratio}")
        yield f"          {name}: {', '.join(told)}"


_SHOW = {"device": _device, "loader": _loader, "training": _trained, "presets": _presets}


def _giga(number: float) -> str:
    return f"{number / 1e12:,.2f} T" if number >= 1e12 else f"{number / 1e9:,.2f} G"
