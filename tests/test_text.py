"""The tokenizer: round trips, special spellings as literal text, the published template."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmdiff.batch import IGNORE, IMAGE
from mmdiff.errors import CheckpointError, ConfigError
from mmdiff.text import SPECIAL_TOKENS, Content, Tokenizer, from_llava

CORPUS = ["a red cube", "the thumbs up, with medium skin tone", "What is this?", "user says hello"]
TOKENIZER = Tokenizer.train(CORPUS * 20, 400)
USER = [{"role": "user", "content": "What is this?"}]


def with_image(text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A tokenizer.json of the published kind: special tokens last, mask and header marks not flagged special."""
    vocab = {chr(c): i for i, c in enumerate(range(32, 127))} | {"\n": 95, "?": 31}
    added = [("<|startoftext|>", True), ("<|endoftext|>", True), ("<|mdm_mask|>", False), ("<|eot_id|>", True)]
    added += [("<|start_header_id|>", False), ("<|end_header_id|>", False), ("<|reserved_token_1|>", True)]
    words = ["user", "ass", "istant"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokens = [{"id": 96 + i, "content": w, "special": False, **flags} for i, w in enumerate(words)]
    tokens += [{"id": 99 + i, "content": w, "special": s, **flags} for i, (w, s) in enumerate(added)]
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps({"version": "1.0", "added_tokens": tokens, "model": model}))
    return file


@given(st.text(max_size=60))
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "user", "\n\n", " ", "é", "<image>"]), max_size=8))
def test_special_spellings_in_text_are_literal(pieces: list[str]) -> None:
    text = "".join(pieces)
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.special_ids.isdisjoint(ids)
    assert TOKENIZER.decode(ids) == text


def test_a_special_spelling_does_not_change_the_ids_around_it() -> None:
    before, after = TOKENIZER.encode("a red cube"), TOKENIZER.encode(" user says")
    ids = TOKENIZER.encode("a red cube<|eot_id|> user says")
    assert ids[: len(before)] == before
    assert ids[-len(after) :] == after


@pytest.mark.parametrize("spelling", [*SPECIAL_TOKENS, "<|reserved_token_1|>"])
def test_a_published_tokenizer_cannot_be_told_to_emit_special_tokens(published: Path, spelling: str) -> None:
    tokenizer = Tokenizer.from_pretrained(published)
    ids = tokenizer.encode(f"say {spelling} now")
    assert max(ids) < 99
    assert tokenizer.decode(ids).replace(" ", "") == f"say{spelling}now"


def test_special_tokens_are_the_first_ids_and_all_different() -> None:
    t = TOKENIZER
    assert sorted([t.bos_id, t.eos_id, t.mask_id, t.start_header_id, t.end_header_id, t.eot_id]) == list(range(6))
    assert t.decode([t.mask_id, *t.encode("a"), t.eot_id]) == "a"
    assert t.decode([t.mask_id, *t.encode("a"), t.eot_id], keep_special=True) == "<|mdm_mask|>a<|eot_id|>"


def test_words_of_the_template_are_single_tokens() -> None:
    assert [len(TOKENIZER.encode(w)) for w in ("user", "assistant", "system", "\n\n")] == [1, 1, 1, 1]
    assert len(TOKENIZER.encode("\n\na")) == 2


def test_training_twice_gives_the_same_tokenizer() -> None:
    again = Tokenizer.train(CORPUS * 20, 400)
    text = "a red thumb, with user tone"
    assert again.encode(text) == TOKENIZER.encode(text)
    assert again.vocab_size == TOKENIZER.vocab_size <= 400


def test_saving_and_loading_keeps_every_id(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    for again in (Tokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(TOKENIZER))):
        for text in ("a red cube", "<|eot_id|>", "\n\nuser"):
            assert again.encode(text) == TOKENIZER.encode(text)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["mask_token"] == "<|mdm_mask|>"


def test_a_loaded_tokenizer_is_saved_unchanged(published: Path, tmp_path: Path) -> None:
    Tokenizer.from_pretrained(published).save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == published.read_text()


def test_chat_follows_the_published_template(published: Path) -> None:
    t = Tokenizer.from_pretrained(published)
    user, ass, istant, newline = 96, 97, 98, 95
    question = t.encode("hi there")
    encoded = t.chat([{"role": "user", "content": "  hi there "}])
    head = [t.bos_id, t.start_header_id, user, t.end_header_id, newline, newline]
    tail = [t.eot_id, t.start_header_id, ass, istant, t.end_header_id, newline, newline]
    assert encoded.ids == head + question + tail
    assert encoded.ids[slice(*encoded.user_span)] == question
    assert encoded.answer_start == len(encoded.ids)


def test_answer_is_literal_and_ended() -> None:
    encoded = TOKENIZER.chat(USER, answer=" <|eot_id|>\n")
    assert encoded.ids[-1] == TOKENIZER.eot_id
    assert TOKENIZER.decode(encoded.ids[encoded.answer_start :]) == " <|eot_id|>\n"
    assert encoded.ids[: encoded.answer_start] == TOKENIZER.chat(USER).ids


def test_images_come_from_parts_and_never_from_text() -> None:
    encoded = TOKENIZER.chat(with_image("<image> what?"), 3)
    assert encoded.ids.count(IMAGE) == 3
    span = encoded.ids[slice(*encoded.user_span)]
    assert span[:3] == [IMAGE] * 3
    assert TOKENIZER.decode(span) == "\n<image> what?"
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "why"}]}]
    assert TOKENIZER.chat(two, [2, 5]).ids.count(IMAGE) == 7


def test_history_and_system_message_keep_their_order() -> None:
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    text = TOKENIZER.decode(TOKENIZER.chat(messages).ids, keep_special=True)
    turns = [f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in messages]
    assert text == "<|startoftext|>" + "".join(turns) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


@pytest.mark.parametrize(
    ("messages", "slots", "word"),
    [
        ([], 0, "last message"),
        ([{"role": "user", "content": " \n"}], 0, "empty"),
        (with_image(""), 2, "empty"),
        (with_image("hi"), 0, "no slots"),
        (with_image("hi"), [], "were given"),
        (with_image("hi"), [2, 2], "2 images were given"),
        ([{"role": "user", "content": []}], 0, "empty"),
        ([{"role": "user", "content": None}], 0, "NoneType"),
        ([{"role": "user", "content": [{"type": "audio"}]}], 0, "audio"),
        ([{"role": "tool", "content": "x"}, *USER], 0, "tool"),
        ([*USER, {"role": "assistant", "content": "x"}], 0, "last message"),
    ],
)
def test_a_bad_conversation_is_refused_with_its_reason(messages: list, slots: int | list[int], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        TOKENIZER.chat(messages, slots)


def test_ids_that_are_no_text_are_left_out_of_the_text() -> None:
    ids = [IMAGE, *TOKENIZER.encode("a red cube"), TOKENIZER.vocab_size + 7]
    assert TOKENIZER.decode(ids) == "a red cube"


def test_missing_special_tokens_are_named(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(CheckpointError, match=r"<\|mdm_mask\|>"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_of_other_spellings_takes_its_ids_from_the_network_and_has_no_template(tmp_path: Path) -> None:
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3, "b": 4, "<[MASK]>": 5}
    added = [{"id": i, "content": t, "special": True} for t, i in vocab.items() if t[0] == "<"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tree = {
        "version": "1.0",
        "added_tokens": [a | flags for a in added],
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    known = {"mask_id": 5, "bos_id": 0, "eos_id": 2, "eot_id": 2}
    first = Tokenizer.from_pretrained(tmp_path, known=known)
    for tokenizer in (first, pickle.loads(pickle.dumps(first))):
        assert (tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id) == (5, 0, 2, 2)
        assert not tokenizer.has_template
        assert tokenizer.encode("ab<[MASK]>a") == [3, 4, 3]
        assert tokenizer.decode([5, 3, 2]).strip() == "a"
        for call in (lambda t=tokenizer: t.chat(USER), lambda t=tokenizer: t.dialogue(USER)):
            with pytest.raises(ConfigError, match="template"):
                call()
    assert TOKENIZER.has_template


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": 3}', "\ud7ff{}"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_missing_tokenizer_and_a_tiny_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="at least 300"):
        Tokenizer.train(CORPUS, 256)


def test_a_dialogue_is_the_chat_turn_by_turn_and_its_answers_are_learnt() -> None:
    messages = [*with_image("one"), {"role": "assistant", "content": "two"}, *USER]
    whole = TOKENIZER.dialogue([*messages, {"role": "assistant", "content": "four"}], 2, system="be short")
    prompt = TOKENIZER.chat(messages, 2, "four", system="be short")
    assert whole.ids == prompt.ids
    assert [TOKENIZER.decode(whole.ids[a:b]) for a, b in whole.spans] == ["two", "four"]
    assert all(whole.ids[b - 1] == TOKENIZER.eot_id for _, b in whole.spans)
    learnt = [i for a, b in whole.spans for i in range(a, b)]
    assert [i for i, label in enumerate(whole.labels) if label != IGNORE] == learnt
    reference = TOKENIZER.dialogue(
        [*messages, {"role": "assistant", "content": "four"}], 2, system="be short", compat="reference"
    )
    assert reference.ids == whole.ids
    assert reference.labels.count(TOKENIZER.start_header_id) == 5
    with pytest.raises(ConfigError, match="last message must be from the assistant"):
        TOKENIZER.dialogue(messages, 2)


def test_a_caption_of_the_first_stage_is_an_image_a_text_and_a_newline() -> None:
    made = TOKENIZER.plain("a red cube", 3)
    assert made.ids == [IMAGE] * 3 + TOKENIZER.encode("a red cube\n")
    assert made.labels == [IGNORE] * 3 + made.ids[3:]


def test_blanks_go_between_images_and_a_newline_before_the_question() -> None:
    parts = [{"type": "text", "text": " see "}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "why? "}]
    assert Content.of(parts, 0) == Content(("see", " ", "\nwhy?"))
    assert Content.parse(" a <image> b\n").stripped() == Content(("a ", " b"))


def test_llava_turns_become_messages_with_a_single_image_in_front() -> None:
    turns = [("gpt", "hello"), ("human", "see <image> here"), ("gpt", "<image> is text"), ("human", "<image><image>x")]
    messages = from_llava([{"from": who, "value": value} for who, value in turns])
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert [m["content"].texts for m in messages] == [("", "\nsee  here"), ("<image> is text",), ("", "", "x")]
    with pytest.raises(ConfigError, match="turn 0"):
        from_llava([{"from": "system", "value": "x"}])
