"""What the model in the package scores on held-out pictures, and what is left of it when its condition is shuffled.

    python benchmarks/tiny.py --demo runs/demo --pictures drawn.png

``--demo`` names a run of `mmdiff demo`, whose judge of pictures and texts ranks the captions of what is drawn; without
it only answers are measured. The questions and the prompts are the demo's about novel concepts, which the model has not
seen in any style; of the demo's other held-out pictures it has seen most, so those are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmdiff
from eval import bootstrap, retrieval
from mmdiff import rng
from mmdiff.commands.demo import evaluation
from mmdiff.commands.demo.heldout import Held, Question, choose_prompts, questions, read_split
from mmdiff.images import encode_png, grid


def shuffled(n: int) -> list[int]:
    """An order in which hardly anything keeps its place."""
    return rng.permutation(rng.generator(0, "shuffle"), 1, n)[0].tolist()


def row(name: str, hits: Sequence[float], groups: Sequence[str]) -> None:
    """Mean and a bound that holds for other concepts of the kind."""
    found = bootstrap.bootstrap(hits, groups=groups)
    print(f"{name:<44} {100 * found.value:5.1f} %   at least {100 * found.lower:5.1f} %   N = {len(hits)}")


def answers(model: Any, asked: Sequence[Question]) -> None:
    """Accuracy with the picture, with another's, and by guessing the commonest answer of the kind."""
    groups = [q.held.info["concept"] for q in asked]
    order = shuffled(len(asked))
    for name, pictures in (("answers", [q.held.image for q in asked]), ("answers, pictures shuffled", None)):
        shown = [asked[i].held.image for i in order] if pictures is None else pictures
        said: list[str] = []
        for start in range(0, len(asked), evaluation.BATCH):
            part = slice(start, start + evaluation.BATCH)
            said += model.vision.ask(list(shown[part]), [q.question for q in asked[part]])
        row(name, [float(a == q.answer) for a, q in zip(said, asked, strict=True)], groups)
    usual = {
        q.kind: max({p.answer for p in asked if p.kind == q.kind}, key=[p.answer for p in asked].count) for q in asked
    }
    row("commonest answer of the kind", [float(usual[q.kind] == q.answer) for q in asked], groups)


def drawings(model: Any, demo: Path, wanted: Sequence[Held]) -> list[Any]:
    """How often a picture finds its caption among the first five, by the demo's judge; prompts given or shuffled."""
    from mmdiff.models.registry import load_model
    from mmdiff.text import Tokenizer

    scorer = load_model(demo / evaluation.JUDGE / "model")
    captions, groups = [h.caption for h in wanted], [h.info["concept"] for h in wanted]
    texts = evaluation.embed_texts(scorer, Tokenizer.from_pretrained(demo / "tokenizer"), captions)
    order, kept = shuffled(len(captions)), []
    for name, prompts in (("drawn", captions), ("drawn, prompts shuffled", [captions[i] for i in order])):
        made: list[Any] = []
        for start in range(0, len(prompts), evaluation.BATCH):
            part = prompts[start : start + evaluation.BATCH]
            made += model.images(prompts=part, seeds=list(range(start, start + len(part)))).images
        ranks = retrieval.score(evaluation.embed_images(scorer, made), texts, truth=list(range(len(texts))))
        row(f"{name}: caption among the first five of {len(texts)}", [float(r <= 5) for r in ranks.ranks], groups)
        kept = kept or made
    print(f"{'chance':<44} {100 * 5 / len(texts):5.1f} %")
    return kept


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--demo", type=Path, help="folder of a demo run")
    parser.add_argument("--pictures", type=Path, help="PNG of what was drawn, above the real pictures")
    options = parser.parse_args()
    model = mmdiff.load(options.model, device="cpu")
    held = read_split("novel concepts")
    answers(model, questions(held, per_kind=evaluation.QUESTIONS_PER_KIND))
    if options.demo is None:
        return
    wanted = choose_prompts(held, evaluation.PROMPTS_PER_SPLIT)
    made = drawings(model, options.demo, wanted)
    if options.pictures is not None:
        print(f"captions of the pictures: {'; '.join(h.caption for h in wanted[:12])}")
        options.pictures.write_bytes(encode_png(grid([*made[:12], *(h.image for h in wanted[:12])], 12)))


if __name__ == "__main__":
    main()
