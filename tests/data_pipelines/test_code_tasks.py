"""Tasks in MMaDA's and Lumina-DiMOO's sequences: what training meets is what inference shows."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
import torch

import mmdiff
from data_pipelines.reader import Sample, numbered
from data_pipelines.task_config import (
    CaptionConfig,
    ChatConfig,
    ClassToImageConfig,
    EditConfig,
    TextConfig,
    TextToImageConfig,
    VqaConfig,
)
from data_pipelines.tasks import build_task
from mmdiff import rng
from mmdiff.batch import IGNORE, Example, collate
from mmdiff.errors import ConfigError, SampleError
from mmdiff.images import to_pixels
from mmdiff.pipelines.drawing import Job
from mmdiff.pipelines.painters import painter_of
from mmdiff.pipelines.prompts import Prompter, about
from mmdiff.training.objective import Masked
from tests.helpers import lumina, mmada
from tests.helpers.tiny import picture

SQUARE = (16, 16)


@pytest.fixture(scope="module", params=[mmada, lumina], ids=["mmada", "lumina"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mmdiff.load(request.param.publish(tmp_path_factory.mktemp("published")), device="cpu").checkpoint


@pytest.fixture(scope="module")
def codes(checkpoint: Any) -> np.ndarray:
    """Codes of a picture, as `mmdiff data cache` stores them."""
    painter = painter_of(checkpoint)
    return painter.encode(to_pixels(picture(0, *SQUARE), painter.size, "crop")[None])[0].numpy()


def sample(codes: np.ndarray | None, *others: np.ndarray) -> Sample:
    info = {"caption": "a red circle", "concept": "cat", "qa": [["a cat?", "yes", "cat"]], "instruction": "make it red"}
    members = {"json": json.dumps(info).encode()}
    for number, values in enumerate([] if codes is None else [codes, *others]):
        stream = io.BytesIO()
        np.save(stream, values)
        members[numbered(number, "codes.npy")] = stream.getvalue()
    return Sample("k", "s.tar", members)


def job(texts: list[str], codes: np.ndarray) -> Job:
    return Job(subjects=texts, known=None, open=torch.ones(1, len(codes), dtype=torch.bool), sources=None)


def example(checkpoint: Any, options: Any, codes: np.ndarray | None, seed: int = 0) -> Example:
    task = build_task(options, checkpoint.tokenizer, checkpoint.layout)
    return task(sample(codes), rng.generator(seed, "task"))


@pytest.mark.parametrize(
    ("options", "question", "answer"),
    [(CaptionConfig(), "Describe this image.", "a red circle"), (VqaConfig(), "a cat?", "yes")],
)
def test_what_is_learnt_follows_the_prompt_of_inference(checkpoint, codes, options, question, answer):
    made = example(checkpoint, options, codes)
    prompt = Prompter(checkpoint).conversation(about(picture(0, *SQUARE), question)).ids
    assert made.ids[: len(prompt)].tolist() == prompt
    assert (made.labels[: len(prompt)] == IGNORE).all()
    said = made.labels[made.labels != IGNORE].tolist()
    words = checkpoint.tokenizer.encode(answer)
    assert said[: len(words)] == words
    assert said[len(words)] in (checkpoint.tokenizer.eot_id, getattr(checkpoint.model.config.special, "eoa", None))


@pytest.mark.parametrize(
    ("options", "text"),
    [(TextToImageConfig(main=1.0, drop_text=0.0), "a red circle"), (ClassToImageConfig(drop_text=0.0), "cat")],
)
def test_what_is_drawn_lies_as_inference_draws_it(checkpoint, codes, options, text):
    made = example(checkpoint, options, codes)
    painter = painter_of(checkpoint)
    canvas = painter.canvas(job([text], codes))
    learnt = made.labels != IGNORE
    assert torch.equal(made.ids.masked_fill(learnt, checkpoint.layout.code_mask_id), canvas.tokens[0])
    assert torch.equal(learnt, canvas.undecided[0])
    assert (made.ids[learnt] - checkpoint.layout.code_offset).tolist() == codes.tolist()


def test_an_empty_prompt_is_learnt_as_guidance_reads_it(checkpoint, codes):
    made = example(checkpoint, TextToImageConfig(drop_text=1.0), codes)
    painter = painter_of(checkpoint)
    canvas = painter.canvas(job([""], codes))
    assert canvas.null is not None
    assert torch.equal(made.ids[made.labels == IGNORE], canvas.null[0][~canvas.undecided[0]])
    assert not bool(made.droppable.any())


def test_one_batch_learns_all_of_it(checkpoint, codes):
    configs = [CaptionConfig(), VqaConfig(), TextToImageConfig(), ClassToImageConfig(), TextConfig(fields=("caption",))]
    batch = collate([example(checkpoint, options, codes) for options in configs])
    losses = Masked(drop_prompt=0.0)(checkpoint.model, batch, rng.generator(0, "objective"))
    assert bool(losses.total.isfinite())
    assert set(losses.terms) == {"caption", "vqa", "text_to_image", "class_to_image", "text"}


def test_shards_without_codes_say_what_makes_them(checkpoint):
    with pytest.raises(SampleError, match="mmdiff data cache"):
        example(checkpoint, CaptionConfig(), None)


def test_what_a_family_has_no_sequences_for_is_refused(checkpoint):
    edits = checkpoint.model.config.type == "lumina"
    for options in (ChatConfig(),) if edits else (ChatConfig(), EditConfig()):
        with pytest.raises(ConfigError, match="not known for this family"):
            build_task(options, checkpoint.tokenizer, checkpoint.layout)


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return mmdiff.load(lumina.publish(tmp_path_factory.mktemp("editor")), device="cpu").checkpoint


def edited(checkpoint: Any, options: EditConfig, made: Sample, seed: int = 0) -> Example:
    return build_task(options, checkpoint.tokenizer, checkpoint.layout)(made, rng.generator(seed, "task"))


def test_an_edit_is_learnt_as_inference_draws_it(editor):
    """The system sentence, the instruction, the old picture in rows, and the new one's codes to be learnt."""
    painter = painter_of(editor)
    old, new = (painter.encode(to_pixels(picture(n, *SQUARE), painter.size)[None])[0].numpy() for n in (0, 1))
    for drop, text in ((0.0, "make it red"), (1.0, None)):
        made = edited(editor, EditConfig(drop_text=drop), sample(new, old))
        canvas = painter.canvas(dataclasses.replace(job([text], new), about=[picture(0, *SQUARE)]))
        learnt = made.labels != IGNORE
        assert torch.equal(made.ids.masked_fill(learnt, editor.layout.code_mask_id), canvas.tokens[0])
        assert torch.equal(learnt, canvas.undecided[0])
        assert (made.ids[learnt] - editor.layout.code_offset).tolist() == new.tolist()
        assert made.task == "edit"


def test_every_further_picture_is_begun_from(editor):
    new, *olds = (np.full((4, 4), n) for n in range(4))
    task = build_task(EditConfig(drop_text=0.0), editor.tokenizer, editor.layout)
    made = [task(sample(new, *olds), rng.generator(seed, "task")) for seed in range(24)]
    first = [int(m.ids[(m.ids >= editor.layout.code_offset).nonzero()[0]]) - editor.layout.code_offset for m in made]
    assert set(first) == {1, 2, 3}


def test_an_edit_without_codes_of_the_old_picture_says_what_makes_them(editor):
    with pytest.raises(SampleError, match="--others"):
        edited(editor, EditConfig(), sample(np.zeros((4, 4), dtype=int)))


def test_edits_and_the_other_tasks_are_learnt_in_one_batch(editor, codes):
    made = [edited(editor, EditConfig(), sample(codes, codes)), example(editor, CaptionConfig(), codes)]
    losses = Masked(drop_prompt=0.0)(editor.model, collate(made), rng.generator(0, "objective"))
    assert set(losses.terms) == {"edit", "caption"}
    assert bool(losses.total.isfinite())
