"""Examples are padded to the right, and padding is neither read nor learnt."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmdiff.batch import IGNORE, IMAGE, Batch, Example, Layout, collate, expand


def example(length: int, images: int = 0, key: str = "k") -> Example:
    gen = torch.Generator().manual_seed(length)
    return Example(
        key=key,
        task="caption",
        ids=torch.randint(1, 50, (length,), generator=gen),
        labels=torch.randint(1, 50, (length,), generator=gen),
        weights=torch.rand(length, generator=gen),
        droppable=torch.rand(length, generator=gen) < 0.5,
        pixels=torch.rand(images, 3, 4, 4, generator=gen) if images else None,
    )


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=5))
def test_collate_keeps_every_slot_and_pads_the_rest(shapes: list[tuple[int, int]]) -> None:
    examples = [example(n, m, key=str(i)) for i, (n, m) in enumerate(shapes)]
    batch = collate(examples)
    assert len(batch) == len(examples)
    assert batch.keys == tuple(e.key for e in examples)
    for i, e in enumerate(examples):
        n = len(e.ids)
        for name in ("ids", "labels", "weights", "droppable"):
            assert torch.equal(getattr(batch, name)[i, :n], getattr(e, name))
        assert batch.valid[i].tolist() == [True] * n + [False] * (batch.ids.shape[1] - n)
    padding = ~batch.valid
    assert (batch.ids[padding] == 0).all()
    assert (batch.labels[padding] == IGNORE).all()
    assert (batch.weights[padding] == 0).all()
    assert not batch.droppable[padding].any()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_images_are_joined_in_row_order(images: list[int]) -> None:
    examples = [example(5 + i, m) for i, m in enumerate(images)]
    batch = collate(examples)
    if not any(images):
        assert batch.pixels is None
        return
    assert batch.pixels is not None
    assert torch.equal(batch.pixels, torch.cat([e.pixels for e in examples if e.pixels is not None]))


def test_dtypes_survive_collation() -> None:
    batch = collate([example(2, 1), example(3)])
    assert (batch.ids.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.weights.dtype, batch.droppable.dtype, batch.valid.dtype) == (torch.float32, torch.bool, torch.bool)


def test_to_moves_every_tensor_and_nothing_else() -> None:
    batch = collate([example(2, 1), example(3)])
    moved = batch.to("meta")
    for field in dataclasses.fields(Batch):
        value = getattr(moved, field.name)
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta"
        else:
            assert value == getattr(batch, field.name)
    assert batch.ids.device.type == "cpu"


def test_layout_places_codes_behind_the_text() -> None:
    layout = Layout(vocab_size=100, codes=16, codebook=32)
    assert layout.code_offset == 100
    assert layout.code_mask_id == 132
    assert max(IMAGE, IGNORE) < 0
    assert IMAGE != IGNORE


def test_examples_and_batches_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        example(1).key = "other"  # type: ignore[misc]


def test_every_image_gets_its_slots_and_nothing_is_learnt_there() -> None:
    ids, labels = expand([1, IMAGE, 2, IMAGE], [1, IGNORE, 2, IGNORE], [3, 0])
    assert ids == [1, IMAGE, IMAGE, IMAGE, 2]
    assert labels == [1, IGNORE, IGNORE, IGNORE, 2]
    with pytest.raises(ValueError, match="more image placeholders than the 1"):
        expand([IMAGE, IMAGE], [0, 0], [1])
    with pytest.raises(ValueError, match="1 of 2 images have no placeholder"):
        expand([IMAGE], [0], [1, 1])
