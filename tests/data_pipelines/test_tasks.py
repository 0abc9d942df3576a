"""Tasks: what stands where in an example, what is learnt, what is refused."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.reader import Sample
from data_pipelines.task_config import (
    CaptionConfig,
    ChatConfig,
    ClassToImageConfig,
    ImageConfig,
    PairConfig,
    TaskConfig,
    TextConfig,
    TextToImageConfig,
    VqaConfig,
)
from data_pipelines.tasks import build_task
from data_pipelines.transforms import AugmentConfig, PixelCache, augment
from mmdiff.batch import IGNORE, IMAGE, Example, Layout
from mmdiff.config import config, parse
from mmdiff.errors import ConfigError, SampleError
from mmdiff.rng import generator
from mmdiff.text import Tokenizer

from .conftest import png


def sample(**members: bytes) -> Sample:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (20, 10), (255, 0, 51)).save(stream, "PNG")
    return Sample(
        "k", "s.tar", {"png": stream.getvalue(), **{k.replace("_npy", ".npy"): v for k, v in members.items()}}
    )


def info(**fields: Any) -> bytes:
    return json.dumps({"caption": "a thing", "captions": ["thing 1", "thing 2"], "concept": "thing", **fields}).encode()


def codes(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


GRID = np.arange(16, dtype=np.int16).reshape(4, 4)


@pytest.fixture
def make(tokenizer: Tokenizer, layout: Layout):  # type: ignore[no-untyped-def]
    def make(options: Any, what: Sample, seed: int = 0) -> Example:
        return build_task(options, tokenizer, layout)(what, generator(seed, "test"))

    return make


def test_caption_learns_the_answer_its_end_and_lightly_the_filling(make, tokenizer: Tokenizer) -> None:
    e = make(CaptionConfig(main=1.0), sample(json=info()))
    learnt = e.labels != IGNORE
    start = int(learnt.nonzero()[0])
    answer = [*tokenizer.encode("a thing"), tokenizer.eot_id]
    assert learnt[start:].all()
    assert (len(e.ids) - start) % 8 == 0
    assert e.ids[start : start + len(answer)].tolist() == answer
    assert set(e.ids[start + len(answer) :].tolist()) <= {tokenizer.eos_id}
    assert torch.equal(e.labels[learnt], e.ids[learnt])
    assert e.weights[start : start + len(answer)].eq(1).all()
    assert e.weights[start + len(answer) :].eq(0.05).all()
    assert e.weights[:start].eq(0).all()
    assert tokenizer.decode(e.ids[:start].tolist(), True).endswith("assistant<|end_header_id|>\n\n")


def test_images_stand_at_their_slots(make, layout: Layout) -> None:
    e = make(CaptionConfig(), sample(json=info()))
    assert int((e.ids == IMAGE).sum()) == layout.features
    assert e.pixels is not None
    assert e.pixels.shape == (1, 3, layout.image_size, layout.image_size)
    assert torch.allclose(e.pixels[0, :, 5, 5], torch.tensor([1.0, -1.0, -0.6]))
    assert not e.droppable.any()


@pytest.mark.parametrize("length", range(20))
def test_an_answer_always_has_room_for_its_end_and_is_filled_to_the_next_multiple(
    make, tokenizer: Tokenizer, length: int
) -> None:
    text = "~" * (length + 1)  # a character that the corpus does not hold: one id each
    e = make(CaptionConfig(main=1.0, answer_multiple=4), sample(json=info(caption=text)))
    slots = int((e.labels != IGNORE).sum())
    assert slots == -(-(len(tokenizer.encode(text)) + 1) // 4) * 4
    assert int((e.labels == tokenizer.eot_id).sum()) == 1


def test_special_spellings_in_data_stay_literal(make, tokenizer: Tokenizer) -> None:
    text = "<|eot_id|> <|mdm_mask|>"
    e = make(CaptionConfig(main=1.0), sample(json=info(caption=text)))
    answer = e.ids[e.labels != IGNORE].tolist()
    assert tokenizer.decode(answer) == text
    assert tokenizer.mask_id not in e.ids.tolist()


def test_captions_are_drawn_by_their_probability(make, tokenizer: Tokenizer) -> None:
    drawn = Counter()
    for seed in range(400):
        e = make(CaptionConfig(main=0.5), sample(json=info()), seed)
        drawn[tokenizer.decode(e.ids[e.labels != IGNORE].tolist())] += 1
    assert set(drawn) == {"a thing", "thing 1", "thing 2"}
    assert abs(drawn["a thing"] - 200) < 50
    assert abs(drawn["thing 1"] - 100) < 45


def test_a_text_member_is_the_caption_where_there_is_no_json(make, tokenizer: Tokenizer) -> None:
    e = make(CaptionConfig(), sample(txt=b" yes\n"))
    assert tokenizer.decode(e.ids[e.labels != IGNORE].tolist()) == "yes"


def test_questions_can_be_balanced_by_kind(make, tokenizer: Tokenizer) -> None:
    qa = [["What is it?", "thing", "what"], *([f"Is it red {i}?", "no", "yes-no"] for i in range(9))]
    drawn = {balance: Counter() for balance in ("none", "answer")}
    for balance, counter in drawn.items():
        for seed in range(200):
            e = make(VqaConfig(balance=balance), sample(json=info(qa=qa)), seed)
            counter[tokenizer.decode(e.ids[e.labels != IGNORE].tolist())] += 1
    assert 5 <= drawn["none"]["thing"] <= 40
    assert 70 <= drawn["answer"]["thing"] <= 130
    e = make(VqaConfig(kinds=("what",)), sample(json=info(qa=qa)))
    assert "What is it?" in tokenizer.decode(e.ids[e.labels == IGNORE].tolist())


def test_text_to_image_learns_codes_and_may_drop_the_prompt(make, tokenizer: Tokenizer, layout: Layout) -> None:
    e = make(TextToImageConfig(main=1.0), sample(json=info(), codes_npy=codes(GRID)))
    assert e.ids[-16:].tolist() == [layout.code_offset + c for c in range(16)]
    assert torch.equal(e.labels[-16:], e.ids[-16:])
    assert e.labels[:-16].eq(IGNORE).all()
    assert e.weights.sum() == 16
    assert tokenizer.decode(e.ids[e.droppable].tolist()) == "a thing"
    assert e.pixels is None


@pytest.mark.parametrize(
    ("members", "options", "name"),
    [
        ({"json": info()}, ClassToImageConfig(), "thing"),
        ({"json": info()}, ClassToImageConfig(field="tone"), "a thing"),
        ({"cls": b"1\n"}, ClassToImageConfig(classes=("no", "yes")), "yes"),
        ({"txt": b"yes"}, ClassToImageConfig(), "yes"),
    ],
)
def test_class_to_image_uses_the_name(make, tokenizer: Tokenizer, members: dict, options: Any, name: str) -> None:
    e = make(options, sample(codes_npy=codes(GRID.astype(np.int32)), **members))
    assert tokenizer.decode(e.ids[e.droppable].tolist()) == name


def test_pair_and_image_have_pixels_and_nothing_to_predict(make, tokenizer: Tokenizer) -> None:
    pair = make(PairConfig(main=1.0), sample(json=info()))
    assert tokenizer.decode(pair.ids.tolist()) == "a thing"
    assert pair.labels.eq(IGNORE).all()
    alone = make(ImageConfig(), sample())
    assert alone.pixels is not None
    assert len(alone.ids) == 0


def test_text_learns_everything_and_draws_windows_of_long_texts(make, tokenizer: Tokenizer) -> None:
    e = make(TextConfig(), sample(txt=b"yes no"))
    assert e.labels.tolist() == [*tokenizer.encode("yes no"), tokenizer.eos_id]
    long = [make(TextConfig(max_length=8), sample(txt=bytes(range(97, 123)) * 3), seed) for seed in range(8)]
    assert {len(e.ids) for e in long} == {8}
    assert len({tuple(e.ids.tolist()) for e in long}) > 3


def conversation(*turns: str, first: str = "human") -> bytes:
    speakers = ("human", "gpt") if first == "human" else ("gpt", "human")
    rows = [{"from": speakers[i % 2], "value": t} for i, t in enumerate(turns)]
    return json.dumps({"conversations": rows}).encode()


def test_chat_learns_every_answer_of_a_llava_conversation(make, tokenizer: Tokenizer, layout: Layout) -> None:
    e = make(ChatConfig(), sample(json=conversation("Is it\n<image> red?", "no", "What is it?", "thing")))
    text = tokenizer.decode(e.ids[e.weights == 1].tolist(), True)
    assert text == "no<|eot_id|>thing<|eot_id|>"
    assert int((e.ids == IMAGE).sum()) == layout.features
    assert e.pixels is not None
    first_slot = int((e.ids == IMAGE).nonzero()[0])
    assert tokenizer.decode(e.ids[:first_slot].tolist(), True).endswith("user<|end_header_id|>\n\n")


def test_chat_without_image_or_with_a_leading_answer(make, tokenizer: Tokenizer) -> None:
    e = make(ChatConfig(system="yes"), sample(json=conversation("welcome", "What is it?", "thing", first="gpt")))
    text = tokenizer.decode(e.ids.tolist(), True)
    assert "welcome" not in text
    assert text.startswith("<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nyes<|eot_id|>")
    assert e.pixels is None


LYING = (
    b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000,), }".ljust(117) + b"\n"
)
OBJECTS = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|O', 'fortran_order': False, 'shape': (16,), }".ljust(117)
    + b"\n"
    + bytes(128)
)


@pytest.mark.parametrize(
    ("options", "members", "reason"),
    [
        (CaptionConfig(), {}, "missing_caption"),
        (CaptionConfig(), {"json": b"{}"}, "missing_caption"),
        (CaptionConfig(), {"json": b'{"caption": 3, "captions": [null, " "]}'}, "missing_caption"),
        (CaptionConfig(), {"json": b"{"}, "bad_json"),
        (CaptionConfig(), {"json": b"[1]"}, "bad_json"),
        (CaptionConfig(), {"json": b"[" * 99_999}, "bad_json"),
        (CaptionConfig(), {"txt": b"\xff"}, "bad_text"),
        (CaptionConfig(), {"json": info(), "png": b"no image"}, "undecodable_image"),
        (CaptionConfig(max_length=16), {"json": info()}, "too_long"),
        (VqaConfig(), {"json": info()}, "missing_qa"),
        (VqaConfig(), {"json": info(qa=[])}, "missing_qa"),
        (VqaConfig(), {"json": info(qa=[["only a question"]])}, "bad_qa"),
        (VqaConfig(), {"json": info(qa=[["q", 3, "k"]])}, "bad_qa"),
        (VqaConfig(kinds=("x",)), {"json": info(qa=[["q", "a", "k"]])}, "missing_qa"),
        (ChatConfig(), {"json": info()}, "bad_conversation"),
        (ChatConfig(), {"json": conversation("<image>", "yes")}, "bad_conversation"),
        (ChatConfig(), {"json": conversation("<image> a <image>", "yes")}, "missing_image"),
        (ChatConfig(), {"json": b'{"conversations": [{"from": "robot", "value": "x"}]}'}, "bad_conversation"),
        (TextToImageConfig(), {"json": info()}, "missing_codes"),
        (TextToImageConfig(), {"json": info(), "codes_npy": b"junk"}, "bad_codes"),
        (TextToImageConfig(), {"json": info(), "codes_npy": LYING}, "bad_codes"),
        (TextToImageConfig(), {"json": info(), "codes_npy": OBJECTS}, "bad_codes"),
        (TextToImageConfig(), {"json": info(), "codes_npy": codes(GRID[:2])}, "bad_codes"),
        (TextToImageConfig(), {"json": info(), "codes_npy": codes(GRID + 17)}, "bad_codes"),
        (TextToImageConfig(), {"json": info(), "codes_npy": codes(GRID - 1)}, "bad_codes"),
        (TextToImageConfig(), {"json": info(), "codes_npy": codes(GRID.astype(float))}, "bad_codes"),
        (ClassToImageConfig(), {"codes_npy": codes(GRID)}, "missing_class"),
        (ClassToImageConfig(classes=("a",)), {"cls": b"1", "codes_npy": codes(GRID)}, "bad_class"),
        (ClassToImageConfig(classes=("a",)), {"cls": b"x", "codes_npy": codes(GRID)}, "bad_class"),
        (TextConfig(), {}, "missing_text"),
    ],
)
def test_every_unusable_sample_has_a_reason_and_names_itself(make, options: Any, members: dict, reason: str) -> None:
    with pytest.raises(SampleError, match=r"s\.tar: k") as caught:
        make(options, sample(**members))
    assert caught.value.reason == reason


def test_tasks_that_do_not_fit_the_model_are_refused_at_the_start(tokenizer: Tokenizer, layout: Layout) -> None:
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        build_task(CaptionConfig(), None, layout)
    with pytest.raises(ConfigError, match="does not see images"):
        build_task(VqaConfig(), tokenizer, Layout(vocab_size=999))
    with pytest.raises(ConfigError, match="draws no image codes"):
        build_task(TextToImageConfig(), tokenizer, Layout(vocab_size=999, features=4))
    with pytest.raises(ConfigError, match="raise the model's vocab_size"):
        build_task(TextConfig(), tokenizer, Layout(vocab_size=10))


@config
class Holder:
    """For reading a task from plain data."""

    task: TaskConfig
    """The task."""


def test_tasks_are_read_from_plain_data_and_wrong_keys_are_named() -> None:
    made = parse(Holder, {"task": {"type": "vqa", "balance": "answer", "augment": {"shift_px": 2}}}, "x.yaml").task
    assert made == VqaConfig(balance="answer", augment=AugmentConfig(shift_px=2))
    with pytest.raises(ConfigError, match="answer_multiple"):
        parse(Holder, {"task": {"type": "caption", "answer_multipel": 4}}, "x.yaml")


def test_cached_pixels_are_the_decoded_ones_to_the_bit(tokenizer: Tokenizer, layout: Layout) -> None:
    cache = PixelCache(10_000)
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    image = Sample("k", "s.tar", {"png": stream.getvalue()})
    task = build_task(ImageConfig(), tokenizer, layout, cache)
    first = task(image, generator(0))
    assert len(cache) == 1
    again = task(Sample("k", "s.tar", {"png": b"not read again"}), generator(0))
    assert torch.equal(first.pixels, again.pixels)
    full = PixelCache(10)
    build_task(ImageConfig(), tokenizer, layout, full)(image, generator(0))
    assert len(full) == 0


def test_augmentation_is_repeatable_and_does_what_it_says() -> None:
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(3, 8, 8)
    assert torch.equal(augment(pixels, AugmentConfig(), generator(0)), pixels)
    flips = [torch.equal(augment(pixels, AugmentConfig(flip=True), generator(s)), pixels.flip(-1)) for s in range(40)]
    assert 8 < sum(flips) < 32
    options = AugmentConfig(flip=True, shift_px=3, color=0.3)
    for seed in range(20):
        one, two = (augment(pixels, options, generator(seed)) for _ in range(2))
        assert torch.equal(one, two)
        assert one.shape == pixels.shape
        assert one.abs().max() <= 1
    moved = {int(augment(pixels, AugmentConfig(shift_px=2), generator(s)).eq(1).sum()) for s in range(60)}
    assert len(moved) > 5
    gone = augment(pixels, AugmentConfig(shift_px=50), generator(1))
    assert gone.eq(1).all()


def test_several_images_stand_where_their_placeholders_do(make, tokenizer: Tokenizer, layout: Layout) -> None:
    turns = [
        {"from": "human", "value": "first <image> second <image> same?"},
        {"from": "gpt", "value": "no"},
        {"from": "human", "value": "and this? <image>"},
        {"from": "gpt", "value": "yes"},
    ]
    shown = {"png": png(10), "image2.png": png(20), "image3.png": png(30)}
    what = Sample("k", "s.tar", {**shown, "json": json.dumps({"conversations": turns}).encode()})
    e = make(ChatConfig(), what)
    assert e.pixels is not None
    assert e.pixels.shape == (3, 3, layout.image_size, layout.image_size)
    reds = [round(float(p[0, 0, 0] + 1) * 127.5) for p in e.pixels]
    assert reds == [10, 20, 30]
    runs = ["image" if k else tokenizer.decode([int(i) for i in g]).strip() for k, g in _runs(e)]
    order = re.findall(r"first|second|same|image|this", " ".join(runs))
    # A single picture of a turn stands at its front, several stay where they are.
    assert order == ["first", "image", "second", "image", "same", "image", "this"]
    assert int((e.ids == IMAGE).sum()) == 3 * layout.features
    task = build_task(ChatConfig(), tokenizer, layout)
    assert task.length(what, generator(0, "test")) == len(e.ids)  # type: ignore[attr-defined]


def _runs(e: Example) -> Any:
    return ((key, list(group)) for key, group in itertools.groupby(e.ids.tolist(), lambda i: i == IMAGE))
