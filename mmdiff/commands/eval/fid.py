"""``mmdiff eval fid``: distances between two sets of images, by the rules of the published tools."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmdiff.commands.eval.output import BatchSize, JsonOut, Out, device_of, finish, printed, shown

__all__ = ["fid"]


def fid(
    a: Annotated[
        str, typer.Argument(help="Judged images: folder, .npz, shards, model:PATH to draw them; or statistics .npz.")
    ],
    b: Annotated[str, typer.Argument(help="Reference images in the same forms, or statistics .npz.")],
    features: Annotated[
        str,
        typer.Option(
            help="Feature network: inception[:FILE], efficientnet-lite0, scorer:PATH, timm:MODEL, "
            "open_clip:MODEL/WEIGHTS, dinov2, clip-336."
        ),
    ] = "inception",
    num: Annotated[int | None, typer.Option(min=2, help="Exactly this many images of each set.")] = None,
    floor: Annotated[bool, typer.Option("--floor", help="Also measure real against real.")] = False,
    protocol: Annotated[
        str, typer.Option(help="Whose rules: full, torch-fidelity, pytorch-fid, adm, clean, clean-legacy-...")
    ] = "full",
    measures: Annotated[
        str | None, typer.Option(help="fid,kid,isc,sfid,pr,dc,cmmd or all; default: what the protocol's tool reports.")
    ] = None,
    batch_size: BatchSize = 64,
    device: Annotated[str | None, typer.Option(help="Where the network runs; default a GPU if there is one.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Hash that a statistics file B must have.")] = None,
    draws: Annotated[int, typer.Option(min=0, help="Resamples for an interval of the distance.")] = 0,
    save_statistics: Annotated[
        Path | None, typer.Option(help="Write mu and sigma (and mu_s, sigma_s) of A to this .npz.")
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="published: print known numbers beside it (imagenet256 or imagenet512).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the choice of images, of the floor and of resamples.")] = 0,
    as_json: JsonOut = False,
    out: Out = None,
) -> None:
    """FID, KID, Inception Score, sFID, precision/recall, density/coverage of two sets of images."""
    from eval.fid import MEASURES, study
    from eval.processes import barrier, joined

    wanted = None if measures is None else MEASURES if measures == "all" else tuple(measures.split(","))
    settings = dict(a=a, b=b, features=features, num=num, protocol=protocol, measures=wanted, sha256=sha256)
    benchmark = _benchmark(compare, b)
    with joined():
        judged = _images(a, num, seed, batch_size, device, out)
        barrier()
        done = study(
            judged,
            b,
            features=features,
            num=num,
            floor=floor,
            protocol=protocol,
            measures=wanted,
            batch_size=batch_size,
            device=device_of(device),
            sha256=sha256,
            draws=draws,
            seed=seed,
        )
    if save_statistics is not None:
        done.write_statistics(save_statistics)
    result = done.result
    lines = _lines(result)
    rows = _published(benchmark, result)
    lines += [f"{name:24} {value:>8}  {more or source}" for name, value, source, more in rows]
    finish(
        result,
        lines,
        as_json,
        out,
        measure="fid",
        settings=settings | {"draws": draws, "seed": seed},
        page=lambda: _page(done, rows, settings | {"draws": draws, "seed": seed}),
        hashes={"weights": result.weights_sha256, "statistics": result.statistics_sha256},
        items=done.items(),
    )


def _published(benchmark: str | None, result: Any) -> tuple[tuple[str, str, str, str], ...]:
    """Published values (50,000 images against ADM's statistics) with this run in its place."""
    from eval.published import comparison

    return () if benchmark is None else tuple(comparison(benchmark, result.fid, lower_is_better=True))


def _benchmark(compare: str | None, b: str) -> str | None:
    """The published table to print: named, or told by the name of the statistics file."""
    from mmdiff.errors import ConfigError

    if compare is None:
        return None
    if compare == "published":
        for size in ("512", "256"):
            if size in Path(b).name:
                return f"imagenet{size}"
    if compare in ("imagenet256", "imagenet512"):
        return compare
    raise ConfigError(
        f"--compare {compare}: say imagenet256 or imagenet512; `published` alone works where the name of the "
        f"statistics file tells the size, and {Path(b).name} does not"
    )


def _images(a: str, num: int | None, seed: int, batch: int, device: str | None, out: Path | None) -> str:
    """The judged images; ``model:PATH`` draws them first, resumably, below the output folder."""
    from mmdiff.errors import ConfigError

    if not a.startswith("model:"):
        return a
    if num is None or out is None or out.suffix == ".json":
        raise ConfigError("model:PATH draws the images: say how many (--num) and where they go (--out FOLDER)")
    from mmdiff.commands.sample import sample

    with contextlib.redirect_stdout(sys.stderr):
        name = a.removeprefix("model:")
        sample(num=num, out=out / "images", model=name, seed0=seed, batch=batch, device=device)
    return str(out / "images")


def _lines(result: Any) -> list[str]:
    return [*printed(_numbers(result)), *(f"note: {note}" for note in result.notes)]


def _numbers(result: Any) -> list[tuple[str, str, str]]:
    sets = f"{result.features} features, {result.n_a} against {result.n_b}, protocol {result.protocol}"
    rows = [(result.name, f"{result.fid:.2f}", sets)]
    if result.interval is not None:
        low, high = result.interval.lower, result.interval.upper
        rows.append(
            (
                "interval",
                f"{low:.2f} to {high:.2f}",
                f"{result.interval.level:.0%} of {result.interval.draws} resamples",
            )
        )
    if result.kid_mean is not None:
        spread = f" ± {1000 * result.kid_std:.3f}" if result.kid_std is not None else ""
        rows.append(("KID x 1000", f"{1000 * result.kid_mean:.3f}{spread}", ""))
    if result.isc_mean is not None:
        rows.append(("Inception Score", f"{result.isc_mean:.2f} ± {result.isc_std:.2f}", ""))
    if result.sfid is not None:
        rows.append(("sFID", f"{result.sfid:.2f}", ""))
    pairs = [(name, getattr(result, name)) for name in ("precision", "recall", "density", "coverage", "cmmd")]
    rows += [(name, f"{value:.3f}", "") for name, value in pairs if value is not None]
    if result.floor is not None:
        halves = f"real against real, {result.floor_n} images each"
        rows.append(("floor", f"{result.floor:.2f}", halves))
        rows.append(("floor, KID x 1000", f"{1000 * result.floor_kid:.3f}", halves))
    return rows


def _page(done: Any, published: tuple[Any, ...], settings: dict[str, Any]) -> str:
    from eval.page import Gallery, Shown, Table, render, thumbnail

    result = done.result
    parts: list[Any] = shown(_numbers(result))
    if published:
        columns = ("Model", "FID", "Source", "More")
        parts.append(Table(title="Published", columns=columns, rows=published, note="50,000 images each."))
    for title, rows in done.galleries():
        items = tuple(
            Shown(pictures=tuple((thumbnail(image), caption) for image, caption in row.pictures), text=(row.text,))
            for row in rows
        )
        parts.append(Gallery(title=title, items=items, note="Distances are in the feature network's space."))
    facts = settings | {"weights sha256": result.weights_sha256, "statistics sha256": result.statistics_sha256}
    summary = " ".join(("Distances of two sets of images.", *(f"{note}." for note in result.notes)))
    return render(f"{result.name}: {result.fid:.2f}", summary, parts, facts=facts)
