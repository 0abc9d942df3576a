"""What a model of several drawing styles scores on held-out concepts and on held-out pairs of concept and style.

    python benchmarks/styles.py --model runs/styles/model/model --judge runs/styles/vision/model \
        --data runs/styles/data --pictures drawn.png

``--data`` is the output of `mmdiff data build emoji-styles`. Every number stands beside the same with its condition
shuffled (pictures of questions, prompts and instructions of drawings, pictures that are to be changed), and beside what
chance, the commonest answer, or the real pictures score. The judge ranks captions and, with a linear readout of its
features that is fitted on training pictures, names the style. Pairs in 3d are left out: the demo's model, which
training began from, has seen them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mmdiff
from data_pipelines.reader import iter_samples
from eval import bootstrap, features, fid, retrieval
from mmdiff import images, rng
from mmdiff.commands.demo.evaluation import BATCH, embed_images, embed_texts
from mmdiff.commands.demo.heldout import Held, Question, choose_prompts, questions
from mmdiff.models.registry import load_model
from mmdiff.text import Tokenizer

SPLITS, SEEN_BEFORE = ("novel_concepts", "novel_combinations"), "3d"
FITTED_ON = 3000


@dataclass(frozen=True)
class Pair:
    """A held-out picture and one in another style that it can be made from."""

    held: Held
    source: Any

    @property
    def instruction(self) -> str:
        """What is to be done with the source."""
        return str(self.held.info["instruction"])


class Judge:
    """Ranks captions and names styles.

    Args:
        folder: A scorer of pictures and texts.
        tokenizer: Of its texts.
        train: Pictures that the readout of styles is fitted on.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, train: Sequence[Held]) -> None:
        self.network, self.tokenizer = load_model(folder), tokenizer
        self.styles = sorted({h.info["style"] for h in train})
        x = self._features([h.image for h in train])
        y = torch.nn.functional.one_hot(torch.tensor([self.styles.index(h.info["style"]) for h in train])).float()
        self.readout = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1]), x.T @ y)

    def style_of(self, pictures: Sequence[Any]) -> list[str]:
        """The style of each."""
        return [self.styles[i] for i in (self._features(pictures) @ self.readout).argmax(1).tolist()]

    def ranks(self, pictures: Sequence[Any], captions: Sequence[str]) -> Sequence[int]:
        """Rank of each picture's caption among all of them."""
        texts = embed_texts(self.network, self.tokenizer, captions)
        return retrieval.score(embed_images(self.network, pictures), texts).ranks

    def _features(self, pictures: Sequence[Any]) -> Tensor:
        found = torch.cat([embed_images(self.network, part) for part in parts(pictures)])
        return torch.cat((found, torch.ones(len(found), 1)), dim=1)


def parts(items: Sequence[Any]) -> list[Sequence[Any]]:
    """The items, some at a time."""
    return [items[i : i + BATCH] for i in range(0, len(items), BATCH)]


def read(folder: Path, most: int | None = None) -> list[Pair]:
    """The pictures of a split, with the first they can be made from, if there is one."""
    found = []
    for sample, error in iter_samples([str(folder)]):
        if sample is None:
            raise error if error is not None else RuntimeError("neither sample nor error")
        pictures = [images.decode(data) for data in sample.images()]
        held = Held(sample.key, folder.name, pictures[0], sample.info())
        found.append(Pair(held, pictures[1] if len(pictures) > 1 else None))
    order = rng.permutation(rng.generator(0, "sample"), 1, len(found))[0].tolist()
    return [found[i] for i in (order if most is None else sorted(order[:most]))]


def shuffled(items: Sequence[Any]) -> list[Any]:
    """Hardly any item keeps its place."""
    return [items[i] for i in rng.permutation(rng.generator(0, "shuffle"), 1, len(items))[0].tolist()]


def row(name: str, hits: Sequence[float], groups: Sequence[str]) -> None:
    """Mean and a bound that holds for other concepts of the kind."""
    found = bootstrap.bootstrap(hits, groups=groups)
    print(f"{name:<64} {100 * found.value:5.1f} %   at least {100 * found.lower:5.1f} %   N = {len(hits)}", flush=True)


def equal(one: Sequence[Any], other: Sequence[Any]) -> list[float]:
    """Where two lists agree."""
    return [float(a == b) for a, b in zip(one, other, strict=True)]


def read_out(model: Any, asked: Sequence[Question]) -> None:
    """Answers, by kind and in all."""
    groups, truth = [q.held.info["concept"] for q in asked], [q.answer for q in asked]
    shown = [q.held.image for q in asked]
    kinds = [q.kind for q in asked]
    usual = {k: max(set(t := [q.answer for q in asked if q.kind == k]), key=t.count) for k in set(kinds)}
    said = ask(model, shown, asked)
    row("answers", equal(said, truth), groups)
    row("answers, pictures shuffled", equal(ask(model, shuffled(shown), asked), truth), groups)
    row("answers, the commonest of the kind", equal([usual[k] for k in kinds], truth), groups)
    for kind in ("style", "tone", "group", "color"):
        mine = [i for i, k in enumerate(kinds) if k == kind]
        if mine:
            row(f"  {kind}", [float(said[i] == truth[i]) for i in mine], [groups[i] for i in mine])
            row(f"  {kind}, the commonest", [float(usual[kind] == truth[i]) for i in mine], [groups[i] for i in mine])


def ask(model: Any, shown: Sequence[Any], asked: Sequence[Question]) -> list[str]:
    """Answers to questions about pictures."""
    said: list[str] = []
    for part in parts(range(len(asked))):
        said += model.vision.ask([shown[i] for i in part], [asked[i].question for i in part], gen_length=8)
    return said


def captions(model: Any, wanted: Sequence[Held]) -> None:
    """Whether captions name the style, and the emoji word for word."""
    groups, pictures = [h.info["concept"] for h in wanted], [h.image for h in wanted]
    for name, shown in (("", pictures), (", pictures shuffled", shuffled(pictures))):
        said = [text for part in parts(shown) for text in model.vision.caption(list(part))]
        named = [text.rpartition(", ") for text in said]
        styles = [f"{h.info['style']} style" for h in wanted]
        row(f"caption names the style{name}", equal([n[2] for n in named], styles), groups)
        row(f"caption names the emoji{name}", equal([n[0] for n in named], [plain(h) for h in wanted]), groups)


def plain(held: Held) -> str:
    """The caption without the style."""
    return held.caption.rpartition(", ")[0]


def judged(name: str, judge: Judge, pictures: Sequence[Any], wanted: Sequence[Held]) -> None:
    """Two lines about pictures."""
    groups = [h.info["concept"] for h in wanted]
    ranks = judge.ranks(pictures, [h.caption for h in wanted])
    row(f"{name}: caption among the first five of {len(wanted)}", [float(r <= 5) for r in ranks], groups)
    row(f"{name}: style", equal(judge.style_of(pictures), [h.info["style"] for h in wanted]), groups)


def drawn(model: Any, judge: Judge, wanted: Sequence[Held]) -> list[Any]:
    """Pictures for captions."""
    texts = [h.caption for h in wanted]

    def draw(prompts: Sequence[str]) -> list[Any]:
        return in_parts(lambda i: model.images(prompts=[prompts[k] for k in i], seeds=list(i)).images, len(prompts))

    made = draw(texts)
    judged("drawn", judge, made, wanted)
    judged("drawn, prompts shuffled", judge, draw(shuffled(texts)), wanted)
    judged("real pictures", judge, [h.image for h in wanted], wanted)
    return made


def changed(model: Any, judge: Judge, pairs: Sequence[Pair]) -> list[Any]:
    """Pictures changed as instructed."""
    wanted, sources = [p.held for p in pairs], [p.source for p in pairs]
    told = [p.instruction for p in pairs]

    def change(shown: Sequence[Any], texts: Sequence[str]) -> list[Any]:
        return in_parts(
            lambda i: model.images.edit([shown[k] for k in i], None, [texts[k] for k in i], list(i)), len(shown)
        )

    made = change(sources, told)
    judged("changed", judge, made, wanted)
    judged("changed, instructions shuffled", judge, change(sources, shuffled(told)), wanted)
    judged("changed, pictures shuffled", judge, change(shuffled(sources), told), wanted)
    judged("the picture as it was", judge, sources, wanted)
    return made


def in_parts(make: Callable[[Sequence[int]], list[Any]], count: int) -> list[Any]:
    """What is made of the numbers below ``count``."""
    return [made for part in parts(range(count)) for made in make(part)]


def distances(made: dict[str, Sequence[Any]], real: Sequence[Any]) -> None:
    """KID to the real pictures in an ImageNet network's features, beside that between two halves of them."""
    network = features.open_network("efficientnet-lite0")

    def found(pictures: Sequence[Any]) -> Any:
        return features.extract(np.stack([np.asarray(p) for p in pictures]), network)

    known = found(real)
    for name, pictures in made.items():
        print(f"KID of {name}: {fid.score(found(pictures), known, network=network).kid_mean:.4f}")
    order = torch.randperm(len(real), generator=rng.generator(0, "floor"))
    half = len(real) // 2
    floor = fid.score(known[order[:half]], known[order[half:]], network=network)
    print(f"KID of real pictures to others: {floor.kid_mean:.4f}", flush=True)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, help="PNG: what was drawn, what was changed, and the real pictures")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--per-kind", type=int, default=60)
    options = parser.parse_args()
    model = mmdiff.load(options.model, device="cpu")
    train = [p.held for p in read(options.data / "train", FITTED_ON)]
    judge = Judge(options.judge, model.checkpoint.tokenizer, train)
    for split in SPLITS:
        measure(model, judge, options, split)


def measure(model: Any, judge: Judge, options: Any, split: str) -> None:
    """Everything about one split."""
    pairs = [p for p in read(options.data / split) if split == SPLITS[0] or p.held.info["style"] != SEEN_BEFORE]
    held = {p.held.key: p for p in pairs}
    print(f"-- {split}: {len(pairs)} pictures")
    read_out(model, questions([p.held for p in pairs], per_kind=options.per_kind))
    wanted = choose_prompts([p.held for p in pairs], options.prompts)
    captions(model, wanted)
    made = drawn(model, judge, wanted)
    asked = [held[h.key] for h in choose_prompts([p.held for p in pairs if p.source is not None], options.prompts)]
    after = changed(model, judge, asked)
    distances({"drawn": made, "changed": after}, [p.held.image for p in pairs])
    if options.pictures is not None:
        shown = [*made[:16], *(h.image for h in wanted[:16])]
        sheet = [*shown, *(p.source for p in asked[:16]), *after[:16], *(p.held.image for p in asked[:16])]
        out = options.pictures.with_stem(f"{options.pictures.stem}_{split}")
        out.write_bytes(images.encode_png(images.grid(sheet, 16)))
        print(f"drawn: {'; '.join(h.caption for h in wanted[:16])}")
        print(f"changed: {'; '.join(p.held.caption for p in asked[:16])}")


if __name__ == "__main__":
    main()
