"""Changing a picture by an instruction: what training meets is what inference shows."""

from __future__ import annotations

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmdiff
from data_pipelines.reader import Sample
from data_pipelines.task_config import EditConfig
from data_pipelines.tasks import build_task
from mmdiff import rng
from mmdiff.batch import IGNORE, IMAGE, Example, collate
from mmdiff.errors import ConfigError, SampleError
from mmdiff.images import to_pixels
from mmdiff.pipelines import Checkpoint
from mmdiff.pipelines.drawing import Job
from mmdiff.pipelines.painters import painter_of
from mmdiff.training.objective import Masked
from tests.helpers.tiny import picture, unified_checkpoint

SIDE = 16


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    made = unified_checkpoint()
    with torch.no_grad():  # codes far from ties, and pictures that matter
        made.model.codes.head.weight *= 20
        made.model.connector[2].weight *= 4
    return dataclasses.replace(made, defaults={"edit": {"num_inference_steps": 4}})


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def members(checkpoint: Checkpoint, sources: int = 2, **info: Any) -> dict[str, bytes]:
    """Picture 0 is what comes out, pictures 1 and on what it can be made from."""
    stream = io.BytesIO()
    np.save(stream, painter_of(checkpoint).encode(to_pixels(picture(0), SIDE)[None])[0].numpy())
    images = {f"image{n + 1}.png": png(picture(n, SIDE, SIDE)) for n in range(1, sources + 1)}
    told = json.dumps({"instruction": "a blue square", **info}).encode()
    return {"png": png(picture(0)), "json": told, "codes.npy": stream.getvalue(), **images}


def example(checkpoint: Checkpoint, held: dict[str, bytes], seed: int = 0, **options: Any) -> Example:
    task = build_task(EditConfig(**options), checkpoint.tokenizer, checkpoint.layout)
    sample, generator = Sample("k", "s.tar", held), rng.generator(seed, "task")
    made = task(sample, generator)
    assert task.length(sample, rng.generator(seed, "task")) == len(made.ids)
    return made


def test_what_is_learnt_lies_as_inference_draws_it(checkpoint):
    made = example(checkpoint, members(checkpoint, sources=1))
    learnt, offset = made.labels != IGNORE, checkpoint.layout.code_offset
    painter = painter_of(checkpoint)
    job = Job(
        subjects=["a blue square"],
        known=None,
        open=torch.ones(1, int(learnt.sum()), dtype=torch.bool),
        sources=None,
        about=[picture(1, SIDE, SIDE)],
    )
    canvas = painter.canvas(job)
    assert canvas.given is not None
    shown = made.ids == IMAGE
    assert torch.equal(canvas.given[0], shown)
    assert int(shown.sum()) == checkpoint.layout.features
    assert torch.equal(
        made.ids.masked_fill(learnt, checkpoint.layout.code_mask_id).masked_fill(shown, 0), canvas.tokens[0]
    )
    assert torch.equal(learnt, canvas.undecided[0])
    assert torch.equal(made.droppable, canvas.droppable[0]), "guidance drops other slots than training"
    assert not bool((made.droppable & shown).any()), "the picture must stay in sight"
    assert bool(made.droppable.any())
    embeds = checkpoint.model.embed_slots(made.ids[None].masked_fill(learnt, offset), made.pixels)
    torch.testing.assert_close(embeds[0, shown], canvas.embeds[0, shown])


def test_every_source_is_shown_in_time_and_never_the_result(checkpoint):
    held = members(checkpoint, sources=2, instruction=["a blue square", "a red circle"])
    made = [example(checkpoint, held, seed) for seed in range(16)]
    results = {m.labels[m.labels != IGNORE].numpy().tobytes() for m in made}
    shown = {m.pixels.numpy().tobytes() for m in made}
    assert len(results) == 1
    assert shown == {to_pixels(picture(n, SIDE, SIDE), SIDE)[None].numpy().tobytes() for n in (1, 2)}
    assert len({tuple(m.ids[m.droppable].tolist()) for m in made}) == 2, "one of two instructions was never said"


def test_a_step_learns_it_and_dropping_the_instruction_keeps_the_picture(checkpoint):
    rows = [example(checkpoint, members(checkpoint), seed) for seed in range(4)]
    losses = Masked(drop_prompt=1.0)(checkpoint.model, collate(rows), rng.generator(0))
    assert losses.total.isfinite()
    assert set(losses.terms) == {"edit"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"sources": 0}, "missing_image"),
        ({"instruction": None}, "missing_instruction"),
        ({"instruction": 3}, "missing_"),
    ],
)
def test_samples_without_a_source_or_an_instruction_are_refused(checkpoint, changed, reason):
    with pytest.raises(SampleError) as caught:
        example(checkpoint, members(checkpoint, **changed))
    assert caught.value.reason.startswith(reason)


def test_the_picture_and_the_instruction_decide_what_is_drawn(checkpoint):
    images = mmdiff.ImageGenerator(checkpoint)
    assert "edit" in images.capabilities
    one, other, third = (
        np.asarray(images.edit(picture(n, SIDE, SIDE), None, text, seed=0))
        for n, text in ((1, "a cat"), (2, "a cat"), (1, "no"))
    )
    assert one.shape == (SIDE, SIDE, 3)
    assert not np.array_equal(one, other)
    assert not np.array_equal(one, third)
    assert images.trace.nfe == 4, "the checkpoint's words for edits were not used"
    both = images.edit([picture(1, SIDE, SIDE), picture(2, SIDE, SIDE)], None, "a cat", seed=[0, 0])
    assert [np.asarray(b).tobytes() for b in both] == [one.tobytes(), other.tobytes()]


def test_a_network_that_has_not_learnt_it_asks_for_a_mask():
    with pytest.raises(ConfigError, match="give a mask"):
        mmdiff.ImageGenerator(unified_checkpoint()).edit(picture(1), None, "a cat")
