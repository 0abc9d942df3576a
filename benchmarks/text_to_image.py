"""How well a text-to-image model draws emoji that training never saw, and what is left with other prompts.

    python benchmarks/text_to_image.py runs/mmdit_emoji/model --demo runs/demo --pictures drawn.png

``--demo`` names a run of `mmdiff demo`, whose judge of pictures and texts ranks the captions for every picture. Beside
the model stand its own pictures paired with other prompts, an untrained network of the same shape, and real pictures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eval import bootstrap, retrieval
from mmdiff import rng
from mmdiff.commands.demo import evaluation
from mmdiff.commands.demo.heldout import SPLITS, choose_prompts, read_split
from mmdiff.images import encode_png, grid
from mmdiff.models.registry import build, load_model
from mmdiff.pipelines import ImageGenerator
from mmdiff.text import Tokenizer

SHOWN = 12
"""Pictures of each split on the sheet."""
COLUMNS = 8


def draw(model: ImageGenerator, prompts: Sequence[str]) -> list[Any]:
    """One picture per prompt; picture i has seed i."""
    made: list[Any] = []
    for start in range(0, len(prompts), evaluation.BATCH):
        part = list(prompts[start : start + evaluation.BATCH])
        made += model(prompts=part, seeds=list(range(start, start + len(part)))).images
    return made


def untrained(model: ImageGenerator) -> ImageGenerator:
    """A network of the same shape with new weights, between the same encoder and decoder."""
    network = build(model.checkpoint.model.config, generator=rng.generator(0, "init")).eval()
    return ImageGenerator(replace(model.checkpoint, model=network))


def row(name: str, vectors: tuple[Any, Any], truth: Sequence[int], groups: Sequence[str]) -> None:
    """How often a picture's caption is among the first five, with a bound that holds for other concepts of the kind."""
    found = retrieval.score(*vectors, truth=list(truth))
    hits = bootstrap.bootstrap([float(r <= 5) for r in found.ranks], groups=groups)
    bound = f"at least {100 * hits.lower:5.1f} %"
    print(f"{name:<28} {100 * hits.value:5.1f} %   {bound}   median rank {found.median_rank:g} of {found.candidates}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint that draws from texts")
    parser.add_argument("--demo", type=Path, required=True, help="folder of a demo run")
    parser.add_argument("--pictures", type=Path, help="PNG of what was drawn, captions below")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = ImageGenerator.from_pretrained(options.model, device="cpu")
    judge = load_model(options.demo / evaluation.JUDGE / "model").eval()
    tokenizer = Tokenizer.from_pretrained(options.demo / "tokenizer")
    sheet: list[tuple[Any, str]] = []
    for name in SPLITS:
        wanted = choose_prompts(read_split(name), evaluation.PROMPTS_PER_SPLIT)
        captions, groups = [h.caption for h in wanted], [h.info["concept"] for h in wanted]
        began = time.perf_counter()
        made = draw(model, captions)
        print(f"-- {name}: {len(captions)} captions, {len(captions) / (time.perf_counter() - began):.1f} pictures/s")
        sheet += list(zip(made, captions, strict=True))[:SHOWN]
        texts = evaluation.embed_texts(judge, tokenizer, captions)
        vectors = evaluation.embed_images(judge, made)
        own = list(range(len(captions)))
        row("drawn", (vectors, texts), own, groups)
        # The pictures do not change: only the prompt that each is said to have been drawn for.
        other = rng.permutation(rng.generator(0, "shuffle"), 1, len(own))[0].tolist()
        row("drawn, prompts shuffled", (vectors, texts), other, groups)
        row("untrained", (evaluation.embed_images(judge, draw(untrained(model), captions)), texts), own, groups)
        row("real pictures", (evaluation.embed_images(judge, [h.image for h in wanted]), texts), own, groups)
        print(f"{'chance':<28} {100 * 5 / len(texts):5.1f} %")
    if options.pictures is not None:
        pictures = [p.resize((88, 88)) for p, _ in sheet]
        options.pictures.write_bytes(encode_png(grid(pictures, COLUMNS, pad=8, captions=[c for _, c in sheet])))


if __name__ == "__main__":
    main()
