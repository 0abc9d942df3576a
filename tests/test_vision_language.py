"""The Python interface on a tiny random LLaDA-V with tiles: batches of mixed sizes, films, quirks, streaming."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmdiff.batch import IMAGE
from mmdiff.errors import ConfigError
from mmdiff.pipelines import TextGenerator, Video, VisionLanguage
from mmdiff.pipelines.prompts import Prompter, about
from tests.helpers import tiny
from tests.helpers.tiny import picture

SIDE = 2


@pytest.fixture(scope="module")
def checkpoint():
    return tiny.llada_v_checkpoint()


@pytest.fixture(scope="module")
def vlm(checkpoint):
    return VisionLanguage(checkpoint)


ITEMS = {
    "small": picture(0, 9, 9),
    "wide": picture(1, 70, 18),
    "tall": picture(2, 12, 40),
    "large": picture(3, 60, 60),
    "two": [picture(4), picture(5, 8, 31)],
    "film": Video([picture(i, 14, 10) for i in range(6, 9)]),
    "text": None,
}
QUESTIONS = ["yes", "how many dogs are there?", "the blue square is small, a red circle is not; no or yes?"]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(sorted(ITEMS)), st.sampled_from(QUESTIONS)), min_size=2, max_size=4),
    st.sampled_from([{}, {"preset": "exact"}, {"temperature": 0.8, "top_p": 0.9, "seeds": 5}, {"guidance": 1.5}]),
)
def test_an_item_of_a_mixed_batch_equals_the_item_alone(vlm, pairs, words):
    alone = [vlm.ask([ITEMS[name]], question, **words)[0] for name, question in pairs]
    assert vlm.ask([ITEMS[name] for name, _ in pairs], [q for _, q in pairs], **words) == alone


def test_pictures_films_and_their_order_matter(vlm):
    answers = {name: vlm.ask([item], "no", preset="exact")[0] for name, item in ITEMS.items()}
    assert len(set(answers.values())) > 4, answers
    two = ITEMS["two"]
    values = [vlm.loglikelihood(item, "no", "yes", samples=4) for item in ([two], [two[::-1]], [[two[0]]])]
    assert len({v[0] for v in values}) == 3


def slots(checkpoint, item, compat=None):
    prompt = Prompter(checkpoint, compat).conversation(about(item, "no"))
    return [len(list(g)) for is_image, g in itertools.groupby(prompt.ids, lambda i: i == IMAGE) if is_image]


def test_every_kind_of_item_has_its_number_of_image_tokens(checkpoint):
    one = SIDE**2
    assert slots(checkpoint, ITEMS["small"]) == [one + 2 * 3]
    # 70 x 18 on 5 x 2 tiles: 10 x 3 features, 1.37 times as many per side as four crops have
    assert slots(checkpoint, ITEMS["wide"])[0] > one + 2 * 3
    assert slots(checkpoint, ITEMS["two"]) == [one + 1, one + 1]
    assert slots(checkpoint, ITEMS["two"], "reference") == [2 * one]  # the blank between them is lost as well
    assert slots(checkpoint, ITEMS["film"]) == [3 * (1 + 1)]
    assert slots(checkpoint, ITEMS["text"]) == []


def test_reference_mode_loses_the_newline_after_an_image_and_nothing_else(checkpoint):
    default, reference = (
        Prompter(checkpoint, c).conversation(about(picture(0), "no")).ids for c in (None, "reference")
    )
    at = next(i for i in range(len(default)) if default[i] == IMAGE and default[i + 1] != IMAGE) + 1
    assert checkpoint.tokenizer.decode(default[at : at + 1]) == "\n"
    assert default[:at] + default[at + 1 :] == reference


def test_the_system_message_comes_first_unless_the_conversation_has_its_own(checkpoint):
    prompter = Prompter(checkpoint)
    user = {"role": "user", "content": "no"}
    said = [checkpoint.tokenizer.decode(prompter.conversation(m).ids) for m in ([user], [_system("yes"), user])]
    assert said[0].startswith("system\n\nbe brief")
    assert said[1].startswith("system\n\nyes")
    assert "be brief" not in said[1]


def _system(text):
    return {"role": "system", "content": text}


def test_chat_keeps_pictures_of_all_turns_and_equals_ask(vlm):
    a, b = picture(0), picture(1, 40, 10)
    first = {"role": "user", "content": [{"type": "image", "image": a}, {"type": "text", "text": "no"}]}
    assert vlm.chat([first]) == vlm.ask(a, "no")
    film = {"type": "video", "video": ITEMS["film"].frames}
    assert vlm.chat([{"role": "user", "content": [film, {"type": "text", "text": "no"}]}]) == vlm.ask(
        ITEMS["film"], "no"
    )
    again = [
        first,
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "image", "image": b}, {"type": "text", "text": "no"}]},
    ]
    prompt = Prompter(vlm.checkpoint).conversation(again)
    assert [len(c.pixels) for c in prompt.images] == [1, 1]
    assert vlm.chat([again, [first]]) == [vlm.chat(again), vlm.chat([first])]
    assert TextGenerator(vlm.checkpoint).chat(again) == vlm.chat(again)


def test_streaming_and_callbacks_see_every_pass(vlm):
    conversation = about(picture(2, 33, 33), "how many dogs are there?")
    passes = []

    def watch(pipeline, step, t, tensors):
        assert pipeline is vlm
        passes.append((step, round(t, 3), tuple(tensors["tokens"].shape)))

    answer = vlm.chat(conversation, preset="exact", callback_on_step_end=watch)
    assert passes == [(i, round(1 - (i + 1) / 8, 3), (1, 8)) for i in range(8)]
    seen = list(passes)
    drafts = list(vlm.chat(conversation, preset="exact", stream=True, callback_on_step_end=watch))
    assert passes == seen * 2
    assert len(drafts) == 8
    assert drafts[-1] == answer
    assert vlm.trace.nfe == 8


class FakeTokenizer:
    """As much of a tokenizer as transformers' streamers ask for."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, ids, **_):
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        return self.tokenizer.decode(ids, keep_special=True)


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_transformers_own_streamer_shows_the_canvas_fill_in(vlm, capsys, skip_prompt):
    from transformers import TextDiffusionStreamer

    conversation = about(picture(2), "how many dogs are there?")
    streamer = TextDiffusionStreamer(FakeTokenizer(vlm.checkpoint.tokenizer), skip_prompt=skip_prompt)
    answer = vlm.chat(conversation, preset="exact", stream=streamer)
    shown = capsys.readouterr().out
    drafts = shown.split("\033[33m")[1:]
    assert len(drafts) == 8
    masks = [d.count("<|mdm_mask|>") for d in drafts]
    assert masks == sorted(masks, reverse=True)
    assert masks[0] == 7
    assert masks[-1] == 0
    assert shown.rstrip("\n").endswith(answer)
    assert "system" not in shown


def test_a_streamer_without_drafts_gets_the_answer(vlm):
    class Plain:
        def __init__(self):
            self.calls = []

        def put(self, value):
            self.calls.append(vlm.checkpoint.tokenizer.decode(value.tolist()).strip())

        def end(self):
            self.calls.append(None)

    plain = Plain()
    answer = vlm.chat(about(picture(0), "no"), stream=plain)
    assert plain.calls[0] == answer
    assert plain.calls[1:] == [None]
    with pytest.raises(ConfigError, match="one conversation"):
        vlm.chat([about(picture(0), "no")], stream=plain)


def test_infill_fills_the_gaps_of_an_answer_about_a_picture(vlm):
    texts = ["a [MASK] circle", "the [MASK] square is [MASK]"]
    shown = [picture(0), ITEMS["two"]]
    filled = vlm.infill(shown, texts)
    assert filled == [vlm.infill([i], [t])[0] for i, t in zip(shown, texts, strict=True)]
    assert filled[0].startswith("a ")
    assert filled[0].endswith(" circle")
    assert "MASK" not in "".join(filled)
    seen = {vlm.infill(picture(i, 40, 40), "[MASK] [MASK] [MASK]", "no", tokens_per_mask=2) for i in range(6)}
    assert len(seen) > 1, "the picture is not read"
    assert isinstance(vlm.infill(None, texts[0], question="yes"), str)
    with pytest.raises(ConfigError, match="holds no"):
        vlm.infill(picture(0), "nothing to do")


def test_likelihood_by_both_methods_and_with_guidance(vlm):
    item, question, answer = picture(3, 30, 30), "how many dogs are there?", "the blue square"
    plain = vlm.loglikelihood(item, question, answer, samples=8)
    assert plain == vlm.loglikelihood([item, picture(1)], question, [answer, "no"], samples=8)[0]
    guided = vlm.loglikelihood(item, question, answer, samples=8, guidance=2.0)
    assert guided != plain
    sure = vlm.loglikelihood(item, question, answer, method="confidence")
    assert sure == vlm.loglikelihood(item, question, answer, method="confidence", seed=9)
    assert all(math.isfinite(v) and v < 0 for v in (plain, guided, sure))
    assert vlm.loglikelihood(item, question, answer, samples=8, compat="reference") != plain
    with pytest.raises(ConfigError, match="method"):
        vlm.loglikelihood(item, question, answer, method="guess")
    with pytest.raises(ConfigError, match="did you mean 'guidance'"):
        vlm.loglikelihood(item, question, answer, guidence=2.0)


def test_a_prompt_longer_than_the_positions_is_refused_with_its_length(vlm):
    frames = [picture(i) for i in range(30)]
    with pytest.raises(ConfigError, match=r"has \d+ tokens, images included.*300 positions.*fewer or smaller"):
        vlm.ask([[picture(i, 15, 15) for i in range(60)]], "no")
    with pytest.raises(ConfigError, match="300 positions"):
        vlm.loglikelihood(picture(0), "no", "yes " * 200)
    with pytest.raises(ConfigError, match="lower gen_length"):
        vlm.ask(picture(0), "no", gen_length=290)
    assert isinstance(vlm.ask(Video(frames), "no"), str)
    assert isinstance(vlm.ask(picture(0), "no", gen_length=290, block_length=145, steps=2, compat="reference"), str)


def test_a_film_is_read_at_its_limit():
    frames = list(range(100))
    assert Video(frames, limit=4).pictures == [0, 33, 66, 99]
    assert len(Video(frames).pictures) == 32
    assert Video(frames).pictures == [frames[i] for i in np.linspace(0, 99, 32, dtype=int)]
    assert Video(frames[:5]).pictures == frames[:5]
    for bad in (Video([]), Video(frames, limit=0)):
        with pytest.raises(ConfigError, match="frames"):
            _ = bad.pictures


@pytest.mark.parametrize("words", [{"preset": "exact"}, {}, {"compat": "reference", "block_length": 4}])
def test_an_answer_ends_before_its_stop_and_nothing_is_written_behind_it(vlm, words):
    items, question, seen = [ITEMS["wide"], ITEMS["tall"], ITEMS["large"]], "how many dogs are there?", []
    vlm.ask(items, question, callback_on_step_end=lambda *state: seen.append(state[3]["tokens"].clone()), **words)
    spent = sum(vlm.trace.row_nfe)
    tokenizer = vlm.checkpoint.tokenizer
    texts = {tokenizer.decode([i]) for i in seen[0][seen[0] != tokenizer.mask_id].tolist()}
    stops = [t for t in texts if t.strip() and len(tokenizer.encode(t)) == 1]
    assert stops, "the test needs a token decided in the first pass that text can spell"
    stopped = vlm.ask(items, question, stop=stops, **words)
    assert sum(vlm.trace.row_nfe) < spent
    assert not [t for t in stopped for stop in stops if stop in t]
    assert stopped == [vlm.ask(i, question, stop=stops, **words) for i in items]


@pytest.mark.parametrize("stop", ["", ["a", ""], [3]])
def test_a_stop_that_is_no_text_is_refused(vlm, stop):
    with pytest.raises(ConfigError, match="stop"):
        vlm.ask(ITEMS["small"], "no", stop=stop)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_kind_of_item_is_read_in_half_precision(vlm, tmp_path, dtype):
    vlm.save_pretrained(tmp_path)
    half = VisionLanguage.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.model.parameters()} == {getattr(torch, dtype)}
    for item in ITEMS.values():
        assert isinstance(half.ask([item], "no", preset="exact")[0], str)
    exact, near = (v.loglikelihood(ITEMS["large"], "no", "yes", method="confidence") for v in (vlm, half))
    assert near == pytest.approx(exact, rel=0.1)
