"""The demo's results as a page and as a table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mmdiff.commands.demo.state import DemoState

__all__ = ["summary", "write_page"]

STAGES = ("image_tokenizer", "vision", "reader", "model")


def summary(results: Mapping[str, Any]) -> str:
    """The promises as a table of text."""
    lines = []
    for gate in results["gates"]:
        mark, sign = "ok  " if gate["passed"] else "MISS", "<=" if gate["smaller_is_better"] else ">="
        bound = f"95% bound {gate['bound']:.1%} {sign} {gate['threshold']:.1%}"
        lines.append(f"{mark} {gate['value']:7.1%}  {bound:32s} {gate['name']}")
    return "\n".join(lines)


def write_page(state: DemoState) -> Path:
    """Write report.html of a finished run; returns its path."""
    from eval import report
    from mmdiff import __version__

    out = state.folder / "evaluation"
    results = json.loads((out / "results.json").read_text())
    held = _held()
    kept = sum(g["passed"] for g in results["gates"])
    page = report.DemoReport(
        title="mmdiff demo",
        summary=(
            "One masked-diffusion model, trained from nothing on this machine, that captions pictures, answers "
            "questions about them and draws. Everything below is measured on pictures that training never saw."
        ),
        facts=(
            f"{kept} of {len(results['gates'])} promises kept",
            f"{sum(state.seconds.values()) / 60:.1f} minutes in all",
            f"{_threads()} threads on {platform.machine()}",
            datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        ),
        gates=tuple(_gate(g) for g in results["gates"]),
        charts=_charts(state.folder),
        progress=_progress(state.folder),
        captions=_captions(results, held),
        answers=_answers(results, held),
        grids=_grids(out, results),
        tables=(_distances(results), _kinds(results)),
        neighbours=_neighbours(out, results),
        environment=_environment(state, __version__),
        commands=_commands(state),
        notes=(
            "The judge is the small network of pictures and texts that the demo trains first. The model reads with its "
            "vision tower but draws without it. Its KID, FID and retrieval compare models judged by it, nothing else.",
            "Novel concepts share no base concept with training, so their exact names cannot be known; groups, "
            "colours and attributes can. Novel combinations are known concepts in an unseen skin tone or gender.",
            "Bounds are one-sided 95% bootstrap bounds over concepts; questions are balanced so that the commonest "
            "answer scores low.",
        ),
    )
    return report.write_report(page, state.folder / "report.html")


def _gate(saved: Mapping[str, Any]) -> Any:
    from eval.report import Gate

    plain = {k: saved[k] for k in ("name", "value", "threshold", "passed", "note", "smaller_is_better")}
    return Gate(**plain, lower=saved["bound"], baselines=tuple((n, v) for n, v in saved["baselines"]))


def _charts(folder: Path) -> tuple[Any, ...]:
    from eval.report import loss_charts

    charts: list[Any] = []
    for stage in STAGES:
        path = folder / stage / "log.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        charts += [c for c in loss_charts(records, stage=stage.replace("_", " ")) if not c.title.endswith(": loss")]
    return tuple(charts)


def _progress(folder: Path) -> tuple[tuple[int, bytes], ...]:
    return tuple((int(p.stem), p.read_bytes()) for p in sorted((folder / "progress").glob("*.png")))


def _held() -> dict[tuple[str, str], bytes]:
    """PNG of every held-out picture by split and key."""
    from mmdiff import images
    from mmdiff.commands.demo.heldout import SPLITS, read_split

    return {(h.split, h.key): images.encode_png(h.image) for split in SPLITS for h in read_split(split)}


def _captions(results: Mapping[str, Any], held: Mapping[tuple[str, str], bytes]) -> tuple[Any, ...]:
    from eval.report import CaptionItem

    return tuple(
        CaptionItem(image=held[split, i["key"]], caption=i["caption"], truth=i["truth"], note=split)
        for split, items in results["captions"].items()
        for i in items[:12]
    )


def _answers(results: Mapping[str, Any], held: Mapping[tuple[str, str], bytes]) -> tuple[Any, ...]:
    """A few questions of every kind, right and wrong as they come."""
    from eval.report import QaItem

    chosen: dict[str, list[Any]] = {}
    for item in results["answers"]:
        kind = chosen.setdefault(item["kind"], [])
        if len(kind) < 3 and all(item["truth"] != other["truth"] for other in kind):
            kind.append(item)
    return tuple(
        QaItem(
            image=held["novel concepts", i["key"]],
            question=i["question"],
            answer=i["answer"],
            truth=i["truth"],
            blind_answer=i["blind"],
        )
        for items in chosen.values()
        for i in items
    )


def _grids(out: Path, results: Mapping[str, Any]) -> tuple[Any, ...]:
    from eval.report import Grid

    classes = ", ".join(results["classes"])
    pairs = "Upper row of each pair: drawn from the caption; lower row: the real picture."
    return (
        Grid(title="Drawn for a class", png=(out / "drawn_classes.png").read_bytes(), note=f"Four each of: {classes}."),
        Grid(
            title="Drawn from captions: novel combinations",
            png=(out / "drawn_novel_combinations.png").read_bytes(),
            note=pairs,
        ),
        Grid(
            title="Drawn from captions: novel concepts", png=(out / "drawn_novel_concepts.png").read_bytes(), note=pairs
        ),
    )


def _distances(results: Mapping[str, Any]) -> Any:
    from eval.report import TableSpec

    names = {"model": "trained model", "untrained": "untrained model", "real": "real against real (floor)"}
    rows = [
        (names[d["set"]], d["features"], f"{d['kid']:.4f}", f"{d['fid']:.3f}", " and ".join(map(str, d["n"])))
        for d in results["distances"]
    ]
    return TableSpec(
        title="Distance to real held-out pictures",
        columns=("pictures", "features", "KID", "FID", "N"),
        rows=tuple(rows),
        note="FID at this N is biased upwards; compare it with the floor only.",
    )


def _kinds(results: Mapping[str, Any]) -> Any:
    from eval.report import TableSpec

    table = results["answers_by_kind"]
    names = ("model", "without image", "commonest answer", "untrained")
    rows = [
        (kind, str(row["n"]), str(row["answers"]), *(f"{table[name][kind]['accuracy']:.0%}" for name in names))
        for kind, row in table["model"].items()
    ]
    return TableSpec(
        title="Answers on novel concepts, by kind of question",
        columns=("kind", "questions", "different answers", *names),
        rows=tuple(rows),
    )


def _neighbours(out: Path, results: Mapping[str, Any]) -> tuple[Any, ...]:
    from eval.report import Neighbours

    return tuple(
        Neighbours(
            image=(out / f"neighbour_{row}.png").read_bytes(),
            label=found["prompt"],
            nearest=tuple(
                ((out / f"neighbour_{row}_{rank}.png").read_bytes(), f"{n['caption']} ({n['similarity']:.2f})")
                for rank, n in enumerate(found["nearest"])
            ),
        )
        for row, found in enumerate(results["neighbours"])
    )


def _environment(state: DemoState, version: str) -> tuple[tuple[str, str], ...]:
    import torch

    from mmdiff import config

    hashes = {s: config.fingerprint(config.read_yaml(state.folder / s / "config.yaml")) for s in STAGES}
    return (
        ("mmdiff", version),
        ("PyTorch", torch.__version__),
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}, {_threads()} threads"),
        ("seed", str(state.seed)),
        *((f"seconds, {name.replace('_', ' ')}", f"{seconds:.0f}") for name, seconds in state.seconds.items()),
        *((f"configuration, {name.replace('_', ' ')}", digest) for name, digest in hashes.items()),
    )


def _commands(state: DemoState) -> tuple[str, ...]:
    again = "mmdiff demo" if state.minutes is None else f"mmdiff demo --minutes {state.minutes:g}"
    model = state.folder / "model" / "model"
    return (
        f"{again} --seed {state.seed} --out {state.folder}",
        f"mmdiff caption {model} picture.png",
        f'mmdiff ask {model} picture.png "What is the main color?"',
        f'mmdiff generate {model} "red heart" --out pictures',
    )


def _threads() -> int:
    import torch

    return torch.get_num_threads()
