"""The Python interface on a tiny random checkpoint: shapes of calls, batches, refusals, streaming, likelihood."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import mmdiff
from mmdiff import rng
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.models import llada
from mmdiff.pipelines import Checkpoint, ImageGenerator, Pipeline, TextGenerator, Video, VisionLanguage
from mmdiff.pipelines.answers import Answers
from tests.helpers import published, tiny


@pytest.fixture(scope="module")
def checkpoint():
    return tiny.unified_checkpoint()


@pytest.fixture(scope="module")
def text_only(checkpoint):
    tokenizer = checkpoint.tokenizer
    return Checkpoint(llada.LLaDA(tiny.language(tokenizer), generator=rng.generator(5)).eval(), tokenizer)


@pytest.fixture
def vlm(checkpoint):
    return VisionLanguage(checkpoint)


@pytest.fixture
def gen(checkpoint):
    return ImageGenerator(checkpoint)


def picture(seed):
    """Four blocks of colour, so that an untrained model can tell pictures apart."""
    data = torch.randint(0, 2, (2, 2, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8) * 255
    return Image.fromarray(data.numpy()).resize((12, 20), Image.Resampling.NEAREST)


def arrays(images):
    return [np.asarray(i).tolist() for i in images]


def test_a_checkpoint_says_what_it_can_do_and_views_refuse_what_it_cannot(checkpoint, text_only):
    everything = {"caption", "ask", "chat", "infill", "generate_text", "class_image", "text_image"}
    assert Pipeline(checkpoint).capabilities == everything
    assert Pipeline(text_only).capabilities == {"generate_text", "infill", "chat"}
    for view, name in ((VisionLanguage, "caption"), (ImageGenerator, "text_image")):
        with pytest.raises(CheckpointError, match=f"{name}.*generate_text"):
            view(text_only)
    unnamed = Checkpoint(checkpoint.model, checkpoint.tokenizer, checkpoint.image_tokenizer)
    with pytest.raises(CheckpointError, match=r"class_image.*classes\.json"):
        ImageGenerator(unnamed)(labels=[0])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextGenerator(Checkpoint(checkpoint.model))


def test_a_list_of_images_is_a_batch_and_every_item_equals_the_item_alone(vlm):
    pictures = [picture(i) for i in range(4)]
    alone = [vlm.caption(p) for p in pictures]
    assert isinstance(alone[0], str)
    assert len(set(alone)) > 1, "all captions are the same: the images are not read"
    assert vlm.caption(pictures) == alone
    assert vlm.caption(pictures[::-1]) == alone[::-1]


@pytest.mark.parametrize(
    "words", [{"preset": "exact"}, {"temperature": 1.0, "top_p": 0.9, "seeds": 3}, {"guidance": 2.0}]
)
def test_answers_do_not_depend_on_the_batch_whatever_the_options(vlm, words):
    questions = ["how many dogs are there?", "a cat", "is the blue square small or a red circle on the mat?"]
    pictures = [picture(i) for i in range(3)]
    alone = [vlm.ask(p, q, **words) for p, q in zip(pictures, questions, strict=True)]
    assert vlm.ask(pictures, questions, **words) == alone
    for order in itertools.permutations(range(3)):
        got = vlm.ask([pictures[i] for i in order], [questions[i] for i in order], **words)
        assert got == [alone[i] for i in order]


def test_a_single_question_is_asked_about_every_image_and_lists_must_have_equal_length(vlm):
    pictures = [picture(0), picture(1)]
    assert vlm.ask(pictures, "no") == [vlm.ask(p, "no") for p in pictures]
    assert vlm.ask(pictures[0], ["no", "yes"]) == [vlm.ask(pictures[0], q) for q in ("no", "yes")]
    with pytest.raises(ConfigError, match="image has 2, question has 3"):
        vlm.ask(pictures, ["a", "b", "c"])
    with pytest.raises(ConfigError, match="same length"):
        vlm.ask([], "no")


def test_a_nested_list_or_a_video_is_one_item_of_several_images(vlm):
    a, b = picture(0), picture(1)
    both = vlm.ask([[a, b]], "no")
    assert len(both) == 1
    assert vlm.ask([[a, b], a], "no") == [both[0], vlm.ask(a, "no")]
    assert vlm.ask(Video([a, b]), "no") == both[0]
    assert Video(list(range(10)), limit=4).pictures == [0, 3, 6, 9]
    content = [{"type": "image", "image": a}, {"type": "image", "image": b}, {"type": "text", "text": "no"}]
    assert vlm.chat([{"role": "user", "content": content}]) == both[0]


def test_special_spellings_in_a_question_are_literal(vlm):
    t = vlm.checkpoint.tokenizer
    seen = []
    original = vlm.model.embed_slots
    vlm.model.embed_slots = lambda ids, pixels=None: (seen.append(ids.clone()), original(ids, pixels))[1]
    try:
        vlm.ask(picture(0), "<|mdm_mask|> [MASK] <|eot_id|>", preset="exact", gen_length=8)
    finally:
        del vlm.model.embed_slots
    prompt = seen[0][0][:-8].tolist()
    assert t.mask_id not in prompt
    assert prompt.count(t.eot_id) == 1


def test_streaming_shows_every_pass_and_ends_with_the_answer(vlm):
    messages = [{"role": "user", "content": "how many dogs are there?"}]
    answer = vlm.chat(messages, preset="exact")
    drafts = list(vlm.chat(messages, preset="exact", stream=True))
    assert len(drafts) == 8
    assert drafts[-1] == answer
    assert "░" in drafts[0]

    class Streamer:
        def __init__(self):
            self.calls = []

        def put_draft(self, value, **_):
            self.calls.append(("draft", len(value)))

        def put(self, value):
            self.calls.append(("put", vlm.checkpoint.tokenizer.decode(value.tolist()).strip()))

        def end(self):
            self.calls.append(("end", None))

    streamer = Streamer()
    assert vlm.chat(messages, preset="exact", stream=streamer) == answer
    assert streamer.calls == [("draft", 8)] * 8 + [("put", answer), ("end", None)]


def test_chat_takes_a_conversation_or_a_batch_of_them(vlm, text_only):
    short = [{"role": "user", "content": "yes"}]
    long = [*short, {"role": "assistant", "content": "no"}, {"role": "user", "content": "a cat"}]
    assert vlm.chat([short, long]) == [vlm.chat(short), vlm.chat(long)]
    with pytest.raises(ConfigError, match="last message"):
        vlm.chat(long[:2])
    with pytest.raises(ConfigError, match="picture"):
        vlm.chat([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "no"}]}])
    assert isinstance(TextGenerator(text_only).chat(short, gen_length=4), str)


def test_infill_fills_its_gaps_and_keeps_everything_else(text_only):
    txt = TextGenerator(text_only)
    texts = ["a [MASK] circle", "[MASK] sat on the [MASK]"]
    filled = txt.infill(texts)
    assert filled == [txt.infill(t) for t in texts]
    assert filled[0].startswith("a ")
    assert filled[0].endswith(" circle")
    assert " sat on the " in filled[1]
    assert "MASK" not in "".join(filled)
    assert txt.infill("a ___ b", mask="___", tokens_per_mask=3) != "a ___ b"
    with pytest.raises(ConfigError, match="holds no"):
        txt.infill("nothing to do")
    with pytest.raises(ConfigError, match="gen_length"):
        txt.infill("a [MASK]", gen_length=3)


def test_generate_continues_texts_and_the_mask_spelling_is_literal(text_only):
    txt = TextGenerator(text_only)
    single = txt.generate("a [MASK] cat", gen_length=6)
    assert isinstance(single, str)
    assert txt.generate(["a [MASK] cat", "no"], gen_length=6) == [single, txt.generate("no", gen_length=6)]
    assert txt.trace is not None


def test_loglikelihood_is_the_same_for_every_call_and_near_the_exact_value_of_one_token(vlm, text_only):
    txt = TextGenerator(text_only)
    answer = "yes"
    ids, prompt = (text_only.tokenizer.encode(t) for t in (answer, "no"))
    assert len(ids) == 1, "the test needs an answer of one token"
    canvas = torch.tensor([[*prompt, text_only.tokenizer.mask_id]])
    with torch.no_grad():
        exact = float(text_only.model(canvas)[0, -1].log_softmax(-1)[ids[0]])
    assert math.isclose(txt.loglikelihood("no", answer, samples=3), exact, rel_tol=1e-4)
    values = vlm.loglikelihood([picture(0), picture(1)], "no", ["a cat", "yes"], samples=20)
    assert values == [vlm.loglikelihood(picture(i), "no", a, samples=20) for i, a in ((0, "a cat"), (1, "yes"))]
    assert all(math.isfinite(v) and v < 0 for v in values)
    assert values[0] != vlm.loglikelihood(picture(1), "no", "a cat", samples=20), "the image is not read"
    with pytest.raises(ConfigError, match="answer"):
        txt.loglikelihood("no", "")


def test_an_image_depends_on_its_label_and_seed_only(gen):
    labels, seeds = [0, 2, 1, 0], [7, 8, 9, 10]
    alone = [arrays(gen(labels=v, seeds=s).images)[0] for v, s in zip(labels, seeds, strict=True)]
    assert arrays(gen(labels=labels, seeds=seeds).images) == alone
    assert arrays(gen(labels=labels[::-1], seeds=seeds[::-1]).images) == alone[::-1]
    assert alone[0] != alone[3], "the seed changes nothing"
    generators = [rng.generator(s, "image") for s in seeds]
    assert arrays(gen(labels=labels, generator=generators).images) == alone
    assert arrays(gen(prompts="circle", seeds=[7, 10]).images) == [alone[0], alone[3]]
    assert arrays(gen(labels=["circle"], seeds=7).images) == alone[:1]


def test_codes_are_identical_for_any_batch_and_outputs_agree_with_each_other(gen):
    labels, seeds = [i % 3 for i in range(9)], list(range(9))
    together = gen(labels=labels, seeds=seeds, output_type="latent").images
    single = [gen(labels=[v], seeds=[s], output_type="latent").images for v, s in zip(labels, seeds, strict=True)]
    assert torch.equal(together, torch.cat(single))
    as_array = gen(labels=labels, seeds=seeds, output_type="np").images
    assert as_array.shape == (9, 16, 16, 3)
    assert arrays(gen(labels=labels, seeds=seeds).images) == as_array.tolist()
    assert gen(labels=[0], output_type="pt").images.shape == (1, 3, 16, 16)


def test_the_options_of_drawing_do_what_they_say(gen):
    passes = []

    def watch(pipeline, step, t, tensors):
        passes.append((step, t, tuple(tensors["tokens"].shape)))

    out = gen(labels=[0, 1], num_inference_steps=4, guidance=3.0, callback_on_step_end=watch)
    assert [p[0] for p in passes] == [0, 1, 2, 3]
    assert passes[-1][1:] == (0.0, (2, 16))
    assert passes[0][1] > 0.8
    assert (out.trace.nfe, out.trace.row_passes) == (4, 16)
    assert gen(labels=[0], guidance=1.0).trace.row_passes == 5, "the checkpoint's default of 5 steps was not used"
    assert gen(labels=[0], steps=3, guidance=1.0).trace.nfe == 3
    plain = gen(labels=[0, 1], seeds=1, guidance=1.0, output_type="latent").images
    guided = gen(labels=[0, 1], seeds=1, guidance=6.0, output_type="latent").images
    assert not torch.equal(plain, guided)


def test_guidance_drops_what_the_user_said_and_keeps_the_frame_around_it(gen):
    t, seen = gen.checkpoint.tokenizer, []
    original = gen.model.embed_slots
    gen.model.embed_slots = lambda ids, pixels=None: (seen.append(ids.clone()), original(ids, pixels))[1]
    try:
        gen(prompts=["a cat sat"], guidance=2.0, num_inference_steps=1)
    finally:
        del gen.model.embed_slots
    chat = t.chat([{"role": "user", "content": "a cat sat"}])
    start, end = chat.user_span
    blank = [*chat.ids[:start], *[t.mask_id] * (end - start), *chat.ids[end:]]
    assert seen[0][:, : len(chat.ids)].tolist() == [chat.ids, blank]


def test_an_answer_ends_at_the_first_end_of_turn_or_text(vlm):
    t = vlm.checkpoint.tokenizer
    answers = Answers(vlm, vlm.checkpoint, {})
    words = t.encode(" a cat")
    for end in (t.eot_id, t.eos_id):
        assert answers.read([*words, end, *words]) == "a cat"
    assert answers.read(words + words) == "a cat a cat"
    assert answers.read([t.eot_id, *words]) == ""


def test_editing_redraws_the_marked_part_only(gen):
    image = picture(3).resize((16, 16))
    mask = np.zeros((16, 16), bool)
    mask[4:8, 8:16] = True
    out = gen.edit(image, mask, "a cat", seed=1)
    before, after = np.asarray(image), np.asarray(out)
    assert (before[~mask] == after[~mask]).all()
    assert (before[mask] != after[mask]).any()
    both = gen.edit([image, image], mask, ["a cat", 0], seed=[1, 2])
    assert arrays(both[:1]) == arrays([out])
    with pytest.raises(ConfigError, match="marks no part"):
        gen.edit(image, np.zeros((16, 16), bool), "a cat")
    with pytest.raises(ConfigError, match=r"\[H, W\]"):
        gen.edit(image, np.zeros((16, 16, 3), bool), "a cat")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "labels .* or prompts"),
        ({"labels": [0], "prompts": ["a"]}, "one of them"),
        ({"labels": [3]}, "0 to 2"),
        ({"labels": [-1]}, "0 to 2"),
        ({"labels": ["dog"]}, "use prompts"),
        ({"labels": [0, 1], "seeds": [1]}, "same length"),
        ({"labels": [0], "seeds": [1], "generator": [rng.generator(0)]}, "not both"),
        ({"labels": [0], "steps": 3, "num_inference_steps": 3}, "another name"),
        ({"labels": [0], "guidence": 3.0}, "did you mean 'guidance'"),
        ({"labels": [0], "output_type": "jpeg"}, "output_type"),
        ({"labels": [0], "order_temperature": -1.0}, "order_temperature"),
    ],
)
def test_drawing_refuses_what_cannot_be_meant(gen, arguments, message):
    with pytest.raises(ConfigError, match=message):
        gen(**arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"threshold": 0.5, "num_inference_steps": 4}, "contradict"),
        ({"gen_lenght": 4}, "did you mean 'gen_length'"),
        ({"seeds": [1, 2]}, "2 seeds for 1"),
        ({"seeds": 1, "generator": rng.generator(0)}, "not both"),
    ],
)
def test_answering_refuses_what_cannot_be_meant(vlm, words, message):
    with pytest.raises(ConfigError, match=message):
        vlm.caption(picture(0), **words)


def test_an_illada_folder_continues_text_and_refuses_to_chat(tmp_path):
    tree = {k: v for k, v in published.LLAMA.items() if k != "mask_token_id"}
    tree |= {"architectures": ["ILLaDAForCausalLM"], "model_type": "illada", "bos_token_id": 0, "eos_token_id": 2}
    published.publish(tmp_path, "llama", tree)
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3, "b": 4, "<[MASK]>": 5} | {chr(96 + i): i for i in range(6, 27)}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": i, "content": t} | flags for t, i in vocab.items() if t[0] == "<"]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
    m = mmdiff.load(tmp_path, dtype=torch.float32)
    assert m.capabilities == {"generate_text", "infill"}
    assert isinstance(m.text.generate("ab", gen_length=4), str)
    assert m.text.loglikelihood("ab", "ba", samples=4) < 0
    with pytest.raises(ConfigError, match="template"):
        m.text.chat([{"role": "user", "content": "ab"}])
