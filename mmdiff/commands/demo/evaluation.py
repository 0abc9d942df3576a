"""What the demo measures on held-out pictures, through the public interface only.

Everything is written to OUT/evaluation: results.json with every number and every answer, and the pictures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdiff import rng
from mmdiff.commands.demo.heldout import SPLITS, Held, Question, choose_prompts, questions, read_split
from mmdiff.commands.demo.measures import gate, kid_share, macro_over_kinds, tone_of

__all__ = ["embed_images", "embed_texts", "evaluate"]

JUDGE = "vision"
"""The stage whose network of pictures and texts judges what is drawn."""
QUESTIONS_PER_KIND = 100
PROMPTS_PER_SPLIT = 128
PICTURES_PER_PROMPT = 3
SHOWN_PER_SPLIT = 24
TONED_PER_SPLIT = 200
UNTRAINED_CAPTIONS = 32
CLASS_COLUMNS = 4
BATCH = 64


def evaluate(folder: Path, *, seed: int) -> dict[str, Any]:
    """Measure the trained model of a demo run and an untrained copy of it.

    Args:
        folder: The demo run.
        seed: Seed of the untrained copy and of the generated pictures.

    Returns:
        What results.json holds.
    """
    out = folder / "evaluation"
    out.mkdir(parents=True, exist_ok=True)
    trained, untrained = folder / "model" / "model", _untrained(folder, seed)
    splits = {name: read_split(name) for name in SPLITS}
    asked = questions(splits["novel concepts"], per_kind=QUESTIONS_PER_KIND)
    results: dict[str, Any] = {"gates": []}
    results |= _answers(trained, untrained, asked, results["gates"])
    results |= _captions(trained, untrained, splits, results["gates"])
    results |= _pictures(folder, trained, untrained, splits, seed, results["gates"])
    partial = out / "results.json.tmp"
    partial.write_text(json.dumps(results, indent=1))
    partial.replace(out / "results.json")
    return results


def _untrained(folder: Path, seed: int) -> Path:
    """A network of the same shape with new weights, saved like the trained one."""
    import shutil

    from mmdiff.models.registry import build, load_model

    trained, path = folder / "model" / "model", folder / "evaluation" / "untrained"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(trained, path)
    build(load_model(trained).config, generator=rng.generator(seed, "init")).save_pretrained(path)
    return path


def _answers(trained: Path, untrained: Path, asked: Sequence[Question], gates: list[Any]) -> dict[str, Any]:
    from eval import bootstrap, vqa

    references = [{"answer": q.answer, "kind": q.kind} for q in asked]
    given = {
        "model": _ask(trained, asked, "answers"),
        "without image": _ask(trained, asked, "answers without the image", blind=True),
        "untrained": _ask(untrained, asked, "answers of the untrained model"),
    }
    scores = {name: vqa.score(answers, references) for name, answers in given.items()}
    commonest = {k.kind: k.commonest for k in scores["model"].kinds}
    given["commonest answer"] = [commonest[q.kind] for q in asked]
    scores["commonest answer"] = vqa.score(given["commonest answer"], references)
    groups = [q.held.info["concept"] for q in asked]
    macro = macro_over_kinds([q.kind for q in asked], [q.answer for q in asked])
    for title, statistic in (("accuracy", bootstrap.mean), ("macro accuracy", macro)):
        values = {name: bootstrap.bootstrap(s.scores, statistic, groups=groups).value for name, s in scores.items()}
        for rival in ("commonest answer", "without image"):
            lead = bootstrap.paired(scores["model"].scores, scores[rival].scores, statistic, groups=groups)
            gates.append(
                gate(
                    f"Answers on novel concepts: {title} above {_THE[rival]}",
                    lead.value,
                    lead.lower,
                    0.15,
                    note=f"{title} {values['model']:.1%}, N = {len(asked)} questions about {lead.groups} concepts",
                    baselines=[(n, v) for n, v in values.items() if n != "model"],
                )
            )
    kinds = {
        name: {k.kind: {"n": k.n, "answers": k.answers, "accuracy": k.accuracy} for k in s.kinds}
        for name, s in scores.items()
    }
    items = [
        {"key": q.held.key, "question": q.question, "truth": q.answer, "kind": q.kind, "answer": a, "blind": b}
        for q, a, b in zip(asked, given["model"], given["without image"], strict=True)
    ]
    return {"answers": items, "answers_by_kind": kinds}


_THE = {"commonest answer": "the commonest answer", "without image": "the model without the image"}


def _ask(model: Path, asked: Sequence[Question], what: str, *, blind: bool = False) -> list[str]:
    from mmdiff.pipelines import VisionLanguage

    vlm = VisionLanguage.from_pretrained(model)
    answers: list[str] = []
    for part in _parts(asked, what):
        if blind:
            chats = [[{"role": "user", "content": q.question}] for q in part]
            answers += vlm.chat(chats, gen_length=8)
        else:
            answers += vlm.ask([q.held.image for q in part], [q.question for q in part], gen_length=8)
    return answers


def _captions(trained: Path, untrained: Path, splits: dict[str, list[Held]], gates: list[Any]) -> dict[str, Any]:
    from eval import bootstrap

    items: dict[str, list[dict[str, str]]] = {}
    hits: dict[str, list[float]] = {"model": [], "untrained": []}
    groups: list[str] = []
    for split, held in splits.items():
        shown = choose_prompts(held, SHOWN_PER_SPLIT)
        toned = [h for h in held if h.info["tone"]][:TONED_PER_SPLIT]
        both = list({h.key: h for h in (*shown, *toned)}.values())
        written = dict(zip((h.key for h in both), _caption(trained, both, f"captions, {split}"), strict=True))
        before = _caption(untrained, toned[:UNTRAINED_CAPTIONS], f"captions of the untrained model, {split}")
        hits["model"] += [float(tone_of(written[h.key]) == h.info["tone"]) for h in toned]
        hits["untrained"] += [float(tone_of(c) == h.info["tone"]) for h, c in zip(toned, before, strict=False)]
        groups += [h.info["concept"] for h in toned]
        items[split] = [{"key": h.key, "caption": written[h.key], "truth": h.caption} for h in shown]
    tone = bootstrap.bootstrap(hits["model"], groups=groups)
    gates.append(
        gate(
            "Skin tone in captions at least 3 times chance",
            tone.value,
            tone.lower,
            0.6,
            note=f"five tones; N = {tone.n} held-out pictures with a skin tone, {tone.groups} concepts, both splits",
            baselines=[("chance", 0.2), ("untrained", sum(hits["untrained"]) / len(hits["untrained"]))],
        )
    )
    return {"captions": items}


def _caption(model: Path, held: Sequence[Held], what: str) -> list[str]:
    from mmdiff.pipelines import VisionLanguage

    vlm = VisionLanguage.from_pretrained(model)
    captions: list[str] = []
    for part in _parts(held, what):
        captions += vlm.caption([h.image for h in part], gen_length=16)
    return captions


def _pictures(
    folder: Path, trained: Path, untrained: Path, splits: dict[str, list[Held]], seed: int, gates: list[Any]
) -> dict[str, Any]:
    from eval import bootstrap, retrieval
    from mmdiff.models.registry import load_model
    from mmdiff.text import Tokenizer

    out = folder / "evaluation"
    wanted = [h for held in splits.values() for h in choose_prompts(held, PROMPTS_PER_SPLIT)]
    captions = [h.caption for h in wanted]
    # Several times each: the rank of a single picture says little about its prompt.
    tries = _draw(trained, captions * PICTURES_PER_PROMPT, seed, "pictures")
    drawn = {
        "model": tries[: len(captions)],
        "untrained": _draw(untrained, captions, seed, "pictures of the untrained model"),
    }
    real = [h.image for held in splits.values() for h in held]
    distances, vectors = _distances(folder, drawn, real)
    share, bound = kid_share(vectors["model"], vectors["untrained"], vectors["real"])
    kid = {row["set"]: row["kid"] for row in distances if row["features"] == "scorer"}
    gates.append(
        gate(
            "KID at most half of the untrained model's",
            share,
            bound,
            0.5,
            note=f"features of the demo's own judge; KID {kid['model']:.4f}, untrained {kid['untrained']:.4f}, "
            f"real against real {kid['real']:.4f}; N = {len(captions)} generated, {len(real)} real",
            smaller_is_better=True,
        )
    )
    scorer = load_model(folder / JUDGE / "model")
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    texts = embed_texts(scorer, tokenizer, captions)
    ranks = {
        name: retrieval.score(embed_images(scorer, pictures), texts, truth=_cycle(len(texts), len(pictures)))
        for name, pictures in {**drawn, "model": tries, "real": [h.image for h in wanted]}.items()
    }
    chance = 5 / ranks["model"].candidates
    hits = [float(r <= 5) for r in ranks["model"].ranks]
    asked = [wanted[i] for i in _cycle(len(wanted), len(hits))]
    top5 = bootstrap.bootstrap(hits, groups=[h.info["concept"] for h in asked])
    gates.append(
        gate(
            "Picture finds its own caption among the first five, at least 3 times chance",
            top5.value,
            top5.lower,
            3 * chance,
            note=f"{ranks['model'].candidates} held-out captions, each drawn {PICTURES_PER_PROMPT} times, "
            "ranked by the demo's own judge",
            baselines=[("chance", chance), *((n, dict(r.recall)[5]) for n, r in ranks.items() if n != "model")],
        )
    )
    by_split = {}
    for split in splits:
        mine = [hit for hit, h in zip(hits, asked, strict=True) if h.split == split]
        by_split[split] = sum(mine) / len(mine)
    _save_pairs(out, wanted, drawn["model"])
    classes = _save_classes(out, trained, seed)
    neighbours = _save_neighbours(out, scorer, wanted, drawn["model"])
    return {"distances": distances, "retrieval_by_split": by_split, "classes": classes, "neighbours": neighbours}


def _cycle(period: int, length: int) -> list[int]:
    return [i % period for i in range(length)]


def _draw(model: Path, prompts: Sequence[str], seed: int, what: str) -> list[Any]:
    from mmdiff.pipelines import ImageGenerator

    generator = ImageGenerator.from_pretrained(model)
    pictures: list[Any] = []
    for part in _parts(range(len(prompts)), what):
        pictures += generator(prompts=[prompts[i] for i in part], seeds=[seed + i for i in part]).images
    return pictures


def _distances(
    folder: Path, drawn: dict[str, list[Any]], real: list[Any]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """FID and KID rows for every feature network that is here, and the judge's feature vectors."""
    import numpy as np

    from eval import features, fid
    from mmdiff.errors import MissingExtraError

    stacks = {name: np.stack([np.asarray(i) for i in pictures]) for name, pictures in {**drawn, "real": real}.items()}
    rows: list[dict[str, Any]] = []
    vectors: dict[str, Tensor] = {}
    for name in (f"scorer:{folder / JUDGE / 'model'}", "efficientnet-lite0"):
        try:
            network = features.open_network(name)
        except MissingExtraError:
            continue
        found = {key: features.extract(stack, network) for key, stack in stacks.items()}
        vectors = vectors or found
        n = min(len(drawn["model"]), len(real) // 2)
        order = torch.randperm(len(real), generator=rng.generator(0, "floor"))
        pairs = {key: (found[key], found["real"]) for key in drawn}
        pairs["real"] = (found["real"][order[:n]], found["real"][order[n : 2 * n]])
        for key, (a, b) in pairs.items():
            score = fid.score(a, b, network=network)
            rows.append(
                {"features": network.name, "set": key, "fid": score.fid, "kid": score.kid_mean, "n": [len(a), len(b)]}
            )
    return rows, vectors


@torch.no_grad()
def embed_texts(scorer: Any, tokenizer: Any, captions: Sequence[str]) -> Tensor:
    """Vectors of texts, by the judge."""
    rows = [torch.tensor(tokenizer.encode(c)) for c in captions]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(r) for r in rows])
    return scorer.embed_text(ids, torch.arange(ids.shape[1]) < lengths[:, None])


@torch.no_grad()
def embed_images(scorer: Any, pictures: Sequence[Any]) -> Tensor:
    """Vectors of pictures, by the judge."""
    from mmdiff import images

    size = scorer.config.image_size
    return scorer.embed_image(torch.stack([images.to_pixels(p, size) for p in pictures]))


def _save_pairs(out: Path, wanted: Sequence[Held], drawn: Sequence[Any]) -> None:
    """One grid per split: what was drawn above the real picture, twelve captions a row."""
    from mmdiff import images

    for split in dict.fromkeys(h.split for h in wanted):
        mine = [i for i, h in enumerate(wanted) if h.split == split][:36]
        tiles: list[Any] = []
        for start in range(0, len(mine), 12):
            row = mine[start : start + 12]
            tiles += [drawn[i] for i in row] + [wanted[i].image for i in row]
        name = f"drawn_{split.replace(' ', '_')}.png"
        (out / name).write_bytes(images.encode_png(images.grid(tiles, columns=12)))


def _save_classes(out: Path, model: Path, seed: int) -> list[str]:
    """A grid of classes, `CLASS_COLUMNS` pictures each; returns the names in order."""
    from mmdiff import images
    from mmdiff.pipelines import ImageGenerator

    generator = ImageGenerator.from_pretrained(model)
    names = list(generator.checkpoint.classes)
    step = max(1, len(names) // 16)
    labels = list(range(0, len(names), step))[:16]
    pictures = generator(
        labels=[label for label in labels for _ in range(CLASS_COLUMNS)],
        seeds=[seed + i for _ in labels for i in range(CLASS_COLUMNS)],
    ).images
    (out / "drawn_classes.png").write_bytes(images.encode_png(images.grid(pictures, columns=4 * CLASS_COLUMNS)))
    return [names[label] for label in labels]


def _save_neighbours(out: Path, scorer: Any, wanted: Sequence[Held], drawn: Sequence[Any]) -> list[dict[str, Any]]:
    """The training pictures that lie nearest to some generated ones, by the judge's similarity."""
    from data_pipelines.reader import iter_samples
    from mmdiff import images

    train = [s for s, _ in iter_samples(["embedded:emoji/train"]) if s is not None]
    pictures = [images.decode(s.image()) for s in train]
    vectors = torch.cat([embed_images(scorer, pictures[i : i + 256]) for i in range(0, len(pictures), 256)])
    chosen = list(range(0, len(wanted), max(1, len(wanted) // 8)))[:8]
    similarity = embed_images(scorer, [drawn[i] for i in chosen]) @ vectors.T
    found = []
    for row, i in enumerate(chosen):
        best = similarity[row].topk(3)
        names = []
        (out / f"neighbour_{row}.png").write_bytes(images.encode_png(drawn[i]))
        for rank, (value, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            (out / f"neighbour_{row}_{rank}.png").write_bytes(images.encode_png(pictures[place]))
            names.append({"caption": train[place].info()["caption"], "similarity": value})
        found.append({"prompt": wanted[i].caption, "nearest": names})
    return found


def _parts(items: Sequence[Any], what: str) -> Any:
    """Slices of at most `BATCH` items with a progress bar."""
    from tqdm import tqdm

    starts = range(0, len(items), BATCH)
    for start in tqdm(starts, desc=what, unit="batch", leave=False, disable=None, file=sys.stderr):
        yield items[start : start + BATCH]
