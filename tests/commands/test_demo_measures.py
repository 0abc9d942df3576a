"""The demo's own arithmetic: promises, skin tones, the KID share, the state file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eval.kid import kid
from mmdiff import rng
from mmdiff.commands.demo.heldout import SPLITS, choose_prompts, questions, read_split
from mmdiff.commands.demo.measures import gate, kid_share, macro_over_kinds, tone_of
from mmdiff.commands.demo.page import summary
from mmdiff.commands.demo.state import DemoState
from mmdiff.errors import ConfigError


@pytest.mark.parametrize(
    ("caption", "tone"),
    [
        ("woman astronaut: medium-dark skin tone", "medium-dark"),
        ("thumbs up with light skin", "light"),
        ("dark chocolate", None),
        ("handshake: light skin tone, dark skin tone", None),
        ("", None),
    ],
)
def test_a_caption_names_a_tone_only_if_it_names_exactly_one(caption: str, tone: str | None) -> None:
    assert tone_of(caption) == tone


def features(seed: int, n: int, shift: float) -> torch.Tensor:
    return torch.randn(n, 6, generator=rng.generator(seed, "features")) + shift


def test_kid_share_is_the_ratio_of_the_two_kids() -> None:
    judged, before, real = features(0, 40, 0.3), features(1, 50, 1.0), features(2, 60, 0.0)
    share, bound = kid_share(judged, before, real, draws=200)
    assert share == pytest.approx(kid(judged, real).mean / kid(before, real).mean, rel=1e-6)
    assert share < bound < 1


def test_kid_share_bound_exceeds_half_when_nothing_was_learnt() -> None:
    share, bound = kid_share(features(0, 60, 1.0), features(1, 60, 1.0), features(2, 60, 0.0), draws=200)
    assert share == pytest.approx(1, abs=0.3)
    assert bound > 0.5


def test_a_promise_is_judged_by_its_bound_not_by_its_value() -> None:
    assert not gate("a", 0.2, 0.1, 0.15, note="")["passed"]
    assert gate("a", 0.2, 0.16, 0.15, note="")["passed"]
    assert not gate("a", 0.4, 0.6, 0.5, note="", smaller_is_better=True)["passed"]
    text = summary({"gates": [gate("answers", 0.2, 0.1, 0.15, note="")]})
    assert "MISS" in text
    assert "answers" in text


def test_macro_accuracy_counts_every_kind_and_every_answer_the_same() -> None:
    kinds = ["tone", "tone", "tone", "is_food", "is_face"]
    answers = ["light", "light", "dark", "yes", "no"]
    statistic = macro_over_kinds(kinds, answers)
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    weights = torch.tensor([[1.0, 1, 1, 1, 1], [1, 0, 0, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.float64)
    # light 1/2 and dark 0 make tone 1/4; yes 1 and no 0 make yes-or-no 1/2.
    assert statistic(scores, weights).tolist() == pytest.approx([(0.25 + 0.5) / 2, (1 + 0.5) / 2, 1.0])


def test_held_out_questions_share_no_concept_with_training_and_are_balanced() -> None:
    from data_pipelines.reader import iter_samples

    held = read_split("novel concepts")
    trained = {s.info()["concept"] for s, _ in iter_samples(["embedded:emoji/train"]) if s is not None}
    asked = questions(held, per_kind=60)
    assert len(asked) > 200
    assert not trained & {q.held.info["concept"] for q in asked}
    kinds: dict[str, list[str]] = {}
    for q in asked:
        kinds.setdefault(q.kind, []).append(q.answer)
    for answers in kinds.values():
        assert max(answers.count(a) for a in set(answers)) <= 0.5 * len(answers) + 1


def test_prompts_are_distinct_captions_and_do_not_depend_on_order() -> None:
    held = [h for split in SPLITS for h in read_split(split)]
    chosen = choose_prompts(held, 20)
    assert len({h.caption for h in chosen}) == 20
    assert [h.caption for h in choose_prompts(held[:10], 3)] == [h.caption for h in choose_prompts(held[:10], 5)][:3]


def test_a_run_is_continued_only_when_asked_and_only_with_its_own_settings(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    state = DemoState.open(folder, seed=1, minutes=5.0, resume=False)
    state.samples["model"] = 7
    state.save()
    with pytest.raises(ConfigError, match="--resume"):
        DemoState.open(folder, seed=1, minutes=5.0, resume=False)
    with pytest.raises(ConfigError, match=r"--minutes 5\.0"):
        DemoState.open(folder, seed=1, minutes=6.0, resume=True)
    again = DemoState.open(folder, seed=1, minutes=None, resume=True)
    assert (again.minutes, again.samples) == (5.0, {"model": 7})


def test_a_folder_with_other_files_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        DemoState.open(tmp_path, seed=0, minutes=None, resume=False)
