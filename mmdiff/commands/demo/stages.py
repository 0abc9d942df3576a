"""The stages of the demo, each one a call of a command that users have too.

tokenizer -> image_tokenizer -> vision -> reader -> codes -> model -> evaluation -> report
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from mmdiff import config
from mmdiff.commands.demo.state import DemoState
from mmdiff.errors import ConfigError

__all__ = ["StoppedError", "run_stages"]

TRAIN = "embedded:emoji/train"
VOCABULARY = 1024
PROGRESS_AT = (0.0, 0.04, 0.12, 0.3, 0.6, 1.0)
"""Shares of the training at which the same prompts are drawn again."""

RECIPES = {
    "image_tokenizer": "demo/image_tokenizer.yaml",
    "vision": "demo/vision.yaml",
    "reader": "demo/reader.yaml",
    "model": "demo/unified.yaml",
}
"""The recipe of each training stage."""
SHARES = {"image_tokenizer": 0.13, "vision": 0.25, "reader": 0.27, "model": 0.35}
"""How the training time of a ``--minutes`` run is divided."""
FIXED_SECONDS = 110.0
"""What the stages that do not train take together on two cores; used only to plan ``--minutes``."""
CALIBRATION_SAMPLES = {"image_tokenizer": 360, "vision": 1280, "reader": 960, "model": 768}

TITLES = {
    "tokenizer": "text tokenizer: subwords learned from captions, questions and answers",
    "image_tokenizer": "image tokenizer: pictures to codes and back",
    "vision": "vision tower: pictures beside their texts; the eyes of the model, and the judge of what it draws",
    "reader": "reader: the model learns to answer and caption, with short sequences",
    "codes": "codes: every training picture through the image tokenizer",
    "model": "model: captions, answers and pictures in one run over mixed batches",
    "evaluation": "evaluation on held-out pictures",
    "report": "report",
}


class StoppedError(Exception):
    """A training stage was interrupted and saved."""


def run_stages(state: DemoState) -> Path:
    """Run every stage that is not done; returns the path of the report.

    Raises:
        StoppedError: A training stage was interrupted; everything is saved.
    """
    state.save()
    for number, (name, title) in enumerate(TITLES.items(), 1):
        if name in state.done:
            continue
        _say(f"[{number}/{len(TITLES)}] {title}")
        start = time.monotonic()
        try:
            _STAGES[name](state)
            state.done.append(name)
        finally:
            state.seconds[name] = state.seconds.get(name, 0.0) + time.monotonic() - start
            state.save()
    return state.folder / "report.html"


def _tokenizer(state: DemoState) -> None:
    """Learn the text tokenizer, and list the classes that can be drawn."""
    from data_pipelines.reader import iter_samples
    from mmdiff.commands import data
    from mmdiff.io.atomic import save_json

    with redirect_stdout(sys.stderr):
        data.tokenizer([TRAIN], vocab_size=VOCABULARY, out=state.folder / "tokenizer")
    names = sorted({str(s.info()["subgroup"]) for s, _ in iter_samples([TRAIN]) if s is not None})
    save_json(state.folder / "classes.json", names)


def _codes(state: DemoState) -> None:
    from mmdiff.commands import data

    out = state.folder / "codes"
    shutil.rmtree(out, ignore_errors=True)
    with redirect_stdout(sys.stderr):
        data.cache(
            [TRAIN], encoder=state.folder / "image_tokenizer" / "model", out=out, batch=64, fit="square", device="cpu"
        )


def _train(state: DemoState, name: str) -> None:
    from mmdiff.commands.demo.progress import Progress

    samples, out = _planned(state, name), state.folder / name
    probes: tuple[Any, ...] = ()
    if name == "model":
        probes = (Progress(state.folder, samples, PROGRESS_AT, _recipe(name)["generation"]),)
    overrides = [*_overrides(state, name), f"train.samples={samples}", f"out={out}"]
    result = _run(name, overrides, resume=out.exists(), probes=probes)
    if result.fit.stopped:
        raise StoppedError


def _recipe(name: str) -> dict[str, Any]:
    return config.read_yaml(config.find_recipe(RECIPES[name]))


def _planned(state: DemoState, name: str) -> int:
    """Samples of a stage: the recipe's own, or with ``--minutes`` the calibrated number, measured once."""
    if state.minutes is None:
        return int(_recipe(name)["train"]["samples"])
    budget = state.minutes * 60 - FIXED_SECONDS
    if budget < 60:
        raise ConfigError(f"--minutes {state.minutes:g}: needs at least {(FIXED_SECONDS + 60) / 60:.0f} minutes")
    if name not in state.samples:
        scratch = state.folder / "calibration"
        shutil.rmtree(scratch, ignore_errors=True)
        short = [f"train.samples={CALIBRATION_SAMPLES[name]}", f"out={scratch}"]
        result = _run(name, [*_overrides(state, name), *short], resume=False, probes=())
        if result.fit.stopped:
            raise StoppedError
        state.speed[name] = result.fit.samples_per_second
        state.samples[name] = int(budget * SHARES[name] * state.speed[name])
        shutil.rmtree(scratch, ignore_errors=True)
        state.save()
        _say(f"      {state.speed[name]:.0f} samples/s measured, {state.samples[name]:,} samples planned")
    return state.samples[name]


def _overrides(state: DemoState, name: str) -> list[str]:
    """Where a recipe finds what the stages before it made."""
    common = [f"train.seed={state.seed}"]
    if name == "image_tokenizer":
        return common
    common.append(f"tokenizer={state.folder / 'tokenizer'}")
    if name == "vision":
        return common
    images = state.folder / "image_tokenizer" / "model"
    sources = len(_recipe(name)["data"]["sources"])
    if name == "reader":
        return [*common, f"init_parts.vision={state.folder / 'vision' / 'model'}"]
    common.append(f"init_from={state.folder / 'reader' / 'model'}")
    folders = [
        f"image_tokenizer={images}",
        *(f"data.sources.{i}.shards=[{state.folder / 'codes'}]" for i in range(sources)),
    ]
    return [*common, *folders, f"classes={state.folder / 'classes.json'}"]


def _run(name: str, overrides: list[str], *, resume: bool, probes: tuple[Any, ...]) -> Any:
    from mmdiff.commands import train

    return train.run(RECIPES[name], overrides, resume=resume, probes=probes)


def _evaluation(state: DemoState) -> None:
    from mmdiff.commands.demo.evaluation import evaluate

    evaluate(state.folder, seed=state.seed)


def _report(state: DemoState) -> None:
    from mmdiff.commands.demo.page import write_page

    write_page(state)


_STAGES: dict[str, Callable[[DemoState], None]] = {
    "tokenizer": _tokenizer,
    "image_tokenizer": lambda s: _train(s, "image_tokenizer"),
    "vision": lambda s: _train(s, "vision"),
    "reader": lambda s: _train(s, "reader"),
    "codes": _codes,
    "model": lambda s: _train(s, "model"),
    "evaluation": _evaluation,
    "report": _report,
}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
