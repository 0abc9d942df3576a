"""Tasks in MMaDA's and Lumina-DiMOO's sequences: what training meets is what inference shows."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch

import mmdiff
from data_pipelines.reader import Sample
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
    from mmdiff.images import to_pixels

    return painter.encode(to_pixels(picture(0, *SQUARE), painter.size, "crop")[None])[0].numpy()


def sample(codes: np.ndarray | None) -> Sample:
    info = {"caption": "a red circle", "concept": "cat", "qa": [["a cat?", "yes", "cat"]]}
    members = {"json": json.dumps(info).encode()}
    if codes is not None:
        stream = io.BytesIO()
        np.save(stream, codes)
        members["codes.npy"] = stream.getvalue()
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
    for options in (ChatConfig(), EditConfig()):
        with pytest.raises(ConfigError, match="not known for this family"):
            build_task(options, checkpoint.tokenizer, checkpoint.layout)
