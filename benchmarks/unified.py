"""Unified training beside its tasks one by one, and text to image with and without the max-logit cache.

    python benchmarks/unified.py train           # a mixed step beside the steps of its tasks, the model in the package
    python benchmarks/unified.py draw            # a random Lumina-DiMOO: passes per second, exact and cached
    python benchmarks/unified.py draw --device cuda --width 2048 --depth 16 --grid 64

Every round times all variants in turns, so that a busy machine slows them alike; printed are medians and ratios.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import mmdiff
from data_pipelines.reader import iter_samples
from data_pipelines.task_config import CaptionConfig, TextConfig, VqaConfig
from data_pipelines.tasks import build_task
from mmdiff import rng
from mmdiff.batch import IGNORE, Batch, Example, collate
from mmdiff.models.llada import Config as LanguageConfig
from mmdiff.models.lumina import Config, Lumina
from mmdiff.sampling import CodeBackbone, decode, layout
from mmdiff.sampling.vocabulary_presets import lumina_parts
from mmdiff.text.lumina import Scripts, SpecialIds
from mmdiff.training.objective import Masked


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rounds(variants: dict[str, Callable[[], object]], o: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each variant."""
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for n in range(o.rounds + 1):
        for name, run in variants.items():
            seconds = timed(run, o.device)
            if n:  # the first round warms up
                spent[name].append(seconds)
    return {name: statistics.median(s) for name, s in spent.items()}


def examples(o: argparse.Namespace, checkpoint: Any) -> dict[str, list[Example]]:
    """As many examples per task; the codes to draw are random, which costs the same."""
    draw, shape = torch.Generator().manual_seed(0), checkpoint.layout
    samples = [s for s, _ in itertools.islice(iter_samples(["embedded:emoji/train"]), o.batch) if s is not None]
    out: dict[str, list[Example]] = {}
    for config in (CaptionConfig(), VqaConfig(), TextConfig(fields=("caption",))):
        task = build_task(config, checkpoint.tokenizer, shape)
        out[config.type] = [task(sample, draw) for sample in samples]
    out["text_to_image"] = []
    for text in out["text"]:
        codes = torch.randint(shape.codebook, (shape.codes,), generator=draw) + shape.code_offset
        out["text_to_image"].append(
            Example(
                key=text.key,
                task="text_to_image",
                ids=torch.cat([text.ids, codes]),
                labels=torch.cat([torch.full_like(text.ids, IGNORE), codes]),
                weights=torch.cat([torch.zeros(len(text.ids)), torch.ones(len(codes))]),
                droppable=torch.arange(len(text.ids) + len(codes)) < len(text.ids),
            )
        )
    return out


def train(o: argparse.Namespace) -> None:
    """Seconds of a step over all tasks, and of the steps of each."""
    checkpoint = mmdiff.load("tiny", device=o.device).checkpoint
    model: Any = checkpoint.model.train()
    parts = examples(o, checkpoint)
    batches = {name: collate(rows).to(o.device) for name, rows in parts.items()}
    mixed = collate([e for rows in zip(*parts.values(), strict=True) for e in rows]).to(o.device)

    def step(batch: Batch) -> None:
        model.zero_grad(set_to_none=True)
        Masked()(model, batch, rng.generator(0, "objective", device=o.device)).total.backward()

    seconds = rounds({**{n: partial(step, b) for n, b in batches.items()}, "all in one": partial(step, mixed)}, o)
    for name, value in seconds.items():
        rows = len(mixed) if name == "all in one" else o.batch
        print(f"{name:<14} {value * 1e3:8.1f} ms  {rows / value:8.1f} samples/s")
    alone = sum(v for n, v in seconds.items() if n != "all in one")
    print(f"steps one by one / one mixed step: {alone / seconds['all in one']:.2f} (above 1: mixing is faster)")


def draw(o: argparse.Namespace) -> None:
    """Passes per second of a guided run, exact and with the cache."""
    codebook, text = 1024, 512
    language = LanguageConfig(
        vocab_size=text + codebook, width=o.width, depth=o.depth, heads=o.width // 64, kv_heads=o.width // 64,
        ffn_width=3 * o.width, mask_id=0, bos_id=1, eos_id=2, eot_id=3,
    )  # fmt: skip
    ids = SpecialIds(newline=4, boi=5, eoi=6, uncondition=7, boa=8, eoa=9)
    config = Config(language=language, code_offset=text, codebook=codebook, grid=o.grid, special=ids)
    model = Lumina(config, generator=rng.generator(0)).eval().to(o.device)
    front = [ids.boa, ids.boi]
    row = [None if i == 0 else i for i in Scripts(ids).picture([0] * o.grid**2, o.grid, o.grid)[1:]]
    prompt = list(range(10, 74))
    canvas = layout([[*prompt, *front]], [row], mask_id=0, nulls=[[ids.uncondition, *front]], device=o.device)

    def run(preset: str) -> None:
        parts = lumina_parts(slots=o.grid**2, tokens=o.grid**2, preset=preset, steps=o.steps).arguments()
        decode(CodeBackbone(model), canvas=canvas, generators=[rng.generator(0, "image", device=o.device)], **parts)

    with torch.no_grad():
        seconds = rounds({preset: partial(run, preset) for preset in ("exact", "fast")}, o)
    for preset, value in seconds.items():
        print(f"{preset:<6} {value:7.2f} s  {o.steps / value:7.2f} passes/s")
    print(f"exact / cached: {seconds['exact'] / seconds['fast']:.2f} (above 1: the cache is faster)")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "draw"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="examples of each task")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--grid", type=int, default=24, help="codes per side")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    {"train": train, "draw": draw}[options.what](options)


if __name__ == "__main__":
    main()
