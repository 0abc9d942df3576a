"""Properties of the emoji shards that are shipped: splits, answers, colours, schema, size."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.datasets import balanced_questions
from data_pipelines.datasets.colors import COLORS, dominant_color
from data_pipelines.datasets.emojibase import GROUP_NAMES, TONES
from data_pipelines.datasets.questions import QUESTIONS, shape_of
from data_pipelines.datasets.splits import HELD_OUT, unit_hash

ROOT = Path(__file__).parents[3] / "data_pipelines" / "embedded" / "emoji"
SPLITS = ("train", "novel_concepts", "novel_combinations")
Samples = dict[str, tuple[dict, bytes]]


def _read(split: str) -> Samples:
    members: dict[str, dict[str, bytes]] = defaultdict(dict)
    for shard in sorted((ROOT / split).glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                key, _, suffix = member.name.rpartition(".")
                file = archive.extractfile(member)
                assert file is not None
                assert suffix not in members[key], f"{member.name} occurs twice"
                members[key][suffix] = file.read()
    assert all(set(parts) == {"webp", "json"} for parts in members.values())
    return {key: (json.loads(parts["json"]), parts["webp"]) for key, parts in members.items()}


@pytest.fixture(scope="module")
def data() -> dict[str, Samples]:
    return {split: _read(split) for split in SPLITS}


def variant(sample: dict) -> tuple[str, str]:
    """The label without its tone, and the tone."""
    return sample["captions"][1].rpartition(" with ")[0] if sample["tone"] else sample["caption"], sample["tone"] or ""


def test_the_whole_embedded_set_is_below_12_megabytes() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 12_000_000


def test_the_description_matches_the_shards(data: dict[str, Samples]) -> None:
    description = json.loads((ROOT / "dataset.json").read_text(encoding="utf-8"))
    assert description["counts"] == {split: len(samples) for split, samples in data.items()}
    sums = {path.relative_to(ROOT).as_posix(): sha256(path.read_bytes()).hexdigest() for path in ROOT.rglob("*.tar")}
    assert description["sha256"] == sums
    assert all((ROOT / f"{name}.idx.json").is_file() for name in sums)
    notice = (ROOT / "NOTICE.md").read_text(encoding="utf-8")
    for words in ("Microsoft", "Miles Johnson", "MIT License", "mmdiff data build emoji", "c1bb7eee7de09020"):
        assert words in notice


def test_no_key_and_no_picture_is_in_two_places(data: dict[str, Samples]) -> None:
    keys = [key for samples in data.values() for key in samples]
    pictures = [sha256(picture).digest() for samples in data.values() for _, picture in samples.values()]
    assert len(keys) == len(set(keys)) == len(set(pictures)) == 3370


def test_no_base_concept_is_shared_between_training_and_novel_concepts(data: dict[str, Samples]) -> None:
    concepts = {split: {sample["concept"] for sample, _ in samples.values()} for split, samples in data.items()}
    assert not concepts["novel_concepts"] & (concepts["train"] | concepts["novel_combinations"])
    total = len(set.union(*concepts.values()))
    assert abs(len(concepts["novel_concepts"]) / total - HELD_OUT) < 0.02
    for split in SPLITS:
        held = {unit_hash("concept", concept) < HELD_OUT for concept in concepts[split]}
        assert held == {split == "novel_concepts"}


def test_gendered_words_never_separate_a_person_from_its_base_concept(data: dict[str, Samples]) -> None:
    # "man X" in training and "woman X" held out as a novel concept would be the same concept twice.
    def neutral(caption: str) -> str:
        words = caption.split(":")[0].replace("person ", "").split()
        return " ".join(word for word in words if word not in ("man", "woman", "men", "women", "people"))

    people = {
        split: {
            neutral(s["caption"])
            for s, _ in data[split].values()
            if s["group"] == "people and body" and s["gender"] in ("man", "woman")
        }
        - {""}
        for split in SPLITS
    }
    assert not people["novel_concepts"] & (people["train"] | people["novel_combinations"])


def test_every_held_out_combination_belongs_to_a_trained_concept(data: dict[str, Samples]) -> None:
    trained = defaultdict(set)
    for sample, _ in data["train"].values():
        trained[sample["concept"]].add(variant(sample))
    assert len(data["novel_combinations"]) > 150
    for sample, _ in data["novel_combinations"].values():
        assert trained[sample["concept"]], sample["concept"]
        assert variant(sample) not in trained[sample["concept"]]


def test_every_tone_and_gender_is_trained_with_other_concepts(data: dict[str, Samples]) -> None:
    for field in ("tone", "gender"):
        seen = defaultdict(set)
        for sample, _ in data["train"].values():
            seen[sample[field]].add(sample["concept"])
        for sample, _ in data["novel_combinations"].values():
            assert len(seen[sample[field]] - {sample["concept"]}) > (1 if sample[field] in ("boy", "girl") else 10) - 2


def test_every_sample_has_the_schema(data: dict[str, Samples]) -> None:
    fields = ["caption", "captions", "tags", "concept", "group", "subgroup", "tone", "gender", "style", "color", "qa"]
    wordings = {wording for choices in QUESTIONS.values() for wording in choices}
    wordings |= {QUESTIONS["is_color"][0].format(color=color) for color in COLORS}
    for samples in data.values():
        for key, (sample, _) in samples.items():
            assert list(sample) == fields
            assert key == key.lower()
            assert sample["caption"] == sample["captions"][0] == sample["caption"].lower()
            assert sample["group"] in GROUP_NAMES.values()
            assert sample["tone"] in (None, *TONES)
            assert sample["gender"] in (None, "man", "woman", "boy", "girl")
            assert sample["style"] == "3d"
            assert sample["color"] in (None, *COLORS)
            assert len(json.dumps(sample, ensure_ascii=False, separators=(",", ":")).encode()) <= 1024
            for question, answer, kind in sample["qa"]:
                assert question in wordings
                assert kind in QUESTIONS
                assert 1 <= len(answer.split()) <= 4
            assert len({kind for _, _, kind in sample["qa"]}) == len(sample["qa"])


def test_answers_agree_with_the_metadata(data: dict[str, Samples]) -> None:
    for samples in data.values():
        for sample, _ in samples.values():
            answers = {kind: answer for _, answer, kind in sample["qa"]}
            for kind in ("tone", "gender", "color"):
                assert answers.get(kind, sample[kind]) == sample[kind]
            assert answers.get("what", sample["concept"]) == sample["concept"]
            assert (answers.get("is_flag") != "yes") or sample["group"] == "flags"
            assert (answers.get("is_animal") != "yes") or sample["subgroup"].startswith("animal")
            assert (answers.get("is_person") != "yes") or sample["group"] == "people and body"
            for question, answer, kind in sample["qa"]:
                if kind == "is_color":
                    assert (f" {sample['color']}?" in question) == (answer == "yes")


def test_colours_and_shapes_agree_with_the_pixels(data: dict[str, Samples]) -> None:
    named = agree = shaped = same_shape = 0
    for samples in data.values():
        for sample, picture in samples.values():
            answers = {kind: answer for _, answer, kind in sample["qa"]}
            if sample["color"] not in (None, "white"):
                pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
                named += 1
                found = dominant_color(pixels)
                assert found in (sample["color"], None), sample["caption"]
                agree += found == sample["color"]
                if "shape" in answers:
                    shaped += 1
                    same_shape += shape_of(pixels) == answers["shape"]
    # The shards are compressed; the few that differ lie at a threshold.
    assert named > 500
    assert agree / named > 0.97
    assert shaped > 40
    assert same_shape / shaped > 0.9


def test_colour_words_in_names_are_never_contradicted(data: dict[str, Samples]) -> None:
    checked = 0
    for samples in data.values():
        for sample, _ in samples.values():
            words = set(sample["caption"].replace("grey", "gray").split())
            kinds = {"heart", "circle", "square", "book", "diamond", "apple", "envelope"} & words
            if sample["color"] and kinds and (colors := words & set(COLORS)):
                checked += 1
                assert sample["color"] in colors, sample["caption"]
    assert checked > 25


def test_skin_gets_darker_from_tone_to_tone(data: dict[str, Samples]) -> None:
    # The source package has "medium-light" and "medium" the wrong way round; hands show only skin.
    sets: dict[str, dict[str, float]] = defaultdict(dict)
    for samples in data.values():
        for sample, picture in samples.values():
            if sample["tone"] and sample["subgroup"].startswith("hand "):
                pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("L")).astype(float)
                sets[sample["concept"]][sample["tone"]] = pixels[pixels < 235].mean()
    full = [[tones[tone] for tone in TONES] for tones in sets.values() if len(tones) == len(TONES)]
    assert len(full) > 20
    for brightness in full:
        assert brightness == sorted(brightness, reverse=True)


def test_deaf_women_wear_purple_and_deaf_men_blue(data: dict[str, Samples]) -> None:
    # The source package has these two labels the wrong way round.
    for samples in data.values():
        for sample, picture in samples.values():
            if sample["caption"].startswith(("deaf man", "deaf woman")):
                red, _, blue = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))[56, 44:].mean(axis=0)
                assert (red > 90) == ("woman" in sample["caption"]), (sample["caption"], red, blue)


def test_yes_no_questions_are_asked_of_equally_many_concepts(data: dict[str, Samples]) -> None:
    concepts: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for sample, _ in data["train"].values():
        for question, answer, kind in sample["qa"]:
            if kind.startswith("is_"):
                concepts[question][answer].add(sample["concept"])
    assert len(concepts) == 6 + len(COLORS)
    for question, answers in concepts.items():
        assert abs(len(answers["yes"]) - len(answers["no"])) <= max(2, 0.1 * len(answers["yes"])), question


@pytest.mark.parametrize("split", SPLITS)
def test_guessing_the_commonest_answer_scores_low_on_balanced_questions(data: dict[str, Samples], split: str) -> None:
    chosen = balanced_questions([(key, sample) for key, (sample, _) in data[split].items()], seed=0, per_kind=100)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    wordings: dict[str, Counter[str]] = defaultdict(Counter)
    for key, question, answer, kind in chosen:
        assert [question, answer, kind] in data[split][key][0]["qa"]
        kinds[kind][answer] += 1
        wordings[question][answer] += 1
    for kind, answers in kinds.items():
        assert len(answers) >= 2, kind
        assert max(answers.values()) / sum(answers.values()) <= 1 / len(answers) + 1e-9, (kind, answers)
        assert sum(answers.values()) <= 100
    for question, answers in wordings.items():
        if question.startswith("Is it mostly"):
            assert answers["yes"] == answers["no"]
    assert len({(key, question) for key, question, _, _ in chosen}) == len(chosen)
    assert "group" in kinds or split == "novel_combinations"
    again = balanced_questions(
        reversed([(key, sample) for key, (sample, _) in data[split].items()]), seed=0, per_kind=100
    )
    assert sorted(again) == sorted(chosen)
    other = balanced_questions([(key, sample) for key, (sample, _) in data[split].items()], seed=1, per_kind=100)
    assert other != chosen
