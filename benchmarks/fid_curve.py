r"""How a class-conditional model gets better while it learns: FID at every kept checkpoint, beside real against real.

    python benchmarks/fid_curve.py runs/cifar10/maskgit --real data/cifar10/train --reference data/cifar10/test \
        --out curves/maskgit --num 2000 --final 10000 -- --dtype bfloat16

Words after ``--`` go to ``mmdiff sample``. Each network of ``--features`` gives a curve of its own. Everything is done
by the commands that users have, in a folder per step, so an interrupted run goes on where it was. Written to ``--out``:
``curve.svg``, ``curve.json``, and ``pictures.png`` with a row per checkpoint and the same seeds in every row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.svg import Curve, line_chart
from mmdiff.commands.mup_page import draw
from mmdiff.commands.sample import path_of
from mmdiff.images import encode_png, grid, open_image
from mmdiff.io.atomic import save_json

COLUMNS = 20


def mmdiff(*words: object) -> None:
    """Run one command; what it says goes where ours goes."""
    subprocess.run([sys.executable, "-m", "mmdiff", *map(str, words)], check=True)


def distance(judged: Path, reference: Path, features: str, num: int, out: Path, *more: object) -> float:
    """FID of two sets of pictures; measured once, then read from the file."""
    if not out.is_file():
        words = ("--features", features, "--num", num, "--measures", "fid", "--batch", 32, "--out", out)
        mmdiff("eval", "fid", judged, reference, *words, *more)
    return float(json.loads(out.read_text(encoding="utf-8"))["fid"])


def floor(given: argparse.Namespace, features: str, num: int) -> tuple[float, Path]:
    """FID of as many other real pictures, and the statistics of the reference that every set is held against."""
    stem = f"real-{features.partition(':')[0]}-{num}"
    statistics = given.out / f"{stem}.npz"
    out = given.out / f"{stem}.json"
    return distance(given.reference, given.real, features, num, out, "--save-statistics", statistics), statistics


def drawn(given: argparse.Namespace, checkpoint: Path, num: int) -> Path:
    """Pictures of the model at a checkpoint."""
    model, pictures = given.out / f"model-{checkpoint.name}", given.out / f"pictures-{checkpoint.name}"
    if not (model / "manifest.json").is_file():
        mmdiff("convert", checkpoint, model)
    mmdiff("sample", model, "--num", num, "--out", pictures, *given.words)
    return pictures


def sheet(folders: Sequence[Path], columns: int, out: Path) -> None:
    """The first pictures of every checkpoint, a row each."""
    rows = [open_image(path_of(folder, i)) for folder in folders for i in range(columns)]
    out.write_bytes(encode_png(grid(rows, columns=columns)))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All numbers: a list per network of features, in the order of the checkpoints."""
    checkpoints = sorted((given.run / "checkpoints").glob("step_*"))
    samples = [int(path.name.removeprefix("step_")) for path in checkpoints]
    result: dict[str, Any] = {"samples": samples, "num": given.num, "curves": {}, "floor": {}}
    folders = [drawn(given, checkpoint, given.num) for checkpoint in checkpoints]
    sheet(folders, min(COLUMNS, given.num), given.out / "pictures.png")
    for features in given.features:
        result["floor"][features], statistics = floor(given, features, given.num)
        result["curves"][features] = [
            distance(folder, statistics, features, given.num, given.out / f"{folder.name}-{statistics.stem}.json")
            for folder in folders
        ]
    if given.final:
        last = drawn(given, checkpoints[-1], given.final)
        result["final"] = {"num": given.final, "fid": {}, "floor": {}}
        for features in given.features:
            result["final"]["floor"][features], statistics = floor(given, features, given.final)
            name = given.out / f"{last.name}-{statistics.stem}.json"
            result["final"]["fid"][features] = distance(last, statistics, features, given.final, name)
    return result


def chart(features: str, result: dict[str, Any]) -> tuple[str, str]:
    """Title and drawing of one network's curve, with the floor as a flat line."""
    samples, curve, real = result["samples"], result["curves"][features], result["floor"][features]
    lines = [
        Curve(name="drawn", xs=samples, ys=curve),
        Curve(name="real against real", xs=samples, ys=[real] * len(samples)),
    ]
    return features.partition(":")[0], line_chart(lines, x_label="samples seen", y_label="FID", smooth=False)


def main() -> None:
    """Read the command line."""
    words = sys.argv[1:]
    own, more = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("--real", required=True, help="real pictures for the floor, such as the training split")
    parser.add_argument("--reference", required=True, help="real pictures that all sets are held against")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num", type=int, default=2000, help="pictures per checkpoint")
    parser.add_argument("--final", type=int, default=0, help="also this many of the last checkpoint")
    parser.add_argument("--features", nargs="+", default=["inception", "efficientnet-lite0"])
    given = parser.parse_args(own)
    given.words = more
    given.out.mkdir(parents=True, exist_ok=True)
    result = measure(given)
    save_json(given.out / "curve.json", result)
    charts = [chart(features, result) for features in given.features]
    notes = [f"{given.num:,} pictures each; against as many real pictures"]
    draw(given.out / "curve.svg", charts, given.run.name, notes, legend=["drawn", "real"])
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
